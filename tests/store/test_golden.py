"""A format is its bytes: a change of these bytes needs another FORMAT_VERSION, or existing stores become unreadable.

Where one of these fails and the change is meant, raise FORMAT_VERSION and put the new values here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from fate_moe.io.tensorfile import place_tensors
from fate_moe.quant.blob import encode
from fate_moe.store.convert import convert
from fate_moe.store.format import FORMAT_VERSION, Manifest, blob_layout
from tests.support.golden import write_checkpoint

SHARD = "experts-00001-of-00001.safetensors"


def digest(data: bytes) -> str:
    return str(xxhash.xxh3_64_hexdigest(data))


def test_the_version_these_bytes_belong_to() -> None:
    assert FORMAT_VERSION == 1


def test_a_blob_byte_by_byte() -> None:
    """Two rows of 8 weights in groups of 8, planes 2+1+1: rows 0..15 * 0.5 - 4 and all 1.0."""
    layout = blob_layout("int4", {"down_proj": (2, 8), "down_proj_bias": (2,)}, "F32", group_size=8)
    weights = torch.tensor([[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, 3.5], [1.0] * 8])
    blob = encode(layout, {"down_proj": weights, "down_proj_bias": torch.tensor([1.0, -2.0])})
    assert len(blob) == 4096
    at = {part.name: part.offset for part in layout.parts}
    assert at == {
        "down_proj.scale": 0,
        "down_proj.zero": 64,
        "down_proj_bias": 128,
        "down_proj.plane0": 192,
        "down_proj.plane1": 256,
        "down_proj.plane2": 320,
    }
    assert blob[0:4].hex() == "0038" + "0000"  # 0.5, and 0 for the constant row
    assert blob[64:68].hex() == "0044" + "00bc"  # w = scale * q - zero: 4.0, -1.0
    assert blob[128:136].hex() == "0000803f" + "000000c0"
    # codes 0 1 2 3 4 5 6 15: h = 0 0 0 0 1 1 1 3; element 2j+b in bits 2j of byte b; m and l: element e in bit e
    assert blob[192:196].hex() == "50d0" + "0000"
    assert blob[256:258].hex() == "cc" + "00"
    assert blob[320:322].hex() == "aa" + "00"
    used = {*range(4), *range(64, 68), *range(128, 136), *range(192, 196), 256, 257, 320, 321}
    assert not any(byte for place, byte in enumerate(blob) if place not in used)
    assert [(s.name, s.offset, s.length) for s in layout.sections] == [
        ("scales", 0, 192),
        ("plane0", 192, 64),
        ("plane1", 256, 64),
        ("plane2", 320, 64),
    ]


def test_a_header_byte_by_byte() -> None:
    header, entries = place_tensors([("a", "BF16", (2, 3)), ("b", "U8", (4096,))])
    text = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"b":{"dtype":"U8","shape":[4096],"data_offsets":[12,4108]}}'
    )
    assert header == (4088).to_bytes(8, "little") + text.ljust(4088)
    assert [(entry.name, entry.offset, entry.length) for entry in entries] == [("a", 4096, 12), ("b", 4108, 4096)]


GOLDEN = {
    "lossless": {"dense.safetensors": "427117c62ef82548", SHARD: "02bd83ff4f1a7455", "fate.json": "b550a9596f9d8378"},
    "int4": {"dense.safetensors": "427117c62ef82548", SHARD: "0684aed8e98634bb", "fate.json": "0dd5071224a3beb5"},
}


@pytest.mark.parametrize("precision", GOLDEN)
def test_a_complete_store(tmp_path: Path, precision: str) -> None:
    store = convert(write_checkpoint(tmp_path / "checkpoint"), tmp_path / "store", precision, solver="minmax")
    assert sorted(path.name for path in store.iterdir()) == ["config.json", "dense.safetensors", SHARD, "fate.json"]
    facts = json.loads((store / "fate.json").read_bytes())
    facts["identity"] = ""  # depends on the checkpoint's time
    manifest = json.dumps(facts, separators=(",", ":")).encode()
    digests = {name: digest((store / name).read_bytes()) for name in ("dense.safetensors", SHARD)} | {"fate.json": digest(manifest)}
    assert digests == GOLDEN[precision]


def test_int4_fate_json_in_full(tmp_path: Path) -> None:
    """The manifest as text, complete enough to write a reader in another language."""
    store = convert(write_checkpoint(tmp_path / "checkpoint"), tmp_path / "store", "int4", solver="minmax")
    text = (store / "fate.json").read_text()
    assert Manifest.from_json(text).to_json() == text
    facts = json.loads(text)
    assert list(facts) == [
        "format_version",
        "source",
        "family",
        "precision",
        "dtype",
        "layouts",
        "layers",
        "dense_bytes",
        "dense_checksum",
        "shard_bytes",
        "identity",
        "dense_precision",
    ]
    assert facts["layouts"] == [
        {
            "precision": "int4",
            "length": 8192,
            "group_size": 64,
            "plane_widths": [2, 1, 1],
            "sections": [["scales", 0, 640], ["plane0", 640, 2176], ["plane1", 2816, 1088], ["plane2", 3904, 1088]],
            "parts": [
                ["gate_up_proj.scale", "F16", [32, 2], 0],
                ["gate_up_proj.zero", "F16", [32, 2], 128],
                ["down_proj.scale", "F16", [72, 1], 256],
                ["down_proj.zero", "F16", [72, 1], 448],
                ["gate_up_proj.plane0", "U8", [32, 2, 16], 640],
                ["down_proj.plane0", "U8", [72, 1, 16], 1664],
                ["gate_up_proj.plane1", "U8", [32, 2, 8], 2816],
                ["down_proj.plane1", "U8", [72, 1, 8], 3328],
                ["gate_up_proj.plane2", "U8", [32, 2, 8], 3904],
                ["down_proj.plane2", "U8", [72, 1, 8], 4416],
            ],
        }
    ]
    (layer,) = facts["layers"]
    assert (layer["name"], layer["shard"], layer["layout"]) == ("model.layers.0.mlp.experts", SHARD, 0)
    blobs = load_file(store / SHARD)
    for number, (offset, *checksums) in enumerate(layer["experts"]):
        assert offset == 4096 + number * 8192
        blob = bytes(blobs[f"model.layers.0.mlp.experts.{number}"].numpy())
        sections = facts["layouts"][0]["sections"]
        assert checksums == [digest(blob[start : start + length]) for _, start, length in sections]
    assert facts["dense_checksum"] == digest((store / "dense.safetensors").read_bytes())
    assert facts["shard_bytes"] == {SHARD: 4096 + 2 * 8192}
