"""The same text under several sizes of the expert cache: what less memory costs.

    python examples/sweep_budgets.py                    the embedded model
    python examples/sweep_budgets.py PATH-OR-ID

The text never depends on the budget; only the speed and the bytes read from disk do.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from fate_moe import load, plan

SHARES = ("100%", "50%", "25%", "12.5%")


@dataclass(frozen=True)
class Row:
    """One run. ``read_bytes`` counts from loading on, also what the prompt needed."""

    expert_cache: str
    cache_bytes: int
    tokens_per_second: float
    ready_on_time: float
    read_bytes: int
    text: str


def run(model_name: str | None, expert_cache: str, prompt: str, new_tokens: int) -> Row:
    """Write ``new_tokens`` with so much room for experts."""
    cache_bytes = plan(model_name, expert_cache=expert_cache).expert_cache_bytes  # known before anything is loaded
    model, tokenizer = load(model_name, expert_cache=expert_cache)
    with model.fate as engine:
        inputs = tokenizer(prompt, return_tensors="pt")
        began = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        seconds = time.perf_counter() - began
        experts = engine.report().experts
    num_tokens = output.shape[1] - inputs["input_ids"].shape[1]
    return Row(
        expert_cache, cache_bytes, num_tokens / seconds, experts.ready_on_time, experts.bytes_read, tokenizer.decode(output[0])
    )


def main(model_name: str | None = None, prompt: str = "The history of the city", *, new_tokens: int = 40) -> list[Row]:
    """Print one line for each of SHARES; the rows."""
    print(f"{'experts in memory':>18} {'slots, MB':>10} {'tokens/s':>9} {'ready on time':>14} {'read, MB':>9}")
    rows = []
    for share in SHARES:
        row = run(model_name, share, prompt, new_tokens)
        print(
            f"{row.expert_cache:>18} {row.cache_bytes / 1e6:>10.1f} {row.tokens_per_second:>9.1f}"
            f" {row.ready_on_time:>14.1%} {row.read_bytes / 1e6:>9.1f}"
        )
        rows.append(row)
    print(rows[0].text)
    return rows


if __name__ == "__main__":
    main(*sys.argv[1:3])
