"""How many predicted experts to read ahead: by what a read is worth, never by a fixed number. No torch."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["WASTE", "reads_worth"]

# What a read that nobody uses costs beside the delay it causes, in reads: bytes, a thread's time, perhaps a good expert's slot.
WASTE = 0.25


def reads_worth(probabilities: Sequence[float], window_seconds: float, read_seconds: float) -> int:
    """How many of the missing experts with these ``probabilities``, likeliest first, to read one after another from now on.

    The layer that may want them asks in ``window_seconds``; a read takes ``read_seconds`` of the link. Read i then begins at
    i * read, and if its expert is used saves the stall of what is done of it by then. If it is not used, what is left of it delays
    a demand read. A read is made while p * saved > (1 - p) * (delay + WASTE * read); one that could not begin in time never is.
    """
    for index, probability in enumerate(probabilities):
        left = window_seconds - index * read_seconds
        saved = min(read_seconds, left)
        delay = read_seconds - saved
        if left <= 0 or probability * saved <= (1 - probability) * (delay + WASTE * read_seconds):
            return index
    return len(probabilities)
