"""Applies transformers' conversion mapping one parameter (or one expert) at a time.

For each family transformers lists how checkpoint tensors become the model's parameters, as ``WeightRenaming`` and
``WeightConverter`` entries; ``convert_and_load_state_dict_in_model`` applies them to whole models. ``match_names`` groups a
checkpoint's names exactly as that function does. A ``Recipe``, a converter with its source names, then makes one parameter, or a
single expert of a stack if no operation mixes experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
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

from fate_moe.checkpoints.files import SAME_PLACE
from fate_moe.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Matched", "Recipe", "match_names"]


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

    @property
    def all_sources(self) -> list[str]:
        """The checkpoint names of all patterns."""
        return [name for names in self.sources.values() for name in names]

    def takes(self, pattern: str | None) -> bool:
        """Whether a further source of ``pattern`` (None: of the parameter's own name) belongs to the recipe; else it is a rival."""
        if self.converter is None:
            return pattern is None and not self.sources
        if pattern not in self.converter.source_patterns:
            return False
        collects = any(type(op) not in (Chunk, Concatenate, Interleave, Transpose) for op in self.converter.operations)
        return collects or pattern not in self.sources

    def made_shape(self, target: str, model: PreTrainedModel, shape: Callable[[str], tuple[int, ...]]) -> tuple[int, ...] | None:
        """The shape that ``make`` would give, from the sources' shapes alone; None where only the values say it.

        Raises CheckpointError when the sources do not match.
        """
        return self._shape(lambda: self.make(target, model, lambda name: torch.empty(shape(name), device="meta")))

    def made_expert_shape(
        self, target: str, model: PreTrainedModel, shape: Callable[[str], tuple[int, ...]]
    ) -> tuple[int, ...] | None:
        """As ``made_shape``, of what ``make_expert`` gives for every expert. Raises CheckpointError also where experts differ."""
        if self.merges:
            for names in self.sources.values():
                if odd := next((name for name in names if shape(name) != shape(names[0])), None):
                    raise CheckpointError(f"{odd} has shape {shape(odd)}, and {names[0]} has {shape(names[0])}; {SAME_PLACE}")

        def read(name: str, index: int | None) -> Tensor:
            return torch.empty(shape(name) if index is None else (1, *shape(name)[1:]), device="meta")

        return self._shape(lambda: self.make_expert(target, model, read, 0))

    def _shape(self, make: Callable[[], Tensor]) -> tuple[int, ...] | None:
        try:
            return tuple(make().shape)
        except CheckpointError as error:
            if isinstance(error.__cause__, NotImplementedError):  # an operation that looks at values, which meta tensors lack
                return None
            raise

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
            sources = ", ".join(names[0] for names in self.sources.values())
            raise CheckpointError(f"{target} cannot be made from {sources} ...: {first_line(error)}; {SAME_PLACE}") from error
        return made[0] if isinstance(made, list) else made  # type: ignore[no-any-return]


class Matched(NamedTuple):
    """What a checkpoint's names are to a model.

    ``recipes`` by parameter (or persistent buffer). ``unknown``: names that make none, with the parameter that transformers'
    renamings would look for. ``rivals``: further names for a parameter that another tensor already makes, with that tensor's name.
    """

    recipes: dict[str, Recipe]
    unknown: dict[str, str]
    rivals: dict[str, str]


def match_names(model: PreTrainedModel, names: Iterable[str]) -> Matched:
    """Match the checkpoint tensors ``names`` to the parameters of ``model``.

    Mirrors the first half of transformers' ``convert_and_load_state_dict_in_model``.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    targets = model.state_dict()
    prefix = model.base_model_prefix
    recipes: dict[str, Recipe] = {}
    unknown: dict[str, str] = {}
    rivals: dict[str, str] = {}
    for name in sorted(names, key=dot_natural_key):
        first, pattern = rename_source_key(name, renamings, converters, prefix, targets)
        if first not in targets and name in targets:
            first, pattern = rename_source_key(name, [], [], prefix, targets)
        if first not in targets:
            unknown[name] = first
            continue
        recipe = recipes.setdefault(first, Recipe(first, by_pattern[pattern] if pattern else None))
        if recipe.takes(pattern):
            recipe.sources.setdefault(pattern or name, []).append(name)
        else:
            rivals[name] = next(iter(recipe.sources.values()))[0]
    return Matched({target: recipe for recipe in recipes.values() for target in _targets(recipe)}, unknown, rivals)


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
