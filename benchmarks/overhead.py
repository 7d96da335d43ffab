"""Where a decoded token's time goes when all experts are resident: milliseconds by part of the engine and the model.

    python -m benchmarks.overhead MODEL [--new-tokens 32] [--prompt-tokens 64] [--option key=value ...]

A part's time does not include the parts that it calls. Timers make the token a little slower; its time without them is measured
first and printed too. Options are those of `fate_moe.load`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

import fate_moe
from fate_moe.adapter.contract import is_experts
from fate_moe.adapter.families import router_of
from fate_moe.adapter.kv_cache import RoomyLayer
from fate_moe.core import ExpertId
from fate_moe.kernels.native import native

# One call of the extension for all layers that are recognised: their kernels, lookups, waits for reads and what is between them.
STEP = "native step"
KERNELS = (STEP, "expert kernels", "dense kernels")


class Clock:
    """Time by part: the innermost function that runs is charged."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._stack: list[str] = []
        self._since = 0.0

    def start(self) -> None:
        self.seconds.clear()
        self.calls.clear()
        self._since = time.perf_counter()

    def charge(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(part)
            self.calls[part] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        return timed

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1] if self._stack else "generate()"] += now - self._since
        self._since = now


class Ticks(BaseStreamer):  # type: ignore[misc]
    """The time of each token; ``begin`` is called after the first one."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.times: list[float] = []
        self._begin = begin

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self._begin()

    def end(self) -> None:
        """Nothing is buffered."""


def decode(model: Any, prompt: torch.Tensor, new_tokens: int, begin: Callable[[], None] = lambda: None) -> list[float]:
    """Seconds of each token after the first."""
    ticks = Ticks(begin)
    mask = torch.ones_like(prompt)
    with torch.inference_mode():
        model.generation_config.eos_token_id = None  # the text must not end early; a minimum length costs 1 ms a token
        model.generate(
            prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, streamer=ticks,
            pad_token_id=0,
        )  # fmt: skip
    return [after - before for before, after in zip(ticks.times[1:], ticks.times[2:], strict=False)]


def read_all(model: Any) -> None:
    """Read every expert, as far as there are slots."""
    runtime = model.fate.runtime
    for layer, count in enumerate(runtime.num_experts):
        lease = runtime.residency.acquire([ExpertId(layer, expert) for expert in range(count)])
        for _ in lease.batches():
            pass
        lease.release()


@contextmanager
def instrument(model: Any, clock: Clock) -> Iterator[None]:
    """Meanwhile a timer is on everything that has a name of its own. Raises AttributeError where a name is gone: what a renamed
    function does would be charged to its caller."""
    with ExitStack() as undo:

        def wrap(owner: Any, name: str, part: str) -> None:
            original, own = getattr(owner, name), name in vars(owner)
            setattr(owner, name, clock.charge(part, original))
            undo.callback(*((setattr, owner, name, original) if own else (delattr, owner, name)))

        for owner, names, part in _functions(model):
            for name in names:
                wrap(owner, name, part)
        if model.fate.step is not None:  # a module with a timer would lead to the model's own forward
            yield
            return
        routers = model.fate.runtime._routers
        undo.callback(routers.__setitem__, slice(None), list(routers))
        routers[:] = [clock.charge("router, asked early", route) if route else None for route in routers]
        for module in model.modules():
            if (router := _router(module)) is not None:
                wrap(router, "forward", "router, the family's own call")
            if (kind := _part_of(module)) is not None:
                wrap(module, "forward", kind)
        wrap(model, "forward", "model: masks, positions, head")
        yield


def _functions(model: Any) -> Iterator[tuple[Any, Sequence[str], str]]:
    """Owner, names and part of the functions that are timed, but for modules."""
    runtime = model.fate.runtime
    if native is not None:
        yield native, ("step",), STEP
        yield native, ("experts", "combine"), "expert kernels"
        yield native, ("linear", "mlp", "attention", "expand"), "dense kernels"
        yield native, ("norm",), "norms"
    yield DynamicLayer, ("update", "get_seq_length", "get_mask_sizes"), "KV cache"
    yield RoomyLayer, ("update", "reserve", "extend", "get_seq_length"), "KV cache"
    yield torch.nn.functional, ("scaled_dot_product_attention",), "attention"
    yield runtime._prefetcher, ("embedded", "entered", "look_ahead", "observe"), "prediction"
    yield runtime.residency, ("acquire",), "residency and policy"
    yield runtime, ("enter", "compute", "embedded", "begin_step", "end_step"), "runtime"


def _router(module: torch.nn.Module) -> torch.nn.Module | None:
    """The router of ``module``, if that is a MoE block."""
    return router_of(module) if any(map(is_experts, module.children())) else None


def _part_of(module: torch.nn.Module) -> str | None:
    """What the time in a module's own forward is spent on; None: it is charged to its caller."""
    kind = type(module).__name__
    is_block = _router(module) is not None
    if not is_block and not list(module.children()) and hasattr(module, "weight"):
        return "norms" if kind.endswith("Norm") else "embedding" if "Embedding" in kind else "linears around their kernels"
    if "RotaryEmbedding" in kind:
        return "rope's angles"
    if kind.endswith("Attention"):
        return "attention blocks: rope, reshapes"
    if kind.endswith("DecoderLayer"):
        return "decoder layers: residuals, hooks"
    if is_block:
        return "MoE blocks: shared expert's gate, sums"
    return "shared experts: activation, product" if kind.endswith("MLP") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    options = dict(option.split("=", 1) for option in arguments.option)
    model, _ = fate_moe.load(arguments.model, **options)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(0, vocabulary, (1, arguments.prompt_tokens), generator=torch.Generator().manual_seed(1))
    read_all(model)
    decode(model, prompt, 8)
    plain = 1e3 * median(decode(model, prompt, arguments.new_tokens))
    clock = Clock()
    with instrument(model, clock):
        timed = 1e3 * median(decode(model, prompt, arguments.new_tokens, clock.start))
    count = arguments.new_tokens - 1
    rows = {part: 1e3 * seconds / count for part, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1])}
    table = Table("part", "ms per token", "calls")
    for part, milliseconds in rows.items():
        table.add_row(part, f"{milliseconds:.2f}", f"{clock.calls[part] / count:.0f}")
    outside = sum(milliseconds for part, milliseconds in rows.items() if part not in KERNELS)
    table.add_row("outside kernels", f"{outside:.2f}", "")
    Console().print(table)
    result = {"ms_per_token": plain, "ms_per_token_with_timers": timed, "outside_kernels_ms": outside, "parts": rows}
    print(json.dumps({name: value if isinstance(value, dict) else round(value, 2) for name, value in result.items()}))
    model.fate.close()


if __name__ == "__main__":
    main()
