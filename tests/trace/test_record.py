"""Traces of the engine, the simulator compared with them, fitted gates, and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fate_moe import demo
from fate_moe.cli import main
from fate_moe.config import OffloadConfig
from fate_moe.core import Counters, ExpertId
from fate_moe.errors import ConfigError
from fate_moe.journal import ForwardPass, LayerPass, Moment
from fate_moe.predict.forecast import forecast_source
from fate_moe.store.convert import convert
from fate_moe.tools.tracing import record_routing
from fate_moe.trace.fit import RIDGE, GateFitter, Passes
from fate_moe.trace.plots import draw, figure_of
from fate_moe.trace.recall import RecallMeter
from fate_moe.trace.record import Recorder
from fate_moe.trace.recorded import recorded_run
from fate_moe.trace.schema import RoutingTrace, read_trace, write_trace
from fate_moe.trace.simulate import Link, simulate
from tests.support.pictures import labels, lines, num_colors, saved_figures
from tests.support.sources import SourceDouble

pytestmark = pytest.mark.slow


def decode(model: Any, num_tokens: int, seed: int, between: Callable[[], None] = lambda: None) -> None:
    """Random tokens, one by one."""
    generator, past = torch.Generator().manual_seed(seed), None
    with torch.no_grad():
        for _ in range(num_tokens):
            token = torch.randint(1, 60, (1, 1), generator=generator)
            past = model(token, past_key_values=past, use_cache=True).past_key_values
            between()


def pass_of(inputs: list[torch.Tensor], chosen: list[torch.Tensor]) -> ForwardPass:
    """A pass of many tokens: the embeddings, then the router inputs, by layer what was chosen; no lookups, no times."""
    start = Moment(0.0, Counters())
    steps = [
        LayerPass(layer, start, router_input, index, torch.ones_like(index).float(), {}, [])
        for layer, (router_input, index) in enumerate(zip(inputs[1:], chosen, strict=True))
    ]
    return ForwardPass(len(inputs[0]), start, inputs[0], steps, start)


@pytest.fixture
def traced(loaded: Callable[..., Any]) -> tuple[Any, RoutingTrace]:
    """A tiny model with room for six of sixteen experts, and the trace of 160 decoded tokens."""
    model = loaded("qwen2_moe", policy="lru", predictor="none", expert_cache="37.5%")  # nothing learned by earlier tests
    recorder = Recorder([8, 8], router_inputs=True, routers=torch.stack([layer.mlp.gate.weight for layer in model.model.layers]))
    with model.fate.runtime.observe(recorder):
        decode(model, 160, 3)
    return model, recorder.trace(expert_bytes=model.fate.plan.slot_bytes)


def test_what_is_recorded_is_what_happened(traced: tuple[Any, RoutingTrace]) -> None:
    model, trace = traced
    counters = model.fate.report().experts
    assert trace.experts.shape == (160, 2, 2)
    found = trace.extras["lookups"]
    assert [int((found == kind).sum()) for kind in range(3)] == [counters.hits, counters.in_flight, counters.misses]
    assert float(trace.extras["stall"].sum()) == pytest.approx(counters.stall_seconds, rel=1e-3)
    inputs = torch.from_numpy(trace.extras["router_inputs"]).float()
    routers = torch.from_numpy(trace.extras["routers"])
    scores = torch.einsum("nld,led->nle", inputs, routers)
    chosen = torch.from_numpy(trace.experts.astype("int64"))
    assert (scores.topk(2, dim=-1).indices.sort(-1).values == chosen.sort(-1).values).float().mean() > 0.98  # inputs are rounded


def test_the_simulator_agrees_with_the_engine(traced: tuple[Any, RoutingTrace]) -> None:
    model, trace = traced
    row = simulate(trace, "lru", "none", 0.375, Link(1e9, model.fate.plan.slot_bytes, 1e-3))
    measured = model.fate.report().experts.bytes_read / trace.num_tokens
    assert row.bytes_per_token == pytest.approx(measured, rel=0.03)


def test_stall_agrees_with_the_engine(loaded: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The link is so slow that the machine's own noise does not matter; the simulator knows its speed from the trace alone."""
    model = loaded("qwen2_moe", policy="lru", predictor="none", expert_cache="37.5%")
    residency = model.fate.runtime.residency
    residency._source = SourceDouble(residency._source, 5e-3, one_at_a_time=True)
    recorder = Recorder([8, 8])
    with model.fate.runtime.observe(recorder):
        decode(model, 80, 4)
    plan = model.fate.plan
    trace = recorder.trace(expert_bytes=plan.slot_bytes, slots=plan.num_slots, policy="lru", predictor="none")
    write_trace(tmp_path / "t.npz", trace)
    main(["simulate", str(tmp_path / "t.npz"), "--as-recorded", "--json"])
    found = json.loads(capsys.readouterr().out)
    recorded, (row,) = found["recorded"], found["rows"]
    assert row["bytes_per_token"] == pytest.approx(recorded["bytes_per_token"], rel=0.03)
    assert row["stall_seconds"] == pytest.approx(recorded["stall_seconds"], rel=0.15)
    assert recorded["stall_seconds"] == pytest.approx(float(trace.extras["stall"].sum()), rel=1e-3)
    assert found["disk_gbps"] == pytest.approx(plan.slot_bytes / 0.005 / 1e9, rel=0.25)
    main(["simulate", str(tmp_path / "t.npz"), "--as-recorded"])
    assert "recorded, simulated" in capsys.readouterr().out


