"""Runs EleutherAI's evaluation harness on offloaded models: ``fate eval harness``, or ``register()`` and the harness's API.

The harness has no entry points for models, so it finds "fate" in its registry only after ``register()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fate_moe.engine.load import load
from fate_moe.errors import ConfigError
from fate_moe.tools.tokens import num_rows, token_ids

__all__ = ["register", "run_harness", "score"]

_loaded: list[Any] = []  # models of the harness, which never closes them


def score(model: Any, context: Sequence[int], continuation: Sequence[int], max_length: int) -> tuple[float, bool]:
    """The log probability of ``continuation`` after ``context``, and whether each of its tokens is the likeliest.

    Both are token ids; the last ``max_length`` + 1 of them are used.
    """
    tokens = torch.tensor([*context, *continuation])[-(max_length + 1) :]
    count = min(len(continuation), len(tokens) - 1)
    with torch.inference_mode():
        logits = model(tokens[None, :-1], use_cache=False, logits_to_keep=count).logits[0, -count:].float()
    targets = tokens[-count:]
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == targets).all())


def register() -> type:
    """Register the model "fate" with lm_eval (arguments: ``model`` and the fields of OffloadConfig) and return its class.

    Raises ConfigError if lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import MODEL_REGISTRY, register_model
        from lm_eval.utils import make_disjoint_window
    except ImportError as error:
        raise ConfigError("the evaluation harness is not installed; pip install 'fate-moe[eval]'") from error
    if "fate" in MODEL_REGISTRY:
        known: type = MODEL_REGISTRY["fate"]
        return known

    @register_model("fate")
    class FateLM(TemplateLM):  # type: ignore[misc]
        """An offloaded model; runs one request at a time."""

        def __init__(self, model: str | None = None, batch_size: Any = 1, device: Any = None, **options: Any) -> None:
            super().__init__()
            self.model, self.tokenizer = load(model, **options)
            _loaded.append(self.model)
            self._max_length = min(
                self.model.fate.config.context_length, self.model.config.get_text_config().max_position_embeddings
            )

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return token_ids(self.tokenizer, string, num_rows(self.model), special=bool(add_special_tokens))

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
            return [score(self.model, context or [self.eot_token_id], end, self._max_length) for _, context, end in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            from lm_eval.utils import get_rolling_token_windows

            totals: list[float] = []
            for request in requests:
                spans = get_rolling_token_windows(self.tok_encode(request.args[0]), self.eot_token_id, self._max_length, 1)
                parts = [make_disjoint_window(span) for span in spans]
                totals.append(sum(score(self.model, context, end, self._max_length)[0] for context, end in parts))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [self._generate(*request.args) for request in requests]

        def _generate(self, context: str, options: dict[str, Any]) -> str:
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            max_new_tokens = min(int(options.get("max_gen_toks", 256)), self._max_length - 1)
            inputs = torch.tensor([self.tok_encode(context)[-(self._max_length - max_new_tokens) :]])
            output: Tensor = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=bool(options.get("do_sample", False)),
                tokenizer=self.tokenizer,
                pad_token_id=self.eot_token_id,
                **({"stop_strings": stops} if stops else {}),
            )
            text: str = self.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
            return min((text.split(stop)[0] for stop in stops if stop), key=len, default=text)

    model_class: type = FateLM
    return model_class


def run_harness(arguments: Sequence[str]) -> None:
    """Run the harness's command line with ``arguments``; the model is "fate" unless they name another."""
    import sys

    register()
    from lm_eval.__main__ import cli_evaluate

    model = [] if any(argument.split("=")[0] in ("--model", "-m") for argument in arguments) else ["--model", "fate"]
    saved_argv, sys.argv = sys.argv, ["lm_eval", "run", *model, *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = saved_argv
        while _loaded:
            _loaded.pop().fate.close()  # keeps what was learned
