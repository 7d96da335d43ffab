"""An eviction policy of your own: first in, first out, beside the built-in LRU.

    python examples/own_policy.py                       the embedded model
    python examples/own_policy.py PATH-OR-ID

A policy orders experts by what it is told; it owns no bytes. Text never depends on it, only how often an expert has to be read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from fate_moe import load
from fate_moe.core import EvictionPolicy, ExpertId
from fate_moe.registry import register_policy


class FIFO(EvictionPolicy):
    """The expert that was read first goes first, however often it is used."""

    def __init__(self) -> None:
        self._order: dict[ExpertId, None] = {}  # in the order of admission

    def admitted(self, expert: ExpertId, *, prefetched: bool = False) -> None:
        self._order[expert] = None

    def touched(self, expert: ExpertId) -> None:
        pass

    def removed(self, expert: ExpertId) -> None:
        del self._order[expert]

    def victim(self, incoming: ExpertId, evictable: Callable[[ExpertId], bool], probability: float = 1.0) -> ExpertId | None:
        return next(filter(evictable, self._order), None)


register_policy("fifo", lambda num_slots, experts_per_layer: FIFO())


def main(
    model_name: str | None = None, prompt: str = "It was a dark night", *, new_tokens: int = 40
) -> dict[str, tuple[float, str]]:
    """Print how many experts were ready on time under both policies; that and the text, by policy."""
    found = {}
    for policy in ("lru", "fifo"):
        model, tokenizer = load(model_name, expert_cache="50%", policy=policy, predictor="none")
        with model.fate as engine:
            inputs = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
            ready = engine.report().experts.ready_on_time
        print(f"{policy}: {ready:.1%} of experts ready on time")
        found[policy] = ready, str(tokenizer.decode(output[0]))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:3])
