"""What a step in C++ asks of the residency (csrc/expert_memory.h), asked from Python; and who gets to see what is routed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe.core import Counters, ExpertId
from fate_moe.errors import ClosedModelError, CorruptExpertError
from fate_moe.journal import ForwardPass
from fate_moe.kernels.extension import native
from fate_moe.memory.policies import LRU
from fate_moe.memory.residency import Residency
from fate_moe.memory.slots import SlotArena
from fate_moe.registry import make_policy
from fate_moe.store.convert import convert
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engines import load_model
from tests.support.sources import MemorySource, SourceDouble, marked_blobs

pytestmark = pytest.mark.skipif(native is None, reason="the extension is not built")

SLOT = 4096
ALL = [ExpertId(layer, expert) for layer in range(2) for expert in range(6)]


def small(num_slots: int) -> tuple[Any, SourceDouble]:
    source = SourceDouble(MemorySource(marked_blobs(ALL, SLOT)))
    return Residency(source, SlotArena((num_slots, SLOT)), make_policy("lru", num_slots, [6, 6])), source


def run(memory: Any, layer: int, experts: list[int]) -> list[list[int]]:
    """A block as a step runs it: the experts that each call gave."""
    memory.acquire(layer, experts, [1] * len(experts), 1, 0, 0, 0)
    given: list[list[int]] = []
    while sum(map(len, given)) < len(experts):
        given.append([experts[index] for index, _, _ in memory.arrived(len(experts))])
    memory.end()
    return given


def test_what_is_resident_comes_first_then_the_others() -> None:
    residency, _ = small(3)
    assert run(residency.native, 0, [1, 2])[0] == [], "nothing is resident yet"
    given = run(residency.native, 0, [2, 5, 1])
    assert given[:2] == [[2, 1], [5]]
    assert sum(map(len, run(residency.native, 1, [0, 1, 2, 3, 4, 5]))) == 6, "more than there are slots"
    counters = residency.counters
    assert (counters.hits, counters.misses, counters.bytes_read) == (2, 9, 9 * SLOT)
    residency.check_integrity()
    residency.close()
    with pytest.raises(ClosedModelError):
        residency.native.acquire(0, [1], [1], 1, 0, 0, 0)


def test_a_read_that_fails_raises_and_the_block_can_be_ended() -> None:
    residency, source = small(3)
    source.fails[ExpertId(0, 1)] = 1
    residency.native.acquire(0, [1], [1], 1, 0, 0, 0)
    assert residency.native.arrived(1) == []
    with pytest.raises(CorruptExpertError):
        residency.native.arrived(1)
    residency.native.end()
    residency.native.end()
    assert run(residency.native, 0, [1]) == [[], [1]]
    residency.close()


@pytest.mark.parametrize("by_step", [True, False])
def test_a_wait_can_be_interrupted(by_step: bool) -> None:
    residency, source = small(1)
    source.gate.clear()
    lease = residency.acquire([ExpertId(0, 1)])
    wait: Callable[[], Any] = partial(next, lease.batches())
    if by_step:
        lease.release()
        wait = partial(run, residency.native, 0, [1])
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        wait()
    residency.forget_leases()
    source.gate.set()
    residency.wait_idle()
    residency.check_integrity()
    assert run(residency.native, 0, [1]) == [[1]], "what was under way has arrived"
    residency.close()


def test_counters_are_live_and_their_copies_are_not() -> None:
    residency, _ = small(2)
    before = replace(residency.counters)
    run(residency.native, 0, [1])
    residency.counters.predicting_seconds += 0.5
    assert type(before) is Counters
    assert before.misses == 0
    since = residency.counters.since(before)
    assert (since.misses, since.predicting_seconds, residency.counters.ready_on_time) == (1, 0.5, 0.0)
    residency.close()


def test_a_policy_of_ones_own_is_asked() -> None:
    """One that the extension does not have, here the most recently used goes first."""

    class Newest(LRU):
        def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
            return next(filter(evictable, reversed(self._order)), None)

    source = SourceDouble(MemorySource(marked_blobs(ALL, SLOT)))
    residency: Any = Residency(source, SlotArena((2, SLOT)), Newest())
    for expert in (0, 1, 2):
        run(residency.native, 0, [expert])
    assert sorted(residency.resident()) == [ExpertId(0, 0), ExpertId(0, 2)]
    residency.close()


def test_a_program_may_end_while_a_source_in_python_reads() -> None:
    program = """
