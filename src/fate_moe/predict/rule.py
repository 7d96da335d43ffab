"""How many predicted experts to read ahead: by what a read is worth, never by a fixed number. No torch."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["WASTE", "num_reads"]

# What a read that nobody uses costs beside the delay it causes, in reads: bytes, a thread's time, perhaps a good expert's slot.
WASTE = 0.25


def num_reads(probabilities: Sequence[float], layer_seconds: float, read_seconds: float, *, ahead: int = 1, queued: int = 0) -> int:
    """How many of the missing experts with these ``probabilities``, likeliest first, to read one after another from now on.

    The layer that may want them asks in ``ahead * layer_seconds``; a read takes ``read_seconds`` of the link, which has ``queued``
    reads to make before. Read i then begins at (queued + i) * read, and if its expert is used saves the stall of what is done of it
    when it is asked for. Of a layer further ahead that is compared with waiting: one layer on, the same reads can be made with
    better knowledge, so that only what would not be done in time then is gained now. If the expert is not
    used, what is left of its read when the next layer asks delays that one's demand reads. A read is made while what is gained
    > (1 - p) * (delay + WASTE * read); one that could not begin in time never is.
    """
    later = (ahead - 1) * layer_seconds

    def done_later(place: int) -> float:
        return min(read_seconds, max(0.0, later - place * read_seconds))

    for index, probability in enumerate(probabilities):
        begins = (queued + index) * read_seconds
        saved = min(read_seconds, ahead * layer_seconds - begins)
        gained = probability * (saved - done_later(0))
        for place, other in enumerate(probabilities[index + 1 :], start=1):  # they move up by one when their turn comes
            if (before := done_later(place - 1)) == 0:
                break
            gained += other * (before - done_later(place))
        next_asks = layer_seconds * (1 + begins // layer_seconds) if layer_seconds > 0 else 0.0
        delay = max(0.0, begins + read_seconds - next_asks)
        if saved <= 0 or gained <= (1 - probability) * (delay + WASTE * read_seconds):
            return index
    return len(probabilities)
