"""What the server costs beside ``generate()``, and how it holds out under many clients who leave when they like.

    python -m benchmarks.serving overhead             first byte and time per token, against generate() in the same process
    python -m benchmarks.serving soak --clients 50 --seconds 300
    python -m benchmarks.serving clients --precision int4   tokens/s of 1, 4 and 16 clients; a new one beside 8 that are answered

All use the embedded model, a real server on loopback and OpenAI's streams. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import httpx2
import torch

import fate_moe
from fate_moe.machine import resident_memory
from fate_moe.schedule.request import Request, Sampling
from fate_moe.schedule.sampling import generation_config
from fate_moe.serve.options import ServeOptions
from fate_moe.serve.server import Server, bind
from fate_moe.serve.service import Service

__all__ = ["Clients", "Overhead", "Soak", "clients", "overhead", "serving", "soak"]

PROMPTS = ("It was a dark night, and", "The captain looked at", "She opened the letter", "In the morning the")


@contextmanager
def serving(serve: ServeOptions | None = None, **options: Any) -> Iterator[tuple[str, Service]]:
    """The embedded model behind a server in a thread: its URL, and the service."""
    service = Service.loading(serve or ServeOptions(), "embedded", lambda: fate_moe.load(**{"context_length": 512, **options}))
    while service.card is None:
        if service.failure is not None:
            raise RuntimeError(service.failure)
        time.sleep(0.01)
    listener, url = bind(ServeOptions(port=0))
    server = Server(service)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    card = service.card
    try:
        yield url, service
    finally:
        server.should_exit = True
        thread.join()
        card.model.fate.close()


@dataclass(frozen=True)
class Overhead:
    """In milliseconds: medians of wall clock, the server's being what a client sees, and the processor time of this process, which
    says more where other programs run."""

    generate_first_ms: float
    server_first_ms: float
    generate_token_ms: float
    server_token_ms: float
    generate_token_cpu_ms: float
    server_token_cpu_ms: float

    @property
    def request_ms(self) -> float:
        """What the server adds to the first token."""
        return self.server_first_ms - self.generate_first_ms

    @property
    def token_ms(self) -> float:
        """What it adds to each of the others."""
        return self.server_token_ms - self.generate_token_ms


def overhead(url: str, service: Service, rounds: int = 15, tokens: int = 64) -> Overhead:
    """Alternately a text by ``generate()`` and the same by the server, so that both see the same machine. The client, whose own
    work is not the server's, is another process with a bare socket. A token's time is the median of all rounds at its place in the
    text, so that a moment in which the machine did something else does not count."""
    card = service.card
    assert card is not None
    theirs, ours = list[list[float]](), list[list[float]]()
    cpu = list[list[float]]()
    prompt = card.encode(PROMPTS[0], special=True)
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    with ProcessPoolExecutor(1, get_context("spawn")) as client:
        for number in range(rounds + 2):
            clock = [time.process_time()]
            direct = _generate(card.model, prompt, tokens)
            clock.append(time.process_time())
            served = client.submit(_token_times, url, body).result()
            clock.append(time.process_time())
            if number >= 2:  # the first ones fill caches
                theirs.append(direct)
                ours.append(served)
                cpu.append([(end - start) / tokens * 1e3 for start, end in itertools.pairwise(clock)])

    def first(found: list[list[float]]) -> float:
        return statistics.median(times[0] for times in found) * 1e3

    def each(found: list[list[float]]) -> float:
        steps = [[end - start for start, end in itertools.pairwise(times)] for times in found]
        return statistics.fmean(statistics.median(at) for at in zip(*steps, strict=True)) * 1e3

    their_cpu, our_cpu = (statistics.median(one) for one in zip(*cpu, strict=True))
    return Overhead(first(theirs), first(ours), each(theirs), each(ours), their_cpu, our_cpu)


def _generate(model: Any, prompt: list[int], tokens: int) -> list[float]:
    """Seconds to each token of ``generate()``."""
    from transformers import StoppingCriteriaList

    times: list[float] = []

    def follow(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.tensor([False])

    began = time.perf_counter()
    inputs = torch.tensor([prompt])
    with torch.inference_mode():
        model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=generation_config(model, Request(tuple(prompt), tokens, Sampling(temperature=0), ignore_eos=True)),
            stopping_criteria=StoppingCriteriaList([follow]),
        )
    return [at - began for at in times]


def _token_times(url: str, body: dict[str, Any]) -> list[float]:
    """Seconds to each token of an answer, the connection being open."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    with socket.create_connection((host, int(port))) as connection:
        time.sleep(0.01)  # until the server has taken the connection
        began, times, end = time.perf_counter(), list[float](), b""
        connection.sendall(f"{head}\r\n\r\n{data}".encode())
        while not end.endswith(b"\r\n0\r\n\r\n"):
            part = connection.recv(1 << 16)
            if not part:
                raise ConnectionError("the answer was cut off")
            times += [time.perf_counter() - began] * part.count(b'"finish_reason":null')
            end = (end + part)[-16:]
    return times


@dataclass(frozen=True)
class Clients:
    """``tokens_per_second`` of all clients together, by their number; ``cpu_ms_per_token``: the server's processor time, which says
    more where other programs run. ``first_*_ms``: to the first token of a new request, alone
    and while others are answered (median and worst). ``gap_beside_ms``: the longest that one of the others waited meanwhile."""

    tokens_per_second: dict[int, float]
    cpu_ms_per_token: dict[int, float]
    first_alone_ms: float
    first_beside_ms: tuple[float, float]
    gap_beside_ms: float


