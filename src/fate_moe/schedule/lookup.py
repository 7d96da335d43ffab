"""Drafts from what was written before: the tokens that followed the longest match of the text's end. No torch."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["PromptLookup"]

_SHORTEST = 2  # tokens that have to match
_LONGEST = 32  # tokens of a match that are counted
_TRIED = 8  # latest places that are looked at


class PromptLookup:
    """An index over one text that grows. One token costs a step; so does a question, whatever the text's length."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # of each pair of tokens: where what follows it begins, latest last
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """``tokens`` follow."""
        text, places = self._tokens, self._places
        for token in tokens:
            # The pair that ends at the last token gets its place now that something follows it.
            if len(text) >= _SHORTEST:
                of_pair = places.setdefault(tuple(text[-_SHORTEST:]), [])
                of_pair.append(len(text))
                if len(of_pair) > 2 * _TRIED:
                    del of_pair[:_TRIED]
            text.append(token)

    def draft(self, most: int) -> tuple[list[int], int]:
        """Up to ``most`` tokens that may follow, and how many tokens matched; nothing and 0 without a match.

        Of the latest places, the one with the longest match, of equals the latest.
        """
        text = self._tokens
        if most < 1 or len(text) < _SHORTEST:
            return [], 0
        best, longest = -1, 0
        for place in reversed(self._places.get(tuple(text[-_SHORTEST:]), ())[-_TRIED:]):
            length = _SHORTEST
            while length < min(_LONGEST, place) and text[place - 1 - length] == text[-1 - length]:
                length += 1
            if length > longest:
                best, longest = place, length
                if longest == _LONGEST:
                    break
        return (text[best : best + most], longest) if longest else ([], 0)
