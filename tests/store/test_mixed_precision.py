"""Mixed stores: precision rules, choices under a size limit, and stores whose layers differ."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.core import ExpertId
from fate_moe.engine.prepare import prepare
from fate_moe.errors import ConfigError, StoreError
from fate_moe.io.direct import anonymous_buffer
from fate_moe.memory.classes import total_bytes
from fate_moe.store.convert import convert
from fate_moe.store.format import Manifest
from fate_moe.store.mixed_precision import choose_precisions, layer_precisions, parse_precision_rules
from fate_moe.store.open import open_store, verify
from fate_moe.store.reader import DiskSource
from tests.support.engines import load_model


def test_rules() -> None:
    assert parse_precision_rules("layers.0-1:lossless, layers.3:int4", [8] * 4) == {0: "lossless", 1: "lossless", 3: "int4"}
    assert parse_precision_rules("layers.0-3:lossless,layers.2:int4", [8] * 4)[2] == "int4", "a later rule wins"
    rules = parse_precision_rules("layers.0-1.experts.6-7:int8,layers.1:int4,layers.1.experts.0:lossless", [8] * 4)
    assert rules == {ExpertId(0, 6): "int8", ExpertId(0, 7): "int8", 1: "int4", ExpertId(1, 0): "lossless"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers.0:int5", "'layers.0:int5' is not a rule"),
        ("layer.0:int4", "not a rule"),
        ("", "not a rule"),
        ("layers.2-4:int4", "layers 2 to 4; the model has layers 0 to 3"),
        ("layers.3-2:int4", "layers 3 to 2"),
        ("layers.0.experts:int4", "not a rule"),
        ("layers.0.experts.8:int4", "experts 8 to 8; MoE layer 0 has experts 0 to 7"),
        ("layers.1-2.experts.3-6:int4", "experts 3 to 6; MoE layer 2 has experts 0 to 5"),
        ("layers.0.experts.3-2:int4", "experts 3 to 2"),
    ],
)
def test_no_rules(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_precision_rules(text, [8, 8, 6, 8])


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.0, 0.09)), min_size=1, max_size=5), st.integers(0, 100))
def test_choices_fit_and_no_swap_of_one_layer_is_better(bounds: list[tuple[float, float]], spare: int) -> None:
    sizes = [{"int4": 10, "lossless": 40}] * len(bounds)
    errors = [{"int4": high, "lossless": low} for high, low in bounds]
    limit = 10 * len(bounds) + spare
    chosen = choose_precisions(sizes, errors, limit)
    assert sum(layer[name] for layer, name in zip(sizes, chosen, strict=True)) <= limit
    total = sum(layer[name] for layer, name in zip(errors, chosen, strict=True))
    best = min(
        sum(layer[name] for layer, name in zip(errors, names, strict=True))
        for names in itertools.product(("int4", "lossless"), repeat=len(bounds))
        if sum(layer[name] for layer, name in zip(sizes, names, strict=True)) <= limit
    )
    assert total == pytest.approx(best), "with layers of one size, those with the largest gain"


def test_a_limit_below_the_smallest_size() -> None:
    with pytest.raises(ConfigError, match="at least 20 bytes, 5 more than the limit of 15"):
        choose_precisions([{"int4": 10, "lossless": 40}] * 2, [{"int4": 1.0, "lossless": 0.0}] * 2, 15)


def test_a_mixed_store_runs_and_its_lossless_layer_is_exact(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = convert(checkpoint("qwen2_moe"), tmp_path / "mixed", "int4", precision_rules={1: "lossless"})
    store = open_store(path)
    verify(store)
    assert store.manifest.layers_by_precision() == {"int4": ["0"], "lossless": ["1"]}
    assert store.manifest.slot_bytes == store.manifest.layout_of(ExpertId(1, 0)).length
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


def test_precision_rules_are_part_of_the_identity(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    choices: list[dict[int | ExpertId, str]] = [{}, {0: "lossless"}, {1: "lossless"}]
    stores = [
        open_store(convert(checkpoint("qwen2_moe"), tmp_path / str(number), "int4", precision_rules=rules)).manifest.identity
        for number, rules in enumerate(choices)
    ]
    assert len(set(stores)) == 3
    with pytest.raises(ConfigError, match="int5"):
        convert(checkpoint("qwen2_moe"), tmp_path / "never", "int4", precision_rules={0: "int5"})
    with pytest.raises(ConfigError, match="names expert 8; MoE layer 1 has experts 0 to 7"):
        convert(checkpoint("qwen2_moe"), tmp_path / "never", "int4", precision_rules={ExpertId(1, 8): "int8"})


RULES = st.lists(
    st.tuples(st.integers(0, 3), st.none() | st.integers(0, 7), st.sampled_from(("lossless", "int8", "int4"))),
    min_size=1,
    max_size=6,
)


@given(RULES)
def test_each_expert_has_what_the_last_rule_about_it_says(rules: list[tuple[int, int | None, str]]) -> None:
    text = ",".join(f"layers.{layer}{'' if expert is None else f'.experts.{expert}'}:{name}" for layer, expert, name in rules)
    parsed = parse_precision_rules(text, [8] * 4)
    for layer in range(4):
        expected = ["int4"] * 8
        for number, expert, name in rules:
            if number == layer:
                expected = [name if expert in (None, index) else old for index, old in enumerate(expected)]
        assert layer_precisions(layer, 8, "int4", parsed) == expected


@pytest.fixture
def mixed(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """INT4 except two experts of layer 0, one INT8 and one lossless, and an INT8 expert of layer 1."""
    rules: dict[int | ExpertId, str] = {ExpertId(0, 2): "int8", ExpertId(0, 5): "lossless", ExpertId(1, 7): "int8"}
    return convert(checkpoint("qwen2_moe"), tmp_path / "mixed", "int4", precision_rules=rules)


def test_rules_apply_to_single_experts_and_only_to_them(checkpoint: Callable[[str], Path], tmp_path: Path, mixed: Path) -> None:
    store = open_store(mixed)
    verify(store)
    manifest = store.manifest
    assert (manifest.precision, manifest.num_experts) == ("int4", 16)
    assert manifest.layers_by_precision()["lossless"] == ["0.experts.5"]
    assert manifest.layers_by_precision()["int8"] == ["0.experts.2", "1.experts.7"]
    assert manifest.expert_bytes == sum(manifest.layout_of(ExpertId(layer, e)).length for layer in (0, 1) for e in range(8))
    pure = {name: open_store(convert(checkpoint("qwen2_moe"), tmp_path / name, name)) for name in ("int4", "int8", "lossless")}
    for expert in (ExpertId(0, 2), ExpertId(0, 4), ExpertId(0, 5), ExpertId(1, 7)):
        blobs = []
        for each in (store, pure[manifest.layout_of(expert).precision]):
            memory, source = anonymous_buffer(each.manifest.slot_bytes), DiskSource(each)
            source.read(expert, memoryview(memory))
            source.close()
            blobs.append(bytes(memory[: each.manifest.layout_of(expert).length]))
        assert blobs[0] == blobs[1]


@pytest.mark.parametrize("options", [{}, {"exact_activations": True}])
def test_experts_of_several_precisions_in_one_layer_compute_as_in_their_own_stores(
    checkpoint: Callable[[str], Path], tmp_path: Path, mixed: Path, options: dict[str, bool]
) -> None:
    """Each expert of layer 0 against the same expert in a store that has one precision throughout."""
    store = open_store(mixed)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    chosen = [[expert] for expert in range(8)]
    for index in chosen:
        answers = []
        for name in ("mixed", store.manifest.layout_of(ExpertId(0, index[0])).precision):
            folder = mixed if name == "mixed" else convert(checkpoint("qwen2_moe"), tmp_path / name, name, dense_precision="int8")
            model = load_model(folder, **options)
            stack = model.fate.runtime
            experts = next(module for module in model.modules() if hasattr(module, "fate_runtime"))
            dtype = next(model.parameters()).dtype
            with torch.no_grad():
                answers.append(stack.compute(0, experts, hidden.to(dtype), torch.tensor([index] * 3), torch.ones(3, 1)))
            model.fate.close()
        assert torch.equal(*answers)


@pytest.mark.parametrize("precision_policy", ["full", "routing-weighted"])
def test_a_budget_never_changes_the_output_of_mixed_experts(mixed: Path, precision_policy: str) -> None:
    """Same numbers, down to the minimum of slots by length and of shared slots, and slots take the memory of the plan. A precision
    policy does not affect experts that have no shorter views."""
    tokens, logits = torch.arange(1, 40)[None], []
    needs = prepare(mixed).footprint()
    min_by_length, min_shared = total_bytes(needs.slots), needs.min_slots * needs.slot_bytes
    assert min_shared < min_by_length
    for expert_cache in ("100%", "50%", min_by_length, min_shared):
        model = load_model(mixed, expert_cache=expert_cache, precision_policy=precision_policy)
        plan, residency = model.fate.plan, model.fate.runtime.residency
        assert len(plan.slots) == (1 if expert_cache == min_shared else 3)
        assert len(residency._reader.arena.buffer) == plan.expert_cache_bytes
        assert plan.expert_cache_bytes <= (expert_cache if isinstance(expert_cache, int) else needs.expert_bytes)
        with torch.no_grad():
            prompt = model(tokens, use_cache=True)
            steps = [model(torch.tensor([[token]]), past_key_values=prompt.past_key_values).logits for token in (3, 5, 7)]
        logits.append(torch.cat([prompt.logits, *steps], 1))
        used = model.fate.runtime.view_selector.used
        residency.wait_idle()
        residency.check_integrity()
        model.fate.close()
        assert {bits for (expert, bits) in used if expert in (ExpertId(0, 2), ExpertId(1, 7))} == {8}
    if precision_policy == "full":
        assert all(torch.equal(logits[0], others) for others in logits[1:])


@pytest.mark.parametrize("layout", [[0] * 7, [0] * 7 + [9], ["a"] * 8])
def test_layouts_that_no_conversion_writes(mixed: Path, layout: list[object]) -> None:
    facts = json.loads((mixed / "fate.json").read_text())
    facts["layers"][0]["layout"] = layout
    with pytest.raises(StoreError, match="is damaged"):
        Manifest.from_json(json.dumps(facts))
