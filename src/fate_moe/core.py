"""The data types and protocols that all parts share. Imports nothing of ours and no torch.

``layer`` everywhere in this package counts *MoE blocks* from 0, in the order in which the model runs them: dense layers in
between do not count, so that "the next layer" is always the next one that routes.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

__all__ = [
    "KV_BLOCK",
    "KV_FORMATS",
    "PRECISIONS",
    "SLOT_ALIGNMENT",
    "BlobLayout",
    "Counters",
    "Drafts",
    "EvictionPolicy",
    "ExpertId",
    "ExpertSource",
    "Lookup",
    "Need",
    "Part",
    "Patcher",
    "PrecisionPolicy",
    "Predictor",
    "Router",
    "Routing",
    "Section",
]

PRECISIONS = ("lossless", "int8", "int4")

# Blobs start and end on multiples of this, so that one O_DIRECT read fills a slot (4 KiB sectors and pages).
SLOT_ALIGNMENT = 4096

# Positions of a block of the KV cache.
KV_BLOCK = 64
KV_FORMATS = ("bf16", "int8")


class ExpertId(NamedTuple):
    """One routed expert: MoE layer (from 0) and its index within the layer."""

    layer: int
    expert: int


class Lookup(enum.Enum):
    """What a lookup found, decided at the moment after routing (honest counters)."""

    HIT = "hit"  # the bytes are in a slot
    IN_FLIGHT = "in_flight"  # a prefetch read has begun and has not ended
    MISS = "miss"  # a demand read has to be made (a prefetch that is only queued counts as this)


@dataclass(frozen=True)
class Part:
    """One tensor inside a blob: ``dtype`` is a safetensors name (BF16, F16, F32, U8), ``offset`` counts from the blob's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Section:
    """A checksummed run of a blob. Reading a blob up to the end of a section gives the view that the section completes."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True)
class BlobLayout:
    """The layout of one expert's blob of ``length`` bytes (a multiple of 4096).

    lossless: one section ``weights``; parts ``gate_up_proj`` [2I, H] and ``down_proj`` [H, I] (``up_proj`` where experts have no
    gate_proj), each row-major by *output* row whatever the checkpoint's order, and ``*_bias`` [out] where the family has them.

    int4: sections ``scales``, then one per plane (``plane0``: 2 bits, ``plane1``: 1, ``plane2``: 1), each over all matrices; for a
    matrix W [R, C] with G = ceil(C / group_size) groups per row the parts are ``W.scale`` F16 [R, G], ``W.zero`` F16 [R, G] (the
    *scaled* zero: w = scale * q - zero) and ``W.plane{i}`` U8 [R, G, group_size * width / 8]. Biases lie in ``scales`` unquantized.
    """

    precision: str
    parts: tuple[Part, ...]
    sections: tuple[Section, ...]
    length: int
    group_size: int = 0
    plane_widths: tuple[int, ...] = ()


@dataclass
class Drafts:
    """Drafted tokens that were checked since the model was loaded, and those of them that became part of a text."""

    drafted: int = 0
    accepted: int = 0
    by_source: dict[str, tuple[int, int]] = field(default_factory=dict)  # the same of each source: "lookup", "grammar", ...

    def count(self, source: str, drafted: int, accepted: int) -> None:
        """``accepted`` of ``drafted`` more tokens."""
        if drafted:
            self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
            before = self.by_source.get(source, (0, 0))
            self.by_source = {**self.by_source, source: (before[0] + drafted, before[1] + accepted)}


@dataclass
class Counters:
    """What the residency layer did since it was created; amounts in bytes and seconds."""

    hits: int = 0
    in_flight: int = 0
    misses: int = 0
    prefetched: int = 0
    prefetch_used: int = 0
    upgrades: int = 0  # lookups that found fewer bits than requested; they count as misses
    bytes_read: int = 0
    stall_seconds: float = 0.0
    link_seconds: float = 0.0  # in which reads were under way
    predicting_seconds: float = 0.0  # spent by the inference thread on predicting and queueing
    overlap_seconds: float = 0.0  # between the lookups that missed and the first need of what they missed

    @property
    def lookups(self) -> int:
        return self.hits + self.in_flight + self.misses

    @property
    def ready_on_time(self) -> float:
        """Fraction of lookups whose expert was in its slot after routing; 1.0 before any lookup."""
        return self.hits / self.lookups if self.lookups else 1.0

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "ready_on_time": self.ready_on_time}

    def since(self, earlier: Counters) -> Counters:
        """What was counted since ``earlier``, a copy of these counters."""
        return Counters(**{key: value - getattr(earlier, key) for key, value in asdict(self).items()})


class Routing(NamedTuple):
    """A router's result for ``num_tokens`` tokens: ``experts`` [num_tokens, top_k] int64 in the family's own order, and ``scores``
    [num_tokens, num_experts] (logits or probabilities), where a higher one is likelier to be chosen."""

    experts: torch.Tensor
    scores: torch.Tensor


# Routes hidden states [num_tokens, hidden] of one layer.
Router: TypeAlias = "Callable[[torch.Tensor], Routing]"


class EvictionPolicy(Protocol):
    """Chooses the expert to evict; owns no bytes and starts no reads. Called under the residency lock, from one thread at a time.

    The residency layer calls ``admitted`` when an expert is given a slot, ``touched`` at every lookup of an expert that has one
    (once per forward pass of its layer, also for the lookup that caused a demand read: admitted, then touched), and ``removed``
    when the slot is taken away. ``victim`` changes nothing: the caller follows with ``removed(victim)`` and ``admitted(incoming)``,
    or with neither. ``routed`` comes once per forward pass of a layer, before its ``touched``; not while every expert has a slot.
    """

    def routed(self, layer: int, experts: Sequence[int], counts: Sequence[int] | None = None, num_tokens: int = 1) -> None:
        """``layer``'s router chose these distinct experts, with a slot or without, for ``counts`` of ``num_tokens`` tokens."""
        return

    def admitted(self, expert: ExpertId, *, prefetched: bool = False) -> None:
        """``expert`` got a slot: by demand, or by a prefetch that no lookup has asked for yet. It had none before."""

    def touched(self, expert: ExpertId) -> None:
        """The router chose ``expert``, which has a slot."""

    def removed(self, expert: ExpertId) -> None:
        """``expert`` lost its slot. A policy may remember it (a ghost entry)."""

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
        """The admitted expert to evict for ``incoming``, among those for which ``evictable`` is true; None if there is none.

        ``probability``: that ``incoming`` is used in the coming pass of its layer. A policy that knows this probability of the
        admitted experts may return None rather than a likelier one; never at 1.0, which a demand read has.
        """


