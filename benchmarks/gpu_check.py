"""Is the engine still right on this GPU? A few minutes of checks through the public face alone, so that two trees can be compared.

    PYTHONPATH=src python -m benchmarks.gpu_check --folder FOLDER [--models medium qwen2_moe ...] [--json FILE] [--cpu]

Writes small random checkpoints to FOLDER (again only if they are not there), loads each many times and compares logits: equal in
every bit between budgets, presets, graph or none, disk below or not, and with host compute of quantized experts (of others close);
close to transformers' own; different but repeatable with short views in prefill. The last line is one JSON: a digest of the exact
logits of each model (equal digests in two trees: numbers have not changed), tokens a second of each cell, and what failed; exit
code 1 if anything did. ``--cpu`` runs the same checks, as far as they apply, on the CPU engine.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import fate_moe
from fate_moe import OffloadConfig
from fate_moe.errors import FateError

PROMPT, ANSWER, TIMED = 48, 12, 64  # tokens; a prompt of more than 16 goes through the grouped kernels
VRAM, CONTEXT = "8GiB", 256
PRESETS = ("best", "eap", "fate", "load-on-demand")
# Its name before 0.2.0.
HOST_COMPUTE = "host_compute" if "host_compute" in OffloadConfig.__dataclass_fields__ else "host_share"

_COMMON: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_GROUPED: dict[str, Any] = {
    "n_routed_experts": 16, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 128,
    "intermediate_size": 256, "n_group": 4, "topk_group": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "medium": {  # where tokens a second say something
        "model_type": "qwen3_moe", "vocab_size": 8192, "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16,
        "head_dim": 64, "num_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 512, "intermediate_size": 1024,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "num_experts": 16, "moe_intermediate_size": 128, "intermediate_size": 256, "head_dim": 32,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe", "num_experts": 16, "moe_intermediate_size": 128, "intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 16, "intermediate_size": 128},
    "olmoe": {"model_type": "olmoe", "num_experts": 16, "intermediate_size": 128},
    "deepseek_v2": {  # its layers run as transformers has them
        "model_type": "deepseek_v2", **_GROUPED, "topk_method": "greedy",
        "kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "num_key_value_heads": 8,
    },
    "gpt_oss": {
        "model_type": "gpt_oss", "num_local_experts": 16, "intermediate_size": 128, "head_dim": 32, "sliding_window": 20,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128, "truncate": False,
        },
    },
    "windows": {"model_type": "mixtral", "num_local_experts": 16, "intermediate_size": 128, "sliding_window": 20},
    "glm4_moe": {"model_type": "glm4_moe", **_GROUPED, "head_dim": 32, "use_qk_norm": True},
    "dots1": {"model_type": "dots1", **_GROUPED, "head_dim": 32},
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe", "moe_num_experts": 16, "moe_k": 2, "moe_intermediate_size": 128, "intermediate_size": 256,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    },
    "phimoe": {"model_type": "phimoe", "num_local_experts": 16, "intermediate_size": 128, "lm_head_bias": True},
    "minimax_m2": {"model_type": "minimax_m2", "num_local_experts": 16, "intermediate_size": 128, "head_dim": 32, "rotary_dim": 16},
    "hy_v3": {
        "model_type": "hy_v3", "num_experts": 16, "moe_intermediate_size": 128, "intermediate_size": 256, "head_dim": 32,
        "num_shared_experts": 1, "first_k_dense_replace": 1,
    },
}  # fmt: skip


@dataclass
class Check:
    """One model's cells; ``exact`` are the logits that all others are compared with."""

    folder: Path
    cpu: bool
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    context: int = CONTEXT
    exact: torch.Tensor | None = None

    @contextmanager
    def loaded(self, **options: Any) -> Iterator[Any]:
        """The model of ``folder``, closed and freed afterwards."""
        where = {} if self.cpu else {"vram": VRAM}
        model, _ = fate_moe.load(self.folder, context_length=self.context, **where, **options)
        try:
            yield model
        finally:
            model.fate.close()
            del model
            gc.collect()
            if not self.cpu:
                torch.cuda.empty_cache()

    def expect(self, holds: bool, what: str) -> None:
        """Note a failure unless ``holds``."""
        if not holds:
            self.failures.append(what)

    def same(self, name: str, **options: Any) -> None:
        """A cell that must have the exact logits; the first one says what these are."""
        with self.loaded(**options) as model:
            logits, row = measured(model, timed=True)
        if self.exact is None:
            self.exact = logits
        row["same"] = torch.equal(logits, self.exact)
        row["error"] = error(logits, self.exact)
        self.cells[name] = row
        self.expect(row["same"], f"{self.folder.name}: {name} has other logits than fully resident ({row['error']:.1e})")

    def attempt(self, name: str, check: Callable[[], None]) -> None:
        """Run a check whose refusal (an option that this model or machine has not) is noted and is no failure."""
        try:
            check()
        except FateError as problem:
            self.cells[name] = {"why_not": f"{type(problem).__name__}: {problem}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and stores: about 2.5 GB with medium")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=["lossless", "int8", "int4"], default=["lossless", "int4"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpu", action="store_true", help="check the CPU engine instead")
    arguments = parser.parse_args()
    os.environ["FATE_HOME"] = str(arguments.folder / "home")
    device = "cpu" if arguments.cpu else torch.cuda.get_device_name()
    results: dict[str, Any] = {
        "device": device, "torch": torch.__version__, "transformers": transformers.__version__, "models": {}, "failures": [],
    }  # fmt: skip
    for name in arguments.models:
        folder = checkpoint(name, arguments.folder / name)
        for precision in arguments.precisions if name != "medium" else ["int4"]:
            began = time.perf_counter()
            check = Check(folder, arguments.cpu)
            run(check, precision)
            assert check.exact is not None
            key = f"{name}, {precision}"
            results["models"][key] = {"digest": digest(check.exact), "cells": check.cells}
            results["failures"] += check.failures
            print(f"{key}: {len(check.cells)} cells in {time.perf_counter() - began:.0f} s; {check.failures or 'all right'}")
            for cell, row in check.cells.items():
                print(f"  {cell:38} " + "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
    print(json.dumps(results))
    return 1 if results["failures"] else 0


def run(check: Check, precision: str) -> None:
    """All checks of one model in one precision."""
    options: dict[str, Any] = {"precision": precision}
    check.same("100%", expert_cache="100%", **options)
    fractions = ("25%", "15%") if check.folder.name == "medium" else ("25%",)
    for fraction in fractions:
        for preset in PRESETS:

            def resident(fraction: str = fraction, preset: str = preset) -> None:
                check.same(f"{fraction} {preset}", expert_cache=fraction, preset=preset, **options)
                misses = check.cells[f"{fraction} {preset}"]["misses"]
                check.expect(misses > 0, f"{check.folder.name}: {fraction} {preset} missed nothing, so nothing was shown")

            check.attempt(f"{fraction} {preset}", resident)
    close_to_transformers(check, precision, options)
    if not check.cpu:
        check.same("25% without a graph", expert_cache="25%", cuda_graph=False, **options)
        check.attempt("25%, disk below", lambda: disk_below(check, options))
        check.attempt("25%, host compute", lambda: host_compute(check, precision, options))
    check.attempt("25%, short views", lambda: short_views(check, precision, options))


def disk_below(check: Check, options: dict[str, Any]) -> None:
    """RAM for 60 % of the experts alone."""
    plan: Any = fate_moe.plan(check.folder, vram=VRAM, context_length=CONTEXT, **options)
    ram = plan.runtime_bytes + max(plan.passing_bytes, plan.num_experts * plan.slot_bytes * 6 // 10)
    check.same("25%, disk below", expert_cache="25%", ram=ram, **options)
    if check.cells["25%, disk below"]["disk_bytes"] == 0:  # a model so small that what the process takes outweighs it
        check.cells["25%, disk below"]["why_not"] = "all experts fitted"


def host_compute(check: Check, precision: str, options: dict[str, Any]) -> None:
    """Equal for quantized experts. Others are summed otherwise there: close for the first token, after which texts may part."""
    with check.loaded(expert_cache="25%", **{HOST_COMPUTE: 0.5}, **options) as model:
        logits, row = measured(model, timed=True)
    assert check.exact is not None
    row["error"] = error(logits[:2], check.exact[:2])
    row["same"] = torch.equal(logits, check.exact)
    check.cells["25%, host compute"] = row
    check.expect(row["same"] or precision == "lossless", f"{check.folder.name}: host compute changes logits")
    check.expect(row["hosted"] > 0, f"{check.folder.name}: the host computed nothing")
    check.expect(row["error"] < 0.05, f"{check.folder.name}: host compute is {row['error']:.1e} off")


def short_views(check: Check, precision: str, options: dict[str, Any]) -> None:
    """Prefill with fewer bits: the same twice, other than whole where there are views, equal with every expert resident."""
    policy = {"precision_policy": "prefill-popularity", **options}
    check.same("100%, short views", expert_cache="100%", **policy)
    found = []
    for _ in range(2):
        with check.loaded(expert_cache="25%", preset="load-on-demand", **policy) as model:
            logits, row = measured(model, timed=False)
        found.append(logits[0])  # what follows depends on what the first passes left in the slots (on a CPU)
    assert check.exact is not None
    row["error"] = error(found[0], check.exact[0])
    check.cells["25%, short views"] = row
    check.expect(torch.equal(*found), f"{check.folder.name}: short views are not the same twice")
    check.expect(precision == "int4" or row["error"] == 0.0, f"{check.folder.name}: {precision} has no views, yet logits differ")
    check.expect(row["error"] < 0.5, f"{check.folder.name}: short views are {row['error']:.1e} off")


def close_to_transformers(check: Check, precision: str, options: dict[str, Any]) -> None:
    """The checkpoint's own logits for the prompt, in fp32 on the CPU: near with all bits, not far with fewer."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(check.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(prompt(reference)).logits[0, -1]
    del reference
    assert check.exact is not None
    off = error(check.exact[0], expected)
    check.cells["100% against transformers"] = {"error": off}
    allowed = 0.5 if precision == "int4" else 0.25  # near ties may choose other experts in bf16
    check.expect(off < allowed, f"{check.folder.name}, {precision}: {off:.1e} off transformers' logits")


def measured(model: Any, timed: bool) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits fp32 [ANSWER, vocabulary] of a greedy answer, and what the cell's row says."""
    tokens = prompt(model)
    said = model.generate(tokens, max_new_tokens=ANSWER, output_logits=True, return_dict_in_generate=True, **GREEDY)
    row: dict[str, Any] = {}
    if timed:
        seconds = []
        for count in (1, TIMED):
            model.generate(tokens, max_new_tokens=count, **GREEDY)
            times = []
            for _ in range(3):
                began = time.perf_counter()
                model.generate(tokens, max_new_tokens=count, **GREEDY)
                times.append(time.perf_counter() - began)
            seconds.append(min(times))
        row |= {"prompt_seconds": seconds[0], "tokens_per_second": (TIMED - 1) / max(1e-9, seconds[1] - seconds[0])}
    report = model.fate.report().as_dict()
    row |= {name: report["experts"].get(name, 0) for name in ("hits", "misses", "prefetched", "prefetch_used", "hosted")}
    row["disk_bytes"] = report.get("disk", {}).get("bytes_read", 0)
    return torch.cat(said.logits).float().cpu(), row


GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def prompt(model: Any) -> torch.Tensor:
    """Token ids [1, PROMPT], always the same for a vocabulary."""
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(7))
    return ids.to(model.device) if model.device.type == "cuda" else ids


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the norm of ``expected``; infinite where shapes differ."""
    return float((found - expected).norm() / expected.norm()) if found.shape == expected.shape else float("inf")


def digest(logits: torch.Tensor) -> str:
    """Of every bit."""
    return hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()[:16]


def checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random checkpoint of ``dtype`` with a tokenizer in ``folder``, made with transformers alone and only once."""
    if (folder / "tokenizer.json").exists():
        return folder
    described = {**_COMMON, **MODELS[name]}
    config = transformers.CONFIG_MAPPING[described.pop("model_type")](**described)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:  # keeps the size of what goes through, so that routers spread their choices
                value.normal_(0, value.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(described["vocab_size"])}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)  # last: the folder is whole
    return folder


if __name__ == "__main__":
    sys.exit(main())
