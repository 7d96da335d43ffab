"""Perplexity and comparison against plain transformers, and their windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fate_moe.errors import ConfigError
from fate_moe.tools.evaluate import compare, perplexity, windows

TOKENS = torch.randint(1, 128, (70,), generator=torch.Generator().manual_seed(0))


@given(st.integers(2, 300), st.integers(2, 60), st.integers(1, 59))
def test_every_token_is_predicted_once(num_tokens: int, window: int, stride: int) -> None:
    if stride >= window:
        with pytest.raises(ConfigError, match="skips tokens"):
            windows(num_tokens, window, stride)
        return
    spans = windows(num_tokens, window, stride)
    assert [i for span in spans for i in range(span.scored, span.end)] == list(range(1, num_tokens))
    for span in spans:
        assert span.start < span.scored < span.end <= span.start + window
    for span in spans[1:-1]:
        assert span.end - span.scored == stride, "each window has window - stride tokens of context"


def test_nothing_to_predict() -> None:
    with pytest.raises(ConfigError, match="fewer than two tokens"):
        windows(1, 8, 7)


def log_probabilities(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Log probabilities of transformers' own model, [num_tokens - 1, vocabulary]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(tokens[None, :-1]).logits[0].log_softmax(-1)
        return found


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize(("window", "stride"), [(70, None), (32, None), (32, 8)])
def test_perplexity_is_transformers(
    loaded: Callable[..., Any], checkpoint: Callable[[str], Path], window: int, stride: int | None, decode: bool
) -> None:
    losses = []
    for span in windows(len(TOKENS), window, stride or window - 1):
        expected = log_probabilities(checkpoint("qwen2_moe"), TOKENS[span.start : span.end])
        targets = TOKENS[span.start + 1 : span.end]
        losses += (-expected.gather(1, targets[:, None]).flatten()[span.scored - span.start - 1 :]).tolist()
    done: list[int] = []
    model = loaded("qwen2_moe", expert_cache="50%")
    result = perplexity(model, TOKENS, window=window, stride=stride, decode=decode, advance=done.append)
    assert result.tokens == len(losses) == sum(done) == 69
    assert result.loss == pytest.approx(sum(losses) / 69, rel=1e-5)
    assert result.perplexity == math.exp(result.loss)
    assert result.as_dict()["tokens_per_second"] > 0


def test_a_model_agrees_with_itself(loaded: Callable[..., Any]) -> None:
    result = compare(lambda: loaded("qwen2_moe"), lambda: loaded("qwen2_moe", expert_cache="30%"), TOKENS, window=32)
    assert (result.kl_divergence, result.top1_agreement, result.tokens) == (0.0, 1.0, 69)
    assert result.as_dict()["perplexity_difference"] == 0.0


def test_compare_matches_its_definition(loaded: Callable[..., Any], checkpoint: Callable[[str], Path]) -> None:
    """On lossless and INT4, in one window, from the models' own logits."""
    logits = []
    for precision in ("lossless", "int4"):
        with torch.no_grad():
            logits.append(loaded("qwen2_moe", precision)(TOKENS[None, :-1]).logits[0].double().log_softmax(-1))
    a, b = logits
    result = compare(lambda: loaded("qwen2_moe"), lambda: loaded("qwen2_moe", "int4"), TOKENS, window=70)
    assert result.kl_divergence == pytest.approx(float((a.exp() * (a - b)).sum(-1).mean()), rel=1e-4)
    assert result.kl_divergence > 0
    assert result.top1_agreement == float((a.argmax(-1) == b.argmax(-1)).double().mean())
    for probabilities, value in ((a, result.perplexity_a), (b, result.perplexity_b)):
        assert value == pytest.approx(math.exp(-float(probabilities.gather(1, TOKENS[1:, None]).mean())), rel=1e-5)


def test_other_vocabularies_are_not_comparable(loaded: Callable[..., Any], tmp_path: Path) -> None:
    from fate_moe.engine.prepare import store_for
    from tests.support.checkpoints import tiny_checkpoint
    from tests.support.engines import load_model

    other = load_model(store_for(tiny_checkpoint("qwen2_moe", tmp_path / "other", vocab_size=130), "lossless"))
    with pytest.raises(ConfigError, match="128 and 130 tokens"):
        compare(lambda: loaded("qwen2_moe"), lambda: other, TOKENS, window=32)
