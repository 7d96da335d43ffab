"""The running server: its options, its scheduler, and the model once it is loaded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Request

from fate_moe.schedule.batching import BatchScheduler
from fate_moe.schedule.request import Request as TextRequest
from fate_moe.schedule.scheduler import Scheduler
from fate_moe.schedule.speculation import Speculation
from fate_moe.serve.card import ModelCard
from fate_moe.serve.errors import ApiError
from fate_moe.serve.metrics import Metrics
from fate_moe.serve.options import ServeOptions
from fate_moe.serve.prompt import template_kind

__all__ = ["Service", "Serving"]

_log = logging.getLogger(__name__)


class Service:
    """``card`` is None until the model is loaded; ``failure`` says why it will never be. ``stopping`` is set, in the event loop,
    when the server is to end: streams without an end of their own watch it."""

    def __init__(self, options: ServeOptions, scheduler: Scheduler | None = None, card: ModelCard | None = None) -> None:
        self.options = options
        self.card = card
        self.failure: str | None = None
        self.metrics = Metrics(self)
        self.stopping = asyncio.Event()
        self.began = time.monotonic()
        self._scheduler = scheduler

    @classmethod
    def loading(
        cls,
        options: ServeOptions,
        name: str,
        load: Callable[[], tuple[Any, Any]],
        on_loaded: Callable[[Exception | None], None] = lambda error: None,
    ) -> Service:
        """A service whose model ``name`` is being loaded, in the inference thread. ``on_loaded`` is called there afterwards."""
        service = cls(options)

        def loaded(result: tuple[Any, Any] | Exception) -> None:
            if isinstance(result, Exception):
                service.failure = str(result)
                on_loaded(result)
                return
            service.card = ModelCard.of(name, *result)
            if template_kind(service.card) == "plain":
                _log.warning("this model has no chat template: conversations become lines of 'User:' and 'Assistant:'")
            on_loaded(None)

        speculation = Speculation(options.speculate)
        service._scheduler = BatchScheduler(
            load, options.queue, loaded, service.metrics.finished, options.parallel, speculation=speculation
        )
        return service

    @property
    def log_texts(self) -> Callable[[TextRequest, str], None] | None:
        """Writes a prompt and its answer to the log; None unless that was asked for."""
        if not self.options.log_prompts:
            return None
        card = self.model()
        return lambda request, text: _log.warning("prompt: %r\nanswer: %r", card.decode(list(request.prompt)), text)

    @property
    def scheduler(self) -> Scheduler:
        assert self._scheduler is not None
        return self._scheduler

    def model(self) -> ModelCard:
        """The model. Raises ApiError 503 while there is none."""
        if self.failure is not None:
            raise ApiError(f"the model could not be loaded: {self.failure}", status=503, code="model_failed")
        if self.card is None:
            raise ApiError("the model is being loaded; try again soon", status=503, code="model_loading")
        return self.card

    def health(self) -> tuple[int, dict[str, Any]]:
        """The status code and body of /health."""
        if self.failure is not None:
            return 503, {"status": "error", "error": self.failure}
        if self.card is None:
            return 503, {"status": "loading", "seconds": round(time.monotonic() - self.began, 1)}
        if self.stopping.is_set():
            return 503, {"status": "stopping"}
        return 200, {"status": "ok", "waiting": self.scheduler.waiting, "running": self.scheduler.running}

    def close(self, drain_seconds: float = 0.0) -> None:
        """End the scheduler; blocks."""
        if self._scheduler is not None:
            self._scheduler.close(drain_seconds)


async def _service(request: Request) -> Service:  # not async, it would run in a thread
    service: Service = request.app.state.service
    return service


Serving = Annotated[Service, Depends(_service)]
