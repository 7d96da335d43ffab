"""Observing changes neither the numbers nor the path, and both ways through a layer are recorded alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fate_moe
from fate_moe.core import Lookup
from fate_moe.errors import ConfigError
from fate_moe.journal import ForwardPass
from fate_moe.kernels.native import native
from fate_moe.store.convert import convert
from fate_moe.trace.record import Recorder
from fate_moe.trace.schema import RoutingTrace
from tests.support.checkpoints import tiny_model
from tests.support.engines import load_model
from tests.support.spoiled import spoil

needs_extension = pytest.mark.skipif(native is None, reason="the extension is not built")


class Passes:
    """Keeps everything."""

    def __init__(self, keeps: bool = True) -> None:
        self.seen: list[ForwardPass] = []
        self._keeps = keeps

    def keeps_inputs(self, num_tokens: int) -> bool:
        return self._keeps

    def record(self, forward: ForwardPass) -> None:
        self.seen.append(forward)


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """qwen2_moe in bf16, of which every layer runs whole."""
    folder = tmp_path_factory.mktemp("journal")
    tiny_model("qwen2_moe", torch.bfloat16).save_pretrained(folder / "checkpoint")
    return convert(folder / "checkpoint", folder / "store", "int4", dense_precision="lossless")


@pytest.fixture
def opened(tiny_store: Path) -> Iterator[Callable[..., Any]]:
    """A model of ``tiny_store`` or the embedded one, without prefetch, with room for a part of the experts."""
    models = []

    def open_model(name: str = "tiny", **options: Any) -> Any:
        options = {"policy": "lru", "predictor": "none", "expert_cache": "40%", **options}
        model = load_model(tiny_store, **options) if name == "tiny" else fate_moe.load(None, context_length=256, **options)[0]
        models.append(model)
        return model

    yield open_model
    for model in models:
        model.fate.close()


@pytest.fixture
def whole_layers(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the decoder layers that run whole."""
    calls: Counter[str] = Counter()
    original = native.step

    def counted(step: Any, *args: Any) -> Any:
        calls["layer"] += len(step)
        return original(step, *args)

    monkeypatch.setattr(native, "step", counted)
    return calls


def decode(model: Any, num_tokens: int = 24, prompt: int = 5) -> torch.Tensor:
    """Logits [num_tokens, vocabulary] of single tokens after a prompt."""
    generator = torch.Generator().manual_seed(1)
    tokens, past, logits = torch.randint(1, 100, (1, prompt), generator=generator), None, []
    with torch.inference_mode():
        for _ in range(num_tokens + 1):
            output = model(tokens, past_key_values=past, use_cache=True)
            past, tokens = output.past_key_values, torch.randint(1, 100, (1, 1), generator=generator)
            logits.append(output.logits[0, -1])
    return torch.stack(logits[1:])


@needs_extension
@pytest.mark.parametrize("predictor", ["none", "cross-layer-probability"])
@pytest.mark.parametrize("name", ["tiny", "embedded"])
def test_an_observed_model_computes_the_same_on_the_same_path(
    opened: Callable[..., Any], whole_layers: Counter[str], name: str, predictor: str
) -> None:
    model, num_tokens = opened(name, predictor=predictor), 12
    whole_layers.clear()  # loading tries each layer
    want = decode(model, num_tokens)
    num_layers = len(model.model.layers)
    assert whole_layers["layer"] == (1 + num_tokens) * num_layers, "every layer of the prompt and of every token runs whole"
    observer = Passes()
    with model.fate.runtime.observe(observer):
        got = decode(model, num_tokens)
    assert whole_layers["layer"] == 2 * (1 + num_tokens) * num_layers
    assert torch.equal(got, want)
    assert [forward.num_tokens for forward in observer.seen] == [5] + num_tokens * [1]
    assert all(forward.is_whole(num_layers) for forward in observer.seen)


