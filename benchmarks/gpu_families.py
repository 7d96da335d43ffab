"""Is every family's captured step right on this GPU? Small random checkpoints, loaded as a user loads them.

    PYTHONPATH=src python -m benchmarks.gpu_families --folder FOLDER [--models olmoe glm4_moe ...]

One line a stage, and one a family: how far the captured step's logits are from those of transformers' own layers on the same card
with the same experts (in fp32, and in bf16 where the rounding of a router's logits may choose another expert), and whether they are
equal in every bit with 25 % of the experts in VRAM, all misses copied or divided between link and host; and whether several texts
that are decoded together, one of them with drafts, have the bits of ``generate()`` for each. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.gpu_check import CONTEXT, GREEDY, MODELS, Check, checkpoint, error, measured, prompt
from fate_moe.schedule.device_pool import DevicePoolExecutor
from fate_moe.schedule.executor import Rows
from fate_moe.schedule.executors import executor_of

_FAMILIES = [name for name in MODELS if name not in ("medium", "deepseek_v2")]
_TRACE_SECONDS = 100  # where each thread is, so often: a device that waits for the host for ever shows nothing else
_STEPS, _ALLOWED = 12, 1e-2  # a last bit of an activation may round to another of its 8-bit codes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=_FAMILIES)
    arguments = parser.parse_args()
    os.environ.setdefault("FATE_HOME", str(arguments.folder / "home"))
    faulthandler.dump_traceback_later(_TRACE_SECONDS, repeat=True)
    failed = False
    for name in arguments.models:
        began, row = time.perf_counter(), dict[str, Any]()
        try:
            if name != "medium":
                exact = Check(checkpoint(name, arguments.folder / f"{name}-fp32", torch.float32), cpu=False)
                with exact.loaded(precision="int4", expert_cache="100%") as model:
                    row["fused"] = model.fate.decode is not None
                    _say(name, "loaded in fp32", row, began)
                    row["fp32"] = f"{_off_its_layers(model):.1e}"
                _say(name, "compared in fp32", row, began)
            context = 2048 if name == "medium" else CONTEXT
            _equalities(Check(checkpoint(name, arguments.folder / name), cpu=False, context=context), row)
            wrong = not row["equal"] or not row["together"] or not row["fused"] or float(row.get("fp32", 0.0)) > _ALLOWED
        except Exception as problem:  # one family's fault hides no other's
            row["failed"], wrong = f"{type(problem).__name__}: {problem}"[:600], True
        failed |= wrong
        _say("WRONG" if wrong else "right", name, row, began)
    return 1 if failed else 0


def _say(first: str, then: str, row: dict[str, Any], began: float) -> None:
    print(f"{first} {then}", row, f"{time.perf_counter() - began:.0f} s", flush=True)


def _equalities(check: Check, row: dict[str, Any]) -> None:
    cells: dict[str, dict[str, Any]] = {
        "100%": {"expert_cache": "100%"},
        "25%, measured": {"expert_cache": "25%"},
        "25%, off": {"expert_cache": "25%", "host_compute": "off"},
    }
    row["equal"], logits = True, dict[str, torch.Tensor]()
    began = time.perf_counter()
    for cell, options in cells.items():
        with check.loaded(precision="int4", **options) as model:
            logits[cell], found = measured(model, timed=check.folder.name == "medium")
            row["fused"] = model.fate.decode is not None
            if cell == "100%":
                row["bf16"] = f"{_off_its_layers(model):.1e}"
            together = _several(model)
            row["together"] = row.get("together", True) and together[0]
            row[f"tok/s of 16, {cell}"] = round(together[1])
            state = model.fate.experts.state
            if "measured" in cell:
                row["shares"] = "/".join(map(str, state.shares[: state.top_k + 1].tolist()))
            if found.get("hosted"):
                row[f"hosted, {cell}"] = found["hosted"]
            if "tokens_per_second" in found:
                row[f"tok/s, {cell}"] = round(found["tokens_per_second"])
        if not torch.equal(logits[cell], logits["100%"]):
            row["equal"] = False
            row[f"error, {cell}"] = f"{error(logits[cell], logits['100%']):.1e}"
        _say(check.folder.name, cell, row, began)


def _several(model: Any) -> tuple[bool, float]:
    """Whether each of a few texts has the logits that ``generate()`` gives it, and tokens a second of 16."""
    texts = [prompt(model)[0, first : first + 20].tolist() for first in range(0, 24, 8)]
    options = {"max_new_tokens": _STEPS, "output_logits": True, "return_dict_in_generate": True, **GREEDY}
    said = [model.generate(torch.tensor([text], device=model.device), **options) for text in texts]
    want = [torch.cat(one.logits).float() for one in said]
    answers = [one.sequences[0, 20:].tolist() for one in said]
    executor = executor_of(model)
    assert isinstance(executor, DevicePoolExecutor)
    names = [executor.new() for _ in texts]
    logits = [[_checked(each)] for each in executor.step([Rows(name, text) for name, text in zip(names, texts, strict=True)])]
    for at in range(_STEPS - 1):
        rows = [Rows(name, answer[at : at + 1]) for name, answer in zip(names, answers, strict=True)]
        rows[0] = Rows(names[0], [answers[0][at], 5, 6], 3)  # a draft that nobody accepts
        for found, each in zip(logits, executor.step(rows), strict=True):
            found.append(_checked(each)[:1])
        executor.cut(names[0], 20 + at + 1)
    same = all(torch.equal(torch.cat(found).float(), exact) for found, exact in zip(logits, want, strict=True))
    for name in names:
        executor.drop(name)
    if model.fate.plan.context_length < 16 * 64:
        return same, 0.0
    names = [executor.new() for _ in range(16)]
    for name in names:
        executor.step([Rows(name, texts[0])])
    for at in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for step in range(16):
            executor.step([Rows(name, [3 + (7 * number + step + 16 * at) % 900]) for number, name in enumerate(names)])
        torch.cuda.synchronize()
        took = time.perf_counter() - began
    for name in names:
        executor.drop(name)
    return same, 16 * 16 / took


def _checked(result: torch.Tensor | BaseException) -> torch.Tensor:
    if isinstance(result, BaseException):
        raise result
    return result


@torch.no_grad()
def _off_its_layers(model: Any) -> float:
    """The largest error of a captured step's logits against those of transformers' layers, which run with another cache."""
    ids = prompt(model)
    said = model.generate(ids, max_new_tokens=_STEPS, output_logits=True, return_dict_in_generate=True, **GREEDY)
    cache, errors = DynamicCache(config=model.config), list[float]()
    model(ids, past_key_values=cache)
    for step in range(_STEPS - 1):
        own = model(said.sequences[:, ids.shape[1] + step, None], past_key_values=cache).logits[0, -1].float()
        errors.append(error(said.logits[step + 1][0].float(), own))
    return sorted(errors)[len(errors) // 2] if model.dtype == torch.bfloat16 else max(errors)


if __name__ == "__main__":
    sys.exit(main())
