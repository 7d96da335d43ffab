"""A model of plain layers by the twin that defines them (``kernels/reference.py``): what the executors are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from fate_moe.kernels.plain_layer import PlainLayer
from fate_moe.kernels.recurrent import empty_state
from fate_moe.kernels.reference import decoder_layer, norm
from fate_moe.layers.plain import plain_decoder, recognise_norm


def plain_of(model: Any) -> list[PlainLayer]:
    """The layers of ``model``, all of them plain."""
    found = plain_decoder(model)
    assert all(isinstance(layer, PlainLayer) for layer in found), found
    return [layer for layer in found if isinstance(layer, PlainLayer)]


def parameters_of(layer: Any) -> dict[str, torch.Tensor]:
    """A decoder layer's parameters and buffers by name, as ordinary tensors."""
    numbers = dict(layer.named_parameters()) | dict(layer.named_buffers())
    return {name: value.detach().as_subclass(torch.Tensor) for name, value in numbers.items()}


def twin_layer(
    model: Any, plain: PlainLayer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``decoder_layer`` with the weights and the experts of ``model``'s own layer."""
    layer = model.get_submodule(plain.path)
    experts = getattr(layer.get_submodule(plain.block), "experts", None)
    return decoder_layer(plain, parameters_of(layer), x, cos, sin, keys, values, experts)


def empty_cache(plain: PlainLayer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of no token."""
    if plain.attention.delta is not None:
        return empty_state(plain.attention.delta, dtype)
    keys, values = (torch.zeros(0, plain.attention.kv_heads, dim, dtype=dtype) for dim in plain.attention.cached_dims)
    return keys, values


@torch.no_grad()
def twin_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one sequence of ``tokens`` int64 [tokens]."""
    trunk = model.model
    x = trunk.embed_tokens.weight[tokens]
    cos, sin = trunk.rotary_emb(x.unsqueeze(0), torch.arange(len(tokens)).unsqueeze(0))
    for plain in plain_of(model):
        x, _, _ = twin_layer(model, plain, x, cos[0], sin[0], *empty_cache(plain, x.dtype))
    last = recognise_norm(trunk.norm)
    assert not isinstance(last, list)
    return linear(norm(last, parameters_of(trunk), "norm", x), model.lm_head.weight)
