"""Calling tiny models: what they write, and what transformers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

PROMPT = torch.tensor([[3, 17, 90, 5, 44, 8]])


def write(model: Any, ids: torch.Tensor = PROMPT, num: int = 6, **options: Any) -> Any:
    """``num`` tokens, the likeliest ones, after ``ids``; what generate() gives."""
    return model.generate(ids, **{"max_new_tokens": num, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options})


def reference(checkpoint: Path) -> Any:
    """transformers' own model."""
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
