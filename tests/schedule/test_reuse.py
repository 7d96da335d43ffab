"""Logits behind a reused beginning are those of a text that is read anew, to the bit, for every family that reuses some."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fate_moe import demo
from fate_moe.adapter.table import tried_families
from fate_moe.engine.prepare import load_tokenizer
from fate_moe.kernels.native import native
from fate_moe.layers import cpu_step
from fate_moe.schedule import steps
from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.executors import executor_of
from fate_moe.schedule.request import Request, Sampling
from fate_moe.store import dense
from fate_moe.store.convert import convert
from tests.schedule.test_batching import answers, end_of
from tests.support.bits import assert_same
from tests.support.engines import load_model
from tests.support.tiny import text_part, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(native is None, reason="the extension is not built")]

FAMILIES = {row.family: row.prefixes for row in tried_families() if row.prefixes.startswith("reused")}
LENGTH, KEPT = 150, 128
TOKENS = torch.randint(4, 128, (700,), generator=torch.Generator().manual_seed(0)).tolist()
ASKED = Request(tuple(TOKENS[:LENGTH]), 4, Sampling(temperature=0), ignore_eos=True)
OTHER = Request(tuple(TOKENS[LENGTH : LENGTH + 480]), 1, Sampling(temperature=0), ignore_eos=True)
PARTING = Request(tuple(TOKENS[:100] + TOKENS[500:560]), 1, Sampling(temperature=0), ignore_eos=True)


class Asking:
    """A scheduler on ``model``, as after a start: ``logits`` are those of all tokens so far."""

    def __init__(self, model: Any) -> None:
        self.logits = list[torch.Tensor]()
        self.scheduler = BatchScheduler(lambda: (model, TOKENIZER), parallel=1, make_executor=self._executor)

    def _executor(self, model: Any) -> Any:
        executor = executor_of(model)
        assert executor.prefixes is not None
        read = executor.step

        def noted(rows: Any) -> Any:
            results = read(rows)
            self.logits += [result for result in results if isinstance(result, torch.Tensor) and len(result)]
            return results

        executor.step = noted  # type: ignore[method-assign]
        return executor

    def ask(self, request: Request) -> tuple[int, torch.Tensor]:
        """How many tokens were there, and the logits of the answer's tokens."""
        self.logits.clear()
        end = end_of(answers(self.scheduler, request)[0])
        assert end.reason == "length", end.message
        return end.usage.cached_tokens, torch.cat(self.logits)


TOKENIZER = load_tokenizer(demo.MODEL)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models take longer with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prepare_environment(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("FATE_HOME", str(home))
    monkeypatch.setattr(dense, "MIN_QUANTIZED_ELEMENTS", 1)
    monkeypatch.setattr(cpu_step, "_difference", lambda *arguments: None)  # half of the time, and other tests' matter


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_a_beginning_gives_the_same_logits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory, from the disk after a restart, after other texts took its room, in other pieces; keys in both formats."""
    prepare_environment(monkeypatch, tmp_path)
    text_part(tiny_model(family)).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    store = convert(tmp_path / "checkpoint", tmp_path / "store", "int4", solver="minmax")
    found = []
    for kv_cache in ("bf16", "int8"):
        model = load_model(store, context_length=512, kv_cache=kv_cache, prefix_cache_disk="64MiB")
        with model.fate:
            first = Asking(model)
            nothing, want = first.ask(ASKED)
            ways = [(KEPT, first.ask(ASKED))]  # from memory
            first.scheduler.close()
            kept_files = first.scheduler.kept_files(ASKED.prompt)  # what a session knows of
            assert len(kept_files) == KEPT // 64 + ("states" in FAMILIES[family])
            assert all((tmp_path / "kv" / path).is_file() for path in kept_files)
            second = Asking(model)
            ways.append((KEPT, second.ask(ASKED)))  # from the disk
            second.ask(OTHER)
            ways.append((KEPT, second.ask(ASKED)))  # and where memory has lost it
            second.scheduler.close()
            monkeypatch.setattr(steps, "_ROWS", 37)
            monkeypatch.setattr(model.fate.config.__class__, "prefix_disk_bytes", 0)
            third = Asking(model)
            assert third.ask(PARTING)[0] == 0
            parted = 0 if "states" in FAMILIES[family] else 64  # no checkpoint is known to be wanted there
            ways.append((parted, third.ask(ASKED)))  # behind what another text left, in other pieces
            third.ask(OTHER)
            ways.append((0, third.ask(ASKED)))  # it had to go, and is read again
            third.scheduler.close()
            monkeypatch.undo()
            prepare_environment(monkeypatch, tmp_path)
        assert (nothing, len(want)) == (0, 4)
        for kept, (cached, logits) in ways:
            assert cached == kept
            assert_same(logits, want)
        found.append(want)
    assert not torch.equal(*found), "the formats are not the same numbers"
