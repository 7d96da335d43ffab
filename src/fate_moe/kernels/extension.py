"""The compiled extension, or why there is none: built or not, FATE_NATIVE, FATE_KERNELS. No torch."""

from __future__ import annotations

import atexit
import importlib
from typing import Any

from fate_moe import switches
from fate_moe.errors import ConfigError

__all__ = ["native", "why_not"]

_BUILD = (
    "install a wheel, or with a C++17 compiler run "
    "`pip install --no-cache-dir --force-reinstall --no-deps fate-moe` (in a source tree: `make native`)"
)


def _load() -> tuple[Any, str | None]:
    """(the extension, why there is none), one of them None. Raises ConfigError for kernels that cannot be had."""
    asked = switches.kernels()
    if not switches.use_native():
        if asked:
            raise ConfigError("FATE_KERNELS chooses among what FATE_NATIVE=0 turns off; unset one of them")
        return None, "FATE_NATIVE=0 turns the C++ kernels off; unset it to use them"
    try:
        module = importlib.import_module("fate_moe.kernels._native")
    except ImportError as error:
        if asked:
            raise ConfigError(f"FATE_KERNELS: the C++ kernels are not built ({error}); {_BUILD}") from error
        return None, f"the C++ kernels are not built ({error}); {_BUILD}"
    if asked:
        available = module.instruction_sets()
        if asked not in available:
            names = [name for name, of in switches.KERNELS.items() if of in available]
            raise ConfigError(f"FATE_KERNELS: this processor and this build do not have {asked}; they have {', '.join(names)}")
        module.choose(asked)
    atexit.register(module.end_threads)  # before all others, so that it runs after them
    return module, None


native, _missing = _load()


def why_not() -> str | None:
    """Why the extension cannot be used, and what to do; None where it can."""
    return _missing
