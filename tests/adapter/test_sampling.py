"""generation_config.json: values without a meaning name file and field; what says how to compute is not taken over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fate_moe.adapter.sampling import read_generation_config
from fate_moe.errors import StoreError

NAN = float("nan")


def read(tmp_path: Path, options: Any, encoding: str = "utf-8") -> dict[str, Any]:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(options), encoding)
    return read_generation_config(path, 128)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", NAN),
        ("temperature", -1),
        ("temperature", "0.7"),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 1.5),
        ("top_p", NAN),
        ("min_p", 2),
        ("typical_p", 0),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e300),
        ("num_beams", 0),
        ("num_beams", "four"),
        ("no_repeat_ngram_size", -2),
        ("max_length", -5),
        ("max_new_tokens", 0),
        ("do_sample", "yes"),
        ("eos_token_id", 128),
        ("eos_token_id", [2, -1]),
        ("eos_token_id", "</s>"),
        ("forced_eos_token_id", 500),
        ("suppress_tokens", [1, 5000]),
        ("bad_words_ids", [[1], [900]]),
        ("penalty_alpha", 0.6),
        ("guidance_scale", 1.5),
        ("dola_layers", "high"),
        ("prompt_lookup_num_tokens", 3),
        ("num_return_sequences", 2),
        ("num_beam_groups", 2),
        ("force_words_ids", [[3]]),
    ],
)
def test_a_value_without_meaning_names_file_and_field(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=rf"generation_config\.json: .*\b{name}\b") as caught:
        read(tmp_path, {name: value})
    assert "\n" not in str(caught.value)


def test_what_works_is_taken_over(tmp_path: Path) -> None:
    options = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 0,
        "eos_token_id": [2, 127],
        "pad_token_id": -1,
        "of_a_later_version": 5,
    }
    assert read(tmp_path, options) == options
    assert read(tmp_path, {"guidance_scale": 1.0, "num_return_sequences": 1, "penalty_alpha": None})
    assert read(tmp_path, {"top_k": 5}, "utf-8-sig") == {"top_k": 5}


def test_a_temperature_of_zero_is_greedy(tmp_path: Path) -> None:
    assert read(tmp_path, {"do_sample": True, "temperature": 0.0}) == {"do_sample": False, "temperature": 1.0}


def test_the_cache_of_the_file_is_not_the_engines(tmp_path: Path) -> None:
    """Gemma's say "hybrid"; a file made by generate() asks for a dictionary in return."""
    assert read(tmp_path, {"cache_implementation": "hybrid", "return_dict_in_generate": True, "output_scores": True}) == {}


@pytest.mark.parametrize("text", ["[1]", "{torn", "[" * 100_000, "", "null"])
def test_what_is_no_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(StoreError, match=r"generation_config\.json cannot be read"):
        read_generation_config(tmp_path / "generation_config.json", 128)
