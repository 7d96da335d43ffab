"""Decides how many predicted experts to read ahead, by expected gain and cost of each read. No torch."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["WASTE", "num_reads"]

# The cost of an unused read besides the delay it causes, in reads: bytes, a thread's time, perhaps the slot of a useful expert.
WASTE = 0.25


def num_reads(probabilities: Sequence[float], layer_seconds: float, read_seconds: float, *, ahead: int = 1, queued: int = 0) -> int:
    """How many of the missing experts with these ``probabilities``, likeliest first, to read now, one after another.

    The predicted layer needs its experts in ``ahead * layer_seconds``. A read takes ``read = read_seconds`` of the link, which has
    ``queued`` reads to do first. Read i, with probability p, is made while

        gain(i) > (1 - p) * (delay + WASTE * read)

    - Read i begins at (queued + i) * read. If its expert is used, it saves the part that is done when the layer needs the expert.
    - For ``ahead`` > 1 the alternative is to wait one layer and predict better. The gain then counts only what that could not save:
      for this read, and for the later ones, each of which moves up one place if this one is made now.
    - If the expert is not used, the part of the read that is still running when the next layer begins delays that layer's reads.
    - A read that could not begin in time is never made.
    """
    later = (ahead - 1) * layer_seconds

    def done_later(place: int) -> float:
        return min(read_seconds, max(0.0, later - place * read_seconds))

    for index, probability in enumerate(probabilities):
        begins = (queued + index) * read_seconds
        saved = min(read_seconds, ahead * layer_seconds - begins)
        gained = probability * (saved - done_later(0))
        for place, other in enumerate(probabilities[index + 1 :], start=1):  # each moves up one place if this is read now
            if (before := done_later(place - 1)) == 0:
                break
            gained += other * (before - done_later(place))
        next_asks = layer_seconds * (1 + begins // layer_seconds) if layer_seconds > 0 else 0.0
        delay = max(0.0, begins + read_seconds - next_asks)
        if saved <= 0 or gained <= (1 - probability) * (delay + WASTE * read_seconds):
            return index
    return len(probabilities)
