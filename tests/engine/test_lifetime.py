"""What a model takes is given back: by close, by del, by ``with``, by a failure and at the end of the program."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

from fate_moe import Loaded, load
from fate_moe.config import OffloadConfig
from fate_moe.engine import engine as engines
from fate_moe.engine.load import build
from fate_moe.engine.prepare import prepare, store_for
from fate_moe.errors import CheckpointError, ClosedModelError
from fate_moe.memory.decayed import Decayed
from fate_moe.store.learned import STATISTICS, load_statistics
from tests.support.calls import PROMPT, write
from tests.support.engines import load_model, simulated_gpu

pytestmark = pytest.mark.slow


def held() -> tuple[int, int]:
    """Threads and open files."""
    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.fixture(params=["cpu", "cuda"])
def make(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Callable[[], Any]:
    store = store_for(checkpoint("qwen2_moe"), "lossless")
    return lambda: load_model(store) if request.param == "cpu" else simulated_gpu(store, 8, 6)


def test_a_model_that_is_deleted_ends_itself(make: Callable[[], Any]) -> None:
    with torch.no_grad():
        make()(PROMPT[:, :1])
    before, known = held(), len(engines._open)
    for _ in range(2):
        model = make()
        with torch.no_grad():
            model(PROMPT[:, :1])
        assert len(engines._open) == known + 1
        del model
        assert held() == before
    assert len(engines._open) == known


def test_many_loads_do_not_grow(checkpoint: Callable[[str], Path]) -> None:
    store = store_for(checkpoint("qwen2_moe"), "lossless")
    load_model(store).fate.close()
    before = held()
    for _ in range(20):
        load_model(store).fate.close()
    assert held() == before


def test_what_is_left_of_a_model_keeps_it_running(make: Callable[[], Any]) -> None:
    model = make()
    base = model.model
    with torch.no_grad():
        want = model.model(PROMPT[:, :1]).last_hidden_state
        del model
        gc.collect()
        torch.testing.assert_close(base(PROMPT[:, :1]).last_hidden_state, want)


def test_statistics_of_a_deleted_model_are_kept(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(store_for(checkpoint("qwen2_moe"), "lossless"), store, ignore=shutil.ignore_patterns(STATISTICS))
    model = load_model(store, expert_cache="50%", policy="decayed")
    write(model)
    assert load_statistics(store) is None
    del model
    gc.collect()
    assert load_statistics(store) is not None


def test_with_load_closes_the_model(tmp_path: Path) -> None:
    with load(ram="2GiB", context_length=64) as (model, tokenizer):
        inputs = tokenizer("Once", return_tensors="pt")
        want = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        say = pipeline("text-generation", model=model, tokenizer=tokenizer)
        said = say("Once", max_new_tokens=2, do_sample=False, return_full_text=True)[0]["generated_text"]
        assert said == tokenizer.decode(want[0], skip_special_tokens=True)
        streamer = TextIteratorStreamer(tokenizer)  # of which only the beginning is read
        options = {**inputs, "min_new_tokens": 50, "max_new_tokens": 50, "do_sample": False, "streamer": streamer}
        ended: list[Any] = []

        def run() -> None:
            try:
                model.generate(**options)
            except ClosedModelError as error:
                ended.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        next(iter(streamer))
    thread.join(60)
    assert not thread.is_alive()
    assert len(ended) == 1
    with pytest.raises(ClosedModelError):
        model(PROMPT)
    again = load(ram="2GiB", context_length=64)
    assert isinstance(again, Loaded)
    model, tokenizer = again
    with model.fate as one, pytest.raises(KeyboardInterrupt), one:
        raise KeyboardInterrupt
    assert one.closed


def test_a_load_that_fails_leaves_nothing(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_for(checkpoint("qwen2_moe"), "lossless")
    before = held()

    def none(path: Path) -> None:
        raise CheckpointError("its tokenizer cannot be loaded")

    with monkeypatch.context() as patch:
        patch.setattr("fate_moe.engine.load.load_tokenizer", none)
        with pytest.raises(CheckpointError, match="tokenizer"):
            load(store, ram="2GiB", context_length=64)
    assert held() == before
    for step in ("place_weights", "make_prediction", "patch", "engine"):
        with monkeypatch.context() as patch:
            patch.setattr(f"fate_moe.engine.cpu.CpuParts.{step}", lambda self, *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                load_model(store)
        assert held() == before, step
    with monkeypatch.context() as patch:
        patch.setattr("fate_moe.engine.load.store_used", lambda path: 1 / 0)  # the engine is there already
        with pytest.raises(ZeroDivisionError):
            load_model(store)
    assert held() == before


def test_two_engines_on_one_store(checkpoint: Callable[[str], Path]) -> None:
    store = store_for(checkpoint("qwen2_moe"), "lossless")
    one, other = load_model(store, expert_cache="30%"), load_model(store)
    want, got = write(other).tolist(), list[Any]()
    threads = [threading.Thread(target=lambda m=m: got.append(write(m).tolist())) for m in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [want, want]
    one.fate.close()
    assert write(other).tolist() == want
    other.fate.close()


def test_a_program_that_ends_without_close_is_quiet(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Also with a daemon thread in the midst of a text, after an error and after Ctrl-C; what was learned is kept."""
    store = tmp_path / "store"
    shutil.copytree(store_for(checkpoint("qwen2_moe"), "lossless"), store, ignore=shutil.ignore_patterns(STATISTICS))
    program = f"""
import sys, threading, torch
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.support.engines import load_model
from tests.support.calls import PROMPT, write
torch.set_num_threads(1)
models = [load_model(Path({str(store)!r}), expert_cache="30%", policy="decayed") for _ in range(2)]
write(models[0])
begun = threading.Event()
from tests.engine.test_calls import Within
threading.Thread(target=lambda: write(models[1], num=200, streamer=Within(begun.set)), daemon=True).start()
begun.wait()
try:
    write(models[0], streamer=Within(lambda: 1 / 0))
except ZeroDivisionError as error:
    kept = error  # its frames hold the model
raise KeyboardInterrupt
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (1, -2, 130)
    lines = [line for line in done.stderr.splitlines() if line[:1].strip()]
    assert lines[-2:] == ["Traceback (most recent call last):", "KeyboardInterrupt"], done.stderr
    assert "leaked" not in done.stderr
    assert "Exception in thread" not in done.stderr
    assert load_statistics(store) is not None


def test_a_parts_failure_while_abandoning_still_undoes(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = OffloadConfig(context_length=64)
    prepared = prepare(store_for(checkpoint("qwen2_moe"), "lossless"))
    monkeypatch.setattr("fate_moe.engine.cpu.CpuParts.patch", lambda self: 1 / 0)
    monkeypatch.setattr("fate_moe.engine.cpu.CpuParts.abandon", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(prepared, prepared.plan(config), config)
    assert prepared.model.lm_head.weight.device.type == "meta"


def test_what_was_used_most_is_read_before_the_first_pass(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """In the background, as far as it comes; the text is the same."""
    store = tmp_path / "store"
    shutil.copytree(store_for(checkpoint("qwen2_moe"), "lossless"), store, ignore=shutil.ignore_patterns(STATISTICS))
    first = load_model(store, expert_cache="50%")
    assert not first.fate.runtime.residency.resident()
    text = write(first)
    first.fate.close()
    state = load_statistics(store)
    again = load_model(store, expert_cache="50%")
    residency = again.fate.runtime.residency
    residency.wait_idle()
    used_most = Decayed(again.fate.runtime.num_experts)
    assert state is not None
    used_most.restore(state)
    assert set(residency.resident()) == set(used_most.hottest(again.fate.plan.num_slots))
    assert torch.equal(write(again), text)
    again.fate.close()


def test_a_model_that_runs_whole_goes_when_nobody_has_it() -> None:
    """What the extension watches holds what holds it."""
    with torch.no_grad():
        model, _ = load()
        model(PROMPT)
    gone = [weakref.ref(model), weakref.ref(model.fate.runtime), weakref.ref(model.model.layers[0])]
    assert model.fate.step is not None
    del model, _
    gc.collect()
    assert [each() for each in gone] == [None, None, None]