@needs_extension
def test_both_ways_through_a_layer_write_the_same_record(opened: Callable[..., Any]) -> None:
    """The same token, routed alike, by ``enter`` and ``compute`` in one model, as a step does it in another."""
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randn(1, 64, generator=generator).bfloat16() for _ in range(20)]
    seen = []
    for whole in (False, True):
        model, observer = opened(), Passes()
        runtime = model.fate.runtime
        hidden_buffer, weights_buffer = torch.empty(1, 64, dtype=torch.bfloat16), torch.empty(1, 2)
        with runtime.observe(observer), torch.inference_mode():
            for token in tokens:
                runtime.embedded(token)
                for layer, decoder in enumerate(model.model.layers):
                    _, weights, index = decoder.mlp.gate(token)
                    if not whole:
                        runtime.enter(layer, token)
                        runtime.compute(layer, decoder.mlp.experts, token, index, weights)
                        continue
                    hidden_buffer.copy_(token)
                    weights_buffer.copy_(weights)
                    chosen, native = index[0].tolist(), runtime.memory
                    addresses = [tensor.data_ptr() for tensor in (hidden_buffer, index, weights_buffer)]
                    lease = runtime.begin_step(layer, chosen, [1, 1], 1, *addresses)
                    native.next(lease)  # those that are resident, perhaps none
                    while native.next(lease):
                        pass
                    native.release(lease)
                    runtime.end_step(layer, chosen, [0, 0])
        seen.append(observer.seen)
    assert len(seen[0]) == len(seen[1]) == 20
    kinds: Counter[Lookup] = Counter()
    for parts, steps in zip(*seen, strict=True):
        assert parts.is_whole(2)
        assert steps.is_whole(2)
        for one, other in zip(parts.layers, steps.layers, strict=True):
            assert one.lookups == other.lookups
            assert torch.equal(one.experts, other.experts)
            assert torch.equal(one.weights.float(), other.weights.float())
            assert one.router_input is not None
            assert other.router_input is not None
            assert torch.equal(one.router_input, other.router_input)
            kinds.update(one.lookups.values())
        assert {read[0] for read in parts.reads} == {read[0] for read in steps.reads}
    assert min(kinds[Lookup.HIT], kinds[Lookup.MISS]) > 10


