"""The plan of a conversion: every file, tensor and offset, decided and checked before the first byte is written."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from fate_moe.adapter.meta_model import ExpertStack, build_meta_model, expert_stacks, parameter_dtypes
from fate_moe.checkpoints.accounting import account, refuse_missing
from fate_moe.checkpoints.files import SAME_PLACE, has_weights
from fate_moe.checkpoints.gguf import find_gguf, open_checkpoint
from fate_moe.checkpoints.mapping import Recipe, match_names
from fate_moe.checkpoints.source import Checkpoint
from fate_moe.core import BlobLayout
from fate_moe.errors import CheckpointError, UnsupportedModelError
from fate_moe.io.tensorfile import TensorEntry, place_tensors
from fate_moe.quant.blob import QuantizedMatrix
from fate_moe.quant.dtypes import dtype_name
from fate_moe.quant.solver import Solver
from fate_moe.store.dense import dense_layouts, encode_dense
from fate_moe.store.format import blob_layout
from fate_moe.store.mixed_precision import PrecisionRules, layer_precisions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ConversionPlan",
    "DenseTensor",
    "ShardPlan",
    "check_finite",
    "describe_model",
    "plan_conversion",
    "tensor_bytes",
]


@dataclass(frozen=True)
class DenseTensor:
    """A parameter or buffer outside the routed experts, and how it is made; ``made_as`` differs from ``name`` if it is tied."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    recipe: Recipe
    made_as: str
    layout: BlobLayout | None = None  # of a quantized tensor, which the file holds as a blob uint8 [length]

    @property
    def stored(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Its dtype and shape in the file."""
        return (torch.uint8, (self.layout.length,)) if self.layout is not None else (self.dtype, self.shape)


@dataclass(frozen=True)
class ShardPlan:
    """One MoE layer's file: its header, and the layout and place of each expert's blob."""

    name: str
    stack: ExpertStack
    layouts: tuple[BlobLayout, ...]
    header: bytes
    blobs: tuple[TensorEntry, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(blob.length for blob in self.blobs)


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that a conversion writes. ``dense`` is in the order of the tensors in ``dense_header``.

    ``unread`` says why a tensor of the checkpoint is not read, by its name.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    recipes: dict[str, Recipe]
    dtype: torch.dtype
    dense: tuple[DenseTensor, ...]
    dense_header: bytes
    shards: tuple[ShardPlan, ...]
    unread: dict[str, str]

    @property
    def dense_bytes(self) -> int:
        return len(self.dense_header) + sum(_num_bytes(*tensor.stored) for tensor in self.dense)

    def make_dense(self, tensor: DenseTensor, solver: Solver) -> Tensor:
        """The tensor as it is stored. Raises CheckpointError when the checkpoint has it in another shape, or not as numbers."""
        made = tensor.recipe.make(tensor.made_as, self.model, lambda name: self._read_as(name, tensor.dtype))
        made = _checked(made, tensor.shape, tensor.name)
        return made.to(tensor.dtype) if tensor.layout is None else encode_dense(tensor.layout, made, solver)

    def make_quantized(self, stack: ExpertStack, expert: int) -> dict[str, QuantizedMatrix]:
        """Codes, scales and zeros of an expert's matrices that the checkpoint has already quantized; {} if there are none.

        transformers' mapping only joins and transposes matrices, whatever they hold, so it is run once each on codes, scales and
        zeros.
        """
        targets = [name for name in stack.parameters if self._is_packed(self.recipes[f"{stack.name}.{name}"])]
        packed = functools.cache(self.checkpoint.read_packed)  # each matrix is unpacked once
        parts = [
            self.make_expert(stack, expert, {}, lambda name, _, field=field: getattr(packed(name), field), targets)  # type: ignore[misc]
            for field in QuantizedMatrix._fields
        ]
        return {name: QuantizedMatrix(*(part[name] for part in parts)) for name in targets}

    def _is_packed(self, recipe: Recipe) -> bool:
        return recipe.merges and self.checkpoint.packed_names.issuperset(recipe.all_sources)

    def make_expert(
        self,
        stack: ExpertStack,
        expert: int,
        stacked: dict[str, Tensor],
        read: Callable[[str, int | None], Tensor] | None = None,
        names: Iterable[str] | None = None,
    ) -> dict[str, Tensor]:
        """Expert ``expert`` of ``stack``: matrices [out, in] and biases [out] by name, in the experts' own dtype (or wider).

        ``stacked`` holds parameters that can only be made for all experts of a stack at once; pass the same dict for each of them.
        ``read`` replaces the checkpoint's (None: the checkpoint's own); ``names`` are the parameters to make (None: all).
        """
        read = read or self.checkpoint.read
        tensors = {}
        for name in stack.parameters if names is None else names:
            shape, target = stack.parameters[name], f"{stack.name}.{name}"
            recipe = self.recipes[target]
            if recipe.splits(stack.num_experts, self.checkpoint.shape):
                tensor = recipe.make_expert(target, self.model, read, expert)
            else:
                if name not in stacked:
                    made = recipe.make(target, self.model, lambda name: read(name, None))
                    stacked[name] = _checked(made, (stack.num_experts, *shape), target)
                tensor = stacked[name][expert]
            tensor = _checked(tensor, shape, target)
            tensors[name] = tensor.T if stack.is_transposed and tensor.ndim == 2 else tensor
        return tensors

    def _read_as(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.checkpoint.read(name)
        if not tensor.is_floating_point():
            return tensor
        check_finite(tensor, name)
        made = tensor.to(dtype)
        if made.dtype != tensor.dtype and not _is_finite(made):
            raise CheckpointError(f"{name} has weights too large for {dtype}, the dtype in config.json; write bfloat16 there")
        return made


def plan_conversion(
    checkpoint: Checkpoint,
    precision: str,
    group_size: int = 64,
    dense_precision: str = "lossless",
    precision_rules: PrecisionRules | None = None,
) -> ConversionPlan:
    """Plan the conversion of ``checkpoint``; ``precision_rules`` set other precisions for layers or single experts.

    Raises CheckpointError and UnsupportedModelError, from headers alone, where the checkpoint has less than the model needs, more
    than is known (see ``checkpoints.accounting``), or other shapes.
    """
    model = build_meta_model(checkpoint.folder)
    stacks = expert_stacks(model)
    matched = match_names(model, checkpoint.names)
    recipes = matched.recipes
    routed = {f"{stack.name}.{name}" for stack in stacks for name in stack.parameters}
    dense, missing = _dense_tensors(model, recipes, routed, dense_layouts(model, dense_precision))
    missing += [target for target in sorted(routed) if target not in recipes]
    refuse_missing(model, checkpoint, matched, missing)
    unread = account(model, checkpoint, matched) | _tied_copies(model, recipes, dense)
    for stack in stacks:
        _check_stack(stack, model, recipes, checkpoint)
    for tensor in dense:
        _check_dense(tensor, model, checkpoint)
    dtype = _experts_dtype(checkpoint, recipes, routed)
    header, _ = place_tensors((tensor.name, dtype_name(tensor.stored[0]), tensor.stored[1]) for tensor in dense)
    shards = tuple(
        _shard(
            stack,
            len(stacks),
            layer_precisions(stack.layer, stack.num_experts, precision, precision_rules or {}),
            dtype,
            group_size,
        )
        for stack in stacks
    )
    plan = ConversionPlan(checkpoint, model, recipes, dtype, tuple(dense), header, shards, unread)
    _check_tied(plan)
    return plan


def describe_model(path: Path) -> tuple[PreTrainedModel, dict[str, str]]:
    """The model at ``path`` without its weights, and what a conversion would not read (see ``ConversionPlan``).

    A folder that has config.json and no weights is enough; nothing is accounted for then. Raises as ``plan_conversion``.
    """
    if (path / "config.json").is_file() and not has_weights(path) and find_gguf(path) is None:
        return build_meta_model(path), {}
    plan = plan_conversion(open_checkpoint(path), "lossless")
    return plan.model, plan.unread


def _shard(stack: ExpertStack, num_stacks: int, precisions: Sequence[str], dtype: torch.dtype, group_size: int) -> ShardPlan:
    shapes, name = stack.output_rows_first(), dtype_name(dtype)
    made = {precision: blob_layout(precision, shapes, name, group_size) for precision in dict.fromkeys(precisions)}
    layouts = tuple(made[precision] for precision in precisions)
    header, blobs = place_tensors((f"{stack.name}.{i}", "U8", (layout.length,)) for i, layout in enumerate(layouts))
    return ShardPlan(f"experts-{stack.layer + 1:05}-of-{num_stacks:05}.safetensors", stack, layouts, header, tuple(blobs))


def _dense_tensors(
    model: PreTrainedModel, recipes: dict[str, Recipe], routed: set[str], layouts: dict[str, BlobLayout]
) -> tuple[list[DenseTensor], list[str]]:
    """In the order of writing (by alignment, largest first: every tensor starts aligned, without gaps); and what is missing."""
    dtypes = parameter_dtypes(model)
    tied: dict[str, str] = model.all_tied_weights_keys
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or []
    tensors: list[DenseTensor] = []
    missing: list[str] = []
    for name, value in model.state_dict().items():
        if name in routed or name in tied:
            continue
        aliases = (name, *(key for key, source in tied.items() if source == name))
        made_as = next((alias for alias in aliases if alias in recipes), None)
        if made_as is not None:
            dtype = dtypes[name] if value.is_floating_point() else value.dtype
            tensors.append(DenseTensor(name, dtype, tuple(value.shape), recipes[made_as], made_as, layouts.get(name)))
        elif value.is_floating_point() and not any(re.search(pattern, name) for pattern in ignored):
            missing.append(name)
    return sorted(tensors, key=lambda t: (-min(64, _alignment(t)), -_num_bytes(*t.stored), t.name)), missing


def _tied_copies(model: PreTrainedModel, recipes: dict[str, Recipe], dense: Sequence[DenseTensor]) -> dict[str, str]:
    """The tensors of parameters that config.json ties to others, which are read instead (``_check_tied``: their values agree)."""
    read = {name for tensor in dense for name in tensor.recipe.all_sources}
    tied: dict[str, str] = model.all_tied_weights_keys
    copies = {name: source for key, source in tied.items() if key in recipes for name in recipes[key].all_sources}
    return {name: f"a copy of {source}, to which config.json ties it" for name, source in copies.items() if name not in read}


def _alignment(tensor: DenseTensor) -> int:
    """The largest power of two that divides the tensor's length."""
    length = _num_bytes(*tensor.stored)
    return length & -length or 64


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _check_stack(stack: ExpertStack, model: PreTrainedModel, recipes: dict[str, Recipe], checkpoint: Checkpoint) -> None:
    for name, shape in stack.parameters.items():
        target = f"{stack.name}.{name}"
        if len(shape) != (1 if name.endswith("_bias") else 2):
            raise UnsupportedModelError(
                f"{target} has {len(shape)} dimensions for each expert, which is not supported; matrices and biases are expected"
            )
        recipe = recipes[target]
        for names in recipe.sources.values() if recipe.merges else ():
            _check_experts(target, names, stack.num_experts, checkpoint.folder)
        if recipe.splits(stack.num_experts, checkpoint.shape):
            _check_shape(target, recipe.made_expert_shape(target, model, checkpoint.shape), shape)
        else:
            _check_shape(target, recipe.made_shape(target, model, checkpoint.shape), (stack.num_experts, *shape))


