"""Every parser under texts and bytes that nobody wrote: a value, or the parser's own error in one line; never another exception."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_moe.checkpoints.gguf_file import read_gguf
from fate_moe.errors import ConfigError, FateError, StoreError
from fate_moe.io.json_file import parse_json
from fate_moe.io.tensorfile import parse_header
from fate_moe.store.format import Manifest
from fate_moe.trace.schema import read_trace
from fate_moe.units import parse_amount, parse_host_compute, parse_size

pytestmark = pytest.mark.slow

quick = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
numbers = st.integers(-2, 40) | st.sampled_from([1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, 10**400]) | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def fits(action: Callable[[], object], *errors: type[Exception]) -> None:
    """``action`` ends well or in one of ``errors``, whose message is a line."""
    said = ""
    try:
        action()
    except errors as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000


@given(st.text(max_size=40) | st.from_regex(r"\s*[0-9.]{1,400}\s*[kKmMgGtTiIbB%]*\s*") | numbers)
@quick
def test_sizes(text: Any) -> None:
    for parse in (parse_size, parse_host_compute, lambda text: parse_amount(text, 1 << 40)):
        fits(lambda parse=parse: parse(text), ConfigError)  # type: ignore[misc]


entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "U8", "F4"]) | values, "shape": st.lists(numbers, max_size=20) | values,
     "data_offsets": st.lists(numbers, min_size=2, max_size=2) | values}
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=6), entries | values, max_size=4) | values, st.integers(0, 1 << 40), st.binary(max_size=8))
@quick
def test_safetensors_headers(header: Any, num_bytes: int, tail: bytes) -> None:
    fits(lambda: parse_header(json.dumps(header).encode() + tail, num_bytes), ValueError)


@given(st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()))
@quick
def test_json_files_and_manifests(data: bytes) -> None:
    fits(lambda: parse_json(data), ValueError)
    fits(lambda: Manifest.from_json(data), StoreError)


@given(
    st.dictionaries(st.sampled_from(["format_version", "layers", "layouts", "shard_bytes", "precision", "dtype", "unread"]), values)
)
@quick
def test_manifests_of_other_values(entries: dict[str, Any]) -> None:
    fits(lambda: Manifest.from_json(json.dumps({"format_version": 1, **entries})), StoreError)


words = st.one_of(
    st.sampled_from([struct.pack("<Q", n) for n in (0, 1, 2, 3, 8, 9, 255, 1 << 32, (1 << 64) - 1)]),
    st.sampled_from([struct.pack("<I", n) for n in (*range(13), 99, 1 << 31)]),
    st.sampled_from(
        [struct.pack("<Q", len(name)) + name for name in (b"general.alignment", b"general.architecture", b"a", b"tokenizer.x")]
    ),
    st.binary(max_size=9),
)


@given(st.integers(0, 3), st.integers(0, 3), st.lists(words, max_size=24), st.sampled_from([b"GGUF\x03\0\0\0", b"GGUF\x02\0\0\0"]))
@quick
def test_gguf_headers(tmp_path: Path, num_tensors: int, num_fields: int, parts: list[bytes], begin: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(begin + struct.pack("<QQ", num_tensors, num_fields) + b"".join(parts))
    fits(lambda: read_gguf(path), FateError)


def npy(dtype: Any, shape: Any) -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text) + 1) + text + b"\n" + bytes(64)


shapes = st.lists(st.integers(-1, 4) | st.sampled_from([1 << 40, 1 << 62]), max_size=4).map(tuple) | values
dtypes = st.sampled_from(["|u1", "<f2", "<f4", "<i8", "|O", "|S2", "|V3", "<M8[s]", "x"]) | values
names = st.sampled_from(["experts", "probs", "start", "num_experts", "stall", "reads", "routers", "meta", "../x", "version"])


@given(st.dictionaries(names, st.tuples(dtypes, shapes) | st.binary(max_size=30), max_size=5))
@quick
def test_trace_files(tmp_path: Path, members: dict[str, Any]) -> None:
    whole = {"experts": np.array([[[0, 1]]], np.uint8), "probs": np.ones((1, 1, 2), np.float16), "start": np.array([0, 1])}
    out = io.BytesIO()
    np.savez(out, **{name: array for name, array in whole.items() if name not in members})  # type: ignore[arg-type]
    with zipfile.ZipFile(out, "a") as archive:
        for name, made in members.items():
            archive.writestr(f"{name}.npy", made if isinstance(made, bytes) else npy(*made))
    (tmp_path / "t.npz").write_bytes(out.getvalue())
    fits(lambda: read_trace(tmp_path / "t.npz"), ConfigError)


pieces = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {', "}}", '"', "\\", "\n", " " * 50]
    )
    | st.text(max_size=8),
    max_size=14,
)


@given(pieces, st.sampled_from([None, "f"]))
@quick
def test_answers_of_a_server(parts: list[str], name: str | None) -> None:
    """Whatever a model writes, the readers pass all of it on or understand it; none of it raises."""
    pytest.importorskip("fastapi")
    from fate_moe.serve.messages import parsed_arguments
    from fate_moe.serve.parsing import _ANCHOR, _CALLS, _THINK, ForcedCall, PlainReader, TemplateReader, Text

    parsed_arguments("".join(parts))
    template = {
        "defaults": {"role": "assistant"},
        "start_anchor": _ANCHOR,
        "fields": {"reasoning_content": _THINK, "tool_calls": _CALLS, "content": {"content": "text"}},
    }
    plain = PlainReader()
    for reader in (plain, ForcedCall(name), TemplateReader(template, "<|assistant|>", [])):
        deltas = [delta for part in parts for delta in reader.feed(part)] + reader.finish()
        if reader is plain:
            assert "".join(delta.text for delta in deltas if isinstance(delta, Text)) == "".join(parts)
