"""What fits where, decided before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from fate_moe.adapter.meta_model import ExpertStack, parameter_dtypes
from fate_moe.config import OffloadConfig
from fate_moe.core import KV_BLOCK
from fate_moe.engine.kv_bytes import int8_kv_bytes_per_token, kv_bytes_per_token, rotary_width, state_bytes, width
from fate_moe.errors import BudgetError, ConfigError
from fate_moe.kernels.activations import find_activation
from fate_moe.kernels.cpu import SMALL
from fate_moe.kernels.native import native
from fate_moe.layers.model_step import reads_in_pieces
from fate_moe.machine import available_memory, resident_memory
from fate_moe.memory.classes import SlotClass, divide, fewest, slot_classes, total_bytes
from fate_moe.quant.dtypes import dtype_name
from fate_moe.store.dense import byte_length, default_dense_precision, dense_layouts, one_product, row_read_parameter
from fate_moe.store.format import blob_layout
from fate_moe.store.open import Store, dense_entries, stored_layouts, unquantized
from fate_moe.units import format_bytes, parse_amount

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Footprint", "Plan", "footprint", "make_plan"]

# What the process grows by between planning and its peak besides what the table lists: thread stacks, oneDNN's primitives and
# scratch, allocator slack. Measured 30-45 MiB (torch 2.13, 2 and 8 threads, embedded model and a 3 GiB one).
RESERVE_BYTES = 56 << 20
# What a start takes differs from the next one's by a few MiB; the budget that a refusal names has to work then too.
SPREAD_BYTES = 8 << 20
# "auto" takes so much of the free memory; the rest is for other programs.
AUTO_FRACTION = 0.8
PASS_ROWS = 256  # (token, expert) that are computed at a time (csrc/products.cpp: kMostRows)


# Rows of a call for which memory is set aside where prompts are read in pieces (layers/model_step.py): for these, which are
# shorter, and for calls that the model's own forward has to run.
MOST_WHOLE = 2048
_ANGLE_BYTES = 12  # cos and sin of a channel and position, in fp32, and in bf16 as the table is made


@dataclass(frozen=True)
class Footprint:
    """What a model asks for, whatever the budget. ``min_slots`` are one token's experts in one layer; ``slots`` the fewest for the
    experts of each length, of which ``slot_bytes`` is the longest.

    ``dense_bytes`` are resident; ``row_bytes``, the embedding of which tokens' rows are read, stay on disk. ``tied_bytes`` of the
    resident ones are the embedding and the head at once. On a GPU all of them take ``device_bytes``: quantized matrices of plain
    Linear modules a byte a weight, all others (embeddings, what is tied) as numbers of the model's dtype, routers twice (the step
    has them beside one another). A layer's experts have ``inner_bytes_per_token`` between up and down. A prompt has
    ``scratch_bytes`` whatever its length, for what is kept of a pass over experts; with exact activations it has
    ``exact_scratch_bytes``: an expert of many tokens is written out as numbers. A sequence has ``state_bytes`` beside its tokens'
    keys and values.
    """

    family: str
    precision: str
    dense_bytes: int
    row_bytes: int
    kv_bytes_per_token: int
    int8_kv_bytes_per_token: int
    activation_bytes_per_token: int
    slots: tuple[SlotClass, ...]
    min_slots: int
    num_layers: int
    device_bytes: int
    inner_bytes_per_token: int
    scratch_bytes: int
    exact_scratch_bytes: int
    angle_bytes_per_token: int
    tied_bytes: int = 0
    state_bytes: int = 0
    in_pieces: bool = False

    def kv_bytes(self, config: OffloadConfig) -> int:
        """Of a token."""
        return self.kv_bytes_per_token if config.kv_cache == "bf16" else self.int8_kv_bytes_per_token

    def rows_at_once(self, config: OffloadConfig) -> int:
        """So many tokens of a prompt have activations at once."""
        longest = MOST_WHOLE if self.in_pieces and not config.exact_activations else config.context_length
        return min(config.context_length, longest)

    @property
    def slot_bytes(self) -> int:
        return self.slots[-1].slot_bytes

    @property
    def num_experts(self) -> int:
        return sum(of.num_experts for of in self.slots)

    @property
    def expert_bytes(self) -> int:
        """All experts together."""
        return sum(of.num_experts * of.slot_bytes for of in self.slots)


@dataclass(frozen=True)
class Plan:
    """Where the budget goes; all amounts in bytes. ``left_bytes`` is what no line needs (all experts fit); ``tied_bytes`` of
    ``dense_bytes`` are the embedding and the head at once.

    ``prefix_cache_bytes`` of the KV cache may hold beginnings of texts that ended, while texts that run do not need them.

    ``slots`` by ascending length, several where the store's blobs are of several lengths; ``slot_bytes`` is the longest.
    ``unread``: tensors of the checkpoint that the model does not use, and why."""

    family: str
    precision: str
    budget_bytes: int
    runtime_bytes: int
    dense_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    context_length: int
    rows_at_once: int
    slots: tuple[SlotClass, ...]
    tied_bytes: int = 0
    kv_format: str = "bf16"
    prefix_cache_bytes: int = 0
    unread: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_slots(self) -> int:
        return sum(of.num_slots for of in self.slots)

    @property
    def num_experts(self) -> int:
        return sum(of.num_experts for of in self.slots)

    @property
    def slot_bytes(self) -> int:
        return self.slots[-1].slot_bytes

    @property
    def expert_cache_bytes(self) -> int:
        return total_bytes(self.slots)

    @property
    def left_bytes(self) -> int:
        fixed = self.runtime_bytes + self.dense_bytes + self.kv_cache_bytes + self.activation_bytes
        return self.budget_bytes - fixed - self.expert_cache_bytes

    def as_dict(self) -> dict[str, Any]:
        """For programs; ``slots`` only where there are several lengths."""
        facts = asdict(self)
        del facts["slots"]
        for name in ("num_slots", "num_experts", "slot_bytes", "expert_cache_bytes", "left_bytes"):
            facts[name] = getattr(self, name)
        return {**facts, "slots": [of._asdict() for of in self.slots]} if len(self.slots) > 1 else facts

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark) for a table."""
        several = len(self.slots) > 1
        kept = f", up to {format_bytes(self.prefix_cache_bytes)} of it prefixes of texts that ended"
        prefixes = kept if self.prefix_cache_bytes else ""
        tied = f" ({format_bytes(self.tied_bytes)}, the embedding too)" if self.tied_bytes else ""
        return [
            ("Python, torch, transformers", self.runtime_bytes, "measured in this process"),
            ("dense weights", self.dense_bytes, f"attention, norms, routers, shared experts, head{tied}"),
            ("KV cache", self.kv_cache_bytes, f"{self.context_length} tokens, {self.kv_format}{prefixes}"),
            ("activations", self.activation_bytes, f"{self.rows_at_once} tokens of a prompt at once"),
            *(
                (
                    f"expert slots of {format_bytes(of.slot_bytes)}" if several else "expert slots",
                    of.num_slots * of.slot_bytes,
                    f"{of.num_slots} of {of.num_experts} experts ({of.num_slots / of.num_experts:.1%})"
                    + ("" if several else f", {self.precision}"),
                )
                for of in self.slots
            ),
            ("left", self.left_bytes, ""),
            ("budget", self.budget_bytes, "the whole process"),
        ]

    def line(self) -> str:
        """The plan in one line."""
        return (
            f"{self.family}, {self.precision}: budget {format_bytes(self.budget_bytes)} = "
            f"runtime {format_bytes(self.runtime_bytes)} + dense {format_bytes(self.dense_bytes)} + "
            f"KV {format_bytes(self.kv_cache_bytes)} + activations {format_bytes(self.activation_bytes)} + "
            f"{self.num_slots}/{self.num_experts} expert slots {format_bytes(self.expert_cache_bytes)} + "
            f"left {format_bytes(self.left_bytes)}"
        )


