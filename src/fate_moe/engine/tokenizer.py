"""The tokenizer of a store or checkpoint, and why there is none."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from fate_moe.checkpoints.gguf import NO_TOKENIZER
from fate_moe.checkpoints.source import has_tokenizer
from fate_moe.errors import CheckpointError, first_line
from fate_moe.io.bounded import load_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]

_COPY = "copy tokenizer.json and tokenizer_config.json (or tokenizer.model) from where the model was published"


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder ``path``. Raises CheckpointError that says what is missing, torn or not installed."""
    if not has_tokenizer(path):
        if (told := path / NO_TOKENIZER).exists():
            raise CheckpointError(f"{path} has no tokenizer: {told.read_text()}; {_COPY} into this folder")
        raise CheckpointError(f"{path} has no tokenizer; {_COPY} into the checkpoint, or into this folder")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)  # type: ignore[no-any-return]
    except Exception as error:  # whatever hostile tokenizer files make transformers raise
        reason = next(_reasons(path), None) or f"({first_line(error)}); {_COPY} again"
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded: {reason}") from error


def _reasons(path: Path) -> Iterator[str]:
    """What of the files explains that there is no tokenizer."""
    read: dict[str, Any] = {}
    for file in sorted(path.glob("*.json")):
        if file.name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab", "tekken")):
            try:
                read[file.name] = load_json(file)
            except OSError as error:
                yield f"{file.name} cannot be read ({error.strerror})"
            except ValueError as error:
                yield f"{file.name} is damaged ({error}); copy it from the checkpoint again"
    described = read.get("tokenizer_config.json")
    if "tokenizer.json" not in read:
        if isinstance(described, dict) and "AutoTokenizer" in (described.get("auto_map") or {}):
            yield "it needs the checkpoint's own code, which is never run; add a tokenizer.json, which needs none"
        for pattern, package in (("*.model", "sentencepiece"), ("*.tiktoken", "tiktoken"), ("tekken.json", "mistral_common")):
            if any(path.glob(pattern)) and importlib.util.find_spec(package) is None:
                yield f"it needs the package {package} (pip install {package}), or a tokenizer.json"
