"""The bytes of an expert store: the layout of a blob (see core.BlobLayout), and the manifest ``fate.json``."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fate_moe.core import PRECISIONS, SLOT_ALIGNMENT, BlobLayout, ExpertId, Part, Section
from fate_moe.errors import StoreError
from fate_moe.io.checked import checksum, count, file_name, items, require, text
from fate_moe.quant.dtypes import TORCH_DTYPES

__all__ = ["AGAIN", "FORMAT_VERSION", "ExpertEntry", "LayerEntry", "Manifest", "blob_layout"]

FORMAT_VERSION = 1
AGAIN = "delete the store and convert the checkpoint again"

# Parts and sections start on multiples of a cache line, which is also the widest vector load.
PART_ALIGNMENT = 64

# Bits of each plane, by precision: int4 can be read as shorter views, int8 is one plane of whole bytes.
PLANE_WIDTHS = {"int8": (8,), "int4": (2, 1, 1)}

_LONGEST_REASON = 300  # characters: an entry may be as long as the file
_MOST_DIMENSIONS = 8  # of a part; the product of thousands of huge ones would take hours

_Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class ExpertEntry:
    """One blob: its ``offset`` in the shard file (a multiple of 4096), and an xxh3_64 checksum in hex for each section."""

    offset: int
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class LayerEntry:
    """One MoE layer: the path of its experts module, its shard's file name, and the index of each expert's layout in the manifest.

    ``fate.json`` holds a single index if all experts have the same layout.
    """

    name: str
    shard: str
    layouts: tuple[int, ...]
    experts: tuple[ExpertEntry, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of ``fate.json``.

    ``precision`` is that of most experts (in a mixed store some layouts have another); ``dtype`` is the experts' dtype in the
    checkpoint (BF16, F16, F32). ``dense_bytes`` and ``shard_bytes`` are file lengths. ``dense_checksum`` covers all of
    dense.safetensors, whose matrices have ``dense_precision`` (see store/dense.py). ``identity`` differs between stores of other
    sources or conversion options. ``unread`` says why a tensor of the checkpoint is not in the store, by its name.
    """

    format_version: int
    source: str
    family: str
    precision: str
    dtype: str
    layouts: tuple[BlobLayout, ...]
    layers: tuple[LayerEntry, ...]
    dense_bytes: int
    dense_checksum: str
    shard_bytes: dict[str, int]
    identity: str = ""
    dense_precision: str = "lossless"
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.layers)

    @property
    def experts_per_layer(self) -> int:
        """Experts of one layer; of the largest layer if they differ."""
        return max(len(layer.experts) for layer in self.layers)

    @property
    def num_experts(self) -> int:
        """Experts of all layers together."""
        return sum(len(layer.experts) for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot that any expert fits into."""
        return max(self.layouts[index].length for layer in self.layers for index in set(layer.layouts))

    @property
    def expert_bytes(self) -> int:
        """Bytes of all blobs."""
        return sum(layout.length for layer in range(self.num_layers) for layout in self.layouts_of(layer))

    def layers_by_precision(self) -> dict[str, list[str]]:
        """The numbers of the MoE layers of each precision; "3.experts.7" for an expert of a layer with several precisions."""
        by_precision: dict[str, list[str]] = {}
        for layer in range(self.num_layers):
            layouts = self.layouts_of(layer)
            if len(set(layouts)) == 1:
                by_precision.setdefault(layouts[0].precision, []).append(str(layer))
                continue
            for expert, layout in enumerate(layouts):
                by_precision.setdefault(layout.precision, []).append(f"{layer}.experts.{expert}")
        return by_precision

    def layouts_of(self, layer: int) -> tuple[BlobLayout, ...]:
        """The layouts of MoE layer ``layer``'s blobs, by expert."""
        return tuple(self.layouts[index] for index in self.layers[layer].layouts)

    def layout_of(self, expert: ExpertId) -> BlobLayout:
        """The layout of ``expert``'s blob."""
        return self.layouts[self.layers[expert.layer].layouts[expert.expert]]

    def to_json(self) -> str:
        """The text of ``fate.json``; equal manifests give equal bytes."""
        layouts = [
            {
                "precision": layout.precision,
                "length": layout.length,
                "group_size": layout.group_size,
                "plane_widths": layout.plane_widths,
                "sections": [[s.name, s.offset, s.length] for s in layout.sections],
                "parts": [[p.name, p.dtype, p.shape, p.offset] for p in layout.parts],
            }
            for layout in self.layouts
        ]
        layers = [
            {
                "name": layer.name,
                "shard": layer.shard,
                "layout": layer.layouts[0] if len(set(layer.layouts)) == 1 else layer.layouts,
                "experts": [[expert.offset, *expert.checksums] for expert in layer.experts],
            }
            for layer in self.layers
        ]
        facts = {**vars(self), "layouts": layouts, "layers": layers}
        if self.dense_precision == "lossless":
            del facts["dense_precision"]
        del facts["unread"]
        if self.unread:  # in the file by reason: thousands of names may share one
            facts["unread"] = {reason: [] for reason in self.unread.values()}
            for name, reason in self.unread.items():
                facts["unread"][reason].append(name)
        return json.dumps(facts, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, written: str | bytes, where: str = "fate.json") -> Manifest:
        """Parse ``written`` and check everything that can be checked without the other files; errors name the file ``where``.

        Raises StoreError for another format version, and for anything that no conversion could have written.
        """
        try:
            data = json.loads(written)
            version = data["format_version"]
            if type(version) is not int:
                raise ValueError("format_version is not a number")
        except UnicodeDecodeError as error:  # whose own message may quote the whole file
            raise StoreError(f"{where} is damaged (it is no text at byte {error.start}); {AGAIN}") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StoreError(f"{where} is damaged ({error!r}); {AGAIN}") from error
        if version != FORMAT_VERSION:
            advice = "update fate-moe to read it" if version > FORMAT_VERSION else AGAIN
            raise StoreError(
                f"{where}: the store has format version {version}, and this fate-moe reads version {FORMAT_VERSION}; {advice}"
            )
        try:
            return _manifest(data)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            said = " ".join(str(error).split())[:_LONGEST_REASON]
            raise StoreError(f"{where} is damaged ({said}); {AGAIN}") from error


def blob_layout(
    precision: str,
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    group_size: int = 64,
    plane_widths: Sequence[int] | None = None,
) -> BlobLayout:
    """The layout of an expert with parameters of ``shapes`` ([out, in], and [out] for names ending in ``_bias``) in ``dtype``.

    ``dtype`` is a safetensors name; ``group_size`` and ``plane_widths`` (None: PLANE_WIDTHS) apply to quantized precisions.
    Raises ValueError for an unknown precision.
    """
    if precision == "lossless":
        return _place(precision, {"weights": [(name, dtype, shape) for name, shape in shapes.items()]}, 0, ())
    if precision not in PLANE_WIDTHS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    plane_widths = PLANE_WIDTHS[precision] if plane_widths is None else plane_widths
    matrices = {name: shape for name, shape in shapes.items() if not name.endswith("_bias")}
    groups = {name: (rows, -(-cols // group_size)) for name, (rows, cols) in matrices.items()}
    scales: list[_Tensor] = [(f"{name}.{kind}", "F16", shape) for name, shape in groups.items() for kind in ("scale", "zero")]
    sections = {"scales": [*scales, *((name, dtype, shape) for name, shape in shapes.items() if name not in matrices)]}
    for i, width in enumerate(plane_widths):
        bytes_per_group = group_size * width // 8
        sections[f"plane{i}"] = [(f"{name}.plane{i}", "U8", (*shape, bytes_per_group)) for name, shape in groups.items()]
    return _place(precision, sections, group_size, tuple(plane_widths))


def _place(precision: str, contents: dict[str, list[_Tensor]], group_size: int, widths: tuple[int, ...]) -> BlobLayout:
    parts: list[Part] = []
    sections: list[Section] = []
    end = 0
    for section, tensors in contents.items():
        start = end
        for name, dtype, shape in tensors:
            parts.append(Part(name, dtype, tuple(shape), end))
            end = _align(end + _num_bytes(dtype, shape), PART_ALIGNMENT)
        sections.append(Section(section, start, end - start))
    return BlobLayout(precision, tuple(parts), tuple(sections), _align(end, SLOT_ALIGNMENT), group_size, widths)


def _align(amount: int, alignment: int) -> int:
    return -(-amount // alignment) * alignment


def _num_bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * TORCH_DTYPES[dtype].itemsize


# ---- reading fate.json: files are hostile, so every number that a reader uses is checked --------------------------------------


def _manifest(data: dict[str, Any]) -> Manifest:
    unknown = data.keys() - Manifest.__dataclass_fields__.keys()
    require(not unknown, f"unknown entries {sorted(unknown)}")
    shard_bytes = {file_name(name): count(length) for name, length in data["shard_bytes"].items()}
    layouts = tuple(_layout(entry) for entry in items(data["layouts"]))
    layers = tuple(_layer(entry, layouts, shard_bytes) for entry in items(data["layers"]))
    require(bool(layers), "no layers")
    require(len({layer.name for layer in layers}) == len(layers), "two layers of one name")
    require({layer.shard for layer in layers} == shard_bytes.keys(), "layers and shard_bytes name different shards")
    _no_overlaps(layers, layouts)
    require(data["precision"] in PRECISIONS, f"precision {data['precision']!r}")
    require(all(layout.precision in PRECISIONS for layout in layouts), "a layout of unknown precision")
    require(any(layout.precision == data["precision"] for layout in layouts), "layouts of another precision")
    require(data["dtype"] in ("BF16", "F16", "F32"), f"dtype {data['dtype']!r}")
    dense_precision = data.get("dense_precision", "lossless")
    require(dense_precision in PRECISIONS, f"dense precision {dense_precision!r}")
    checked: dict[str, Any] = {"layouts": layouts, "layers": layers, "shard_bytes": shard_bytes}
    checked |= {key: text(data[key]) for key in ("source", "family", "precision", "dtype")}
    return Manifest(
        format_version=FORMAT_VERSION,
        dense_bytes=count(data["dense_bytes"]),
        dense_checksum=checksum(data["dense_checksum"]),
        identity=text(data.get("identity", "")),
        dense_precision=dense_precision,
        unread={text(name): reason for reason, names in data.get("unread", {}).items() for name in items(names)},
        **checked,
    )


def _layout(entry: dict[str, Any]) -> BlobLayout:
    parts = tuple(
        Part(text(name), text(dtype), _shape(shape), count(offset)) for name, dtype, shape, offset in items(entry["parts"])
    )
    sections = tuple(Section(text(name), count(offset), count(length)) for name, offset, length in items(entry["sections"]))
    widths = tuple(count(width) for width in items(entry["plane_widths"]))
    layout = BlobLayout(text(entry["precision"]), parts, sections, count(entry["length"]), count(entry["group_size"]), widths)
    require(layout.length > 0 and layout.length % SLOT_ALIGNMENT == 0, f"blob length {layout.length}")
    if layout.precision != "lossless":
        require(layout.group_size > 0 and layout.group_size % 8 == 0, f"groups of {layout.group_size}")
        require(bool(widths) and sum(widths) <= 8 and all(width in (1, 2, 4, 8) for width in widths), f"planes of {widths} bits")
    end = 0
    for section in sections:
        require(section.offset == end and end % PART_ALIGNMENT == 0, f"section {section.name} at {section.offset}")
        end += section.length
    require(end <= layout.length, f"sections of {end} bytes in a blob of {layout.length}")
    covered = 0
    for part in parts:
        require(part.dtype in TORCH_DTYPES, f"dtype {part.dtype!r} of {part.name}")
        require(part.offset >= covered and part.offset % PART_ALIGNMENT == 0, f"{part.name} at {part.offset}")
        covered = part.offset + _num_bytes(part.dtype, part.shape)
    require(covered <= end, f"parts end at {covered}, sections at {end}")
    return layout


def _shape(value: Any) -> tuple[int, ...]:
    require(len(items(value)) <= _MOST_DIMENSIONS, f"a part of {len(value)} dimensions")
    return tuple(map(count, value))


def _layer(entry: dict[str, Any], layouts: tuple[BlobLayout, ...], shard_bytes: dict[str, int]) -> LayerEntry:
    name, shard, layout_index = text(entry["name"]), text(entry["shard"]), entry["layout"]
    experts = tuple(ExpertEntry(count(offset), tuple(map(checksum, sums))) for offset, *sums in items(entry["experts"]))
    require(bool(experts), f"{name} has no experts")
    indices = tuple(map(count, items(layout_index))) if isinstance(layout_index, list) else (count(layout_index),) * len(experts)
    require(len(indices) == len(experts), f"{name} has {len(indices)} layouts for {len(experts)} experts")
    for number, (expert, layout) in enumerate(zip(experts, (layouts[index] for index in indices), strict=True)):
        where = f"{name} expert {number}"
        require(expert.offset > 0 and expert.offset % SLOT_ALIGNMENT == 0, f"{where} at {expert.offset}")
        require(expert.offset + layout.length <= shard_bytes[shard], f"{where} ends outside {shard}")
        actual, expected = len(expert.checksums), len(layout.sections)
        require(actual == expected, f"{where} has {actual} checksums instead of {expected}")
    return LayerEntry(name, shard, indices, experts)


def _no_overlaps(layers: tuple[LayerEntry, ...], layouts: tuple[BlobLayout, ...]) -> None:
    spans = sorted(
        (layer.shard, expert.offset, layouts[index].length, layer.name)
        for layer in layers
        for expert, index in zip(layer.experts, layer.layouts, strict=True)
    )
    for (shard, offset, length, name), (next_shard, next_offset, _, _) in itertools.pairwise(spans):
        require(shard != next_shard or offset + length <= next_offset, f"experts of {name} overlap at {next_offset}")
