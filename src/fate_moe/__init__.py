"""fate-moe runs Mixture-of-Experts language models that are bigger than the memory they run in.

>>> from fate_moe import load
>>> model, tokenizer = load("path-or-id", ram="4GiB")
>>> inputs = tokenizer("Once upon a time", return_tensors="pt")
>>> print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
>>> print(model.fate.report())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fate_moe.config import OffloadConfig

if TYPE_CHECKING:
    from fate_moe.engine.load import load, plan

__version__ = "0.1.0"

__all__ = ["OffloadConfig", "__version__", "load", "plan"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `fate --help` and `import fate_moe` must not wait for them.
    if name in ("load", "plan"):
        from fate_moe.engine import load as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
