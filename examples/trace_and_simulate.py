"""Record what routers choose, then ask the simulator what other policies and sizes would have done on the same tokens.

    python examples/trace_and_simulate.py               the embedded model
    python examples/trace_and_simulate.py PATH-OR-ID

"belady" knows the future: no policy can miss less.
"""

from __future__ import annotations

import sys

from fate_moe import OffloadConfig
from fate_moe.tools.tracing import record_routing
from fate_moe.trace.simulate import Link, Row, simulate, size_of_all

TEXTS = ("It was a dark night, and the old house", "The history of the city begins", "def main(arguments):")


def main(model_name: str | None = None, *, new_tokens: int = 60) -> list[Row]:
    """Print the share of experts that were ready on time, by policy and share of experts in memory; the rows."""
    config = OffloadConfig(expert_cache="50%", context_length=512)
    trace = record_routing(model_name, TEXTS, config, new_tokens=new_tokens, max_tokens=len(TEXTS) * new_tokens)
    link = Link(bytes_per_second=1.2e9, expert_bytes=size_of_all(trace.meta["expert_bytes"]), layer_seconds=1e-3)
    rows = []
    print(f"{trace.num_tokens} tokens, {trace.num_layers} layers")
    for share in (0.125, 0.25, 0.5):
        for policy in ("lru", "shallow-arc", "best", "belady"):
            row = simulate(trace, policy, "none", share, link)
            print(
                f"{share:>6.1%} of the experts, {policy:>12}: {row.ready_on_time:.1%} ready, {row.tokens_per_second:.1f} tokens/s"
            )
            rows.append(row)
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:2])