import time
from fate_moe.core import ExpertId
from fate_moe.memory.policies import LRU
from fate_moe.memory.residency import Residency
from fate_moe.memory.slots import SlotArena

class Slow:
    def read(self, expert, slot, first=0, last=None):
        time.sleep(0.05)
        return 4096

    def close(self):
        pass

residency = Residency(Slow(), SlotArena((3, 4096)), LRU())
residency.acquire([ExpertId(0, 0), ExpertId(0, 1)])
time.sleep(0.02)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


class Watch:
    """An observer that keeps what it is given."""

    def __init__(self) -> None:
        self.passes: list[ForwardPass] = []

    def keeps_inputs(self, num_tokens: int) -> bool:
        return True

    def record(self, forward: ForwardPass) -> None:
        self.passes.append(forward)


def test_observers_and_counts_see_what_a_step_runs(loaded: Callable[..., Any]) -> None:
    model = loaded("qwen2_moe", policy="lru", predictor="none", expert_cache="50%")
    runtime = model.fate.runtime
    top_k, hidden = 2, model.config.hidden_size
    inputs = torch.randn(1, hidden).bfloat16()
    chosen, weights = torch.tensor([[3, 1]]), torch.tensor([[0.75, 0.25]])

    def step() -> None:
        runtime.embedded(inputs)
        for layer in range(2):
            runtime.memory.acquire(layer, [3, 1], [1, 1], 1, inputs.data_ptr(), chosen.data_ptr(), weights.data_ptr())
            count = 0
            while count < top_k:
                count += len(runtime.memory.arrived(2))
            runtime.memory.end()

    before, watch = runtime.view_selector.uses(), Watch()
    step()
    with runtime.observe(watch):
        step()
    step()
    (forward,) = watch.passes
    assert forward.is_whole(2)
    for block in forward.layers:
        assert block.router_input is not None
        assert torch.equal(block.router_input, inputs)
        assert torch.equal(block.experts, chosen)
        assert torch.equal(block.weights, weights)
    added = [after - old for after, old in zip(runtime.view_selector.uses(), before, strict=True)]
    assert [added[1], added[3], sum(added)] == [3, 3, 12], "counted with and without Python"


def test_a_pass_that_reads_ahead_calls_no_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits and counts as by the calls that observers make; and nothing is predicted once all experts are there."""
    store = convert(tiny_checkpoint("qwen2_moe", tmp_path / "checkpoint", torch.bfloat16), tmp_path / "store", "int4")
    ids = torch.randint(0, 60, (1, 6), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        out, rows = model(ids, use_cache=True), []
        for token in ids[0]:
            out = model(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1])
        return torch.stack(rows)

    model = load_model(store, expert_cache="50%", preset="best", context_length=64)
    runtime = model.fate.runtime
    with runtime.observe(Watch()):
        want = logits(model)
    uses, prefetched = sum(runtime.view_selector.uses()), model.fate.counters().prefetched
    monkeypatch.setattr(type(runtime), "begin_step", None)
    assert torch.equal(logits(model), want)
    assert sum(runtime.view_selector.uses()) == 2 * uses
    assert model.fate.counters().prefetched > prefetched
    model.fate.close()

    whole = load_model(store, expert_cache="100%", preset="best", context_length=64)
    runtime = whole.fate.runtime
    for layer, size in enumerate(runtime.num_experts):
        lease = runtime.residency.acquire([ExpertId(layer, expert) for expert in range(size)])
        assert len(list(lease.arrivals())) == size
        lease.release()
    assert torch.equal(logits(whole), want)
    assert whole.fate.counters().predicting_seconds == 0
    whole.fate.close()
