"""Calls from several threads, from within calls, after closing, in forked children: right, or one clear error."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from fate_moe import ClosedModelError
from fate_moe.engine.prepare import store_for
from fate_moe.errors import CorruptExpertError, StoreError, UnsupportedCallError
from tests.support.calls import PROMPT, write
from tests.support.engines import load_model, simulated_gpu

pytestmark = pytest.mark.slow

PROMPTS = [PROMPT, PROMPT.flip(1), PROMPT + 9]


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> Any:
    """A running model with fewer slots than experts."""
    running = load_model(store_for(checkpoint("qwen2_moe"), "lossless"), expert_cache="30%")
    yield running
    running.fate.close()


@pytest.fixture
def on_gpu(checkpoint: Callable[[str], Path]) -> Any:
    """The same on a simulated GPU, on which a token takes seconds."""
    running = simulated_gpu(store_for(checkpoint("qwen2_moe"), "lossless"), 8)
    yield running
    running.fate.close()


def alone(model: Any, prompts: list[torch.Tensor], num: int = 4) -> list[Any]:
    return [write(model, prompt, num).tolist() for prompt in prompts]


class Within(BaseStreamer):  # type: ignore[misc]
    """A streamer that calls something at every token."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.results = call, list[Any]()

    def put(self, value: torch.Tensor) -> None:
        self.results.append(self.call())

    def end(self) -> None:
        pass


def test_threads_wait_their_turn_and_each_writes_what_it_would_alone(model: Any) -> None:
    want, got = alone(model, PROMPTS), dict[int, Any]()
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: write(model, PROMPTS[i], 4).tolist()})) for i in range(len(PROMPTS))
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert model.fate.report().experts.lookups > 0  # from any thread, at any time
        threads[0].join(0.001)
    assert [got[i] for i in range(len(PROMPTS))] == want

    async def gathered() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(write, model, prompt, 4) for prompt in PROMPTS))

    assert [one.tolist() for one in asyncio.run(gathered())] == want


def test_calls_take_turns_on_a_gpu(on_gpu: Any) -> None:
    """It has one captured cache: a call from another thread waits, one from within has a cache of its own, and close ends both."""
    prompts = [prompt[:, :2] for prompt in PROMPTS[:2]]
    want, beside = alone(on_gpu, prompts, 2)
    begun, got, raised = threading.Event(), list[Any](), list[BaseException]()

    def call_within() -> Any:
        begun.set()
        return write(on_gpu, prompts[1], 1).tolist() if not inner.results else None

    inner = Within(call_within)

    def run() -> None:
        got.append(write(on_gpu, prompts[0], 2, streamer=inner).tolist())

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait(60)
    assert write(on_gpu, prompts[1], 2).tolist() == beside
    thread.join()
    assert got == [want]
    assert inner.results[0] == [beside[0][:-1]]

    def run_until_closed() -> None:
        try:
            write(on_gpu, prompts[0], num=18, streamer=Within(closing.set))
        except ClosedModelError as error:
            raised.append(error)

    closing = threading.Event()
    thread = threading.Thread(target=run_until_closed)
    thread.start()
    closing.wait(60)
    on_gpu.fate.close()
    thread.join(60)
    assert len(raised) == 1
    for call in (on_gpu.generate, on_gpu, on_gpu.model.layers[0].mlp):
        with pytest.raises(ClosedModelError):
            call(PROMPT)


def test_forward_passes_of_threads_do_not_mix(model: Any) -> None:
    with torch.no_grad():
        want, wrong = [model(prompt).logits for prompt in PROMPTS], list[int]()

        def run(i: int) -> None:
            with torch.no_grad():
                for _ in range(3):
                    if not torch.allclose(model(PROMPTS[i]).logits, want[i], atol=1e-4):
                        wrong.append(i)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_streamer_may_call_the_same_model(model: Any) -> None:
    want, beside = alone(model, PROMPTS[:2])
    streamer = Within(lambda: write(model, PROMPTS[1], 4).tolist())
    assert write(model, PROMPTS[0], 4, streamer=streamer).tolist() == want
    assert streamer.results[1:] == [beside] * (len(streamer.results) - 1)


