"""Tokens that a model does not have, chat templates that fail, long texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fate_moe import demo
from fate_moe.errors import CheckpointError, ConfigError
from fate_moe.tools import tokens
from fate_moe.tools.generate import _Printer
from fate_moe.tools.tokens import chat_text, first_tokens, token_ids

BOOKS = Path(__file__).parents[1] / "data" / "heldout-books.txt"


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.MODEL)


def test_a_token_beyond_the_vocabulary_is_named(tokenizer: Any) -> None:
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    assert token_ids(tokenizer, "Once upon a time", rows)
    with pytest.raises(CheckpointError, match=rf"token {rows} \('<extra>'\).*the model has {rows} tokens only"):
        token_ids(tokenizer, "Once <extra> upon", rows)


def test_a_tokenizer_that_fails_is_one_error() -> None:
    def broken(text: str, **options: Any) -> Any:
        raise TypeError("TextInputSequence must be str")

    with pytest.raises(CheckpointError, match="tokenizer fails on this text"):
        token_ids(broken, "Once", 10)


def test_the_first_tokens_of_a_long_text_are_those_of_the_whole(tokenizer: Any) -> None:
    text = BOOKS.read_text()
    assert first_tokens(tokenizer, text, 8192, 50) == token_ids(tokenizer, text[:20000], 8192)[:50]
    assert first_tokens(tokenizer, text[:500], 8192, None) == token_ids(tokenizer, text[:500], 8192)
    spaces = " " * 50_000 + "end"  # many characters a token
    assert first_tokens(tokenizer, spaces, 8192, 40) == token_ids(tokenizer, spaces, 8192)[:40]


ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ALTERNATE, "[user] Hello"),
        ("{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}!", "Hello!"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "HELLO"),
        ("{% if tools is not none %}{{ tools }}{% endif %}{{ messages[0].content }}", "Hello"),
    ],
)
def test_chat_templates_that_work(tokenizer: Any, template: str, expected: str) -> None:
    tokenizer.chat_template = template
    assert chat_text(tokenizer, [{"role": "user", "content": "Hello"}]) == expected


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('needs a system message') }}", "needs a system message"),
        ("{% for m in messages %}{{ m['content'] }", "unexpected"),
        ("", "no chat template"),
        ("{% set x = 1 %}", "renders nothing"),
        ("{{ tools[0].name }}", "undefined|None"),
        ("{{ messages[7].content.strip() }}", "undefined|no element"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% for i in range(10000000) %}x{% endfor %}", "range|Range"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not end within"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
    ],
)
def test_chat_templates_that_fail_are_one_error(tokenizer: Any, template: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "TEMPLATE_SECONDS", 0.3)
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises((CheckpointError, ConfigError), match=says) as caught:
        chat_text(tokenizer, [{"role": "user", "content": "Hello"}])
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "text", ["plain words", "你好,世界", "שלום עולם", "e\u0301 n\u0303", "😀👨‍👩‍👧 a😀b", "line\nline\r\n", "ไทย"]
)
def test_text_that_is_streamed_is_the_text(tokenizer: Any, text: str) -> None:
    """Characters that are several tokens come whole."""
    import torch

    pieces: list[str] = []
    printer = _Printer(tokenizer, pieces.append)
    ids = token_ids(tokenizer, text, 8192)
    printer.put(torch.tensor([[1, 2]]))
    for token in ids:
        printer.put(torch.tensor([token]))
    printer.end()
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == text
    assert not any("�" in piece for piece in pieces)
