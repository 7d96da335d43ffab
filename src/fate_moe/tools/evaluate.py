"""Measures how well a model predicts a text, and how much two models' predictions differ."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from fate_moe.errors import ConfigError

__all__ = ["Comparison", "Perplexity", "Window", "compare", "logits_bytes", "perplexity", "windows"]

# Bytes per logit: the model's own, an fp32 copy, and the temporaries of its log-softmax (measured with the embedded model).
_LOGIT_BYTES = 14


class Window(NamedTuple):
    """Tokens ``start`` to ``end`` are read; those from ``scored`` on are predicted, each from the ones before it in the window."""

    start: int
    scored: int
    end: int


@dataclass(frozen=True)
class Perplexity:
    """``perplexity`` is exp of ``loss`` (nats per predicted token); ``tokens`` counts those predicted; ``seconds`` wall clock."""

    perplexity: float
    loss: float
    tokens: int
    window: int
    stride: int
    seconds: float

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0}


@dataclass(frozen=True)
class Comparison:
    """B against A over ``tokens`` predictions: mean KL(A || B) in nats, top-1 agreement (a fraction), both perplexities."""

    kl_divergence: float
    top1_agreement: float
    perplexity_a: float
    perplexity_b: float
    tokens: int

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "perplexity_difference": self.perplexity_b / self.perplexity_a - 1}


def windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """Windows of ``window`` tokens, one every ``stride``; every token except the first is predicted exactly once.

    Raises ConfigError if the text or the window is too short, or if ``stride`` is not below ``window``.
    """
    if not 1 <= stride < window:
        raise ConfigError(
            f"a stride of {stride} with windows of {window} tokens skips tokens; give a stride from 1 to {window - 1}"
        )
    if num_tokens < 2:
        raise ConfigError("the text has fewer than two tokens, so there is nothing to predict; give a longer text")
    spans, predicted = [], 1
    for start in range(0, num_tokens, stride):
        end = min(start + window, num_tokens)
        spans.append(Window(start, predicted, end))
        predicted = end
        if end == num_tokens:
            break
    return spans


def perplexity(
    model: Any,
    tokens: Tensor,
    *,
    window: int = 512,
    stride: int | None = None,
    decode: bool = False,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> Perplexity:
    """Perplexity of ``model`` on ``tokens`` [num_tokens] int64, in windows, one every ``stride`` (None: ``window`` - 1).

    ``decode`` feeds the predicted tokens one at a time through the KV cache, as generation does, instead of a window at once. This
    is slower and measures what precision policies do in decode. ``advance`` is called with the number of further tokens done.
    """
    stride = window - 1 if stride is None else stride
    spans = windows(len(tokens), window, stride)
    total, count, began = 0.0, 0, time.perf_counter()
    for span, logits in _predictions(model, tokens, spans, decode):
        targets = tokens[span.scored : span.end]
        total += float(cross_entropy(logits.float(), targets, reduction="sum"))
        count += len(targets)
        advance(len(targets))
    loss = total / count
    return Perplexity(math.exp(loss), loss, count, window, stride, time.perf_counter() - began)


def compare(
    open_a: Callable[[], Any],
    open_b: Callable[[], Any],
    tokens: Tensor,
    *,
    window: int = 512,
    decode: bool = False,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> Comparison:
    """Compare the predictions of two models on ``tokens`` [num_tokens] int64, in windows that overlap by one token.

    ``open_a`` and ``open_b`` load the models, whose ``fate`` is closed afterwards. They are loaded one after the other, so that
    each can use all memory; A's logits are written to a temporary file. Raises ConfigError if the vocabularies differ.
    """
    spans = windows(len(tokens), window, window - 1)
    with tempfile.TemporaryFile() as file:
        vocabulary, dtype = 0, torch.float32
        with closing(_Loaded(open_a)) as model:
            for span, logits in _predictions(model.model, tokens, spans, decode):
                vocabulary, dtype = logits.shape[-1], logits.dtype
                file.write(memoryview(logits.contiguous().view(torch.uint8).numpy()))  # type: ignore[arg-type]
                advance(span.end - span.scored)
        file.seek(0)
        divergence, loss_a, loss_b, agreeing, count = 0.0, 0.0, 0.0, 0, 0
        with closing(_Loaded(open_b)) as model:
            for span, logits in _predictions(model.model, tokens, spans, decode):
                targets = tokens[span.scored : span.end]
                if logits.shape[-1] != vocabulary:
                    raise ConfigError(
                        f"the models cannot be compared: their vocabularies have {vocabulary} and {logits.shape[-1]} tokens"
                    )
                data = bytearray(len(targets) * vocabulary * dtype.itemsize)
                file.readinto(data)
                log_a = torch.frombuffer(data, dtype=dtype).view(-1, vocabulary).float().log_softmax(-1)
                log_b = logits.float().log_softmax(-1)
                divergence += float((log_a.exp() * (log_a - log_b)).sum())
                agreeing += int((log_a.argmax(-1) == log_b.argmax(-1)).sum())
                loss_a -= float(log_a.gather(1, targets[:, None]).sum())
                loss_b -= float(log_b.gather(1, targets[:, None]).sum())
                count += len(targets)
                advance(len(targets))
    return Comparison(divergence / count, agreeing / count, math.exp(loss_a / count), math.exp(loss_b / count), count)


def logits_bytes(vocabulary: int, window: int) -> int:
    """Bytes that scoring needs in addition to the model: the logits of a window and their temporaries."""
    return vocabulary * window * _LOGIT_BYTES


class _Loaded:
    """A loaded model; ``close`` closes its engine and drops the model."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.model = load()

    def close(self) -> None:
        self.model.fate.close()
        del self.model


def _predictions(model: Any, tokens: Tensor, spans: list[Window], decode: bool) -> Iterator[tuple[Window, Tensor]]:
    """For each window the logits [scored tokens, vocabulary] that predict its tokens from ``scored`` on."""
    with torch.inference_mode():
        for span in spans:
            inputs = tokens[None, span.start : span.end - 1]
            first = span.scored - span.start - 1  # the position that predicts the first scored token
            if not decode:
                yield span, model(inputs, use_cache=False).logits[0, first:]
                continue
            past = DynamicCache(config=model.config)
            if first:
                model(inputs[:, :first], past_key_values=past, use_cache=True, logits_to_keep=1)
            steps = [model(inputs[:, [i]], past_key_values=past, use_cache=True).logits[0] for i in range(first, inputs.shape[1])]
            yield span, torch.cat(steps)
