"""From text to the model's tokens: every way in goes through here, so that no token is one that the model does not have."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from fate_moe.errors import CheckpointError, ConfigError, first_line

__all__ = ["as_input", "chat_text", "first_tokens", "num_rows", "token_ids"]

TEMPLATE_SECONDS = 10.0  # that a chat template may take; one that is whole takes milliseconds
_CHARACTERS_PER_TOKEN = 16  # more than texts have on average: a first guess


def num_rows(model: Any) -> int:
    """How many tokens ``model`` (it may be on the meta device) has embeddings of."""
    return int(model.get_input_embeddings().weight.shape[0])


def token_ids(tokenizer: Any, text: str, rows: int, *, special: bool = True) -> list[int]:
    """The tokens of ``text``; ``special``: with those that the tokenizer puts around a text.

    Raises CheckpointError where the tokenizer fails, or has a token that the model, of ``rows`` tokens, does not have.
    """
    try:
        ids = [int(token) for token in tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]
    except Exception as error:
        raise CheckpointError(
            f"the model's tokenizer fails on this text ({first_line(error)}); check its tokenizer files"
        ) from error
    if ids and not 0 <= min(ids) <= max(ids) < rows:
        wrong = next(token for token in ids if not 0 <= token < rows)
        name = tokenizer.convert_ids_to_tokens(wrong)
        raise CheckpointError(
            f"the tokenizer makes token {wrong} ({name!r}) of this text, and the model has {rows} tokens only: the tokenizer is "
            "not this model's, or the model was not resized for its added tokens; omit that token, or use the model's own tokenizer"
        )
    return ids


def first_tokens(tokenizer: Any, text: str, rows: int, most: int | None) -> list[int]:
    """As ``token_ids``, no more than the first ``most``; of a long text no more is read than they need."""
    taken = len(text) if most is None else min(len(text), _CHARACTERS_PER_TOKEN * most + 1024)
    while True:
        ids = token_ids(tokenizer, text[:taken], rows)
        if taken == len(text) or len(ids) > (most or 0) + 64:  # the last ones depend on where the text was cut
            return ids[:most]
        taken = min(len(text), 4 * taken)


def chat_text(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """``messages`` (role and content) in the model's chat template, ready for the answer.

    Templates that want a message's content as a list of parts get it so. Raises ConfigError for a model without a template, and
    CheckpointError for a template that raises, does not end, or renders nothing.
    """
    if not tokenizer.chat_template:
        raise ConfigError("this model has no chat template; omit --chat")
    said = messages[-1]["content"].strip()
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    found, reasons = [], []
    for attempt in (messages, parts):
        try:
            with _time_limit(TEMPLATE_SECONDS):
                text = tokenizer.apply_chat_template(list(attempt), add_generation_prompt=True, tokenize=False)
        except Exception as error:
            reasons.append(first_line(error))
            continue
        if isinstance(text, str) and said in text:
            return text
        found.append(text)
    if found and isinstance(found[0], str) and found[0].strip():
        return found[0]
    reason = reasons[0] if reasons else "it renders nothing of the message"
    raise CheckpointError(f"the model's chat template cannot be used here ({reason}); ask without it: fate run MODEL PROMPT")


def as_input(ids: Sequence[int]) -> torch.Tensor:
    """Token ids [1, num_tokens] int64."""
    return torch.tensor([list(ids)], dtype=torch.int64)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after ``seconds``; only the main thread can be interrupted so."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it did not end within {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