def footprint(
    model: PreTrainedModel,
    stacks: list[ExpertStack],
    precision: str,
    store: Store | None = None,
    dense_precision: str | None = None,
) -> Footprint:
    """Sizes of ``model`` (a meta_model: shapes without weights); exact from ``store`` where it exists already.

    ``dense_precision`` None: what a conversion chooses by itself."""
    text = model.config.get_text_config()
    dtypes = parameter_dtypes(model)
    routed = {f"{stack.name}.{name}" for stack in stacks for name in stack.parameters}
    tied: dict[str, str] = model.all_tied_weights_keys  # empty where nothing is tied
    absent = routed | set(tied)
    numbers = {name: value.numel() * dtypes[name].itemsize for name, value in model.state_dict().items() if name not in absent}
    if store is not None:
        lengths = [[layout.length for layout in store.manifest.layouts_of(stack.layer)] for stack in stacks]
        quantized = stored_layouts(store, model)
    else:
        dtype = dtype_name(model.dtype)
        lengths = [[blob_layout(precision, stack.output_rows_first(), dtype).length] * stack.num_experts for stack in stacks]
        quantized = dense_layouts(model, dense_precision or default_dense_precision(precision))
    held = {name: quantized[name].length if name in quantized else size for name, size in numbers.items()}
    by_row, row_bytes = row_read_parameter(model), 0
    if store is None:
        dense_bytes = sum(held.values())
        row_bytes = held[by_row] if by_row else 0
    else:
        entries, dense_bytes = dense_entries(store), store.manifest.dense_bytes
        row_bytes = entries[by_row].length if by_row in entries else 0
        made = unquantized(store, model, quantized)
        dense_bytes -= sum(entries[name].length - layout.length for name, layout in made.items() if name != by_row)
    on_device = {
        name: byte_length(quantized[name]) if name in quantized and one_product(model, name) else size
        for name, size in numbers.items()
    }
    itemsize = model.dtype.itemsize
    top_k = max(stack.top_k for stack in stacks)
    at_once = min(top_k, *(stack.num_experts for stack in stacks))
    inner = max(width(text, "intermediate_size"), *(shape[0] for stack in stacks for shape in stack.parameters.values()))
    # One layer's transients per token at prefill: residual, norm in fp32, q k v o (about 8 hidden vectors), the experts' outputs by
    # (token, choice) and their weighted copy, and the widest MLP three times. The experts' inputs in 8 bits take less than q k v o,
    # which are gone by then.
    activation = text.hidden_size * (8 * itemsize + 8 + top_k * (itemsize + 4)) + 3 * inner * itemsize
    return Footprint(
        family=model.config.model_type,
        precision=precision,
        dense_bytes=dense_bytes - row_bytes,
        row_bytes=row_bytes,
        tied_bytes=sum(size for name, size in held.items() if name in tied.values() and _is_embedding(model, name)),
        kv_bytes_per_token=kv_bytes_per_token(text, itemsize),
        int8_kv_bytes_per_token=int8_kv_bytes_per_token(text),
        activation_bytes_per_token=activation,
        slots=slot_classes(lengths, at_once),
        min_slots=at_once,
        num_layers=len(stacks),
        device_bytes=sum(on_device.values()) + sum(stack.num_experts for stack in stacks) * text.hidden_size * itemsize,
        inner_bytes_per_token=top_k * max(shape[0] for stack in stacks for shape in stack.output_rows_first().values()) * itemsize,
        scratch_bytes=_scratch_bytes(model, stacks, precision, exact=False),
        exact_scratch_bytes=_scratch_bytes(model, stacks, precision, exact=True),
        state_bytes=state_bytes(text),
        in_pieces=_in_pieces(model, stacks, precision, quantized),
        angle_bytes_per_token=_ANGLE_BYTES * rotary_width(text),
    )


