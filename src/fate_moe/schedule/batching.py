"""The scheduler: one inference thread, a bounded queue, and several requests in each step of the model."""

from __future__ import annotations

import logging
import secrets
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fate_moe.engine.report import PrefixReport
from fate_moe.errors import FateError
from fate_moe.schedule.executor import Executor, Rows
from fate_moe.schedule.executors import default_parallel, executor_of
from fate_moe.schedule.prompt_logprobs import prompt_records
from fate_moe.schedule.request import Finished, Queued, Reason, Request
from fate_moe.schedule.sampling import choose
from fate_moe.schedule.savings import Savings
from fate_moe.schedule.scheduler import Load, QueueFullError, Scheduler, StoppedError
from fate_moe.schedule.sequence import CancelledError, TextSequence
from fate_moe.schedule.speculation import Drafter, Speculation
from fate_moe.schedule.steps import Steps
from fate_moe.schedule.ticket import Bell, QueueTicket

__all__ = ["BatchScheduler"]

_log = logging.getLogger(__name__)

_SAVE_SECONDS = 10.0  # that what is kept may take to be written at the end
_RECENT = 32  # requests by which the time that others will take is estimated


class BatchScheduler(Scheduler):
    """Runs requests side by side in a thread of its own, which also loads the model. Who came first is admitted first.

    ``load`` gives (model, tokenizer); ``on_loaded`` is called with them, or with the error, in that thread. At most ``capacity``
    requests wait and ``parallel`` run (None: ``default_parallel``; 1: one after the other). ``on_finished`` is told of each request
    that ended, in the inference thread. ``speculation``: what is drafted (None: nothing). A request that fails ends with
    ``Finished("error")``; all others go on.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        capacity: int = 64,
        on_loaded: Callable[[tuple[Any, Any] | Exception], None] = lambda result: None,
        on_finished: Callable[[Request, Finished], None] = lambda request, finished: None,
        parallel: int | None = None,
        make_executor: Callable[[Any], Executor] = executor_of,
        speculation: Speculation | None = None,
    ) -> None:
        self.speculation = speculation or Speculation("off")
        self.capacity = capacity
        self._load, self._on_loaded, self._on_finished = load, on_loaded, on_finished
        self._parallel, self._make_executor = parallel, make_executor
        self._waiting: list[TextSequence] = []  # by age
        self._tickets: dict[TextSequence, QueueTicket] = {}
        self._seconds: deque[float] = deque(maxlen=_RECENT)  # that requests took once they had begun
        self._bells: tuple[Bell, ...] = ()  # of all loops that asked
        self._steps: Steps | None = None  # of a model that is loaded
        self._order = self._num_steps = self._num_rows = self._generated = 0
        self._changed = threading.Condition()  # reentrant: ending a request may cancel another
        self._savings = Savings()
        self._is_closed, self._why_closed = False, "the server is shutting down"
        self._thread = threading.Thread(target=self._run, name="fate-inference", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._steps.run) if self._steps is not None else 0

    @property
    def generated_tokens(self) -> int:
        """Tokens that were generated so far, those of running requests among them."""
        return self._generated

    @property
    def parallel(self) -> int:
        """How many requests run at once; 1 until the model is loaded, unless it was said."""
        return self._steps.parallel if self._steps is not None else self._parallel or 1

    @property
    def load(self) -> Load:
        if (steps := self._steps) is None:
            return Load()
        blocks, prefixes = steps.executor.blocks, steps.executor.prefixes
        kept = len(prefixes) if prefixes is not None else 0
        report = self._prefix_report() or PrefixReport()
        drafts = replace(self.speculation.counts)
        return Load(self._num_steps, self._num_rows, steps.preemptions, blocks.used, blocks.num_blocks, kept, drafts, report)

    def kept_files(self, tokens: Sequence[int]) -> list[str]:
        """Where what is kept of a text of ``tokens`` is or will be on the disk; none where nothing is kept there."""
        executor = self._steps.executor if self._steps is not None else None
        if executor is None or executor.disk is None or executor.prefixes is None:
            return []
        names = executor.prefixes.names([*tokens, 0])  # all full blocks: names() leaves a token to be read
        return executor.disk.paths_of(names)

    def submit(self, request: Request) -> QueueTicket:
        ticket = QueueTicket(self._end_cancelled)
        with self._changed:
            if self._is_closed:
                raise StoppedError(self._why_closed)
            self._drop_cancelled()
            if len(self._waiting) >= self.capacity:
                seconds = len(self._waiting) * statistics.fmean(self._seconds or [0.0]) / self.parallel
                raise QueueFullError(f"{self.capacity} requests wait already; try again in {seconds:.0f} s", seconds)
            self._order += 1
            sequence = TextSequence(request, self._order, time.perf_counter(), ticket.deliver, lambda: ticket.is_cancelled)
            self._tickets[sequence] = ticket
            self._waiting.append(sequence)
            if ticket.bell not in self._bells:
                self._bells = (*(bell for bell in self._bells if not bell.is_closed), ticket.bell)
            ticket.deliver(Queued(self._ahead(len(self._waiting) - 1)))
            self._ring()
            self._changed.notify_all()
        return ticket

    def close(self, drain_seconds: float = 0.0) -> None:
        deadline = time.monotonic() + drain_seconds
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._tickets, max(0.0, deadline - time.monotonic()))
            for ticket in list(self._tickets.values()):
                ticket.cancel()
            self._drop_cancelled()
            self._ring()
            self._changed.notify_all()
        if self._steps is not None:  # loading cannot be told to stop; the thread ends with the process
            self._thread.join()

    def _end_cancelled(self) -> None:
        """What was cancelled while it waited ends now, not when its turn comes."""
        with self._changed:
            self._drop_cancelled()
            self._ring()

    def _ring(self) -> None:
        """Let the loops know what was delivered. Until then nothing wakes them: they would take the interpreter."""
        for bell in self._bells:
            bell.ring()

    def _drop_cancelled(self) -> None:
        """Under the lock: end waiting requests that were cancelled, and tell the others where they stand."""
        gone = [sequence for sequence in self._waiting if sequence.is_cancelled]
        if gone:
            self._waiting = [sequence for sequence in self._waiting if not sequence.is_cancelled]
            for sequence in gone:
                self._end(sequence, "cancelled")
            self._tell_positions()

    def _ahead(self, place: int) -> int:
        """How many requests have to end before the one at ``place`` of the queue begins."""
        return max(0, place + self.running + 1 - self.parallel)

    def _tell_positions(self) -> None:
        for place, sequence in enumerate(self._waiting):
            if not sequence.has_begun:
                self._tickets[sequence].deliver(Queued(self._ahead(place)))

    def _end(self, sequence: TextSequence, reason: Reason, message: str = "") -> None:
        """Under the lock, or with nobody else there."""
        if self._steps is not None:
            self._steps.leave(sequence)
        finished = sequence.finished(reason, message)
        if sequence.has_begun:
            self._seconds.append(finished.timings.prompt_seconds + finished.timings.decode_seconds)
        self._on_finished(sequence.request, finished)
        self._tickets.pop(sequence).deliver(finished)
        self._changed.notify_all()

    def _prefix_report(self) -> PrefixReport | None:
        """None where no prefixes are kept."""
        executor = self._steps.executor if self._steps is not None else None
        if executor is None or (prefixes := executor.prefixes) is None:
            return None
        on_disk = executor.disk.traffic if executor.disk is not None else (0, 0, 0)
        kept_bytes = len(prefixes) * executor.block_bytes
        if prefixes.states is not None:
            kept_bytes += len(prefixes.states) * executor.state_bytes
        return PrefixReport(prefixes.lookups, prefixes.hits, kept_bytes, *on_disk, self._savings.seconds)

    # What follows runs in the inference thread.

    def _run(self) -> None:
        try:
            model, tokenizer = self._load()
            executor = self._make_executor(model)
            executor.on_pass = self._ring
            self.speculation.counts = getattr(model.fate, "drafts", self.speculation.counts)
            self.speculation.assistant = self.speculation.assistant or getattr(model.fate, "assistant", None)
            most = executor.most_sequences or executor.blocks.num_blocks
            drafts = self.speculation if self.speculation.mode != "off" and executor.takes_drafts else None
            self._steps = Steps(executor, min(self._parallel or default_parallel(executor), most), drafts)
            model.fate.prefixes = self._prefix_report
            self._on_loaded((model, tokenizer))
        except Exception as error:
            self._on_loaded(error)
            with self._changed:
                self._is_closed, self._why_closed = True, str(error)
                for left in self._waiting:
                    self._end(left, "error", str(error))
                self._waiting.clear()
                self._ring()
            return
        while self._admit(model, tokenizer):
            self._step()
        if executor.disk is not None:
            executor.disk.save_all(_SAVE_SECONDS)
        report = self._prefix_report()
        model.fate.prefixes = lambda: report  # which does not hold the KV cache

    def _admit(self, model: Any, tokenizer: Any) -> bool:
        """Let requests run as there is room for them, wait where there is none to run; False once closed and empty."""
        steps = self._steps
        assert steps is not None
        while True:
            with self._changed:
                for sequence in [one for one in steps.run if one.is_cancelled]:
                    self._end(sequence, "cancelled")
                self._drop_cancelled()
                self._waiting = sorted([*steps.make_room(), *self._waiting], key=lambda one: one.order)
                begun = []
                while self._waiting and (steps.never_admits(self._waiting[0]) or steps.admits(self._waiting[0])):
                    sequence = self._waiting.pop(0)
                    if (reason := steps.never_admits(sequence)) is not None:
                        self._end(sequence, "error", reason)
                        continue
                    steps.admit(sequence)
                    begun.append(sequence)
                if begun:
                    self._tell_positions()
                elif not steps.run:
                    self._ring()
                    if self._is_closed:
                        return False
                    if steps.executor.disk is None or not steps.executor.disk.has_work:
                        self._changed.wait()
                        continue
                    if (seconds := steps.executor.disk.seconds_to_wait) > 0:
                        self._changed.wait(seconds)
                        continue
            for sequence in begun:
                if not sequence.has_begun:
                    self._guarded(self._begin, sequence, model, tokenizer)
            if steps.run:
                return True
            if not begun and steps.executor.disk is not None:
                steps.executor.disk.save()

    def _begin(self, sequence: TextSequence, model: Any, tokenizer: Any) -> None:
        request, steps = sequence.request, self._steps
        assert steps is not None
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(63)
        sequence.begin(model, tokenizer, seed)
        if steps.speculation is not None:
            sequence.drafter = Drafter(self.speculation)
        if request.prompt_logprobs and not steps.executor.any_cut:
            with torch.inference_mode():
                inputs = torch.tensor([request.prompt], device=model.device)
                sequence.prompt_records = list(prompt_records(model, inputs, request.top_logprobs or 0))
        if sequence.sampler is None and not sequence.wants_prompt_records:
            self._finish(sequence, "length")

    def _step(self) -> None:
        """One step of the model, and what becomes of it."""
        steps = self._steps
        assert steps is not None
        began = time.perf_counter()
        steps.restore()
        step = steps.rows()
        if not step:
            self._ring()
            return
        rows, restored = [one for _, one in step], time.perf_counter()
        try:
            results = steps.executor.step(rows)
        except BaseException as error:  # of no single request
            results = [error] * len(rows)
        self._savings.note([len(one.tokens) for one in rows], time.perf_counter() - restored)
        if steps.executor.prefixes is not None:
            self._savings.count(steps.executor.prefixes.hits, restored - began)
        self._ring()  # an executor that met an error may not have
        self._num_steps += 1
        self._num_rows += sum(len(one.tokens) for one in rows)
        ready: list[tuple[TextSequence, torch.Tensor]] = []  # and the logits of its last token and of its drafts [rows, vocab]
        for (sequence, one), result in zip(step, results, strict=True):
            if isinstance(result, BaseException):
                self._fail(sequence, result)
            else:
                self._guarded(self._take, sequence, one, result, ready)
        accepted = dict.fromkeys((sequence for sequence, _ in step), 0)
        place = 0  # among the rows
        while ready:
            rows_now = [logits[place] for _, logits in ready]
            tokens = choose([sequence.sampler for sequence, _ in ready if sequence.sampler is not None], rows_now)
            going_on: list[tuple[TextSequence, torch.Tensor]] = []
            for (sequence, logits), row, token in zip(ready, rows_now, tokens, strict=True):
                if isinstance(token, BaseException):
                    self._fail(sequence, token)
                elif not sequence.is_cancelled:
                    self._guarded(self._follow, sequence, token, row)
                    if sequence in self._tickets and place < len(sequence.draft) and token == sequence.draft[place]:
                        sequence.read += 1
                        sequence.accepted += 1
                        accepted[sequence] += 1
                        going_on.append((sequence, logits))
            ready, place = going_on, place + 1
        if steps.speculation is not None:
            self._end_drafts(steps.speculation, accepted)
        if steps.executor.disk is not None:
            steps.executor.disk.save_beside()

    def _end_drafts(self, speculation: Speculation, accepted: dict[TextSequence, int]) -> None:
        """Of the drafts of the step's sequences the first ``accepted`` tokens are part of their texts."""
        steps = self._steps
        assert steps is not None
        if any(sequence.draft for sequence in accepted):
            steps.executor.learn(list(accepted.values()))
        for sequence, count in accepted.items():
            if sequence.name is not None and sequence in self._tickets and count < len(sequence.draft):
                steps.executor.cut(sequence.name, sequence.read)
            sequence.draft = []
        speculation.passed(list(accepted.values()))

    def _take(
        self, sequence: TextSequence, rows: Rows, logits: torch.Tensor, ready: list[tuple[TextSequence, torch.Tensor]]
    ) -> None:
        """``rows`` of ``sequence`` were read."""
        sequence.read += len(rows.tokens) - len(sequence.draft)
        if sequence.wants_prompt_records and len(logits):
            sequence.record_prompt(logits)
        if sequence.sampler is not None and sequence.read == len(sequence.tokens):
            steps = self._steps
            assert steps is not None
            logits = logits[-1 - len(sequence.draft) :]
            ready += [(one, logits) for one in (sequence, *(steps.forked(sequence) if not sequence.generated else ()))]
        elif sequence.sampler is None and sequence.read == sequence.target:
            self._finish(sequence, "length")
        else:
            sequence.progress(0.0)

    def _follow(self, sequence: TextSequence, token: int, logits: torch.Tensor) -> None:
        self._generated += 1
        if (reason := sequence.follow(token, logits)) is not None:
            self._finish(sequence, reason)
        if sequence.generated == 1:  # whoever waits for a first token is told at once
            self._ring()

    def _finish(self, sequence: TextSequence, reason: Reason, message: str = "") -> None:
        with self._changed:
            self._end(sequence, reason, message)

    def _guarded(self, work: Callable[..., None], sequence: TextSequence, *args: Any) -> None:
        """``work`` for ``sequence``; what it raises ends this one alone."""
        try:
            work(sequence, *args)
        except BaseException as error:  # a panic of a library in Rust is no Exception; the thread outlives it
            self._fail(sequence, error)

    def _fail(self, sequence: TextSequence, error: BaseException) -> None:
        if sequence not in self._tickets:
            _log.error("a request failed as it ended", exc_info=error)
        elif isinstance(error, CancelledError):
            self._finish(sequence, "cancelled")
        elif isinstance(error, FateError):
            self._finish(sequence, "error", str(error))
        else:
            _log.error("a request failed", exc_info=error)
            self._finish(sequence, "error", f"{type(error).__name__}: {error}")
