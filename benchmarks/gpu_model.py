"""Models of a published geometry with random weights, made on the device: nothing is downloaded and no checkpoint is written.

Routing is made similar to that of trained models. Every layer adds about a third of the first hidden state's size, so that
neighbouring router inputs are as similar as published (cosine > 0.83). Embeddings share a vector within a topic of 200 tokens,
which carries a tenth of their power, and attention makes neighbouring tokens more similar. Both values were chosen so that the hit
rate of least-recently-used slots lies between recorded and published ones of trained models; every run measures the result.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fate_moe.adapter.meta_model import ExpertStack, build_meta_model, expert_stacks
from fate_moe.core import BlobLayout
from fate_moe.engine.cuda_attach import attach_device, router_weights
from fate_moe.engine.patches import Patches
from fate_moe.gpu.dense import ByteLinear
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.host_compute import HostCompute
from fate_moe.gpu.layout import DeviceLayout, device_layout
from fate_moe.gpu.memory import PinnedArena, VramPool
from fate_moe.gpu.options import DeviceOptions
from fate_moe.gpu.state import MAX_DECODE_TOKENS, DeviceState
from fate_moe.gpu.tables import ResidencyTables, layer_quotas
from fate_moe.store.format import blob_layout

__all__ = ["GEOMETRIES", "RandomModel"]

_COMMON: dict[str, Any] = {"vocab_size": 151936, "hidden_size": 2048, "torch_dtype": "bfloat16", "rope_theta": 1000000.0}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        **_COMMON, "model_type": "qwen3_moe", "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    },
    "Qwen1.5-MoE-A2.7B": {
        **_COMMON, "model_type": "qwen2_moe", "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "use_sliding_window": False, "norm_topk_prob": False,
    },
    "Mixtral-8x7B": {
        **_COMMON, "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "sliding_window": None,
    },
}  # fmt: skip

TOPIC_TOKENS, TOPIC_POWER = 200, 0.1


@dataclass
class RandomModel:
    """A transformers model on the device, its experts' blobs in a pinned arena, and a sequence of tokens to process."""

    name: str
    model: Any
    stacks: list[ExpertStack]
    layout: BlobLayout
    device_layouts: list[DeviceLayout]
    arena: PinnedArena
    script: torch.Tensor
    host: HostCompute | None = None  # created for the first method that needs it

    @classmethod
    def make(
        cls,
        name: str,
        num_layers: int | None = None,
        topic_power: float = TOPIC_POWER,
        length: int = 2048,
        precision: str = "int4",
        dense: str = "bf16",
    ) -> RandomModel:
        """``precision`` of the experts: int4 or int8; ``dense`` of all other matrices except the embedding: bf16 or int8."""
        config = dict(GEOMETRIES[name])
        config["num_hidden_layers"] = num_layers or config["num_hidden_layers"]
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            model: Any = build_meta_model(folder)
        device = torch.device("cuda")
        torch.manual_seed(0)
        stacks = expert_stacks(model)
        routed = {id(model.get_submodule(stack.name)) for stack in stacks}
        for module in model.modules():
            if id(module) not in routed:
                for key, value in list(module._parameters.items()):
                    if value is not None:
                        module._parameters[key] = nn.Parameter(_dense(module, key, value, device, topic_power), requires_grad=False)
            for key, value in list(module._buffers.items()):
                if value is not None:
                    module._buffers[key] = value.to(device)
        if dense == "int8":
            _round_dense(model)
        shapes = stacks[0].output_rows_first()
        layout = blob_layout(precision, shapes, "BF16")
        arena = PinnedArena(len(stacks) * stacks[0].num_experts, layout.length, device)
        for number in range(arena.num_blobs):
            arena.blob(number).copy_(_random_blob(layout, device), non_blocking=True)
        torch.cuda.synchronize()
        layouts = [device_layout(layout, shapes, model.get_submodule(stack.name)) for stack in stacks]
        return cls(name, model, stacks, layout, layouts, arena, _script(model, length))

    def experts(self, resident: float, options: DeviceOptions, fitted: Sequence[torch.Tensor | None] = ()) -> DeviceExperts:
        """``resident`` is a fraction of all experts; ``fitted`` is as in DeviceExperts."""
        num_experts, top_k = self.stacks[0].num_experts, self.model.config.num_experts_per_tok
        device = torch.device("cuda")
        quotas = layer_quotas(
            round(resident * self.arena.num_blobs), len(self.stacks), num_experts, top_k + options.limit, options.num_whole
        )
        tables = ResidencyTables(quotas, num_experts, device)
        pool = VramPool(tables.num_slots, 2 * min(32, num_experts), self.layout.length, device)
        routers = router_weights(self.model, self.stacks)
        host_compute = self.host_compute() if options.host_compute != 0 else None
        state = DeviceState(
            self.device_layouts, self.arena, pool, tables, routers, top_k=top_k, options=options, host_compute=host_compute,
            fitted=fitted,
        )  # fmt: skip
        state.fill()
        experts = DeviceExperts(state)
        attach_device(self.model, self.stacks, experts, Patches(self.model))
        return experts

    def host_compute(self) -> HostCompute:
        """The host's compute threads, created once."""
        if self.host is None:
            module, top_k = self.model.get_submodule(self.stacks[0].name), self.model.config.num_experts_per_tok
            shapes = self.stacks[0].output_rows_first()
            self.host = HostCompute(self.layout, shapes, module, self.arena, top_k, torch.device("cuda"), tokens=MAX_DECODE_TOKENS)
        return self.host

    def close(self) -> None:
        if self.host is not None:
            self.host.close()
        self.arena.close()


