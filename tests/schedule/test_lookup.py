from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fate_moe.schedule.lookup import PromptLookup

texts = st.lists(st.integers(0, 3), max_size=60)


@given(texts, st.lists(st.integers(1, 7), max_size=8))
def test_a_draft_followed_the_same_tokens_before(text: list[int], cuts: list[int]) -> None:
    index, done = PromptLookup(), 0
    for cut in cuts:
        index.extend(text[done : done + cut])
        done += cut
    index.extend(text[done:])
    assert len(index) == len(text)
    drafted, matched = index.draft(5)
    ends = [end for end in range(2, len(text)) if text[end - 2 : end] == text[-2:]]
    if len(text) < 2 or not ends:
        assert (drafted, matched) == ([], 0)
        return

    def match(end: int) -> int:
        return next((n for n in range(min(32, end)) if text[end - 1 - n] != text[-1 - n]), min(32, end))

    latest = ends[-8:]
    longest = max(match(end) for end in latest)
    place = max(end for end in latest if match(end) == longest)
    assert matched == longest >= 2
    assert drafted == text[place : place + 5]


def test_an_index_stays_small() -> None:
    index = PromptLookup([1] * 10_000)
    assert max(len(places) for places in index._places.values()) <= 16
    assert index.draft(3) == ([1], 32)
