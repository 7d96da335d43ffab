"""transformers' own conversion mapping, one parameter (or one expert of it) at a time.

transformers says for each family how checkpoint tensors become the model's parameters: a list of ``WeightRenaming`` and
``WeightConverter`` that ``convert_and_load_state_dict_in_model`` applies to whole models. ``find_recipes`` groups a checkpoint's
names exactly as that function does; a ``Recipe`` then makes one parameter when asked, or a single expert of a stack where no
operation mixes experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from fate_moe.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Recipe", "find_recipes"]


@dataclass
class Recipe:
    """How some parameters are made: ``sources`` are checkpoint names by the converter's pattern, experts in order.

    ``first`` is the parameter by whose name transformers groups them; one-to-many converters make others beside it.
    """

    first: str
    converter: Any = None  # WeightConverter; None: the one source is the parameter
    sources: dict[str, list[str]] = field(default_factory=dict)

    def make(self, target: str, model: PreTrainedModel, read: Callable[[str], Tensor]) -> Tensor:
        """The whole parameter ``target``. Raises CheckpointError when the sources do not fit together."""
        return self._run(target, model, {pattern: [read(name) for name in names] for pattern, names in self.sources.items()})

    def splits(self, num_experts: int, shape: Callable[[str], tuple[int, ...]]) -> bool:
        """Whether ``make_expert`` can be used: no operation mixes experts, and each source belongs to one or has all of them."""
        if self.converter is not None and not all(_keeps_experts_apart(op) for op in self.converter.operations[self.merges :]):
            return False
        if self.merges:
            return all(len(names) == num_experts for names in self.sources.values())
        return all(len(names) == 1 and shape(names[0])[:1] == (num_experts,) for names in self.sources.values())

    def make_expert(self, target: str, model: PreTrainedModel, read: Callable[[str, int | None], Tensor], expert: int) -> Tensor:
        """Entry ``expert`` of the stacked parameter ``target``, reading nothing of the others. ``read(name, i)`` gives [1, ...]."""
        if self.merges:
            tensors = {pattern: [read(names[expert], None)] for pattern, names in self.sources.items()}
        else:
            tensors = {pattern: [read(names[0], expert)] for pattern, names in self.sources.items()}
        return self._run(target, model, tensors)[0]

    @property
    def merges(self) -> bool:
        """Whether the first operation stacks one tensor for each expert."""
        if self.converter is None:
            return False
        first = self.converter.operations[0]
        return type(first) is MergeModulelist and first.dim == 0

    def _run(self, target: str, model: PreTrainedModel, tensors: dict[str, list[Tensor]]) -> Tensor:
        if self.converter is None:
            ((tensor,),) = tensors.values()
            return tensor
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name, tensor in zip(names, tensors[pattern], strict=False):
                converter.add_tensor(self.first, name, pattern, tensor)
        tensors.clear()
        try:
            made = converter.convert(self.first, model=model, config=model.config)[target]
        except Exception as error:  # whatever torch raises on tensors of wrong shapes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            sources = ", ".join(names[0] for names in self.sources.values())
            raise CheckpointError(f"{target} cannot be made from {sources} ...: {reason}; fetch the checkpoint again") from error
        return made[0] if isinstance(made, list) else made  # type: ignore[no-any-return]


def find_recipes(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Recipe]:
    """Recipes by the name of each parameter (or persistent buffer) that can be made from checkpoint tensors called ``names``.

    Mirrors the first half of transformers' ``convert_and_load_state_dict_in_model``. Names unknown to the model are left out.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted = model.state_dict()
    prefix = model.base_model_prefix
    recipes: dict[str, Recipe] = {}
    for name in sorted(names, key=dot_natural_key):
        first, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if first not in wanted and name in wanted:
            first, pattern = rename_source_key(name, [], [], prefix, wanted)
        if first not in wanted:
            continue
        recipe = recipes.setdefault(first, Recipe(first, by_pattern[pattern] if pattern else None))
        if recipe.converter is not None or not recipe.sources:  # of two names for one parameter transformers takes the first
            recipe.sources.setdefault(pattern or name, []).append(name)
    return {target: recipe for recipe in recipes.values() for target in _targets(recipe)}


def _targets(recipe: Recipe) -> list[str]:
    if recipe.converter is None:
        return [recipe.first]
    patterns = recipe.converter.target_patterns
    return [recipe.first.replace(patterns[0], pattern) for pattern in patterns]


def _keeps_experts_apart(op: Any) -> bool:
    """Whether ``op`` on stacks [E, ...] does to each expert what it does to all: its dimensions are counted from the second on."""
    if type(op) in (Chunk, Concatenate, Interleave):
        return bool(op.dim >= 1)
    return type(op) is Transpose and not op.check_dims and bool(op.dim0 >= 1 and op.dim1 >= 1)