def clients(url: str, service: Service, tokens: int = 64, rounds: int = 3, others: int = 8) -> Clients:
    """Each client is a thread of another process with a bare socket and a text of its own; medians over ``rounds``."""
    card = service.card
    assert card is not None
    prompts = [card.encode(text, special=True) for text in PROMPTS]

    def body(number: int, length: int = tokens) -> dict[str, Any]:
        options = {"max_tokens": length, "temperature": 0.8, "seed": number, "stream": True, "ignore_eos": True}
        return {"prompt": prompts[number % len(prompts)], **options}

    with ProcessPoolExecutor(1, get_context("spawn")) as client:
        client.submit(_together, url, [body(0)] * 2).result()  # the first ones fill caches
        speeds, costs = dict[int, float](), dict[int, float]()
        for number in (1, 4, 16):
            began = time.process_time()
            found = [client.submit(_together, url, [body(i) for i in range(number)]).result() for _ in range(rounds)]
            costs[number] = round((time.process_time() - began) / (rounds * number * tokens) * 1e3, 2)
            speeds[number] = statistics.median(number * tokens / max(times[-1] for times in one) for one in found)
        alone = [client.submit(_token_times, url, body(99, 1)).result()[0] for _ in range(2 * rounds)]
        beside, gaps = list[float](), list[float]()
        for _ in range(2 * rounds):
            first, *their = client.submit(_together, url, [body(99, 1), *(body(i) for i in range(others))], 0.2).result()
            beside.append(first[0])
            gaps += [end - start for times in their for start, end in itertools.pairwise(times)]
    return Clients(
        {number: round(speed, 1) for number, speed in speeds.items()},
        costs,
        round(statistics.median(alone) * 1e3, 1),
        (round(statistics.median(beside) * 1e3, 1), round(max(beside) * 1e3, 1)),
        round(max(gaps) * 1e3, 1),
    )


def _together(url: str, bodies: list[dict[str, Any]], first_after: float = 0.0) -> list[list[float]]:
    """``_token_times`` of all ``bodies`` at once, but the first one ``first_after`` seconds behind the others."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(_token_times, url, body) for body in bodies[1:]]
        time.sleep(first_after)
        return [_token_times(url, bodies[0]), *(answer.result() for answer in answers)]


@dataclass(frozen=True)
class Soak:
    """``wrong`` are answers that ended and are not the text that a lone client got; memory in bytes."""

    finished: int
    left: int
    refused: int
    wrong: int
    memory_before: int
    memory_after: int
    peak_bytes: int
    budget_bytes: int


def soak(url: str, service: Service, clients: int, seconds: float, tokens: int = 24, seeds: int = 3) -> Soak:
    """``clients`` at once for ``seconds``; half of their requests are dropped at a random moment."""
    jobs = [(prompt, seed) for prompt in PROMPTS for seed in range(seeds)]
    card = service.card
    assert card is not None

    async def run() -> Soak:
        limits = httpx2.Limits(max_connections=clients)
        async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
            alone = {job: await _text(client, job, tokens, None) for job in jobs}
            before, counts = resident_memory(), {"finished": 0, "left": 0, "refused": 0, "wrong": 0}
            until = time.monotonic() + seconds

            async def one(number: int) -> None:
                source = random.Random(number)
                while time.monotonic() < until:
                    job = source.choice(jobs)
                    patience = source.uniform(0, 2.0) if source.random() < 0.5 else None
                    try:
                        text = await _text(client, job, tokens, patience)
                    except TimeoutError:
                        counts["left"] += 1
                        continue
                    if text is None:
                        counts["refused"] += 1
                        await asyncio.sleep(0.2)
                        continue
                    counts["finished"] += 1
                    counts["wrong"] += text != alone[job]

            await asyncio.gather(*(one(number) for number in range(clients)))
        report = card.model.fate.report()
        return Soak(**counts, memory_before=before, memory_after=resident_memory(), peak_bytes=report.peak_bytes, budget_bytes=report.budget_bytes)  # fmt: skip  # noqa: E501

    return asyncio.run(run())


async def _text(client: httpx2.AsyncClient, job: tuple[str, int], tokens: int, patience: float | None) -> str | None:
    """The text of a stream; None where the queue is full. Raises TimeoutError, and hangs up, after ``patience`` seconds."""
    prompt, seed = job
    body = {"prompt": prompt, "seed": seed, "max_tokens": tokens, "stream": True}

    async def read() -> str | None:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 429:
                return None
            answer.raise_for_status()
            text = ""
            async for event in _events(answer):
                text += event["choices"][0]["text"]
            return text

    return await asyncio.wait_for(read(), patience)


async def _events(answer: httpx2.Response) -> AsyncIterator[Any]:
    async for line in answer.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def main() -> None:
    """Run one of them from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "soak", "clients"))
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--threads", type=int, help="of torch; default: its own")
    parser.add_argument("--parallel", type=int, help="requests at once; default: the server's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--precision", default="lossless")
    parser.add_argument("--expert-cache", help="a size or percentage; default: all experts")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = ServeOptions(queue=2 * arguments.clients, parallel=arguments.parallel)
    length = 4096 if arguments.what == "clients" else 512
    with serving(options, context_length=length, precision=arguments.precision, expert_cache=arguments.expert_cache) as (
        url,
        service,
    ):
        if arguments.what == "overhead":
            found = overhead(url, service)
            print(json.dumps({**found.__dict__, "request_ms": found.request_ms, "token_ms": found.token_ms}))
        elif arguments.what == "soak":
            print(json.dumps(soak(url, service, arguments.clients, arguments.seconds).__dict__))
        else:
            print(json.dumps(clients(url, service, arguments.tokens, arguments.rounds).__dict__))


if __name__ == "__main__":
    main()
