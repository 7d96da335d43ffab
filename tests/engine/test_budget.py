"""Sizes by hand, refusals with the smallest budget that works, and what plan says is what load does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fate_moe import plan
from fate_moe.adapter.meta_model import build_meta_model, expert_stacks
from fate_moe.config import OffloadConfig
from fate_moe.core import ExpertId
from fate_moe.engine.budget import Plan, footprint, make_plan
from fate_moe.engine.prepare import prepare, store_for
from fate_moe.errors import BudgetError, ConfigError
from fate_moe.memory.classes import fewest, total_bytes
from fate_moe.store.convert import convert
from fate_moe.store.learned import save_gates
from fate_moe.units import format_bytes, parse_amount, parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 << 30), ("4096MiB", 4 << 30), ("1.5G", 3 << 29), ("4GB", 4 * 10**9), ("10", 10), ("2kib", 2048)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4 gigs", "-1GiB", "0", "1e9", "12%"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)


def test_amounts() -> None:
    assert parse_amount("25%", 1000) == 250
    assert parse_amount("0.75", 1000) == 750
    assert parse_amount("1KiB", 10) == 1024
    for wrong in ("0%", "101%", "1.5x"):
        with pytest.raises(ConfigError):
            parse_amount(wrong, 1000)
    assert [format_bytes(size) for size in (0, 1023, 1 << 20, 1000 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1 MiB",
        "1000 MiB",
        "5 TiB",
    ]


def test_unknown_options_name_their_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'expert_cach'; did you mean 'expert_cache'\?"):
        OffloadConfig.from_options({"expert_cach": "25%"})
    with pytest.raises(ConfigError, match=r"did you mean 'shallow-arc'\?"):
        OffloadConfig(policy="shalow-arc")
    options: list[dict[str, Any]] = [
        {"context_length": 0},
        {"io_threads": 1},
        {"ram": "much"},
        {"expert_cache": "0%"},
        {"precision": "int5"},
    ]
    for wrong in options:
        with pytest.raises(ConfigError):
            OffloadConfig(**wrong)


def test_footprint_by_hand(checkpoint: Callable[[str], Path]) -> None:
    """Qwen1.5-MoE-A2.7B's geometry, from a config.json alone."""
    import json

    folder = checkpoint("qwen2_moe").parent / "geometry"
    folder.mkdir(exist_ok=True)
    geometry = {
        "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "vocab_size": 151936, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(geometry))
    model = build_meta_model(folder)
    needs = footprint(model, expert_stacks(model), "lossless")
    assert needs.num_experts == 24 * 60
    assert needs.min_slots == 4
    assert needs.slot_bytes == 3 * 2048 * 1408 * 2  # already a multiple of 4096
    assert needs.kv_bytes_per_token == 24 * 2 * 2048 * 2
    assert needs.int8_kv_bytes_per_token == 24 * 2 * 16 * (128 + 2 * 4)  # a scale for each 64 channels of a head
    plans = [make_plan(needs, OffloadConfig(ram="20GiB", context_length=1024, kv_cache=kv)) for kv in ("bf16", "int8")]
    assert [plan.kv_cache_bytes for plan in plans] == [1024 * 24 * 2 * 4096, 1024 * needs.int8_kv_bytes_per_token]
    assert plans[1].num_slots > plans[0].num_slots
    assert any("int8" in remark for _, _, remark in plans[1].rows())
    attention = 4 * 2048 * 2048 + 3 * 2048
    per_layer = attention + 3 * 2048 * 5632 + 2048 + 60 * 2048 + 2 * 2048  # shared expert, its gate, router, norms
    assert (needs.dense_bytes, needs.row_bytes) == (2 * (24 * per_layer + 151936 * 2048 + 2048), 2 * 151936 * 2048)
    groups = 3 * 2048 * 1408 // 64
    int4 = footprint(model, expert_stacks(model), "int4").slot_bytes
    assert groups * 36 <= int4 < groups * 36 + 4096


def test_a_written_out_expert_is_counted(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the prompt's length: a pass over experts, or with exact activations or without kernels one expert as numbers."""
    model = build_meta_model(checkpoint("qwen2_moe")).bfloat16()
    stacks = expert_stacks(model)
    (wide, hidden), (_, inner) = stacks[0].parameters.values()
    numbers = wide * hidden + hidden * inner
    monkeypatch.setattr("fate_moe.engine.budget.native", SimpleNamespace())
    needs = footprint(model, stacks, "int4")
    assert needs.scratch_bytes == 256 * (4 * max(wide, hidden) + 3 * (hidden + inner))
    assert needs.exact_scratch_bytes == 2 * numbers
    for exact, scratch in ((False, needs.scratch_bytes), (True, needs.exact_scratch_bytes)):
        config = OffloadConfig(ram="64GiB", context_length=16, exact_activations=exact)
        each = needs.activation_bytes_per_token + needs.angle_bytes_per_token
        assert make_plan(needs, config).activation_bytes == 16 * each + scratch
    monkeypatch.setattr("fate_moe.engine.budget.native", None)
    assert footprint(model, stacks, "int4").scratch_bytes == 2 * numbers
    assert footprint(model, stacks, "lossless").scratch_bytes == 0


def test_prompts_in_pieces_have_the_activations_of_a_piece(checkpoint: Callable[[str], Path]) -> None:
    model = build_meta_model(checkpoint("qwen2_moe")).bfloat16()
    stacks = expert_stacks(model)
    needs = footprint(model, stacks, "int4")
    assert needs.in_pieces
    short, long, exact = (
        make_plan(needs, OffloadConfig(ram="64GiB", context_length=length, exact_activations=exact))
        for length, exact in ((2048, False), (32768, False), (32768, True))
    )
    assert (short.rows_at_once, long.rows_at_once, exact.rows_at_once) == (2048, 2048, 32768)
    assert long.activation_bytes - short.activation_bytes == (32768 - 2048) * needs.angle_bytes_per_token
    assert not footprint(build_meta_model(checkpoint("qwen2_moe")), stacks, "int4").in_pieces  # in fp32


def test_prefixes_are_a_part_of_the_kv_cache(checkpoint: Callable[[str], Path]) -> None:
    model = build_meta_model(checkpoint("qwen2_moe"))
    needs = footprint(model, expert_stacks(model), "lossless")

    def plan(share: str | int) -> Plan:
        return make_plan(needs, OffloadConfig(prefix_cache=share, context_length=128))

    whole = plan("100%")
    assert whole.prefix_cache_bytes == whole.kv_cache_bytes
    assert plan("25%").prefix_cache_bytes == whole.kv_cache_bytes // 4
    assert plan("off").prefix_cache_bytes == 0
    assert "prefixes" not in str(plan("off").rows())
    assert "up to" in next(remark for what, _, remark in plan("25%").rows() if what == "KV cache")
    assert plan("25%").num_slots == plan("off").num_slots
    with pytest.raises(ConfigError, match="a larger context_length"):
        plan(whole.kv_cache_bytes + 1)


def test_too_small_budgets_name_the_smallest_that_works(checkpoint: Callable[[str], Path]) -> None:
    model = build_meta_model(checkpoint("qwen2_moe"))
    needs = footprint(model, expert_stacks(model), "lossless")
    with pytest.raises(BudgetError, match=r"at least --ram \d+MiB") as caught:
        make_plan(needs, OffloadConfig(ram="10MiB"))
    enough = caught.value.smallest_bytes + (4 << 20)  # this process may have grown meanwhile
    smallest = make_plan(needs, OffloadConfig(ram=enough))
    assert smallest.num_slots >= needs.min_slots
    assert smallest.left_bytes >= 0
    with pytest.raises(BudgetError, match="one token needs 2"):
        make_plan(needs, OffloadConfig(expert_cache=needs.slot_bytes))
    with pytest.raises(BudgetError, match="is too small"):
        make_plan(needs, OffloadConfig(ram=caught.value.smallest_bytes // 2, expert_cache="100%"))


def test_a_mixed_store_has_slots_of_each_length(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    rules: dict[int | ExpertId, str] = {ExpertId(0, 5): "lossless", ExpertId(1, 2): "int8"}
    needs = prepare(convert(checkpoint("qwen2_moe"), tmp_path / "mixed", "int4", precision_rules=rules)).footprint()
    lengths = [of.slot_bytes for of in needs.slots]
    assert [of.num_experts for of in needs.slots] == [14, 1, 1]
    assert needs.expert_bytes == 14 * lengths[0] + lengths[1] + lengths[2]
    with pytest.raises(BudgetError, match=r"--ram \d+MiB") as caught:
        make_plan(needs, OffloadConfig(ram="10MiB"))
    smallest = make_plan(needs, OffloadConfig(ram=caught.value.smallest_bytes + (4 << 20)))
    assert smallest.left_bytes >= 0
    whole, half = (make_plan(needs, OffloadConfig(expert_cache=share)) for share in ("100%", "50%"))
    assert [of.num_slots for of in whole.slots] == [14, 1, 1]
    assert (whole.num_slots, whole.num_experts, whole.expert_cache_bytes) == (16, 16, needs.expert_bytes)
    assert half.slots[1:] == whole.slots[1:], "one that is alone in its class keeps its slot"
    assert half.num_slots > needs.expert_bytes // 2 // needs.slot_bytes
    assert half.expert_cache_bytes <= needs.expert_bytes // 2 < half.expert_cache_bytes + lengths[0]
    assert half.as_dict()["slots"] == [of._asdict() for of in half.slots]
    assert half.as_dict()["num_slots"] == half.num_slots
    rows = half.rows()
    assert sum(size for _, size, _ in rows[:-1]) == half.budget_bytes
    assert [what for what, _, _ in rows if "slots" in what] == [f"expert slots of {format_bytes(length)}" for length in lengths]
    for share in ("1", str(total_bytes(fewest(needs.slots, needs.min_slots)) - 1)):
        with pytest.raises(BudgetError, match="one token needs"):
            make_plan(needs, OffloadConfig(expert_cache=share))


def test_plan_is_what_load_does(checkpoint: Callable[[str], Path], loaded: Callable[..., Any]) -> None:
    planned = plan(checkpoint("qwen2_moe"), expert_cache="50%")
    model = loaded("qwen2_moe", expert_cache="50%")
    assert planned.num_slots == model.fate.plan.num_slots == 8
    assert abs(planned.dense_bytes - model.fate.plan.dense_bytes) < 64 << 10  # the file's header
    assert planned.slot_bytes == model.fate.plan.slot_bytes
    assert sum(size for _, size, _ in planned.rows()[:-1]) == planned.budget_bytes
    assert "slots" not in planned.as_dict()
    assert ("expert slots", 8 * planned.slot_bytes, "8 of 16 experts (50.0%), lossless") in planned.rows()


def test_a_plan_counts_the_gates_of_fate_fit_as_load_does(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = convert(checkpoint("qwen3_moe"), tmp_path / "store")
    before = plan(store, expert_cache="50%")
    save_gates(store, [torch.zeros(8, 65), torch.zeros(8, 65)])
    planned, loaded_plan = plan(store, expert_cache="50%"), prepare(store).plan(OffloadConfig(expert_cache="50%"))
    assert planned.dense_bytes > before.dense_bytes
    assert planned.dense_bytes == loaded_plan.dense_bytes


def test_a_plan_of_a_checkpoint_that_was_converted_is_its_stores(checkpoint: Callable[[str], Path]) -> None:
    source = checkpoint("olmoe")
    estimated = plan(source, expert_cache="50%")
    exact = prepare(store_for(source, "lossless")).plan(OffloadConfig(expert_cache="50%"))
    assert estimated.dense_bytes != exact.dense_bytes  # the file's header
    assert plan(source, expert_cache="50%").dense_bytes == exact.dense_bytes