def test_every_read_is_in_the_timeline(loaded: Callable[..., Any], tmp_path: Path) -> None:
    """Demand reads and prefetches, each in its lane; the first tokens of a trace come with their reads."""
    model = loaded("qwen2_moe", preset="fate", expert_cache="50%")
    residency = model.fate.runtime.residency
    recorder = Recorder([8, 8])
    with model.fate.runtime.observe(recorder):
        decode(model, 40, 5, residency.wait_idle)
    trace = recorder.trace()
    counters, reads = residency.counters, trace.extras["reads"]
    assert (int((reads[:, 3] == 1).sum()), int((reads[:, 3] == 0).sum())) == (counters.misses, counters.prefetched)
    assert counters.prefetched > 0
    assert (reads[:, 5] > reads[:, 4]).all()
    path = tmp_path / "t.npz"
    write_trace(path, trace)
    draw(path, tmp_path / "one.json", token=7)
    lanes = [e["tid"] for e in json.loads((tmp_path / "one.json").read_text())["traceEvents"] if e["ph"] == "X"]
    mine = reads[reads[:, 0] == 7]
    assert (lanes.count(2), lanes.count(3)) == ((mine[:, 3] == 1).sum(), (mine[:, 3] == 0).sum())
    assert set(read_trace(path).first(10).extras["reads"][:, 0]) <= set(range(10))


def test_a_trace_without_times_says_so() -> None:
    trace = RoutingTrace(np.zeros((2, 1, 1), np.uint8), np.ones((2, 1, 1), np.float16), np.array([0, 2]), np.array([4]))
    with pytest.raises(ConfigError, match="has no times"):
        recorded_run(trace)