def _in_pieces(model: PreTrainedModel, stacks: list[ExpertStack], precision: str, quantized: Container[str]) -> bool:
    """Whether prompts are read in pieces on the CPU."""
    shapes = [shape for stack in stacks for shape in stack.output_rows_first().values()]
    many = precision != "lossless" or all(math.prod(shape) <= SMALL for shape in shapes)
    return many and reads_in_pieces(model, quantized)


def _is_embedding(model: nn.Module, parameter: str) -> bool:
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), nn.Embedding)


def make_plan(needs: Footprint, config: OffloadConfig) -> Plan:
    """Divide the budget. Call it after torch and transformers are imported: what they take is measured, not guessed.

    Raises BudgetError, naming the smallest budget that works, when the fixed parts and one token's experts do not fit, or when
    ``expert_cache`` asks for more than the budget leaves.
    """
    free = available_memory() + resident_memory()
    budget = int(free * AUTO_FRACTION) if config.ram == "auto" else parse_amount(config.ram, free)
    runtime = resident_memory() + RESERVE_BYTES
    kv = needs.kv_bytes(config) * -(-config.context_length // KV_BLOCK) * KV_BLOCK  # a server has it in whole blocks
    kv += needs.state_bytes
    rows = needs.rows_at_once(config)
    activations = needs.activation_bytes_per_token * rows + needs.angle_bytes_per_token * config.context_length
    activations += needs.exact_scratch_bytes if config.exact_activations else needs.scratch_bytes
    fixed = runtime + needs.dense_bytes + kv + activations
    smallest_slots = fewest(needs.slots, needs.min_slots)
    if not config.keeps_experts:
        wanted = slots = smallest_slots
    elif config.expert_cache is None:
        wanted, slots = smallest_slots, divide(budget - fixed, needs.slots, needs.min_slots)
    else:
        amount = parse_amount(config.expert_cache, needs.expert_bytes)
        wanted = slots = divide(amount, needs.slots, needs.min_slots)
        if not slots:
            raise BudgetError(
                f"--expert-cache {config.expert_cache} is too small: one token needs {_describe(smallest_slots)}; give at least "
                f"{format_bytes(total_bytes(smallest_slots))}",
                fixed + total_bytes(smallest_slots),
            )
    smallest = fixed + total_bytes(wanted)
    if smallest > budget:
        works = smallest + SPREAD_BYTES
        raise BudgetError(
            f"a budget of {format_bytes(budget)} is too small: {format_bytes(runtime)} runtime, {format_bytes(needs.dense_bytes)} "
            f"dense weights, {format_bytes(kv + activations)} for {config.context_length} tokens and "
            f"{_describe(wanted)} need at least --ram {-(-works >> 20)}MiB (or a shorter --context-length)",
            works,
        )
    return Plan(
        family=needs.family,
        precision=needs.precision,
        budget_bytes=budget,
        runtime_bytes=runtime,
        dense_bytes=needs.dense_bytes,
        kv_cache_bytes=kv,
        activation_bytes=activations,
        context_length=config.context_length,
        rows_at_once=rows,
        slots=slots,
        tied_bytes=needs.tied_bytes,
        kv_format=config.kv_cache,
        prefix_cache_bytes=prefix_bytes(config, kv),
    )


def prefix_bytes(config: OffloadConfig, kv_bytes: int) -> int:
    """What prefixes may take of the KV cache. Raises ConfigError for more than it has."""
    if config.prefix_cache == "off":
        return 0
    if (amount := parse_amount(config.prefix_cache, kv_bytes)) > kv_bytes:
        raise ConfigError(
            f"prefix_cache {config.prefix_cache} is more than the KV cache of {config.context_length} tokens, "
            f"{format_bytes(kv_bytes)}, of which it is a part; give at most 100%, or a larger context_length"
        )
    return amount


def _describe(slots: tuple[SlotClass, ...]) -> str:
    first, *others = ((of.num_slots, format_bytes(of.slot_bytes)) for of in slots)
    return f"{first[0]} expert slots of {first[1]}" + "".join(f" and {number} of {size}" for number, size in others)


def _scratch_bytes(model: PreTrainedModel, stacks: list[ExpertStack], precision: str, exact: bool) -> int:
    """What a layer's prompt takes beside activations (kernels/cpu.py, csrc/products.cpp)."""
    if precision == "lossless":
        return 0  # multiplied where it lies
    shapes = [stack.output_rows_first() for stack in stacks]
    expanded: int = max(sum(math.prod(shape) for shape in shape_of.values()) for shape_of in shapes) * model.dtype.itemsize
    modules = {type(module): module for module in (model.get_submodule(stack.name) for stack in stacks)}
    if native is None or exact or None in map(find_activation, modules.values()):
        return expanded
    matrices = [[shape for shape in shape_of.values() if len(shape) == 2] for shape_of in shapes]
    # Of each row what the first matrix gives in fp32, and the inputs of both in 8 bits with their scales, as they come and packed.
    widest: int = max(4 * max(rows for rows, _ in both) + 3 * sum(cols for _, cols in both) for both in matrices)
    return PASS_ROWS * widest
