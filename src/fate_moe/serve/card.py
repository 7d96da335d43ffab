"""What the routes know of the model that is served."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from fate_moe.adapter.config_rules import longest_context
from fate_moe.schedule.sampling import eos_ids, sampling_defaults

__all__ = ["ModelCard"]


@dataclass(frozen=True, eq=False)
class ModelCard:
    """``name`` is what clients call the model. ``tokenizer`` is the routes' own copy: they encode while the inference thread
    decodes. ``context_length`` is for prompt and answer together."""

    name: str
    model: Any
    tokenizer: Any
    context_length: int
    created: int = field(default_factory=lambda: int(time.time()))
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, name: str, model: Any, tokenizer: Any) -> ModelCard:
        """The card of a loaded model: as much context as was set aside, and as the model was made for."""
        context = model.fate.config.context_length
        return cls(name, model, copy.deepcopy(tokenizer), min(context, longest_context(model.config) or context))

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def chat_template(self) -> str | None:
        """The model's own template; None where it has none."""
        template = getattr(self.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        return template if isinstance(template, str) and template else None

    @property
    def eos_ids(self) -> set[int]:
        return eos_ids(self.model, self.tokenizer)

    @property
    def sampling_defaults(self) -> dict[str, float | int | bool]:
        return sampling_defaults(self.model)

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids of ``text``, with the special tokens that the tokenizer adds around a text or without. Any thread."""
        with self.lock:
            return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids, special ones included. Any thread."""
        with self.lock:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=False))