def test_many_tokens_begin_another_generation(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe")
    recorder = Recorder([8, 8])
    with model.fate.runtime.observe(recorder), torch.no_grad():
        for length in (5, 1, 1, 4, 1):
            model(torch.arange(1, length + 1)[None], use_cache=False)
    trace = recorder.trace()
    assert trace.num_tokens == 3
    assert trace.start.tolist() == [0, 2, 3]


def test_nothing_recorded() -> None:
    with pytest.raises(ValueError, match="nothing was recorded"):
        Recorder([4]).trace()


def test_ridge_finds_a_linear_router() -> None:
    """Layer 1's choice depends on layer 0's input through another matrix than its router: the fit finds it."""
    generator = torch.Generator().manual_seed(0)
    hidden_router = torch.randn(6, 10, generator=generator)
    fitter = GateFitter([6, 6], 10)
    for _ in range(20):
        embedding, first = torch.randn(64, 10, generator=generator), torch.randn(64, 10, generator=generator)
        chosen = [(x @ hidden_router.mT).topk(2).indices for x in (embedding, first)]
        fitter.record(pass_of([embedding, first, first], chosen))
    (gates,) = fitter.gates()
    x = torch.randn(500, 10, generator=generator)
    for gate in gates:
        assert gate is not None
        guessed = (x @ gate[:, :-1].mT + gate[:, -1]).topk(2).indices.sort(-1).values
        truth = (x @ hidden_router.mT).topk(2).indices.sort(-1).values
        assert (guessed == truth).float().mean() > 0.8
    with pytest.raises(ValueError, match="ran for no token"):
        GateFitter([6], 10).gates()


def test_a_fit_to_logits_predicts_better_than_one_to_choices() -> None:
    """Sixty tokens, hardly more than an input has numbers: a linear map is found from logits, not from choices."""
    generator = torch.Generator().manual_seed(2)
    routers = [torch.randn(12, 40, generator=generator) for _ in range(2)]
    embedding, x = torch.randn(60, 40, generator=generator), torch.randn(500, 40, generator=generator)
    truth = (x @ routers[1].mT).topk(2).indices
    recalls = []
    for known in (routers, None):
        fitter = GateFitter([12, 12], 40, routers=known)
        fitter.record(pass_of([embedding] * 3, [(embedding @ router.mT).topk(2).indices for router in routers]))
        gate = fitter.gates()[0][1]
        assert gate is not None
        guessed = (x @ gate[:, :-1].mT + gate[:, -1]).topk(2).indices
        recalls.append(float((guessed[:, :, None] == truth[:, None]).any(1).float().mean()))
    from_logits, from_choices = recalls
    assert from_logits > 0.9 > 0.75 > from_choices


def test_a_fit_is_ridge_regression_and_recall_is_counted() -> None:
    """Three layers, five passes: every gate and the forecast against regressions on all rows at once, recall against counting."""
    generator = torch.Generator().manual_seed(1)
    sizes, hidden, k = [6, 5, 6], 7, 1
    passes = [
        ([torch.randn(12, hidden, generator=generator) for _ in range(4)], [torch.randint(0, 5, (12, k)) for _ in sizes])
        for _ in range(5)
    ]

    def show(observer: Passes) -> None:
        for inputs, chosen in passes:
            observer.record(pass_of(inputs, chosen))

    def regression(rows: list[torch.Tensor], layer: int, begin: int) -> torch.Tensor:
        x = torch.nn.functional.pad(torch.cat(rows), (0, 1), value=1.0).double()
        targets = torch.cat([torch.nn.functional.one_hot(chosen[layer][begin:, 0], sizes[layer]) for _, chosen in passes]).double()
        squares = x.mT @ x
        solved: torch.Tensor = torch.linalg.solve(
            squares + RIDGE * squares.diagonal().mean() * torch.eye(len(squares)), x.mT @ targets
        ).mT.float()
        return solved

    fitter = GateFitter(sizes, hidden, 2, forecast=True)
    show(fitter)
    gates, whole = fitter.gates(), fitter.forecast()
    for ahead, layer in ((1, 0), (1, 1), (1, 2), (2, 1), (2, 2)):
        got = gates[ahead - 1][layer]
        assert got is not None
        assert torch.allclose(got, regression([inputs[layer + 1 - ahead] for inputs, _ in passes], layer, 0), atol=1e-4)
    assert gates[1][0] is None
    for layer in range(3):
        before = 1 + forecast_source(layer, 3)
        rows = [torch.cat([inputs[0][1:], inputs[before][:-1]], 1) for inputs, _ in passes]
        assert torch.allclose(whole[layer], regression(rows, layer, 1), atol=1e-4)

    meter = RecallMeter(gates, None, whole)
    show(meter)
    found = 0
    for inputs, chosen in passes:
        best = (torch.nn.functional.pad(inputs[1], (0, 1), value=1.0) @ gates[1][2].mT).topk(k + 2).indices  # type: ignore[union-attr]
        found += int((best == chosen[2]).any(1).sum())
    fitted = meter.table()["by_ahead"][1]["fitted"][k + 2]["layers"]
    assert fitted[0] is None
    assert fitted[2] == pytest.approx(found / 60)
    assert meter.better(1) == [0, 1, 2], "nothing else was asked"


def test_a_perfetto_trace_shows_one_token(traced: tuple[Any, RoutingTrace], tmp_path: Path) -> None:
    _, trace = traced
    write_trace(tmp_path / "t.npz", trace)
    draw(tmp_path / "t.npz", tmp_path / "timeline.json", token=5)
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    computing = [event for event in events if event["ph"] == "X" and event["tid"] == 0]
    waiting = sum(event["dur"] for event in events if event["ph"] == "X" and event["tid"] == 1)
    assert len(computing) == 2
    assert waiting == pytest.approx(1e6 * float(trace.extras["stall"][5].sum()), rel=1e-3)
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a trace"):
        draw(tmp_path / "rows.json", tmp_path / "x.json")


def test_pictures_show_the_numbers_of_their_files(traced: tuple[Any, RoutingTrace], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, trace = traced
    path = tmp_path / "t.npz"
    write_trace(path, trace)
    (heat,) = figure_of(path).axes[0].images
    counts = np.stack([np.bincount(trace.experts[:, layer].reshape(-1), minlength=8) for layer in range(2)])
    assert np.allclose(heat.get_array(), 100 * counts / 160)
    bars = figure_of(path, "timeline", token=5).axes[0].patches
    assert sum(bar.get_width() for bar in bars if bar.get_y() < 1.5) == pytest.approx(
        1e3 * trace.extras["seconds"][5].sum(), rel=1e-3
    )

    rows = [
        simulate(trace, policy, "none", capacity, Link(1e9, 4096, 1e-3)).as_dict()
        for policy in ("lru", "belady")
        for capacity in (0.5, 0.25)
    ]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    with saved_figures() as figures:
        for kind in ("heat", "timeline"):
            draw(path, tmp_path / f"{kind}.png", kind)
        for kind in ("capacity", "recall"):
            draw(tmp_path / "rows.json", tmp_path / f"{kind}.png", kind)
    assert {name: labels(figure)[0] for name, figure in figures.items()} == {
        "heat.png": ("expert", "layer"),
        "timeline.png": ("ms", ""),
        "capacity.png": ("experts in memory, %", "ready on time, %"),
        "recall.png": ("MB read per token", "ready on time, %"),
    }
    (heat,) = figures["heat.png"].axes[0].get_images()
    by_layer = [np.bincount(trace.experts[:, layer].reshape(-1), minlength=trace.num_experts[layer]) for layer in range(2)]
    np.testing.assert_allclose(heat.get_array(), 100 * np.stack(by_layer) / trace.num_tokens)
    assert len(figures["timeline.png"].axes[0].patches) > 0
    shown = lines(figures["capacity.png"].axes[0])
    assert {name: [x for x, _ in points] for name, points in shown.items()} == {"lru": [25.0, 50.0], "belady": [25.0, 50.0]}
    by_capacity = sorted(rows[:2], key=lambda row: row["capacity"])
    assert [y for _, y in shown["lru"]] == [pytest.approx(100 * row["ready_on_time"]) for row in by_capacity]
    assert lines(figures["recall.png"].axes[0]).keys() == {"lru, none", "belady, none"}
    assert all(num_colors(tmp_path / name) > 10 for name in figures)
    row = {"mean": 0.5, "layers": [0.7, 0.5]}
    by_width = {"2": row, "4": row}
    ahead = {"plain": {"2": {"mean": None, "layers": []}}, "fitted": by_width}
    (tmp_path / "fit.json").write_text(json.dumps({"by_ahead": [ahead], "forecast": by_width}))
    with saved_figures() as figures:
        draw(tmp_path / "fit.json", tmp_path / "widths.png")
    half = [(2.0, 50.0), (4.0, 50.0)]
    assert lines(figures["widths.png"].axes[0]) == {
        "fitted, 1 ahead": half,
        "layer 0, from the embedding": [(2.0, 70.0), (4.0, 70.0)],
        "whole token": half,
    }
    assert num_colors(tmp_path / "widths.png") > 10
    (tmp_path / "nothing.json").write_text("[]")
    with pytest.raises(ConfigError, match="no rows"):
        figure_of(tmp_path / "nothing.json")


def curves(figure: Any) -> dict[str, list[tuple[float, float]]]:
    """By label, the points of each line."""
    return {
        line.get_label(): list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))
        for line in figure.axes[0].lines
    }


