"""Every environment variable that this package reads. Each is read when it is used, so a test may set it.

============  =============================  ===================================================================================
variable      values                         meaning
============  =============================  ===================================================================================
FATE_API_KEY  any text                       what clients of ``fate serve`` must send, where no option gives a key
FATE_HOME     a folder                       where converted stores, sessions, prefixes and measurements live; default:
                                             ~/.cache/fate if it is there, else ``fate`` in $XDG_CACHE_HOME or ~/.cache
FATE_LOG      debug, info, warning           what the command ``fate`` says on stderr; -v is info, -vv debug; default: warning
FATE_KERNELS  portable, avx2, avx-vnni,      which CPU kernels run; read when ``fate_moe.kernels.native`` is first imported;
              avx512, amx, neon, neon-dot,   default: the best that this processor has (``fate doctor`` lists them)
              neon-i8mm
FATE_NATIVE   0, 1                           0: run on torch, without the C++ extension; read at the same time
FATE_FUSE     0, 1                           0: no layer as one step and no accelerated module, the family's own code instead
FATE_CHECK    0, 1                           1: check the residency's tables after each pass, and raise where they do not agree
============  =============================  ===================================================================================

A value that is none of these raises ConfigError: one line on the command line, at the start.
"""

from __future__ import annotations

import difflib
import logging
import os
from pathlib import Path

from fate_moe.errors import ConfigError

__all__ = [
    "KERNELS",
    "NAMES",
    "api_key",
    "cache_home",
    "check",
    "check_each_pass",
    "fuse",
    "kernels",
    "library_settings",
    "log_level",
    "misspelt",
    "use_native",
]

NAMES = ("FATE_API_KEY", "FATE_CHECK", "FATE_FUSE", "FATE_HOME", "FATE_KERNELS", "FATE_LOG", "FATE_NATIVE")
# What FATE_KERNELS may say, and what the extension calls it.
KERNELS = {
    "portable": "portable",
    "avx2": "avx2",
    "avx-vnni": "avx-vnni",
    "avx512": "avx512-vnni",
    "amx": "amx",
    "neon": "neon",
    "neon-dot": "neon-dot",
    "neon-i8mm": "neon-i8mm",
}
_OF_LIBRARIES = (
    *("ATEN_", "DNNL_", "GOMP_", "KMP_", "LD_PRELOAD", "MKL_", "OMP_", "ONEDNN_", "OPENBLAS_", "TORCH_"),
    *("FATE_KERNELS", "FATE_NATIVE"),
)
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


def api_key() -> str | None:
    """What clients of ``fate serve`` must send (FATE_API_KEY); None where it is unset or empty."""
    return os.environ.get("FATE_API_KEY", "").strip() or None


def cache_home() -> Path:
    """Where converted stores live: ``$FATE_HOME``, else ``fate`` in the user's cache.

    Raises ConfigError where there is no such place. Whether it can be written to is not checked: stores in a read-only folder can
    be loaded.
    """
    given = os.environ.get("FATE_HOME")
    try:
        home = Path(given).expanduser() if given else _default_home()
    except RuntimeError as error:
        raise ConfigError(f"there is no home folder to keep stores in ({error}); set FATE_HOME to a folder") from error
    if os.path.lexists(home) and not os.path.isdir(home):
        raise ConfigError(f"FATE_HOME: {home} is not a folder; set it to one")
    return home


def _default_home() -> Path:
    """Raises RuntimeError where there is no home folder."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    other = Path(cache) / "fate" if os.path.isabs(cache) else None  # the specification ignores relative ones
    try:
        home = Path.home()
    except RuntimeError:
        if other:
            return other
        raise
    if not home.is_absolute():
        raise RuntimeError("HOME is not an absolute path")
    usual = home / ".cache" / "fate"
    return other if other and not os.path.isdir(usual) else usual


def log_level() -> int:
    """The level of ``logging`` that FATE_LOG names. Raises ConfigError for another name."""
    return _LEVELS[_one_of("FATE_LOG", tuple(_LEVELS), "warning")]


def kernels() -> str | None:
    """The extension's name of the kernels that FATE_KERNELS asks for; None: the best. Raises ConfigError for an unknown name."""
    name = _one_of("FATE_KERNELS", tuple(KERNELS), "")
    return KERNELS[name] if name else None


def use_native() -> bool:
    """Whether the C++ extension may be used (FATE_NATIVE)."""
    return _flag("FATE_NATIVE", default=True)


def fuse() -> bool:
    """Whether layers may run as one step and modules be accelerated (FATE_FUSE)."""
    return _flag("FATE_FUSE", default=True)


def check_each_pass() -> bool:
    """Whether the residency's integrity is checked after each pass (FATE_CHECK)."""
    return _flag("FATE_CHECK", default=False)


def check() -> None:
    """Raise ConfigError for the first switch whose value has no meaning."""
    for read in (cache_home, log_level, kernels, use_native, fuse, check_each_pass):
        read()


def library_settings() -> dict[str, str]:
    """The variables that are set and reach the libraries which compute, and ours that choose kernels, by name."""
    return {name: value for name, value in sorted(os.environ.items()) if value and name.startswith(_OF_LIBRARIES)}


def misspelt() -> list[str]:
    """A sentence for each variable whose name is nearly, but not quite, one of NAMES."""
    found = []
    for name in sorted(os.environ):
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.8) if name.startswith("FATE_") else []
        if near and name not in NAMES:
            found.append(f"{name} is not read; did you mean {near[0]}?")
    return found


def _flag(name: str, default: bool) -> bool:
    return _one_of(name, ("0", "1"), "1" if default else "0") == "1"


def _one_of(name: str, values: tuple[str, ...], default: str) -> str:
    """The variable's value, ``default`` where it is unset or empty."""
    value = os.environ.get(name) or default
    if value != default and value not in values:
        raise ConfigError(f"{name}={value} is not one of {', '.join(values)}")
    return value
