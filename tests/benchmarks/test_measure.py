"""What a cell records of peers that end well, fail, crash, hang, or are killed by the limit; and what is computed from it."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.analysis import Cost, cost, memory_floor, overlap, ratio
from benchmarks.facts import processor_folder
from benchmarks.limits import can_limit
from benchmarks.measure import Cell, Sample, run_cell
from benchmarks.peers import Variant
from benchmarks.pictures import plot
from benchmarks.report import cell_text, limit_name, markdown
from benchmarks.results import ModelFacts, Results
from benchmarks.rounds import Planned, shuffled
from benchmarks.workloads import WORKLOADS, Workload
from tests.support.pictures import labels, lines, num_colors, saved_figures

WORKER = Path(__file__).with_name("worker.py")
MIB = 1 << 20


def run(does: str, *, limit_bytes: int | None = None, seconds: float = 30.0, samples: int = 3, batch: int = 1) -> Cell:
    workload = Workload("decode", "decode", 4, 5, batch=batch, num_samples=samples)
    job: dict[str, Any] = {"samples": [[[1, 2, 3, 4]] * batch] * samples, "new_tokens": 5, "settings": {"does": does}}
    return run_cell(Path(sys.executable), WORKER, job, Cell("peer", "", "decode", limit_bytes), workload, seconds)


def test_a_peer_that_ends_well() -> None:
    cell = run("work")
    assert (cell.outcome, cell.load_seconds, cell.versions, len(cell.samples)) == ("ok", 0.5, {"worker": "1"}, 3)
    assert cell.decode_rates() == [4 / 8.0, 4 / 12.0]  # the first sample warms up
    assert cell.first_seconds() == [2.0, 2.0]
    spent = cost(cell)
    assert spent is not None
    assert spent == Cost(seconds=2.5, read_bytes=150.0, stall_seconds=spent.stall_seconds)
    assert spent.stall_seconds == pytest.approx(0.015)


def test_tokens_of_a_whole_batch_count() -> None:
    assert run("work", batch=2).decode_rates() == [2 * 4 / 8.0, 2 * 4 / 12.0]


@pytest.mark.parametrize(("does", "message"), [("fail", "RuntimeError: no luck"), ("crash", "MemoryError: of its own accord")])
def test_a_peer_that_fails_says_why(does: str, message: str) -> None:
    cell = run(does)
    assert (cell.outcome, cell.message) == ("failed", message)
    assert cell_text(cell) == "failed"


def test_a_peer_that_hangs_is_cut_and_what_came_counts() -> None:
    cell = run("hang", seconds=1.5)
    assert cell.outcome == "slow"
    assert cell.first_seconds() == [2.0]
    assert cell.rate() == 2 / 8.0
    assert cost(cell) == Cost(seconds=4.0, read_bytes=250.0, stall_seconds=0.25)


def test_a_sample_cut_after_a_few_tokens_does_not_count() -> None:
    samples = [Sample(4, 1.0, count, seconds) for count, seconds in ((100, 50.0), (100, 20.0), (24, 12.0))]
    cell = Cell("peer", "", "decode", None, outcome="slow", samples=samples)
    assert cell.decode_rates() == [5.0]
    samples[1].count = 40
    assert cell.decode_rates() == [40 / 20], "none came to its end"
    samples[1].count = 3
    assert cell.decode_rates() == [100 / 50], "the first, where nothing else came far enough"


@pytest.mark.root
@pytest.mark.skipif(can_limit() is not None, reason="needs root and a control group")
def test_a_peer_that_the_limit_kills_is_recorded_as_killed() -> None:
    cell = run("eat", limit_bytes=256 * MIB)
    assert cell.outcome == "killed"
    assert cell.peak_bytes is not None
    assert 250 * MIB < cell.peak_bytes <= 257 * MIB
    assert run("work", limit_bytes=256 * MIB).outcome == "ok"


def made(peer: str, workload: str, limit: int | None, seconds: float, read: float, stall: float) -> Cell:
    """Two samples, the second one: a prompt of 10 tokens in ``seconds`` or ten new tokens, ``seconds`` each."""
    prefill = workload.startswith("prefill")
    counters = [{"experts": {"bytes_read": b, "stall_seconds": s}} for b, s in ((0, 0), (5, 1), (5 + read, 1 + stall))]
    if prefill:
        samples = [
            Sample(10, 1.0, 0, math.nan, None, counters[0], counters[1]),
            Sample(10, seconds, 0, math.nan, counters[1], counters[2], counters[2]),
        ]
    else:
        ten = [{"experts": {key: 10 * value for key, value in c["experts"].items()}} for c in counters]
        samples = [Sample(10, 1.0, 10, 9.0, None, ten[0], ten[1]), Sample(10, 1.0, 10, 10 * seconds, ten[1], ten[1], ten[2])]
    return Cell(peer, "", workload, limit, outcome="ok", samples=samples)


FACTS = ModelFacts("model", "qwen2_moe", 1000, 2, 8, 2, model_bytes=500, expert_bytes=20, active_bytes=120)
MACHINE = {
    "processor": "P", "cores": 2, "threads": 2, "instructions": ["avx2"], "memory_bytes": 1 << 30, "system": "S",
    "memory_bytes_per_second": 60.0, "disk_bytes_per_second": 10.0,
}  # fmt: skip


@pytest.mark.parametrize("workload", ["decode", "prefill-128"])
def test_overlap_by_hand(workload: str) -> None:
    """Computing takes 2.0 s (2.5 without a limit, of which 0.5 are waited), reading 40 bytes 4 s: 5 s are 80 % of perfect."""
    results = Results(FACTS, MACHINE)
    results.add(made("fate", workload, None, seconds=2.5, read=3, stall=0.5))
    results.add(made("fate", workload, 100, seconds=5.0, read=40, stall=2.0))
    results.add(made("eap", workload, 100, seconds=10.0, read=40, stall=2.0))
    hidden = overlap(results, results.joined()[1])
    assert hidden is not None
    assert (hidden.seconds, hidden.compute_seconds, hidden.read_seconds) == pytest.approx((5.0, 2.0, 4.0))
    assert hidden.efficiency == pytest.approx(0.8)
    assert hidden.max_speedup == pytest.approx(1.5)
    assert ratio(results, "fate", "eap", workload, 100) == pytest.approx(2.0)
    assert ratio(results, "fate", "eap", workload, None) is None
    assert memory_floor(results) == 2.0
    page = markdown(results)
    assert f"| fate | {workload} | 100 B | 40 B | 5000.0 | 2000.0 | 4000.0 | 2000.0 | 80% | 1.50x |" in page
    assert f"| {workload} | fate / eap |  | 2.00x |" in page


@pytest.mark.slow
def test_pictures_show_every_peer_and_limit(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = Results(FACTS, MACHINE)
    for limit, seconds, read in ((None, 0.5, 0.0), (100, 2.0, 40.0)):
        results.add(made("fate", "decode", limit, seconds, read, stall=0.25))
    results.add(made("eap", "decode", 100, seconds=4.0, read=80.0, stall=0.5))
    results.add(made("fate", "prefill-64", 100, seconds=3.0, read=0, stall=0))
    with saved_figures() as figures:
        files = plot(results, tmp_path / "pictures")
    assert [file.name for file in files] == [f"model-{name}.png" for name in ("decode", "first-token", "traffic")] == list(figures)
    assert all(num_colors(file) > 10 for file in files)
    assert labels(figures["model-decode.png"]) == [("memory limit", "new tokens/s")]
    axes = figures["model-decode.png"].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [limit_name(limit) for limit in results.limits()]
    shown, place = lines(axes), results.limits().index(100)
    assert shown["fate"][place] == (place, 0.5)
    assert shown["eap"] == [(place, 0.25)]
    assert shown["fate: its missed bytes / disk bandwidth"] == [(place, 10.0 / 40.0)]
    assert [y for _, y in shown["floor: active bytes / memory bandwidth"]] == [0.5, 0.5]
    ((where, megabytes),) = lines(figures["model-traffic.png"].axes[0])["fate"]
    assert where == place, "nothing is read without a limit"
    assert megabytes == pytest.approx(40e-6)


def test_best_is_the_fastest_that_came_through(tmp_path: Path) -> None:
    results = Results(FACTS, MACHINE)
    results.add(Cell("llama.cpp", "repacked", "decode", 100, outcome="killed"))
    assert cell_text(results.best("llama.cpp", "decode", 100)) == "killed"
    slow, fast = (made("llama.cpp", "decode", 100, seconds, 0, 0) for seconds in (2.0, 1.0))
    slow.variant, fast.variant = "slow", "fast"
    results.add(fast)
    results.add(slow)
    best = results.best("llama.cpp", "decode", 100)
    assert best is not None
    assert best.variant == "fast"
    results.save(tmp_path / "results.json")
    assert repr(Results.load(tmp_path / "results.json")) == repr(results)  # nan is not equal to itself


@pytest.mark.parametrize("workload", ["decode", "prefill-128"])
def test_a_cell_of_several_rounds_counts_what_each_counts(workload: str, tmp_path: Path) -> None:
    """Warm-up samples of no round count; a round that was killed beside others that came through does not either."""
    results = Results(FACTS, MACHINE, code="state")
    for number, seconds in enumerate((4.0, 1.0, 2.0)):
        results.add(replace(made("fate", workload, 100, seconds, read=40, stall=0.5), round=number, peak_bytes=number + 1))
    results.add(Cell("fate", "", workload, 100, 3, outcome="killed", peak_bytes=9))
    assert results.has(("fate", "", workload, 100), 3)
    assert not results.has(("fate", "", workload, 100), 4)
    (cell,) = results.joined()
    assert (cell.outcome, cell.rate(), cell.peak_bytes) == ("ok", {"decode": 0.5, "prefill-128": 5.0}[workload], 9)
    assert len(cell.measured()) == 3
    assert cost(cell) == Cost(2.0, 40.0, 0.5)
    results.save(tmp_path / "results.json")
    again = Results.load(tmp_path / "results.json")
    assert repr(again) == repr(results)
    assert repr(again.best("fate", workload, 100)) == repr(cell)


def test_results_of_another_model_processor_or_code_are_refused() -> None:
    results = Results(FACTS, MACHINE, code="state")
    here = {"processor": "P", "instructions": ["avx2"]}
    results.refuse_others(FACTS, here, "state")
    with pytest.raises(ValueError, match="not of other"):
        results.refuse_others(replace(FACTS, name="other"), here, "state")
    with pytest.raises(ValueError, match="another processor"):
        results.refuse_others(FACTS, {**here, "instructions": ["avx2", "amx_int8"]}, "state")
    with pytest.raises(ValueError, match="another state of the code"):
        results.refuse_others(FACTS, here, "later state")


def test_each_processor_has_its_folder() -> None:
    xeon = {"processor": "Intel(R) Xeon(R) Processor", "instructions": ["avx2", "amx_int8"]}
    assert processor_folder(xeon) == "intel-xeon-processor-amx"
    assert processor_folder({"processor": "AMD EPYC 9R14", "instructions": ["avx2"]}) == "amd-epyc-9r14"


def test_each_round_measures_every_cell_in_an_order_of_its_own() -> None:
    peer: Any = None
    planned = [Planned(peer, Path(), Path(), Variant(str(n), {}), WORKLOADS["decode"], None) for n in range(8)]
    first, second = shuffled(planned, 0), shuffled(planned, 1)
    assert sorted(job.variant.name for job in first) == sorted(job.variant.name for job in second) == [str(n) for n in range(8)]
    assert first != second
    assert shuffled(planned, 0) == first, "a run that is continued keeps the order"


def test_every_workload_that_can_be_asked_for_is_one_the_workers_know() -> None:
    assert {workload.kind for workload in WORKLOADS.values()} == {"decode", "prefill", "chat"}
