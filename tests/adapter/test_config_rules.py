"""config.json is refused in one line where transformers would warn, or compute NaN, or take minutes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fate_moe.adapter.meta_model import build_meta_model
from fate_moe.errors import CheckpointError

_SCALED = {"factor": 2.0, "original_max_position_embeddings": 64}
Checkpoints = Callable[[str], Path]


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, **values}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rope(rope_type="ntk"), r"rope_parameters has the type 'ntk', and .*yarn are known"),
        ({"rope_parameters": None, "rope_scaling": {"type": "foo", "factor": 2.0}}, "has the type 'foo'"),
        (rope(rope_type="linear", factor=0), r"rope_parameters\.factor is 0, and a number above 0"),
        (rope(rope_type="linear", factor=-2.0), r"factor is -2\.0"),
        (rope(rope_type="yarn", factor="2"), "factor is '2'"),
        (rope(rope_type="default", rope_theta=0), "rope_theta is 0"),
        (
            rope(rope_type="llama3", factor=2.0, original_max_position_embeddings=64, low_freq_factor=4.0, high_freq_factor=4.0),
            "not above",
        ),
        (
            rope(rope_type="longrope", factor=2.0, original_max_position_embeddings=64, short_factor=[0.0], long_factor=[1.0]),
            "short_factor",
        ),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"num_hidden_layers": "2"}, "expected int, got str"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 10**9}, "at most 10000 are expected"),
        ({"num_local_experts": "8"}, "num_experts is '8', and a whole number"),
        ({"num_experts_per_tok": 0}, "a token takes 0 of 8 experts"),
        ({"hidden_act": "foo"}, "does not know 'foo'"),
        ({"layer_types": ["full_attention"]}, "must be equal to the number of `layer_types`"),
        ({"model_type": None}, "holds no model_type"),
    ],
)
def test_a_configuration_that_would_compute_nonsense(
    checkpoint: Checkpoints, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((checkpoint("qwen3_moe") / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(CheckpointError, match=message) as caught:
        build_meta_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"null", "holds no JSON object but NoneType"),
        (b"[]", "holds no JSON object but list"),
        (b"", "is empty"),
        (b'{"model_type": "mixtral",\n}', "line 2, column 1: a comma before a closing bracket; delete the comma"),
        (b'{"model_type": "mixtral" # ours\n}', "line 1, column 26: JSON has no comments"),
        (b"{'model_type': 'mixtral'}", "double quotes"),
        (b'{"use_cache": True}', "true, false and null"),
        (b'{"model_type": "mixtral", "x": "Andr\xe9"}', "is not UTF-8 text .byte 0xe9 in line 1.; save it as UTF-8"),
        (b'{"num_experts": 8, "num_experts": 4}', "has 'num_experts' twice, as 8 and as 4; delete one"),
        (b'{"model_type": "mix', "is not valid JSON: line 1"),
        (b"[" * 100_000, "nested too deeply"),
        (b"<!DOCTYPE html>", "is a web page"),
    ],
)
def test_a_config_json_that_cannot_be_read(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        build_meta_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_json_with_a_byte_order_mark(checkpoint: Checkpoints, tmp_path: Path, encoding: str) -> None:
    text = (checkpoint("qwen3_moe") / "config.json").read_text()
    (tmp_path / "config.json").write_bytes(text.encode(encoding))
    assert build_meta_model(tmp_path).config.num_hidden_layers == 2


def test_linear_rope_of_old_checkpoints_is_read(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """rope_scaling with "type", before transformers 5."""
    config = json.loads((checkpoint("qwen3_moe") / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}})
    )
    assert build_meta_model(tmp_path).config.rope_parameters["factor"] == 2.0
