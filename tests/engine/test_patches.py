"""Patches: what is changed is listed, and undone to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fate_moe.engine.patches import Patches


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def state(module: nn.Module) -> list[Any]:
    """Everything that a patch may change: attributes, parts, hooks."""
    return [
        (
            name,
            dict(part._parameters),
            dict(part._buffers),
            dict(part._modules),
            {key for key in vars(part) if not key.startswith("_")},
            list(part._forward_hooks),
            list(part._forward_pre_hooks),
        )
        for name, part in module.named_modules()
    ]


def test_undo_restores_attributes_parts_and_hooks() -> None:
    found = model()
    before = state(found)
    x = torch.randn(3, 2)
    want = found(x)
    patches = Patches(found)
    seen: list[str] = []
    patches.replace(found[0], "forward", lambda x: x)
    patches.replace(found[0], "weight", nn.Parameter(torch.zeros(5, 7)))
    patches.replace(found, "1", nn.Identity())
    patches.replace(found, "label", "ours")
    patches.replace(found, "label", "ours again")
    patches.hook(found, "before", lambda module, args: seen.append("before"))
    patches.hook(found, "after", lambda module, args, output: seen.append("after"))
    assert torch.equal(found(x), x)
    assert seen == ["before", "after"]
    assert len(patches) == 7
    patches.undo()
    patches.undo()
    assert len(patches) == 0
    assert str(state(found)) == str(before)
    assert not hasattr(found, "label")
    assert torch.equal(found(x), want)
    assert seen == ["before", "after"]


def test_description_counts_layers() -> None:
    found = nn.Module()
    found.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    patches = Patches(found)
    for layer in found.layers:
        patches.replace(layer, "forward", torch.relu)
    patches.replace(found, "label", "ours")
    assert patches.describe() == "layers.*.forward: relu (2 times)\nlabel: str"


def test_another_moment_for_a_hook_is_refused() -> None:
    with pytest.raises(ValueError, match="before or after"):
        Patches(model()).hook(model(), "during", print)
