"""What differs between families, and the generic rules that cover most of them.

The rules: a router is the MoE block's child of a known name; of what it returns, the integer tensor is the expert index and the
floating one with a column for each expert the scores; what it wants besides hidden states are the block's own tensors of that name.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fate_moe.adapter.meta_model import TEXT_CLASSES, ExpertStack
from fate_moe.core import Patcher, Router, Routing

__all__ = ["NOT_ENTERED", "entrance", "find_router", "linear_routers", "moe_families", "norms_of", "router_of"]

# The names transformers' MoE blocks give their router.
ROUTER_NAMES = ("gate", "router", "wg")
# And their decoder layers the norm before the MoE block; where a layer has several of them, the first in this order.
NORM_NAMES = ("pre_feedforward_layernorm", "ffn_norm", "pre_ff_layernorm", "post_attention_layernorm")
# Blocks that text never enters (Ernie-VL has a second set of experts for images): reading ahead for them would be wasted.
NOT_FOR_TEXT = ("vision_moe",)
NOT_ENTERED = "text does not enter it"


def moe_families() -> list[str]:
    """Every model type of the installed transformers that writes text and whose experts use the experts interface.

    Found by looking, not listed: modelling files that apply ``use_experts_implementation``, the model types that these files
    implement, and model types that hold one of those as their text model; of all these, the ones in a table of text writers.
    """
    import transformers
    from transformers.models.auto import configuration_auto as auto

    root = Path(auto.__file__).parents[1]
    using = {path.parent.name for path in root.glob("*/modeling_*.py") if "@use_experts_implementation" in path.read_text()}
    writing = [getattr(transformers, name)._model_mapping._model_mapping for name in TEXT_CLASSES]
    module_of = auto.model_type_to_module_name
    of_experts = {name for name in auto.CONFIG_MAPPING_NAMES if module_of(name) in using}
    mentions = re.compile(rf"""["'](?:{"|".join(of_experts)})["']|\.(?:{"|".join(using)})[. ]""")

    def holds(family: str) -> bool:
        files = (root / module_of(family)).glob("configuration_*.py")
        if not any(mentions.search(path.read_text()) for path in files):  # configurations are slow to import: 5 s for all
            return False
        text = getattr(transformers.CONFIG_MAPPING[family], "sub_configs_defaults", {}).get("text_config")
        return getattr(text, "model_type", None) in of_experts

    families = (name for name in auto.CONFIG_MAPPING_NAMES if any(name in table for table in writing))
    return sorted(name for name in families if name in of_experts or holds(name))


def router_of(block: nn.Module) -> nn.Module | None:
    """The module of ``block`` that chooses experts; None if it has no child of a name that routers have."""
    return next((child for name, child in block.named_children() if name in ROUTER_NAMES), None)


def entrance(block: nn.Module) -> nn.Module:
    """The module whose input the router of ``block`` sees: the block, or the router where attention is in the block too (Gemma)."""
    return router_of(block) or block if isinstance(block, GradientCheckpointingLayer) else block


def find_router(block: nn.Module, stack: ExpertStack, probe: torch.Tensor, patcher: Patcher) -> Router | str:
    """How to ask the router of ``block`` about hidden states [num_tokens, hidden] before the block runs, or why nobody can.

    ``probe`` [1, hidden] is what it is tried with. A plain Linear router returns scores alone: take their top-k. The call passes
    hooks by: it is a question, not a step.
    """
    router = router_of(block)
    if router is None:
        return f"none of {', '.join(ROUTER_NAMES)} is in it"
    if stack.block.rpartition(".")[2] in NOT_FOR_TEXT:
        return NOT_ENTERED
    wanted = list(inspect.signature(router.forward).parameters.values())[1:]
    names = [parameter.name for parameter in wanted if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if foreign := [name for name in names if not isinstance(getattr(block, name, None), torch.Tensor)]:
        return f"its router wants {', '.join(foreign)}, which only the running model knows"

    remembering = router.forward if isinstance(router.forward, _Remembering) else _Remembering(router.forward)

    def asking(leading: tuple[int, ...]) -> Router:
        def route(hidden: torch.Tensor) -> Routing:
            with torch.no_grad():
                answer = remembering.ask(hidden.view(*leading, *hidden.shape), {name: getattr(block, name) for name in names})
            return _routing(answer, stack)

        return route

    reason = ""
    for leading in ((), (1,)):  # nearly all take tokens in a row, a few insist on a batch
        route = asking(leading)
        try:
            route(probe)
        except Exception as error:  # whatever a family's router makes of a call that it does not expect
            reason = str(error) or f"nothing in what it returns has {stack.num_experts} columns"
        else:
            patcher.replace(router, "forward", remembering)
            return route
    return reason


class _Remembering:
    """A router's forward: asked early about a tensor, it gives the same answer when the block itself asks about this very tensor.

    Once only, without gradients, and only if nothing was written to the tensor since (inference mode does not count that; no
    family writes to its gate input). The tensor is kept meanwhile, so that no other can lie at its address.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = self.__wrapped__ = forward  # what inspect.signature looks at
        self._asked: tuple[torch.Tensor, int, Any, Any] | None = None

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self._forward, memo)  # a copied router has its own weights

    def _router(self) -> Any:
        """The identity of the router's weights, which an adapter may replace for the time of one call."""
        router = getattr(self._forward, "__self__", None)
        return router and (type(router), *map(id, router._parameters.values()))

    def ask(self, hidden: torch.Tensor, others: dict[str, torch.Tensor]) -> Any:
        """The router's answer, remembered unless it depends on ``others`` too."""
        answer = self._forward(hidden, **others)
        self._asked = None if others else (hidden, _version(hidden), self._router(), answer)
        return answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked, self._asked = self._asked, None
        if asked is not None and len(args) == 1 and not kwargs and not torch.is_grad_enabled():
            hidden, (known, version, router, answer) = args[0], asked
            same = hidden.data_ptr() == known.data_ptr() and hidden.shape == known.shape and hidden.stride() == known.stride()
            if same and hidden.dtype == known.dtype and _version(hidden) == version and self._router() == router:
                return answer
        return self._forward(*args, **kwargs)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def linear_routers(model: nn.Module, stacks: Sequence[ExpertStack]) -> list[torch.Tensor] | None:
    """The routers' own weights [E, hidden]; None where a router is not one matrix."""
    weights = []
    for stack in stacks:
        router = router_of(model.get_submodule(stack.block))
        tensors = [] if router is None else [*router.parameters(), *router.buffers()]  # biases decide too
        if len(tensors) != 1 or tensors[0].ndim != 2 or tensors[0].shape[0] != stack.num_experts:
            return None
        weights.append(tensors[0].detach())
    return weights


def norms_of(model: nn.Module, stacks: Sequence[ExpertStack]) -> torch.Tensor | None:
    """The gains [L, hidden] of the RMS norms before the MoE blocks, where there is one before each; else None.

    With them a layer's gate input says what any other layer's norm makes of the same residual stream: x * gain[m] / gain[l].
    """
    gains = []
    for stack in stacks:
        parent, _, name = stack.block.rpartition(".")
        children = dict(model.get_submodule(parent).named_children())
        gain = next((_gain(children[norm]) for norm in NORM_NAMES if norm in children), None) if name in children else None
        if gain is None:
            return None
        gains.append(gain)
    return torch.stack(gains)


@torch.no_grad()
def _gain(norm: nn.Module) -> torch.Tensor | None:
    """What an RMS norm multiplies by, [hidden] fp32; None if ``norm`` is something else (it is asked about +1 and -1)."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return None
    ones = torch.ones(1, len(weight), dtype=weight.dtype)
    gain, mirrored = norm.forward(ones)[0].float(), norm.forward(-ones)[0].float()
    return gain if torch.equal(gain, -mirrored) and bool((gain != 0).any()) else None


def _routing(answer: Any, stack: ExpertStack) -> Routing:
    parts = [answer] if isinstance(answer, torch.Tensor) else [part for part in answer if isinstance(part, torch.Tensor)]
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    scores = next(part for part in flat if part.is_floating_point() and part.shape[-1] == stack.num_experts)
    index = next((part for part in flat if not part.is_floating_point()), None)
    return Routing(scores.topk(stack.top_k, dim=-1).indices if index is None else index, scores)