def test_models_called_within_each_other_do_not_wait_for_ever(loaded: Callable[..., Any]) -> None:
    one, other, told, meeting = loaded("qwen2_moe"), loaded("olmoe"), list[str](), threading.Barrier(2, timeout=30)
    want = alone(one, PROMPTS[:1])
    assert Within(lambda: write(other, num=1)).call().shape == (1, 7)

    def cross(model: Any, inner: Any) -> None:
        met: list[int] = []

        def call() -> None:
            if not met:
                met.append(meeting.wait())
            write(inner, num=1)

        try:
            write(model, num=2, streamer=Within(call))
        except UnsupportedCallError as error:
            told.append(str(error))

    threads = [threading.Thread(target=cross, args=models) for models in ((one, other), (other, one))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert len(told) == 1
    assert alone(one, PROMPTS[:1]) == want


def test_an_error_in_a_call_leaves_the_turn_free(model: Any) -> None:
    class Raises(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

    class RaisesToo(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("mine")

    want = alone(model, PROMPTS[:1])
    with pytest.raises(KeyboardInterrupt):
        write(model, stopping_criteria=[Raises()])
    with pytest.raises(ValueError, match="mine"):
        write(model, logits_processor=[RaisesToo()])
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.extend(alone(model, PROMPTS[:1])))
    thread.start()
    thread.join(60)
    assert got == want


def test_close_from_another_thread_ends_a_generate_that_runs(model: Any) -> None:
    begun, raised = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            write(model, num=18, streamer=Within(begun.set))
        except ClosedModelError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait(30)
    model.fate.close()
    thread.join(60)
    assert not thread.is_alive()
    assert len(raised) == 1
    for call in (model.generate, model, model.model, model.model.layers[0], model.lm_head, model.save_pretrained, model.state_dict):
        with pytest.raises(ClosedModelError, match="has been closed; load it again"):
            call(PROMPT)


def test_close_within_a_call(model: Any) -> None:
    with pytest.raises(ClosedModelError):
        write(model, streamer=Within(model.fate.close))


def test_observing_begins_and_ends_between_passes(loaded: Callable[..., Any]) -> None:
    class Counts:
        def __init__(self) -> None:
            self.whole = list[bool]()

        def keeps_inputs(self, num_tokens: int) -> bool:
            return False

        def record(self, forward: Any) -> None:
            self.whole.append(forward.is_whole(2))

    model, counts, stop = loaded("qwen2_moe"), Counts(), threading.Event()

    def run() -> None:
        while not stop.is_set():
            write(model, num=3)

    thread = threading.Thread(target=run)
    thread.start()
    while len(counts.whole) < 20:
        with model.fate.observe(counts):
            pass
        with model.fate.observe(counts):
            threading.Event().wait(0.01)
    stop.set()
    thread.join()
    assert all(counts.whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_child_forked_after_loading_is_told(model: Any) -> None:
    """Its parent's turn may be taken, and no thread reads for it."""
    with model.fate.calls.passing:
        thread = threading.Thread(target=lambda: write(model, num=1))  # holds the turn as the child begins
        thread.start()
        while not model.fate.calls.turn._owner:
            pass
        read, written = os.pipe()
        child = os.fork()
        if not child:
            said = b"nothing"
            try:
                write(model)
            except BaseException as error:
                said = f"{type(error).__name__}: {error}".encode()
            model.fate.close()  # and does not wait
            os.write(written, said)
            os._exit(0)
    os.close(written)
    assert os.waitpid(child, 0)[1] == 0
    assert b"UnsupportedCallError: this process was forked after the model was loaded" in os.read(read, 1000)
    os.close(read)
    thread.join()
    assert write(model, num=1).shape == (1, 7)


def test_a_disk_that_fails_is_an_error_each_time_and_recovers(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(store_for(checkpoint("qwen2_moe"), "lossless"), expert_cache="30%")
    want = alone(model, PROMPTS[:1])
    files = [file.fileno() for file in model.fate.runtime.residency._source._files.values()]
    good, folder = [os.dup(file) for file in files], os.open(tmp_path, os.O_RDONLY)
    for file in files:
        os.dup2(folder, file)
    for _ in range(2):
        with pytest.raises(StoreError, match="Is a directory"):
            write(model, PROMPT + 31)
    for file, old in zip(files, good, strict=True):
        os.dup2(old, file)
    assert alone(model, PROMPTS[:1]) == want
    model.fate.close()


def test_a_store_that_is_overwritten_while_in_use_is_noticed(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the bytes were right before; a touched file is still the same."""
    monkeypatch.setattr("fate_moe.store.dense.MIN_QUANTIZED_ELEMENTS", 1 << 11)  # the embedding stays on the disk
    store = tmp_path / "store"
    shutil.copytree(store_for(checkpoint("qwen2_moe"), "lossless"), store)
    model = load_model(store, expert_cache="30%")
    want = alone(model, PROMPTS[:1])
    for path in store.glob("*.safetensors"):
        path.touch()
    assert alone(model, PROMPTS[:1]) == want
    dense = (store / "dense.safetensors").read_bytes()
    (store / "dense.safetensors").write_bytes(bytes(len(dense)))
    with pytest.raises(StoreError, match="differ from their checksum"):
        write(model)
    (store / "dense.safetensors").write_bytes(dense)
    assert alone(model, PROMPTS[:1]) == want
    for path in store.glob("experts*"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptExpertError):
        alone(model, PROMPTS)
    model.fate.close()


def test_tensors_of_other_default_devices_and_dtypes(loaded: Callable[..., Any]) -> None:
    """Kernels are given addresses: what they write to must be in RAM and as wide as they think."""
    model = loaded("qwen2_moe")
    want = write(model).tolist()
    with torch.device("meta"):
        assert write(model).tolist() == want
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert write(model).tolist() == want
        assert write(loaded("qwen2_moe")).tolist() == want
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert write(model).shape == (1, 12)