@needs_extension
def test_a_trace_of_whole_layers_is_that_of_the_familys_own(
    opened: Callable[..., Any], whole_layers: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts, lookups and routing weights, until a token whose two best experts are nearly equal is routed otherwise."""
    model = opened(exact_activations=True)
    whole_layers.clear()  # loading tries each layer
    whole = traced(model, 24)
    assert whole_layers["layer"] == 2 * 25, "the prompt and each token"
    with monkeypatch.context() as patch:
        patch.setenv("FATE_FUSE", "0")
        own = traced(opened(exact_activations=True), 24)
    assert whole_layers["layer"] == 2 * 25, "the prompt and each token"
    alike = (whole.experts == own.experts).all((1, 2)).tolist()
    first = alike.index(False) if False in alike else len(alike)
    assert first >= 12
    assert (whole.extras["lookups"][:first] == own.extras["lookups"][:first]).all()
    assert abs(whole.probs[:first] - own.probs[:first]).max() < 0.02
    assert whole.extras.keys() == own.extras.keys()
    assert {0, 2} <= set(whole.extras["lookups"][:first].flatten().tolist())


def traced(model: Any, num_tokens: int) -> RoutingTrace:
    recorder = Recorder([8, 8], router_inputs=True)
    with model.fate.runtime.observe(recorder):
        decode(model, num_tokens)
    return recorder.trace()


@needs_extension
def test_buffers_that_layers_share_are_copied(opened: Callable[..., Any]) -> None:
    """Each layer's router, applied to what was recorded, chooses what was recorded."""
    model, observer = opened(), Passes()
    with model.fate.runtime.observe(observer):
        decode(model)
    for forward in observer.seen[1:]:
        for step, decoder in zip(forward.layers, model.model.layers, strict=True):
            assert step.router_input is not None
            with torch.inference_mode():
                _, weights, index = decoder.mlp.gate(step.router_input)
            assert set(index[0].tolist()) == set(step.experts[0].tolist()) == {expert.expert for expert in step.lookups}
            assert torch.allclose(weights.float().sort().values, step.weights.float().sort().values, atol=0.01)


def test_inputs_are_kept_only_where_they_are_wanted(opened: Callable[..., Any]) -> None:
    model, observer = opened(), Passes(keeps=False)
    with model.fate.runtime.observe(observer):
        decode(model, 3)
    assert all(forward.embeddings is None for forward in observer.seen)
    assert all(step.router_input is None for forward in observer.seen for step in forward.layers)


def test_times_and_counters_add_up(opened: Callable[..., Any]) -> None:
    model, observer = opened(), Passes()
    counters = model.fate.runtime.residency.counters
    with model.fate.runtime.observe(observer):
        decode(model)
    stalls = [step.stall_seconds for forward in observer.seen for step in forward.layers]
    assert sum(stalls) == pytest.approx(counters.stall_seconds)
    assert min(stalls) >= 0
    found = Counter(lookup for forward in observer.seen for step in forward.layers for lookup in step.lookups.values())
    assert (found[Lookup.HIT], found[Lookup.IN_FLIGHT], found[Lookup.MISS]) == (counters.hits, counters.in_flight, counters.misses)
    assert sum(len(forward.reads) for forward in observer.seen) == counters.misses
    for before, after in zip(observer.seen, observer.seen[1:], strict=False):
        assert before.end is not None
        assert before.start.seconds < before.layers[0].start.seconds < before.end.seconds <= after.start.seconds


def test_one_observer_at_a_time(opened: Callable[..., Any]) -> None:
    model, first, second = opened(), Passes(), Passes()
    runtime = model.fate.runtime
    with runtime.observe(first):
        decode(model, 2)
        with pytest.raises(ConfigError, match="observed already"), runtime.observe(second):
            pass
        decode(model, 2)
    with runtime.observe(second):
        decode(model, 1)
    decode(model, 1)
    assert (len(first.seen), len(second.seen)) == (6, 2)
    assert runtime.residency.journal is None, "reads are no longer collected"


def test_a_pass_that_fails_is_not_whole_and_the_next_one_is(opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, observer = opened(), Passes()
    runtime = model.fate.runtime

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    with runtime.observe(observer):
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1], "forward", broken)
            with pytest.raises(ZeroDivisionError):
                decode(model, 1)
        decode(model, 1)
    assert [forward.is_whole(2) for forward in observer.seen] == [False, True, True]
    assert [step.layer for step in observer.seen[0].layers] == [0]


def test_a_pass_that_is_under_way_is_not_recorded(opened: Callable[..., Any]) -> None:
    model, observer = opened(), Passes()
    runtime = model.fate.runtime
    runtime.embedded(torch.zeros(1, 64))
    with runtime.observe(observer), torch.inference_mode():
        experts = model.model.layers[0].mlp.experts
        runtime.enter(0, torch.zeros(1, 64, dtype=torch.bfloat16))
        runtime.compute(0, experts, torch.zeros(1, 64, dtype=torch.bfloat16), torch.tensor([[0, 1]]), torch.ones(1, 2))
    assert not observer.seen


@pytest.mark.parametrize("whole", [True, False])
def test_broken_tables_are_found_after_the_pass(opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """What FATE_CHECK=1 asks for: once a pass, on both ways."""
    if not whole:
        monkeypatch.setenv("FATE_FUSE", "0")
    model = opened()
    runtime, checked = model.fate.runtime, list[int]()
    decode(model, 2)
    check = runtime.residency.check_integrity

    def counted() -> None:
        checked.append(1)
        check()

    monkeypatch.setattr(runtime.residency, "check_integrity", counted)
    decode(model, 2)
    assert not checked
    monkeypatch.setattr(runtime, "_check", True)
    decode(model, 2)
    assert len(checked) == 3
    spoil(runtime.residency)
    with pytest.raises(RuntimeError, match="every slot is in one place"):
        decode(model, 2)