class Predictor(Protocol):
    """Predicts the experts that a layer will choose, before routing. May be wrong, must be cheap, never raises.

    ``gives_probabilities``: its probabilities are frequencies (of the experts given 0.3, three in ten are used), so that they are
    compared with the cost of a read (``predict.rule``). Otherwise experts are prefetched in the order of the list.
    """

    gives_probabilities: bool

    def observe(self, layer: int, routed: Sequence[int]) -> None:
        """``layer`` was routed: the distinct experts it chose in this pass, most popular first.

        Not called in passes in which nothing is predicted.
        """

    def predict(self, layer: int, router_input: torch.Tensor, ahead: int = 1) -> list[tuple[int, float]]:
        """Experts of ``layer`` with probabilities, likeliest first; ``router_input`` [num_tokens, hidden] is ``layer - ahead``'s.

        Layer -1's are the tokens' embeddings. Nearer layers are predicted before further ones; a predictor that cannot look
        ``ahead`` layers ahead returns an empty list.
        """


class Need(NamedTuple):
    """One of a pass's distinct experts in one layer, as a precision policy sees it.

    ``num_tokens`` chose it, ``weight`` is the sum of their routing weights; ``held`` bits are in its slot, 0 if it is missing.
    """

    num_tokens: int
    weight: float
    held: int


class Patcher(Protocol):
    """The only way to change the user's model: each change is listed and undone when the engine closes (engine/patches.py)."""

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name`` becomes ``value``."""

    def hook(self, module: Any, when: str, function: Callable[..., Any], *, with_kwargs: bool = False) -> None:
        """Call ``function`` "before" or "after" each forward of ``module``."""

    def record(self, change: Callable[[], Any]) -> None:
        """Call ``change``, a library's own function, and list the parts of modules that it replaced."""


class PrecisionPolicy(Protocol):
    """Decides how many bits of each expert a pass uses; more bits that are in the slot are used too, missing ones are read.

    The only protocol whose implementations may change numbers, and only if the user chose one. Depends on its arguments alone.
    """

    def bits(self, needs: Sequence[Need], views: Sequence[int], affordable: float) -> list[int]:
        """For each of ``needs`` one of ``views`` (bits at which a read may end, ascending; the last is the whole expert).

        ``affordable``: how many bits, summed over experts, can be read while one layer computes; 0.0 before it is known.
        """


class ExpertSource(Protocol):
    """Brings an expert's bytes to a slot: from disk, from host RAM, or in tests from a source that is slow or fails."""

    def read(self, expert: ExpertId, slot: memoryview, first: int = 0, last: int | None = None) -> int:
        """Fill ``slot`` (page-aligned, at least the blob's length) and return the bytes read. Called from several threads at once.

        Only the sections from ``first`` up to but not including ``last`` (None: to the end) have to be read, each to its place.
        Reads begin and end on multiples of 4096, so bytes of a neighbouring section may be written too, unchanged.
        Raises StoreError if the bytes cannot be read whole, CorruptExpertError if they differ from their checksum.
        """

    def close(self) -> None:
        """Close the files; no read may follow."""
