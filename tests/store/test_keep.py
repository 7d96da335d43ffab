"""Mixed stores: rules, choices under a size, and stores whose layers differ."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.errors import ConfigError
from fate_moe.store.convert import convert
from fate_moe.store.keep import choose_precisions, parse_keep
from fate_moe.store.open import open_store, verify
from tests.conftest import load_model


def test_rules() -> None:
    assert parse_keep("layers.0-1:lossless, layers.3:int4", 4) == {0: "lossless", 1: "lossless", 3: "int4"}
    assert parse_keep("layers.0-3:lossless,layers.2:int4", 4)[2] == "int4", "a later rule wins"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layers.0:int5", "'layers.0:int5' is no rule"),
        ("layer.0:int4", "no rule"),
        ("", "no rule"),
        ("layers.2-4:int4", "layers 2 to 4, the model has layers 0 to 3"),
        ("layers.3-2:int4", "layers 3 to 2"),
    ],
)
def test_no_rules(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_keep(text, 4)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.0, 0.09)), min_size=1, max_size=5), st.integers(0, 100))
def test_choices_fit_and_no_swap_of_one_layer_is_better(harms: list[tuple[float, float]], spare: int) -> None:
    sizes = [{"int4": 10, "lossless": 40}] * len(harms)
    harm = [{"int4": high, "lossless": low} for high, low in harms]
    limit = 10 * len(harms) + spare
    chosen = choose_precisions(sizes, harm, limit)
    assert sum(of_layer[name] for of_layer, name in zip(sizes, chosen, strict=True)) <= limit
    total = sum(of_layer[name] for of_layer, name in zip(harm, chosen, strict=True))
    best = min(
        sum(of_layer[name] for of_layer, name in zip(harm, names, strict=True))
        for names in itertools.product(("int4", "lossless"), repeat=len(harms))
        if sum(of_layer[name] for of_layer, name in zip(sizes, names, strict=True)) <= limit
    )
    assert total == pytest.approx(best), "of layers of one size, those that gain most"


def test_a_size_below_the_smallest() -> None:
    with pytest.raises(ConfigError, match="takes 20 bytes, 5 more than 15"):
        choose_precisions([{"int4": 10, "lossless": 40}] * 2, [{"int4": 1.0, "lossless": 0.0}] * 2, 15)


def test_a_mixed_store_runs_and_its_kept_layer_is_exact(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = convert(checkpoint("qwen2_moe"), tmp_path / "mixed", "int4", keep={1: "lossless"})
    store = open_store(path)
    verify(store)
    assert store.manifest.layers_by_precision() == {"int4": [0], "lossless": [1]}
    assert store.manifest.slot_bytes == store.manifest.layout_of(1).length
    pure = [convert(checkpoint("qwen2_moe"), tmp_path / name, name) for name in ("int4", "lossless")]
    for shard, other in (("experts-00001-of-00002.safetensors", pure[0]), ("experts-00002-of-00002.safetensors", pure[1])):
        assert (path / shard).read_bytes() == (other / shard).read_bytes()
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        logits = []
        for folder in (path, *pure):
            model = load_model(folder, expert_cache="50%")
            logits.append(model(tokens).logits)
            model.fate.close()
    mixed, int4, lossless = logits
    assert (mixed - lossless).norm() < (int4 - lossless).norm()


def test_keeping_is_part_of_the_identity(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    stores = [
        open_store(convert(checkpoint("qwen2_moe"), tmp_path / str(number), "int4", keep=keep)).manifest.identity
        for number, keep in enumerate(({}, {0: "lossless"}, {1: "lossless"}))
    ]
    assert len(set(stores)) == 3
    with pytest.raises(ConfigError, match="int5"):
        convert(checkpoint("qwen2_moe"), tmp_path / "never", "int4", keep={0: "int5"})