def test_simulate_prints_rows(tmp_path: Path, traced: tuple[Any, RoutingTrace], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.npz"
    write_trace(path, traced[1])
    assert main(["simulate", str(path), "--policy", "lru,best,belady", "--capacity", "25%,50%", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["policy"], row["capacity"]) for row in result["rows"]] == [
        (policy, share) for policy in ("lru", "best", "belady") for share in (0.25, 0.5)
    ]
    assert main(["simulate", str(path), "--predictor", "temporal", "--capacity", "50%"]) == 0
    assert "temporal" in capsys.readouterr().out
    for wrong in (["--capacity", "much"], ["--capacity", "150%"], ["--policy", "mru"]):
        assert main(["simulate", str(path), *wrong]) == 1


@pytest.mark.slow
def test_a_mixed_stores_trace_wants_one_size_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = convert(demo.MODEL, tmp_path / "mixed", "int4", precision_rules={ExpertId(3, 7): "lossless"}, solver="minmax")
    config = OffloadConfig(expert_cache="50%", context_length=64)
    trace = record_routing(store, ["Once upon a time"], config, new_tokens=4, max_tokens=4)
    assert trace.meta["expert_bytes"] == [28672, 98304]
    path = tmp_path / "t.npz"
    write_trace(path, trace)
    simulated = ["simulate", str(path), "--capacity", "50%"]
    for refused in (simulated, [*simulated, "--as-recorded", "--expert-bytes", "28KiB"]):
        assert main(refused) == 1
        assert "experts of 28672, 98304 bytes" in capsys.readouterr().err
    assert main([*simulated, "--expert-bytes", "28KiB"]) == 0