def _check_experts(target: str, names: Sequence[str], num_experts: int, folder: Path) -> None:
    """Raises CheckpointError unless ``names`` are those of experts 0 to ``num_experts`` - 1, once each."""
    if len(names) < num_experts:
        raise CheckpointError(
            f"{folder} lacks {num_experts - len(names)} of the {num_experts} experts of {target} that config.json describes "
            f"(it has {names[0]} to {names[-1]}); {SAME_PLACE}"
        )
    if len(names) > num_experts:
        raise CheckpointError(
            f"{folder} has {len(names)} experts of {target} ({names[0]} to {names[-1]}), and config.json describes {num_experts}; "
            f"{SAME_PLACE}"
        )
    numbers = list(zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=False))
    if num_experts > 1 and tuple(range(num_experts)) not in numbers:
        said = f"the experts of {target} are not numbered 0 to {num_experts - 1}"
        raise CheckpointError(f"{folder}: {said} ({names[0]} to {names[-1]}); {SAME_PLACE}")


def _check_dense(tensor: DenseTensor, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    _check_shape(tensor.name, tensor.recipe.made_shape(tensor.made_as, model, checkpoint.shape), tensor.shape)
    for name in tensor.recipe.all_sources:
        if tensor.dtype.is_floating_point != (of := checkpoint.dtype(name)).is_floating_point:
            raise UnsupportedModelError(
                f"{checkpoint.folder}: {name} is {of}, and the model needs {tensor.dtype}; use the checkpoint in bf16, fp16 or fp32"
            )


def _experts_dtype(checkpoint: Checkpoint, recipes: dict[str, Recipe], routed: set[str]) -> torch.dtype:
    """The one dtype that holds all experts without loss."""
    sources = [name for target in routed for name in recipes[target].all_sources]
    dtype = checkpoint.dtype(sources[0])
    for name in sources:
        dtype = torch.promote_types(dtype, checkpoint.dtype(name))
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UnsupportedModelError(
            f"{checkpoint.folder} has experts of {dtype}, which is not supported; use one in bf16, fp16, fp32 or block-scaled FP8"
        )
    return dtype


def _check_tied(plan: ConversionPlan) -> None:
    """Raises UnsupportedModelError where the config ties two parameters that the checkpoint has with different values."""
    tied: dict[str, str] = plan.model.all_tied_weights_keys
    for name, source in tied.items():
        if name in plan.recipes and source in plan.recipes:
            made = (plan.recipes[key].make(key, plan.model, plan.checkpoint.read) for key in (name, source))
            digests = [xxhash.xxh3_64_hexdigest(tensor_bytes(tensor)) for tensor in made]
            if digests[0] != digests[1]:
                raise UnsupportedModelError(
                    f"{plan.checkpoint.folder}: config.json ties {name} to {source}, but their values differ; "
                    "set tie_word_embeddings to false there"
                )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row-major; a copy only if the tensor is not contiguous."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def check_finite(tensor: Tensor, name: str) -> None:
    """Raises CheckpointError for a NaN or an infinity, at every precision: with one in it, a model writes nonsense."""
    if tensor.is_floating_point() and not _is_finite(tensor):
        raise CheckpointError(
            f"{name} has infinite or NaN weights, with which the model would write nonsense; if the file is as it was published, "
            "tell its author, else fetch it again"
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    least, greatest = torch.aminmax(tensor)  # unlike isfinite() without a copy; NaN is both the least and the greatest
    return bool(least.isfinite()) and bool(greatest.isfinite())


def _check_shape(name: str, shape: tuple[int, ...] | None, expected: tuple[int, ...]) -> None:
    if shape is not None and shape != expected:
        raise CheckpointError(f"{name} has shape {shape} in the checkpoint, and config.json describes {expected}; {SAME_PLACE}")


def _checked(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    _check_shape(name, tuple(tensor.shape), shape)
    return tensor
