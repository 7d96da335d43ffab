"""fate-moe runs Mixture-of-Experts language models that are bigger than the memory they run in.

>>> from fate_moe import load
>>> model, tokenizer = load("path-or-id", ram="4GiB")
>>> inputs = tokenizer("Once upon a time", return_tensors="pt")
>>> print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
>>> print(model.fate.report())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fate_moe.config import OffloadConfig
from fate_moe.errors import (
    BudgetError,
    CheckpointError,
    ClosedModelError,
    ConfigError,
    CorruptExpertError,
    DiskSpaceError,
    FateError,
    StoreError,
    UnsupportedCallError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from fate_moe.engine.engine import Engine
    from fate_moe.engine.load import Loaded, load
    from fate_moe.engine.prepare import plan
    from fate_moe.engine.report import Report

__version__ = "0.2.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ClosedModelError",
    "ConfigError",
    "CorruptExpertError",
    "DiskSpaceError",
    "Engine",
    "FateError",
    "Loaded",
    "OffloadConfig",
    "Report",
    "StoreError",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "__version__",
    "load",
    "plan",
]

# torch and transformers take seconds to import; `fate --help` and `import fate_moe` must not wait for them.
_LAZY = {
    "Engine": "fate_moe.engine.engine",
    "Loaded": "fate_moe.engine.load",
    "Report": "fate_moe.engine.report",
    "load": "fate_moe.engine.load",
    "plan": "fate_moe.engine.prepare",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
