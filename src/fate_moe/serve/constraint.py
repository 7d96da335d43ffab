"""Answers that a grammar forces: JSON, JSON of a schema, a call of a tool. llguidance says which tokens may come next."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import llguidance
import llguidance.hf
import numpy as np
import torch
from transformers import LogitsProcessor

from fate_moe.serve.card import ModelCard
from fate_moe.serve.errors import ApiError

__all__ = ["Constraint", "call_grammar", "constraint", "json_grammar"]

# Without it a model may write white space for ever.
_COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
_tokenizers: WeakKeyDictionary[ModelCard, llguidance.LLTokenizer] = WeakKeyDictionary()


class Constraint(LogitsProcessor):  # type: ignore[misc]
    """Leaves only tokens with which ``grammar`` can go on; follows one text, whose first ``prompt_tokens`` it does not judge."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, grammar: str, prompt_tokens: int) -> None:
        with _no_panic():
            self._matcher = llguidance.LLMatcher(tokenizer, grammar)
        self._seen = prompt_tokens

    def forced(self, input_ids: torch.Tensor) -> list[int]:
        """The tokens of what the grammar leaves no choice about next, as the tokenizer would write it. Ids [1, tokens]."""
        with _no_panic():
            self._consume(input_ids)
            return [] if self._matcher.is_error() else self._matcher.compute_ff_tokens()

    def _consume(self, input_ids: torch.Tensor) -> None:
        tokens = input_ids[0, self._seen :].tolist()
        self._seen += len(tokens)
        self._matcher.consume_tokens(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with _no_panic():
            self._consume(input_ids)
            if self._matcher.is_error():
                raise ValueError(f"the grammar failed: {self._matcher.get_error()}")
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little", count=scores.shape[-1]).astype(bool)
        return scores.masked_fill_(~torch.from_numpy(allowed).to(scores.device), float("-inf"))


@contextmanager
def _no_panic() -> Iterator[None]:
    """llguidance is Rust: what it did not think of (a long schema in another script, in 1.9) is a panic, which is no Exception."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"llguidance cannot read this grammar: {error}") from error


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of the JSON that ``schema`` describes."""
    return f"start: {_json(schema)}"


def call_grammar(tools: Sequence[Mapping[str, Any]], name: str | None) -> str:
    """The grammar of a call: of the tool ``name`` its arguments, else ``{"name": ..., "arguments": ...}`` of any."""
    if name is not None:
        tool = next(tool["function"] for tool in tools if tool["function"]["name"] == name)
        return json_grammar(_parameters(tool))
    rules = [f"start: {' | '.join(f'call{index}' for index in range(len(tools)))}"]
    for index, tool in enumerate(tools):
        head = json.dumps('{"name": ' + json.dumps(tool["function"]["name"]) + ', "arguments": ')
        rules += [f'call{index}: {head} args{index} "}}"', f"args{index}: {_json(_parameters(tool['function']))}"]
    return "\n".join(rules)


def constraint(card: ModelCard, grammar: str, prompt_tokens: int, param: str) -> Callable[[], Constraint]:
    """What makes a Request's constraint. Raises ApiError, naming ``param``, where the grammar cannot be."""
    if not card.eos_ids:
        raise ApiError(f"'{param}' needs a model that can end a text; this one has no such token", param)
    tokenizer = _tokenizer(card)
    try:
        with _no_panic():
            error = llguidance.LLMatcher.validate_grammar(grammar, tokenizer)
    except ValueError as panic:
        error = str(panic)
    if error and not error.startswith("WARNING"):
        reason = error.strip().splitlines()[0][:300]
        raise ApiError(f"'{param}': this schema cannot be followed: {reason}", param, "invalid_json_schema")
    return functools.partial(Constraint, tokenizer, grammar, prompt_tokens)


def _tokenizer(card: ModelCard) -> llguidance.LLTokenizer:
    """Made once a model: that takes about a second for a large vocabulary."""
    with card.lock:
        if card not in _tokenizers:
            try:
                made = llguidance.hf.from_tokenizer(card.tokenizer, n_vocab=card.vocab_size, eos_token=sorted(card.eos_ids))
            except Exception as error:
                raise ApiError(f"this model's tokenizer cannot be constrained: {error}", code="unsupported_model") from error
            _tokenizers[card] = made
        return _tokenizers[card]


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, **_COMPACT})
