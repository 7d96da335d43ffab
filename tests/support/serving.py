"""A real server on loopback, in a thread; and a scheduler that says what the test wants."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from fate_moe.schedule.request import Event, Finished, Piece, Queued, Reading, Request, Timings, TokenRecord, Usage
from fate_moe.schedule.scheduler import Load, QueueFullError, Scheduler, Ticket
from fate_moe.serve.card import ModelCard
from fate_moe.serve.options import ServeOptions
from fate_moe.serve.server import Server, bind
from fate_moe.serve.service import Service

# In Qwen's way: turns in marks, tools in the system message, reasoning and calls in tags, thinking that can be turned off.
QWEN_LIKE = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}{% for message in messages %}{% if message.content == 'refuse me' %}{{ raise_exception('not that') }}{% endif %}{% if message.role == 'user' %}<|im_start|>user
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}<|im_start|>assistant
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>
{% endif %}{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role != 'system' %}{{ raise_exception('no such role: ' + message.role) }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""  # noqa: E501


@contextmanager
def running(service: Service) -> Iterator[str]:
    """``service`` on a free port of loopback; its URL."""
    listener, url = bind(ServeOptions(port=0))
    server = Server(service)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield url
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Until ``condition`` holds. Fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def qwen_like_card(tokenizer: Any, context_length: int = 4096) -> ModelCard:
    """A card without a model: the embedded tokenizer with a chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = QWEN_LIKE
    config = SimpleNamespace(model_type="qwen3_moe", vocab_size=len(tokenizer))
    config.get_text_config = lambda: config
    model = SimpleNamespace(config=config, generation_config=SimpleNamespace(eos_token_id=tokenizer.eos_token_id))
    return ModelCard("qwen-like", model, tokenizer, context_length)


class Script:
    """What one request gets: pieces of text, an end, or a wait in between (None)."""

    def __init__(self, pieces: Sequence[str | None], end: str = "stop", stop: str | None = None, message: str = "") -> None:
        self.pieces, self.end, self.stop, self.message = pieces, end, stop, message


class Scripted(Scheduler):
    """Gives each request the next of ``scripts`` (the last one again and again); ``requests`` are those that came.

    A None among the pieces waits until ``go`` is set, or the ticket is cancelled.
    """

    def __init__(self, *scripts: Script, capacity: int = 64) -> None:
        self.scripts = list(scripts)
        self.requests: list[Request] = []
        self.tickets: list[ScriptedTicket] = []
        self.capacity = capacity
        self.go = threading.Event()

    waiting = 0
    generated_tokens = 0
    load = Load()

    @property
    def running(self) -> int:
        return sum(not ticket.ended and not ticket.is_cancelled for ticket in self.tickets)

    def submit(self, request: Request) -> Ticket:
        if self.running >= self.capacity:
            raise QueueFullError("the queue is full", 7.2)
        self.requests.append(request)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        ticket = ScriptedTicket(request, script, self.go)
        self.tickets.append(ticket)
        return ticket

    def close(self, drain_seconds: float = 0.0) -> None:
        for ticket in self.tickets:
            ticket.cancel()


class ScriptedTicket:
    """Says what its script says, a token a piece."""

    def __init__(self, request: Request, script: Script, go: threading.Event) -> None:
        self.request, self.script, self.go = request, script, go
        self.is_cancelled = self.ended = False

    def cancel(self) -> None:
        self.is_cancelled = True

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        prompt = len(self.request.prompt)
        yield [Queued(1), Queued(0)]
        yield [Reading(0, prompt)]
        written = 0
        for piece in self.script.pieces:
            while piece is None and not self.go.is_set() and not self.is_cancelled:
                await asyncio.sleep(0.005)
            if self.is_cancelled:
                break
            if piece is not None:
                written += 1
                yield [Piece(piece, (TokenRecord(100 + written % 10, -0.5, ((100 + written % 10, -0.5), (7, -2.0))),))]
                await asyncio.sleep(0)
        self.ended = True
        reason: Any = "cancelled" if self.is_cancelled else self.script.end
        usage, message = Usage(prompt, written), self.script.message
        yield [Finished(reason, usage, Timings(decode_tokens_per_second=1.0), stop=self.script.stop, message=message)]
