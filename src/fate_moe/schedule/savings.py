"""How much time was saved by tokens that did not have to be read."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Savings"]


class Savings:
    """``seconds``: cached tokens, each at the mean time of those of prompts that were read, less the time of restoring them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._read_tokens, self._read_seconds = 0, 0.0
        self._counted, self._restoring = 0, 0.0

    def note(self, rows: Sequence[int], seconds: float) -> None:
        """A step of so many ``rows`` of each sequence took ``seconds``; a decode row counts as much as a prompt's."""
        read = sum(count for count in rows if count > 1)
        self._read_tokens += read
        self._read_seconds += seconds * read / sum(rows)

    def count(self, cached_tokens: int, seconds: float) -> None:
        """In all ``cached_tokens`` were there so far; since the last call, looking for them took ``seconds``."""
        self._restoring += seconds
        if cached_tokens > self._counted and self._read_tokens:
            each = self._read_seconds / self._read_tokens
            self.seconds += max(0.0, (cached_tokens - self._counted) * each - self._restoring)
            self._counted, self._restoring = cached_tokens, 0.0
