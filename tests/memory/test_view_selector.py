"""Precision policies on running models: what is read, what is counted, and that upgrades are exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.core import ExpertId, Routing
from fate_moe.engine.prepare import store_for
from fate_moe.errors import CorruptExpertError
from fate_moe.memory.precision import make_precision_policy
from fate_moe.memory.view_selector import chosen_weights
from fate_moe.store.open import open_store
from fate_moe.store.reader import DiskSource

TOKENS = torch.randint(1, 128, (1, 40), generator=torch.Generator().manual_seed(5))

ROBUST = {2: 0.1, 3: 0.01}  # nats lost by shorter views, of a model that bears them


def run(model: Any) -> torch.Tensor:
    """Prefill of 40 tokens, then 4 decode steps; all logits."""
    with torch.no_grad():
        output = model(TOKENS, use_cache=True)
        steps = [output.logits[0]]
        for token in (3, 5, 7, 11):
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits[0])
    return torch.cat(steps)


@pytest.mark.parametrize("direct", [True, False])
def test_a_short_read_and_its_upgrade_are_one_full_read(checkpoint: Callable[[str], Path], direct: bool) -> None:
    """Bit for bit, whatever the steps, and each step brings its view."""
    store = open_store(store_for(checkpoint("qwen2_moe"), "int4"))
    sections = store.manifest.layouts_of(0)[0].sections
    for steps in ([2, None], [1, 2, 3, None], [3, None], [2, 3, None]):
        source = DiskSource(store, direct)
        whole, stepwise = (snapshot_memory(store.manifest.slot_bytes) for _ in range(2))
        source.read(ExpertId(1, 3), whole)
        first, total = 0, 0
        for last in steps:
            total += source.read(ExpertId(1, 3), stepwise, first, last)
            end = sections[last - 1].offset + sections[last - 1].length if last else len(whole)
            assert stepwise[:end] == whole[:end]
            first = last or 0
        assert stepwise == whole
        assert total <= len(whole) + 4096 * (len(steps) - 1)
        source.close()


def snapshot_memory(num_bytes: int) -> memoryview:
    import mmap

    return memoryview(mmap.mmap(-1, num_bytes))


def test_each_section_is_checked_when_it_is_read(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A flipped bit in the last plane is no matter to a shorter view, and found by the read that brings that plane."""
    import shutil

    path = tmp_path / "store"
    shutil.copytree(store_for(checkpoint("qwen2_moe"), "int4"), path)
    store = open_store(path)
    last = store.manifest.layouts_of(0)[0].sections[-1]
    with open(store.shard_of(ExpertId(0, 0)), "r+b") as file:
        file.seek(store.manifest.layers[0].experts[0].offset + last.offset)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    source = DiskSource(store)
    memory = snapshot_memory(store.manifest.slot_bytes)
    source.read(ExpertId(0, 0), memory, 0, 3)
    with pytest.raises(CorruptExpertError, match=r"layer 0 expert 0: section plane2"):
        source.read(ExpertId(0, 0), memory, 3)
    source.close()


def test_full_is_the_default_and_counts_everything_as_four_bits(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe", "int4", expert_cache="50%")
    run(model)
    report = model.fate.report()
    assert report.uses_by_bits.keys() == {4}
    assert report.uses_by_bits[4] == report.experts.lookups == sum(model.fate.bits_used().values())
    lossless = loaded("qwen2_moe")
    run(lossless)
    assert lossless.fate.report().uses_by_bits.keys() == {32}


@pytest.mark.parametrize("policy", ["prefill-popularity", "routing-weighted", "budget"])
def test_policies_read_less_and_what_is_read_is_what_is_computed_with(loaded: Callable[..., Any], policy: str) -> None:
    options = {"expert_cache": "40%", "preset": "load-on-demand", "exact_activations": True}
    full = loaded("qwen2_moe", "int4", **options)
    want = run(full)
    model = loaded("qwen2_moe", "int4", precision_policy=policy, **options)
    model.fate.runtime.view_selector.policy = make_precision_policy(policy, ROBUST)
    got = run(model)
    report = model.fate.report()
    assert report.experts.bytes_read < full.fate.report().experts.bytes_read
    assert min(report.uses_by_bits) < 4
    assert sum(report.uses_by_bits.values()) == report.experts.lookups
    assert not torch.equal(got, want)
    assert (got - want).norm() < (want - want.mean()).norm(), "near the truth all the same"
    assert policy in str(report)
    assert model.fate.report().as_dict()["experts"]["uses_by_bits"] == report.uses_by_bits
    model.fate.runtime.residency.check_integrity()


def test_prefill_popularity_decodes_with_everything(loaded: Callable[..., Any]) -> None:
    """What prefill read short is upgraded where decode wants it, so a decode step is that of the full policy on the same past."""
    model = loaded("qwen2_moe", "int4", precision_policy="prefill-popularity", expert_cache="100%", predictor="none")
    model.fate.runtime.view_selector.policy = make_precision_policy("prefill-popularity", ROBUST)
    run(model)
    before = dict(model.fate.bits_used())
    with torch.no_grad():
        got = model(torch.tensor([[9]])).logits
        want = loaded("qwen2_moe", "int4")(torch.tensor([[9]])).logits
    assert torch.equal(got, want)
    grown = {key for key, uses in model.fate.bits_used().items() if uses > before.get(key, 0)}
    assert grown
    assert all(bits == 4 for _, bits in grown)


def test_lossless_stores_have_no_shorter_view(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe", precision_policy="routing-weighted", expert_cache="40%")
    assert torch.equal(run(model), run(loaded("qwen2_moe")))


def test_gate_weights_from_scores() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0]])
    index = torch.tensor([[0, 2]])
    expected = torch.tensor([[2.0, 0.5]]).softmax(-1)
    assert torch.allclose(chosen_weights(Routing(index, logits)), expected)
    assert torch.allclose(chosen_weights(Routing(index, logits.softmax(-1))), expected)
    assert torch.isfinite(chosen_weights(Routing(torch.tensor([[-1, 4]]), logits))).all(), "masked choices"
