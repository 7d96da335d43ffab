"""Applies transformers' conversion mapping one parameter (or one expert) at a time.

For each family transformers lists how checkpoint tensors become the model's parameters, as ``WeightRenaming`` and
``WeightConverter`` entries; ``convert_and_load_state_dict_in_model`` applies them to whole models. ``find_recipes`` groups a
checkpoint's names exactly as that function does. A ``Recipe``, a converter with its source names, then makes one parameter, or a
single expert of a stack if no operation mixes experts.
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
    """How a parameter is made: ``sources`` are checkpoint names by the converter's pattern, experts in order.

    ``first`` is the parameter whose name transformers uses for the group; a one-to-many converter makes further parameters.
    """

    first: str
    converter: Any = None  # WeightConverter; None: the single source is the parameter
    sources: dict[str, list[str]] = field(default_factory=dict)

    def make(self, target: str, model: PreTrainedModel, read: Callable[[str], Tensor]) -> Tensor:
        """The whole parameter ``target``. Raises CheckpointError when the sources do not match."""
        return self._run(target, model, {pattern: [read(name) for name in names] for pattern, names in self.sources.items()})

    def splits(self, num_experts: int, shape: Callable[[str], tuple[int, ...]]) -> bool:
        """Whether ``make_expert`` can be used: no operation mixes experts, and each source holds one expert or all of them."""
        if self.converter is not None and not all(_is_per_expert(op) for op in self.converter.operations[self.merges :]):
            return False
        if self.merges:
            return all(len(names) == num_experts for names in self.sources.values())
        return all(len(names) == 1 and shape(names[0])[:1] == (num_experts,) for names in self.sources.values())

    def make_expert(self, target: str, model: PreTrainedModel, read: Callable[[str, int | None], Tensor], expert: int) -> Tensor:
        """Entry ``expert`` of the stacked parameter ``target``; reads no other expert. ``read(name, i)`` returns [1, ...]."""
        if self.merges:
            tensors = {pattern: [read(names[expert], None)] for pattern, names in self.sources.items()}
        else:
            tensors = {pattern: [read(names[0], expert)] for pattern, names in self.sources.items()}
        return self._run(target, model, tensors)[0]

    @property
    def merges(self) -> bool:
        """Whether the first operation stacks one tensor per expert."""
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
        except Exception as error:  # torch raises several types for wrong shapes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            sources = ", ".join(names[0] for names in self.sources.values())
            raise CheckpointError(f"{target} cannot be made from {sources} ...: {reason}; fetch the checkpoint again") from error
        return made[0] if isinstance(made, list) else made  # type: ignore[no-any-return]


def find_recipes(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Recipe]:
    """A recipe for each parameter (or persistent buffer), by name, that can be made from the checkpoint tensors ``names``.

    Mirrors the first half of transformers' ``convert_and_load_state_dict_in_model``. Names unknown to the model are ignored.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    targets = model.state_dict()
    prefix = model.base_model_prefix
    recipes: dict[str, Recipe] = {}
    for name in sorted(names, key=dot_natural_key):
        first, pattern = rename_source_key(name, renamings, converters, prefix, targets)
        if first not in targets and name in targets:
            first, pattern = rename_source_key(name, [], [], prefix, targets)
        if first not in targets:
            continue
        recipe = recipes.setdefault(first, Recipe(first, by_pattern[pattern] if pattern else None))
        if recipe.converter is not None or not recipe.sources:  # like transformers: the first of two names for one parameter
            recipe.sources.setdefault(pattern or name, []).append(name)
    return {target: recipe for recipe in recipes.values() for target in _targets(recipe)}


def _targets(recipe: Recipe) -> list[str]:
    if recipe.converter is None:
        return [recipe.first]
    patterns = recipe.converter.target_patterns
    return [recipe.first.replace(patterns[0], pattern) for pattern in patterns]


def _is_per_expert(op: Any) -> bool:
    """Whether ``op`` on a stack [E, ...] acts on each expert separately, that is, only on dimensions after the first."""
    if type(op) in (Chunk, Concatenate, Interleave):
        return bool(op.dim >= 1)
    return type(op) is Transpose and not op.check_dims and bool(op.dim0 >= 1 and op.dim1 >= 1)
