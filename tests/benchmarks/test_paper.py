"""The paper's ratios, counts and bounds from cells with known numbers."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import Cell, Sample
from benchmarks.paper import System, markdown
from benchmarks.results import ModelFacts, Results

FACTS = ModelFacts("model", "qwen2_moe", 1000, 2, 8, 2, model_bytes=500, expert_bytes=20, active_bytes=120)
MACHINE = {
    "processor": "P", "cores": 2, "threads": 2, "instructions": ["avx2"], "memory_bytes": 1 << 30, "system": "S",
    "memory_bytes_per_second": 60.0, "disk_bytes_per_second": 10.0,
}  # fmt: skip


def cell(system: str, budget: str, workload: str, seconds: float, hits: int = 0, in_flight: int = 0, read: float = 0.0) -> Cell:
    """A prompt of 10 tokens, or ten new tokens, in ``seconds`` each; of 20 lookups of a token so many found their expert."""
    start = dict.fromkeys(("hits", "in_flight", "misses", "bytes_read", "stall_seconds"), 0.0)
    end = {"hits": hits, "in_flight": in_flight, "misses": 20 - hits - in_flight, "bytes_read": 10 * read, "stall_seconds": 0.0}
    warm, counted = Sample(10, 1.0, 10, 1.0), Sample(10, 10 * seconds, 10, 10 * seconds, None, {"experts": start}, {"experts": end})
    return Cell(system, budget, workload, None, outcome="ok", samples=[warm, counted])


def test_ratios_are_the_highest_over_budgets_and_baselines_without_a_budget_stand_at_each() -> None:
    results = Results(FACTS, MACHINE)
    for made in (
        cell("lod-paper, lossless", "", "decode", 8.0, read=80),
        cell("lod-paper", "", "decode", 4.0, read=20),
        cell("eap", "25%", "decode", 3.0, hits=8, in_flight=2, read=15),
        cell("fate", "25%", "decode", 2.0, hits=10, in_flight=8, read=10),
        cell("eap", "80%", "decode", 2.0, hits=18, read=5),
        cell("fate", "80%", "decode", 1.0, hits=19, in_flight=1, read=5),
    ):
        results.add(made)
    page = markdown(results)
    assert "| lod-paper, lossless | 0.12 | 0.12 |" in page
    assert "| decode | fate / lod-paper, lossless | 8.0x | decode, 80% | 6.0x | 4.1x |" in page
    assert "| decode | fate / lod-paper | 4.0x | decode, 80% | 3.0x | 4.1x |" in page
    assert "| decode | fate / eap | 2.0x | decode, 80% | 1.8x | 2.2x |" in page
    assert "| fate | 90.0% (50.0%) | 100.0% (95.0%) |" in page
    assert "| fate | 4.0x | 8.0x |" in page, "computing takes as long as was measured: nothing was waited for"


def test_each_system_has_the_budgets_that_mean_something_to_it() -> None:
    assert [variant.settings for variant in System("lod-paper, lossless", ["25%"]).variants(Path(), None)] == [
        {"engine": "fate", "preset": "lod-paper"}
    ]
    variants = System("fate", ["25%", "80%"]).variants(Path(), None)
    assert [variant.settings["expert_cache"] for variant in variants] == ["25%", "80%"]
