"""A simulated device: the GPU path on the CPU, every kernel under Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fate_moe.core import BlobLayout, PrecisionPolicy
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.host import HostTier
from fate_moe.gpu.host_compute import HostCompute
from fate_moe.gpu.layout import device_layout
from fate_moe.gpu.memory import PinnedArena, VramPool
from fate_moe.gpu.options import DeviceOptions
from fate_moe.gpu.state import DeviceState
from fate_moe.gpu.tables import ResidencyTables, layer_quotas
from fate_moe.kernels.reference import quantized_experts
from fate_moe.quant.blob import encode, views
from fate_moe.store.format import blob_layout

CPU = torch.device("cpu")


class SwiGLU:
    """What the kernels ask of a transformers experts module."""

    has_gate = True
    is_concatenated = True
    act_fn = staticmethod(torch.nn.functional.silu)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


SwiGLU._apply_gate.__name__ = "_default_apply_gate"


@dataclass
class Model:
    """Random experts of a few layers in an arena, and routers."""

    layout: BlobLayout
    shapes: dict[str, tuple[int, ...]]
    arena: PinnedArena
    routers: list[torch.Tensor]
    num_experts: int
    top_k: int
    dtype: torch.dtype
    module: Any

    @property
    def hidden(self) -> int:
        """Width of a token's vector."""
        return self.shapes["down_proj"][0]

    def experts(
        self,
        num_slots: int,
        options: DeviceOptions | None = None,
        num_staging: int = 4,
        host_compute: HostCompute | None = None,
        host: HostTier | PinnedArena | None = None,
        precision: PrecisionPolicy | None = None,
    ) -> DeviceExperts:
        options = options or DeviceOptions()
        layers = len(self.routers)
        tables = ResidencyTables(
            layer_quotas(num_slots, layers, self.num_experts, min(self.num_experts, self.top_k + options.limit), options.num_whole),
            self.num_experts,
            CPU,
        )
        pool = VramPool(tables.num_slots, num_staging, self.layout.length, CPU)
        device = device_layout(self.layout, self.shapes, self.module)
        state = DeviceState(
            [device] * layers, host or self.arena, pool, tables, self.routers, top_k=self.top_k, options=options,
            host_compute=host_compute, precision=precision,
        )  # fmt: skip
        state.fill()
        return DeviceExperts(state)

    def parts(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        return views(self.layout, self.arena.blob(layer * self.num_experts + expert))


def random_model(
    precision: str = "int4",
    dtype: torch.dtype = torch.float32,
    *,
    layers: int = 1,
    experts: int = 4,
    top_k: int = 2,
    hidden: int = 128,
    width: int = 64,
    seed: int = 0,
    module: Any = None,
) -> Model:
    """With ``module`` experts have biases."""
    random = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    if module is not None:
        shapes |= {"gate_up_proj_bias": (2 * width,), "down_proj_bias": (hidden,)}
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    layout = blob_layout(precision, shapes, name)
    arena = PinnedArena(layers * experts, layout.length, CPU)
    for number in range(layers * experts):
        tensors = {key: torch.randn(shape, generator=random) * shape[-1] ** -0.5 for key, shape in shapes.items()}
        arena.blob(number).copy_(torch.frombuffer(encode(layout, {k: v.to(dtype) for k, v in tensors.items()}), dtype=torch.uint8))
    routers = [torch.randn(experts, hidden, generator=random) for _ in range(layers)]
    return Model(layout, shapes, arena, routers, experts, top_k, dtype, module or SwiGLU())


def route(model: Model, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, index = (hidden.float() @ model.routers[layer].T).softmax(-1).topk(model.top_k)
    return index, weights.to(hidden.dtype)


def reference(
    model: Model,
    layer: int,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    dtype: Any,
    num_planes: int | None = None,
) -> torch.Tensor:
    """Every token's experts one by one in ``dtype``, from numbers, summed in routing order."""
    from fate_moe.kernels.reference import expert_mlp, expert_weights

    x = hidden.to(dtype)
    out = torch.zeros(x.shape, dtype=dtype)
    for token in range(x.shape[0]):
        for choice in range(index.shape[1]):
            parts = model.parts(layer, int(index[token, choice]))
            made = expert_weights(model.layout, parts, model.shapes, torch.float32, num_planes)
            made = {key: value.to(dtype) for key, value in made.items()}
            out[token] += (expert_mlp(SwiGLU(), made, x[token : token + 1])[0] * weights[token, choice].to(dtype)).to(dtype)
    return out


def twin(
    model: Model,
    layer: int,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    num_planes: int | None = None,
    activation: str = "silu",
    **gate: Any,
) -> torch.Tensor:
    """What the kernels must give of quantized experts, to the bit, in ``hidden``'s dtype."""
    return quantized_experts(
        model.layout, lambda expert: model.parts(layer, expert), hidden, index, weights, num_planes, activation, **gate
    )
