"""Models that train: the same adapters with the same numbers on ours and on transformers' own, and what their gradients are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from fate_moe.adapter.contract import is_experts
from fate_moe.core import ExpertId
from fate_moe.layers.frozen import FrozenWeight

TOKENS = torch.randint(3, 120, (2, 11), generator=torch.Generator().manual_seed(1))
ATTENTION = r".*self_attn\.\w*proj\w*"  # of every family

Gradients = Mapping[str, torch.Tensor]


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a checkpoint with the family's own experts."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")


def adapted(model: Any, config: Any) -> Any:
    """``model`` under PEFT's ``config``, every trainable number random (around one where it is a factor) and always the same."""
    from peft import get_peft_model

    made: Any = get_peft_model(model, config)
    fill(made)
    return made


def fill(model: Any) -> None:
    """All that is trainable becomes random numbers, the same in models of every dtype."""
    generator = torch.Generator().manual_seed(3)
    for name, value in model.named_parameters():
        if value.requires_grad:
            centre = float("ia3" in name or "magnitude" in name)
            with torch.no_grad():
                value.copy_(0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float32) + centre)


def gradients(model: Any, tokens: torch.Tensor = TOKENS, **options: Any) -> Gradients:
    """One backward of the loss on ``tokens``: the gradients by name, and the loss under "loss"."""
    model.zero_grad()
    loss = model(tokens, labels=tokens, **options).loss
    loss.backward()
    return {"loss": loss.detach(), **collected(model)}


def collected(model: Any) -> Gradients:
    return {name: value.grad.detach().clone() for name, value in model.named_parameters() if value.grad is not None}


def error(got: Gradients, true: Gradients) -> float:
    """The largest distance of a gradient to the ``true`` one, over the norm of that."""
    assert got.keys() == true.keys()
    distances = [(got[name].double() - true[name].double()).norm() / true[name].double().norm() for name in true]
    return float(torch.stack(distances).max())


def as_exact(run: Callable[[Any], Gradients], ours: Any, twin: Callable[[torch.dtype], Any]) -> None:
    """What ``run`` gives on ours is as near to the twin's in fp64 as the twin's own in the dtype of ours (within a factor 3, for
    another order of sums)."""
    true, own = run(twin(torch.float64)), run(twin(ours.dtype))
    assert len(true) > 0
    assert error(run(ours), true) <= 3 * error(own, true) + torch.finfo(torch.float32).eps


def numbers_of(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model of the checkpoint ``folder`` with the numbers that ``model``'s store stands for."""
    twin, runtime = reference(folder, dtype), model.fate.runtime
    for name, module in model.named_modules():
        own: Any = twin.get_submodule(name)
        if is_experts(module):
            layer = module.fate_layer
            for expert in range(module.num_experts):
                lease = runtime.residency.acquire([ExpertId(layer, expert)])
                [(_, slot)] = [place for batch in lease.batches() for place in batch]
                kernel = runtime._slots._kernels_of(layer, module)[expert]
                weights = runtime._slots._weights(layer, expert, slot, torch.float32, kernel, None)
                for part, value in weights.items():
                    transposed = module.is_transposed and value.ndim == 2
                    getattr(own, part).data[expert] = (value.T if transposed else value).to(dtype)
                lease.release()
        elif isinstance(module._parameters.get("weight"), FrozenWeight):
            own.weight.data = module.weight.clone().to(dtype)
    return twin
