"""Tokens in, text out, piece by piece: characters stay whole, stop strings never show."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fate_moe.schedule.request import Piece, TokenRecord

__all__ = ["Decode", "TextStream", "decoder"]

Decode = Callable[[Sequence[int]], str]
_BROKEN = "�"
# Bytes of a character that may still be completed: a decoder shows each of at most three as one replacement character.
_OPEN_BYTES = 3


class TextStream:
    """The text of a growing list of tokens.

    ``decode`` gives the text of token ids, with a replacement character for what is no UTF-8. ``context``: token ids before the
    first, whose text is not part of this one. What ``push`` and ``finish`` return, joined, is ``decode`` of all tokens up to the
    first place at which one of ``stop`` was complete, and does not depend on how the text was cut into tokens.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self.stopped: str | None = None
        self._decode = decode
        self._stop = tuple(string for string in stop if string)
        self._window = list(context)  # tokens whose text is decoded together; the first ones only for what they do to the next
        self._known = len(decode(self._window)) if context else 0  # characters of the window that were taken
        self._fresh = len(self._window)  # where in the window the latest text began
        self._held = ""  # taken, and perhaps the beginning of a stop string
        self._sent = 0  # characters that were returned
        self._taken = 0  # characters that were decoded
        self._records: deque[tuple[int, TokenRecord]] = deque()  # with the number of characters that show it

    def push(self, record: TokenRecord) -> Piece | None:
        """The text that ``record`` adds; None for nothing yet, and after a stop string."""
        if self.stopped is not None:
            return None
        self._window.append(record.token)
        text = self._decode(self._window)
        whole = text.rstrip(_BROKEN)
        safe = len(whole) if len(text) - len(whole) <= _OPEN_BYTES else len(text) - _OPEN_BYTES
        is_open = safe < len(text)
        new = text[self._known : safe]
        self._known = max(self._known, safe)
        self._taken += len(new)
        self._records.append((self._taken + is_open, record))
        if new and not is_open:
            # Keep the tokens of the latest text as context: decoders treat the first token of a text in its own way.
            del self._window[: self._fresh]
            self._fresh, self._known = len(self._window), len(self._decode(self._window))
        return self._release(new)

    def finish(self) -> Piece | None:
        """The text that was held back, when no more tokens come."""
        if self.stopped is not None:
            return None
        tail = self._decode(self._window)[self._known :]
        self._taken += len(tail)
        piece = self._release(tail)
        if self.stopped is not None:
            return piece
        text, self._held = self._held, ""
        self._sent += len(text)
        tokens = tuple(record for _, record in self._records)
        self._records.clear()
        before = piece or Piece("")
        text, tokens = before.text + text, before.tokens + tokens
        return Piece(text, tokens) if text or tokens else None

    def _release(self, new: str) -> Piece | None:
        """What of the held and the new text can be no part of a stop string."""
        text = self._held + new
        found = min(((at + len(string), at, string) for string in self._stop if (at := text.find(string)) >= 0), default=None)
        if found is not None:
            _, end, self.stopped = found
            self._held = ""
        else:
            end = len(text) - self._open_suffix(text)
            self._held = text[end:]
        self._sent += end
        tokens = []
        while self._records and self._records[0][0] <= self._sent:
            tokens.append(self._records.popleft()[1])
        if found is not None:
            self._records.clear()
        return Piece(text[:end], tuple(tokens)) if end or tokens else None

    def _open_suffix(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = max((len(string) for string in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._stop):
                return length
        return 0


def decoder(tokenizer: Any, skip_special: bool) -> Decode:
    """Token ids to text; special tokens are part of it or not."""

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=skip_special))

    return decode
