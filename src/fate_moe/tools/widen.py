"""Makes a Llama wider and deeper with zero blocks, without changing its function.

The residual stream gets new dimensions that are always zero: the embedding and the output projections have zero rows for them.
RMSNorm then divides by the mean over D' instead of D, so epsilon and norm weights are scaled to match (exactly, also in bf16, if D'
is 4 D or 16 D). Weights that are only multiplied by zeros (input columns of the new dimensions; neurons and heads whose output
columns are zero) are filled with noise with the standard deviation of the real weights, so that their bytes are realistic.

Shapes: D -> D' hidden, H -> H' heads in K -> K' groups of one key/value head, S head size, F neurons.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fate_moe.errors import ConfigError

# Widths are multiples of this, so that real neurons fill whole quantization groups: a zero column that shared a scale with a real
# one might not be quantized to zero.
GROUP = 64


@dataclass(frozen=True)
class Geometry:
    """The geometry to build. Heads have the dense model's size."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int

    def check(self, dense: Any) -> None:
        """Raises ConfigError with every reason for which a Llama of the config ``dense`` cannot be widened to this geometry."""
        wrong = [
            f"{what} is {given}; the dense model has {minimum}, give at least that"
            for what, given, minimum in (
                ("hidden size", self.hidden, dense.hidden_size),
                ("number of layers", self.layers, dense.num_hidden_layers),
                ("number of heads", self.heads, dense.num_attention_heads),
            )
            if given < minimum
        ]
        if self.top_k > self.experts:
            wrong.append(f"top-k of {self.top_k} of {self.experts} experts; give at most {self.experts}")
        if self.expert_width + self.shared_width < dense.intermediate_size:
            wrong.append(f"expert and shared widths together are below the dense model's {dense.intermediate_size} neurons")
        if self.heads % self.kv_heads:
            wrong.append(f"{self.heads} heads do not share {self.kv_heads} key/value heads evenly")
        elif (needed := len(head_places(dense.num_attention_heads, dense.num_key_value_heads, self)[1])) > self.kv_heads:
            wrong.append(f"{self.kv_heads} key/value heads are too few, {needed} are needed")
        if dense.attention_bias or dense.mlp_bias or dense.hidden_act != "silu":
            wrong.append("the dense model has biases or another activation than SiLU")
        if dense.rope_parameters["rope_type"] != "default":
            wrong.append(f"rotary embedding of type {dense.rope_parameters['rope_type']}")
        if wrong:
            raise ConfigError("; ".join(wrong))

    def num_parameters(self, vocabulary: int) -> int:
        """The approximate number of parameters, without norms and biases."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_size * self.hidden
        widths = self.experts * self.expert_width + self.shared_width
        return vocabulary * self.hidden + self.layers * (attention + (3 * widths + self.experts) * self.hidden)


def around(block: Tensor, rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """``block`` [r, c] in the upper left of [rows, columns]; elsewhere noise like it, zeros if ``generator`` is None."""
    if block.shape == (rows, columns):
        return block.contiguous()
    if generator is None:
        whole = torch.zeros(rows, columns, dtype=block.dtype)
    else:
        spread = float(block.float().std())
        whole = torch.empty(rows, columns, dtype=block.dtype).normal_(0, spread, generator=generator)
    whole[: block.shape[0], : block.shape[1]] = block
    return whole


def norm(weight: Tensor, hidden: int) -> Tensor:
    """[D] -> [D']: x / sqrt(mean over D') is sqrt(D'/D) times too long. Weights of zero dimensions may be anything."""
    scaled = weight * math.sqrt(len(weight) / hidden)
    return torch.cat([scaled, scaled.mean().expand(hidden - len(weight))]).to(weight.dtype)


def epsilon(dense: Any, hidden: int) -> float:
    """The mean over D' is D/D' times the mean over D; epsilon is scaled by the same factor."""
    return float(dense.rms_norm_eps * dense.hidden_size / hidden)


def head_places(heads: int, kv_heads: int, geometry: Geometry) -> tuple[list[int], list[int]]:
    """The new place of each old head, and the old key/value head that each of the first new ones copies.

    A group of heads stays with its key/value head. Where groups become smaller, each part gets a copy of it.
    """
    old, new = heads // kv_heads, geometry.heads // geometry.kv_heads
    places: list[int] = []
    sources: list[int] = []
    for kv_head in range(kv_heads):
        for start in range(0, old, new):
            places += range(len(sources) * new, len(sources) * new + min(new, old - start))
            sources.append(kv_head)
    return places, sources


def attention(layer: Any, dense: Any, geometry: Geometry, generator: torch.Generator) -> dict[str, Tensor]:
    """Projections of one layer under Qwen2-MoE's names: q/k/v with (zero) biases, o without."""
    size, hidden = geometry.head_size, geometry.hidden
    places, sources = head_places(dense.num_attention_heads, dense.num_key_value_heads, geometry)
    tensors: dict[str, Tensor] = {}
    for name, num_heads in (("q", geometry.heads), ("k", geometry.kv_heads), ("v", geometry.kv_heads)):
        old = getattr(layer.self_attn, f"{name}_proj").weight.detach()
        by_head = around(old, len(old), hidden, generator).view(-1, size, hidden)  # [H or K, S, D']
        if name == "q":
            grown = noise_like(by_head, num_heads, generator)
            grown[places] = by_head
        else:
            grown = noise_like(by_head, num_heads, generator)
            grown[: len(sources)] = by_head[sources]
        tensors[f"{name}_proj.weight"] = grown.flatten(0, 1)
        tensors[f"{name}_proj.bias"] = torch.zeros(num_heads * size, dtype=old.dtype)
    old = layer.self_attn.o_proj.weight.detach()
    output = torch.zeros(hidden, geometry.heads, size, dtype=old.dtype)
    output[: len(old), places] = old.view(len(old), -1, size)
    tensors["o_proj.weight"] = output.flatten(1)
    return tensors


def noise_like(by_head: Tensor, num_heads: int, generator: torch.Generator) -> Tensor:
    """[H, S, D] -> [num_heads, S, D], noise with the same standard deviation."""
    shape = (num_heads, *by_head.shape[1:])
    return torch.empty(shape, dtype=by_head.dtype).normal_(0, float(by_head.float().std()), generator=generator)


def deepen(dense: Any, layers: int) -> Any:
    """The same function in more layers: evenly spread copies with zero output projections.

    The copies get the real residual stream through real norms, so their router inputs are realistic.
    """
    count = dense.config.num_hidden_layers
    if layers == count:
        return dense
    deeper = copy.deepcopy(dense)
    stack = torch.nn.ModuleList()
    for number in range(layers):
        source = number * count // layers
        repeats = number > 0 and source == (number - 1) * count // layers
        layer = copy.deepcopy(deeper.model.layers[source]) if repeats else deeper.model.layers[source]
        if repeats:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        layer.self_attn.layer_idx = number
        stack.append(layer)
    deeper.model.layers = stack
    deeper.config.num_hidden_layers = layers
    return deeper