def _dense(module: nn.Module, key: str, value: torch.Tensor, device: torch.device, topic_power: float) -> torch.Tensor:
    if value.ndim < 2:
        return torch.zeros_like(value, device=device) if key == "bias" else torch.ones_like(value, device=device)
    made = torch.empty(value.shape, dtype=value.dtype, device=device)
    if isinstance(module, nn.Embedding):
        made.normal_(0, (1 - topic_power) ** 0.5)
        for start in range(0, made.shape[0], TOPIC_TOKENS):
            made[start : start + TOPIC_TOKENS] += torch.randn_like(made[0]) * topic_power**0.5
        return made
    gain = 2.0 if "Router" in type(module).__name__ else 1.0
    return made.normal_(0, gain * value.shape[-1] ** -0.5)


def _round_dense(model: Any) -> None:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.out_features > 1:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ByteLinear.rounded(module.weight.data, module.bias))


def _random_blob(layout: BlobLayout, device: torch.device) -> torch.Tensor:
    """Uniform codes (their standard deviation is 0.29 of their range) with scales for which a matrix preserves the norm."""
    blob = torch.randint(0, 256, (layout.length,), dtype=torch.uint8, device=device)
    max_code = 2 ** sum(layout.plane_widths) - 1
    cols = {part.name.split(".")[0]: part.shape[1] * layout.group_size for part in layout.parts}
    for part in layout.parts:
        name, _, kind = part.name.partition(".")
        if kind in ("scale", "zero"):
            count = part.shape[0] * part.shape[1]
            scale = cols[name] ** -0.5 / (0.29 * (max_code + 1)) * (2.0 if name == "down_proj" else 1.0)
            values = blob[part.offset : part.offset + 2 * count].view(torch.float16)
            values.fill_(scale if kind == "scale" else max_code / 2 * scale)
    return blob


def _script(model: Any, length: int) -> torch.Tensor:
    """Token ids int64 [length]: runs of TOPIC_TOKENS tokens, each within one topic."""
    vocabulary = model.config.vocab_size // TOPIC_TOKENS * TOPIC_TOKENS
    random = torch.Generator().manual_seed(1)
    topics = torch.randint(0, vocabulary // TOPIC_TOKENS, (length // TOPIC_TOKENS + 1,), generator=random)
    within = torch.randint(0, TOPIC_TOKENS, (length,), generator=random)
    return (topics.repeat_interleave(TOPIC_TOKENS)[:length] * TOPIC_TOKENS + within).to("cuda")
