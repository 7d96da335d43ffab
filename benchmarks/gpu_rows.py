"""Several rows in a captured step on this GPU: has each the bits that it has alone, and what do they take together?

    PYTHONPATH=src python -m benchmarks.gpu_rows [--models Qwen3-30B-A3B ...] [--shares 1.0 0.25] [--layers N] [--host 0 0.5]

16 sequences, each in blocks of its own, given tokens at different places of a script. Rows of a step are 1 to 16 of them; with
"drafts" four rows are neighbours in one sequence. Every logit of every sequence must be equal in every bit, whatever stands beside
it, however many experts are resident, and wherever those are computed that are not. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from benchmarks.gpu_measure import event
from benchmarks.gpu_model import GEOMETRIES, RandomModel
from fate_moe.core import KV_BLOCK
from fate_moe.errors import FateError
from fate_moe.gpu.options import DeviceOptions
from fate_moe.layers.cuda_step import MOST_ROWS, FusedStep

SEQUENCES, EACH = MOST_ROWS, 2  # blocks of each sequence
COMPARED, TIMED = 72, 48  # steps: the former cross the border of a block


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=GEOMETRIES, default=["Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B"])
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.25])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--host", nargs="+", type=float, default=[0.0], help="fractions of misses that the host computes")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    failed = False
    for name in arguments.models:
        random = RandomModel.make(name, arguments.layers)
        cache = transformers.StaticCache(config=random.model.config, max_cache_len=SEQUENCES * EACH * KV_BLOCK)
        random.experts(1.0, DeviceOptions(num_whole=0))
        with torch.no_grad():
            random.model(random.script[None, :4], past_key_values=cache)
        exact: torch.Tensor | None = None
        for share in arguments.shares:
            for host in arguments.host if share < 1 else [0.0]:
                try:
                    experts = random.experts(share, DeviceOptions(limit=0, host_compute=host))
                except (ValueError, FateError) as reason:
                    print(name, share, "not possible:", reason)
                    continue
                step = FusedStep(random.model, experts, cache)
                row: dict[str, Any] = {}
                for rows in (1, 2, 4, 8, 16):
                    if rows > step.most_rows:
                        break
                    step.capture(rows)
                    found = _logits(random, step, cache, rows)
                    exact = found if exact is None else exact
                    failed |= not torch.equal(found, exact)
                    row[str(rows)] = "equal" if torch.equal(found, exact) else f"OTHER {_first_other(found, exact)}"
                    took = _milliseconds(random, step, rows)
                    row[f"ms {rows}"] = f"{took:.2f} ({rows * 1e3 / took:.0f} tok/s)"
                    if arguments.profile and rows in (1, 16):
                        _profile(step, rows)
                if step.most_rows >= 4 and exact is not None:
                    same = torch.equal(_drafted(random, step, cache), exact[:, 0])
                    failed |= not same
                    row["drafts"] = "equal" if same else "OTHER"
                print(name, f"{share:.2f}, {host:.0%} of misses on the host, at most {step.most_rows} rows", row, flush=True)
                del step, experts
                torch.cuda.empty_cache()
        random.close()
        del random
        torch.cuda.empty_cache()
    return 1 if failed else 0


def _begin(step: FusedStep) -> None:
    order = torch.randperm(SEQUENCES * EACH, generator=torch.Generator().manual_seed(3)).view(SEQUENCES, EACH)
    step.table[:, :EACH] = order.to(step.table)


def _tokens(random: RandomModel, at: int) -> torch.Tensor:
    """What the sequences are given at position ``at``."""
    return random.script[at + 100 * torch.arange(SEQUENCES, device="cuda")]


def _logits(random: RandomModel, step: FusedStep, cache: Any, rows: int) -> torch.Tensor:
    """Of the last COMPARED / 4 steps [steps, SEQUENCES, vocabulary], by steps of ``rows`` sequences, some with idle rows."""
    cache.reset()
    _begin(step)
    table, kept = step.table.clone(), []
    for at in range(COMPARED):
        made = []
        for group in _groups(rows, at):
            here = torch.tensor(group, device="cuda")
            step.ids[: len(group)] = _tokens(random, at)[here]
            step.positions[: len(group)] = at
            step.table[: len(group)] = table[here]
            step.live.fill_(len(group))
            step.replay(rows)
            made.append(step.all_logits[: len(group)].clone())
        if at >= COMPARED * 3 // 4:
            kept.append(torch.cat(made))
    step.table.copy_(table)
    return torch.stack(kept)


def _groups(rows: int, at: int) -> Iterator[list[int]]:
    """The sequences in steps of ``rows``; every third time with one fewer in a step."""
    size = max(1, rows - (at % 3 == 0))
    for first in range(0, SEQUENCES, size):
        yield list(range(first, min(SEQUENCES, first + size)))


def _drafted(random: RandomModel, step: FusedStep, cache: Any) -> torch.Tensor:
    """As ``_logits``, of sequence 0, read four positions at once."""
    cache.reset()
    _begin(step)
    table, made = step.table.clone(), []
    for at in range(0, COMPARED, 4):
        step.ids[:4] = torch.stack([_tokens(random, at + i)[0] for i in range(4)])
        step.positions[:4] = torch.arange(at, at + 4, device="cuda")
        step.table[:4] = table[0]
        step.live.fill_(4)
        step.replay(4)
        made.append(step.all_logits[:4].clone())
    step.table.copy_(table)
    return torch.cat(made)[COMPARED * 3 // 4 :]


def _first_other(found: torch.Tensor, exact: torch.Tensor) -> str:
    other = (found != exact).any(2)
    return f"{int(other.sum())} of {other.numel()}, first {other.nonzero()[0].tolist()}, {float((found - exact).abs().max()):.1e}"


def _milliseconds(random: RandomModel, step: FusedStep, rows: int) -> float:
    step.live.fill_(rows)
    tokens: Sequence[torch.Tensor] = [_tokens(random, at)[:rows] for at in range(TIMED)]
    for timed in (False, True):
        step.positions.fill_(60)
        start, end = event(), event()
        start.record()
        for at in range(TIMED):
            step.ids[:rows] = tokens[at]
            step.replay(rows)
        end.record()
        end.synchronize()
        took = float(start.elapsed_time(end)) / TIMED if timed else 0.0
    return took


def _profile(step: FusedStep, rows: int) -> None:
    """Print the kernels that take longest."""
    step.positions.fill_(60)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step.replay(rows)
        torch.cuda.synchronize()
    total: dict[str, list[float]] = {}
    for found in profile.events():
        total.setdefault(found.name, []).append(found.device_time)
    for name, times in sorted(total.items(), key=lambda item: -sum(item[1]))[:12]:
        print(f"    {rows} rows: {name[:40]:40} {len(times):4} x {sum(times) / len(times):8.2f} us = {sum(times) / 1e3:.3f} ms")


if __name__ == "__main__":
    sys.exit(main())
