"""What the traced run did, and the time model's parameters as measured in it. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_moe.errors import ConfigError
from fate_moe.trace.schema import RoutingTrace
from fate_moe.trace.simulate import Link, size_of_all

__all__ = ["RecordedRun", "recorded_run"]

_NEEDED = ("lookups", "stall", "seconds", "bytes_read", "link", "overlap", "predicting", "predicted")
_WAITED = 50e-6  # seconds: a shorter stall is the switch between threads, not a read


@dataclass(frozen=True)
class RecordedRun:
    """A traced run: its set-up, the time model as measured in it, and the results that simulate.Row has of a simulated run."""

    policy: str
    predictor: str
    capacity: float
    link: Link
    miss_rate: float
    ready_on_time: float
    bytes_per_token: float
    stall_seconds: float
    tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def recorded_run(trace: RoutingTrace, skip: int = 0) -> RecordedRun:
    """The run that wrote ``trace``, without its first ``skip`` tokens.

    A layer's compute time is its whole time less stalls and predicting. The overlap is the mean time from its lookups to the first
    need of a missing expert. Latency and bandwidth: see _latency_and_transfer. Raises ConfigError if times are missing, experts
    differ in size, or no token is left.
    """
    if not set(_NEEDED) <= set(trace.extras) or not {"slots", "expert_bytes", "policy", "predictor"} <= set(trace.meta):
        raise ConfigError(
            "this trace has no times of the run that wrote it; record one without --prefill: fate trace MODEL --out T.npz"
        )
    if not 0 <= skip < trace.num_tokens:
        raise ConfigError(f"the trace has {trace.num_tokens} tokens; skip fewer than that, not {skip}")
    lookups, stall, seconds, read, busy, overlap = (trace.extras[name][skip:] for name in _NEEDED[:6])
    if not read.any():
        raise ConfigError(
            "no expert was read in these tokens, so there is nothing to compare; record with a smaller --expert-cache"
        )
    expert_bytes = int(size_of_all(trace.meta["expert_bytes"]))
    predicting, predicted = trace.extras["predicting"], trace.extras["predicted"]
    asked = np.roll(predicted.any(2), -1, axis=1)  # a layer's input predicts the next layer
    asked[:, -1] = False
    price = float(predicting[asked].mean() - predicting[~asked].mean()) if asked.any() else 0.0  # over skipped tokens too
    paid = np.where(asked[skip:], price, 0.0)
    hidden = float((overlap - paid)[overlap > 0].mean()) if overlap.any() else 0.0
    latency, transfer = _latency_and_transfer(lookups, hidden + paid + stall, read / expert_bytes, busy, stall)
    link = Link(
        bytes_per_second=expert_bytes / transfer,
        expert_bytes=expert_bytes,
        layer_seconds=float((seconds - stall - paid).mean()),
        overlap_seconds=hidden,
        latency_seconds=latency,
        predicting_seconds=price,
    )
    return RecordedRun(
        policy=str(trace.meta["policy"]),
        predictor=str(trace.meta["predictor"]),
        capacity=int(trace.meta["slots"]) / int(trace.num_experts.sum()),
        link=link,
        miss_rate=float((lookups == 2).mean()),
        ready_on_time=float((lookups == 0).mean()),
        bytes_per_token=float(read.sum() / len(read)),
        stall_seconds=float(stall.sum()),
        tokens_per_second=len(seconds) / float(seconds.sum()),
    )


def _latency_and_transfer(
    lookups: NDArray[Any], until_used: NDArray[Any], reads: NDArray[Any], busy: NDArray[Any], stall: NDArray[Any]
) -> tuple[float, float]:
    """The seconds that n reads queued together take, as latency + n x transfer, by least squares over layers ([N, L] each).

    Measured from the lookup to the last arrival if most layers that missed waited (if few did, they are the slow ones), else by how
    long the link was busy.
    """
    missed = (lookups == 2).sum(2)
    alone = (missed > 0) & (missed == (lookups != 0).sum(2))
    waited = alone & (stall > _WAITED)
    if waited.sum() > alone.sum() / 2:
        number, took = missed[waited].astype(float), until_used[waited]
    else:
        number, took = reads[reads > 0], busy[reads > 0]
    if len(np.unique(number)) < 2:
        return 0.0, float(took.sum() / number.sum())
    transfer, latency = np.polyfit(number, took, 1)
    if transfer <= 0 or latency <= 0:
        return 0.0, float(took.sum() / number.sum())
    return float(latency), float(transfer)
