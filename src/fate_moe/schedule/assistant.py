"""An assistant: a small model that writes drafts for a large one, each text in a KV cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from fate_moe.adapter.kv_cache import RoomyLayer

__all__ = ["ModelAssistant"]


class ModelAssistant:
    """``model`` is a loaded one with the large model's tokenizer. It writes what is likeliest at each place."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def text(self) -> _ReadText:
        """A text that it has read nothing of."""
        return _ReadText(self.model)


class _ReadText:
    """The tokens that the model has read of one text, and their cache. Tokens that the text lost are taken back."""

    def __init__(self, model: Any) -> None:
        self._model, self._tokens = model, list[int]()
        self._cache: DynamicCache | None = None

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """The ``most`` likeliest tokens behind ``tokens``; fewer where the model's context ends."""
        most = min(most, self._model.fate.plan.context_length - len(tokens))
        drafted = list[int]()
        if most < 1 or not tokens:
            return drafted
        self._return_to(tokens)
        unread = list(tokens[len(self._tokens) :])
        while len(drafted) < most:
            drafted.append(self._read(unread))
            unread = drafted[-1:]
        return drafted

    def _return_to(self, tokens: Sequence[int]) -> None:
        """Take back what is no beginning of ``tokens``, whose last one is to be read."""
        pairs = zip(self._tokens, tokens[:-1], strict=False)
        common = next((at for at, (mine, its) in enumerate(pairs) if mine != its), min(len(self._tokens), len(tokens) - 1))
        if (count := len(self._tokens) - common) and self._cache is not None:
            layers: list[Any] = self._cache.layers
            if all(isinstance(layer, RoomyLayer) for layer in layers):
                for layer in layers:
                    layer.take_back(count)
            elif all(type(layer) is DynamicLayer for layer in layers):
                for layer in layers:
                    layer.crop(-count)
            else:  # a state or a window cannot be taken back
                self._cache, common = None, 0
        del self._tokens[common:]

    def _read(self, tokens: list[int]) -> int:
        """The likeliest token behind ``tokens``, which follow what was read."""
        if self._cache is None:
            self._cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            out = self._model(torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._tokens += tokens
        return int(out.logits[0, -1].argmax().item())
