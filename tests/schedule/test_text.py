"""Text in pieces: any text, cut anywhere, with any stop strings."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_moe import demo
from fate_moe.engine.prepare import load_tokenizer
from fate_moe.schedule.request import TokenRecord
from fate_moe.schedule.text import Decode, TextStream, decoder

TOKENIZER = load_tokenizer(demo.MODEL)
DECODE = decoder(TOKENIZER, skip_special=True)


def byte_tokens(text: bytes) -> list[int]:
    """One token a byte, as a byte-level tokenizer has them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [TOKENIZER.convert_tokens_to_ids(bytes_to_unicode()[byte]) for byte in text]


def stream(
    tokens: Sequence[int], stop: Sequence[str] = (), decode: Decode = DECODE, context: Sequence[int] = ()
) -> tuple[list[str], list[int], str | None]:
    """All pieces, the tokens that came with them, and the stop string."""
    texts = TextStream(decode, stop, context)
    pieces = [piece for token in tokens if (piece := texts.push(TokenRecord(token))) is not None]
    if (last := texts.finish()) is not None:
        pieces.append(last)
    return [piece.text for piece in pieces], [record.token for piece in pieces for record in piece.tokens], texts.stopped


def expected(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first."""
    found = min(((text.find(s) + len(s), text.find(s), s) for s in stop if s and s in text), default=None)
    return (text, None) if found is None else (text[: found[1]], found[2])


# A small alphabet, so that stop strings occur; characters of one to four bytes.
TEXT = st.text(alphabet="ab €é😀\n", max_size=24)


@given(text=TEXT, stop=st.lists(st.text(alphabet="ab €😀", min_size=1, max_size=4), max_size=3), data=st.data())
def test_pieces_join_to_the_text_before_the_first_stop_string(text: str, stop: list[str], data: st.DataObject) -> None:
    """Cut into bytes here, into the tokenizer's own tokens there."""
    tokens: list[int] = []
    for start in range(0, len(text), 3):
        part = text[start : start + 3]
        tokens += byte_tokens(part.encode()) if data.draw(st.booleans()) else TOKENIZER(part)["input_ids"]
    pieces, _, stopped = stream(tokens, stop)
    assert ("".join(pieces), stopped) == expected(text, stop)
    assert not any("�" in piece for piece in pieces)


@given(data=st.binary(max_size=40))
def test_bytes_that_are_no_text_are_what_the_tokenizer_says(data: bytes) -> None:
    tokens = byte_tokens(data)
    assert "".join(stream(tokens)[0]) == DECODE(tokens)


@given(text=TEXT, stop=st.lists(st.text(alphabet="ab €😀", min_size=1, max_size=4), max_size=3))
def test_no_beginning_of_a_stop_string_leaks(text: str, stop: list[str]) -> None:
    """At no time has a text been shown that a stop string would have had to take back."""
    texts, shown = TextStream(DECODE, stop), ""
    for count, token in enumerate(tokens := byte_tokens(text.encode())):
        piece = texts.push(TokenRecord(token))
        shown += piece.text if piece else ""
        for rest in (*stop, ""):
            whole = DECODE(tokens[: count + 1]).rstrip("�")
            assert expected(whole + rest, stop)[0].startswith(shown)


@given(text=TEXT)
def test_every_token_comes_with_the_text_it_completes(text: str) -> None:
    tokens = byte_tokens(text.encode())
    assert stream(tokens)[1] == tokens
    assert stream(tokens, ["never there"])[1] == tokens


def test_tokens_of_a_stop_string_are_not_among_those_shown() -> None:
    pieces, tokens, stopped = stream(byte_tokens(b"xy<stop>z"), ["<stop>"])
    assert ("".join(pieces), tokens, stopped) == ("xy", byte_tokens(b"xy"), "<stop>")


@pytest.mark.parametrize(("context", "text"), [((), "Hello there"), ((1,), " Hello there")])
def test_a_decoder_that_strips_the_first_space(context: tuple[int, ...], text: str) -> None:
    """As SentencePiece tokenizers do: what continues a prompt keeps its space."""
    words = ["", "▁Once", "▁Hello", "▁there"]

    def decode(tokens: Sequence[int]) -> str:
        return "".join(words[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    assert "".join(stream([2, 3], decode=decode, context=context)[0]) == text


def test_a_long_run_of_broken_bytes_is_shown_before_it_ends() -> None:
    """A model that writes garbage does not make the client wait for its end."""
    texts = TextStream(DECODE)
    pieces = [texts.push(TokenRecord(token)) for token in byte_tokens(b"\x80" * 40)]
    assert len([piece for piece in pieces if piece and piece.text]) > 30
