"""A routing trace in a ``.npz`` file: what routers chose, token by token. No torch.

Version 1. N tokens (single decode steps, in order), L MoE layers, k choices, E experts (of the largest layer), D hidden:

    experts      [N, L, k] uint8 or uint16    chosen experts, likeliest first
    probs        [N, L, k] float16            their routing weights
    start        [S + 1] int64                bounds of the generations in N: start[i] <= n < start[i + 1]
    version      [] int64                     1
    num_experts  [L] int64                    experts of each layer
    and, where they were recorded:
    lookups      [N, L, k] uint8              0 hit, 1 in flight, 2 miss
    stall        [N, L] float32               seconds that the layer waited for reads
    seconds      [N, L] float32               from entering the layer to entering the next, or to the next token's embedding
    bytes_read   [N, L] int64                 by reads that ended meanwhile
    link         [N, L] float32               seconds in which they used the link
    overlap      [N, L] float32               seconds from the lookups to the first need of a missing expert; 0: none was missing
    predicting   [N, L] float32               seconds that the inference thread spent on predicting
    reads        [R, 6] float64               token, layer, expert, 1 for a demand read (0: a prefetch), when the read began and
                                              when it ended, in seconds since that token entered layer 0
    predicted    [N, L, E] float16            predicted probabilities; 0 where nothing was predicted
    router_inputs [N, L, D] float16           the routers' inputs
    embeddings   [N, D] float16
    routers      [L, E, D] float32            their weights, where they are linear; scores are routers @ router_input
    norms        [L, D] float32               the gains of the norms before them; scores of layer m on l's residual stream are
                                              routers[m] @ (router_input[l] * norms[m] / norms[l])
    meta         [] str                       JSON: model, expert_bytes (a list where they differ), policy, predictor, slots, ...

Files without ``version`` and ``num_experts`` (gpt-oss-20b's published traces) are read too; their layers are taken to be as wide as
the next power of two. Names from before 0.2.0 (``gate_inputs``, ``cross-layer-calibrated``) are understood. Nothing is unpickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_moe.errors import ConfigError
from fate_moe.io.arrays import load_arrays
from fate_moe.io.files import atomic_file

__all__ = ["VERSION", "RoutingTrace", "read_trace", "write_trace"]

VERSION = 1
MOST_BYTES = 256 << 20  # unpacked, of a file of up to 4 MiB; a larger file may hold more
# The shapes of the optional arrays in the letters of the docstring, and the kinds of their dtypes.
_SHAPES = {
    "lookups": ("NLk", "ui"),
    **dict.fromkeys(("stall", "seconds", "link", "overlap", "predicting"), ("NL", "f")),
    "bytes_read": ("NL", "ui"),
    "reads": ("R6", "f"),
    "predicted": ("NLE", "f"),
    "router_inputs": ("NLD", "f"),
    "embeddings": ("ND", "f"),
    "routers": ("LED", "f"),
    "norms": ("LD", "f"),
}
BY_LAYER = ("routers", "norms")
# What arrays, and policies and predictors in ``meta``, were called in files from before 0.2.0.
OLD_ARRAYS = {"gate_inputs": "router_inputs"}
OLD_NAMES = {"cross-layer-calibrated": "cross-layer-probability", "gate-weighted": "routing-weighted"}


@dataclass(frozen=True)
class RoutingTrace:
    """See the module's docstring; ``extras`` holds the optional arrays by name."""

    experts: NDArray[Any]
    probs: NDArray[Any]
    start: NDArray[np.int64]
    num_experts: NDArray[np.int64]
    extras: dict[str, NDArray[Any]] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.experts.shape[1])

    def first(self, num_tokens: int) -> RoutingTrace:
        """Its first ``num_tokens`` tokens."""
        start = np.append(self.start[self.start < num_tokens], min(num_tokens, self.num_tokens))
        cut = {name: array if name in BY_LAYER else array[:num_tokens] for name, array in self.extras.items() if name != "reads"}
        if "reads" in self.extras:
            cut["reads"] = self.extras["reads"][self.extras["reads"][:, 0] < num_tokens]
        return RoutingTrace(self.experts[:num_tokens], self.probs[:num_tokens], start, self.num_experts, cut, self.meta)


def write_trace(path: Path, trace: RoutingTrace) -> None:
    """Write ``trace`` to ``path``, compressed, whole or not at all. Raises ConfigError or DiskSpaceError if that cannot be done."""
    arrays = {
        "experts": trace.experts,
        "probs": trace.probs,
        "start": trace.start,
        "num_experts": trace.num_experts,
        "version": np.int64(VERSION),
        "meta": np.array(json.dumps(trace.meta)),
        **trace.extras,
    }
    try:
        with atomic_file(path.resolve(), shared=True) as file:  # what a link points to
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be written: {error.strerror}") from error


def read_trace(path: Path) -> RoutingTrace:
    """Read a trace and check that its arrays belong together. Raises ConfigError for a file that is not a trace or is damaged."""
    try:
        arrays = {OLD_ARRAYS.get(name, name): array for name, array in load_arrays(path, MOST_BYTES).items()}
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(
            f"{path} is not a trace or is damaged ({_said(error)}); make one with: fate trace MODEL --out {path}"
        ) from error
    try:
        return _checked(arrays)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not a trace that can be used ({_said(error)}); make one with: fate trace MODEL --out {path}"
        ) from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _checked(arrays: dict[str, NDArray[Any]]) -> RoutingTrace:
    if int(arrays.get("version", np.int64(VERSION))) != VERSION:
        raise ValueError(f"version {int(arrays['version'])}, this program reads {VERSION}")
    experts, probs, start = arrays["experts"], arrays["probs"], arrays["start"]
    if experts.ndim != 3 or experts.dtype.kind not in "ui" or not experts.size:
        raise ValueError(f"experts are {experts.dtype} {experts.shape}")
    if probs.shape != experts.shape or probs.dtype.kind != "f":
        raise ValueError(f"probs are {probs.dtype} {probs.shape}")
    num_tokens, num_layers, _ = experts.shape
    if start.ndim != 1 or len(start) < 2 or start[0] != 0 or start[-1] != num_tokens or (np.diff(start) < 0).any():
        raise ValueError("start does not bound the tokens")
    widest = 1 << int(experts.max()).bit_length()
    num_experts = arrays.get("num_experts", np.full(num_layers, widest, np.int64)).astype(np.int64)
    if num_experts.shape != (num_layers,) or (experts.max((0, 2)) >= num_experts).any() or experts.min() < 0:
        raise ValueError("experts beyond num_experts")
    if (np.diff(np.sort(experts, axis=2), axis=2) == 0).any():
        raise ValueError("a token chose an expert twice")
    extras = {name: arrays[name] for name in _SHAPES if name in arrays}
    sizes = {"N": num_tokens, "L": num_layers, "k": experts.shape[2], "6": 6}
    for name, array in extras.items():
        _check_shape(name, array, sizes)
    if "E" in sizes and sizes["E"] < int(num_experts.max()):
        raise ValueError(f"arrays of {sizes['E']} experts for {int(num_experts.max())}")
    meta = {name: _current(value) for name, value in json.loads(str(arrays.get("meta", "{}"))).items()}
    return RoutingTrace(experts, probs, start.astype(np.int64), num_experts, extras, meta)


def _check_shape(name: str, array: NDArray[Any], sizes: dict[str, int]) -> None:
    """Raise ValueError unless an optional array has the shape and kind that the docstring above gives; learns E and D from it."""
    letters, kinds = _SHAPES[name]
    found = dict(zip(letters, array.shape, strict=False))
    fits = all(sizes.setdefault(letter, size) == size for letter, size in found.items() if letter != "R")
    if array.ndim != len(letters) or array.dtype.kind not in kinds or not fits:
        raise ValueError(f"{name} is {array.dtype} {array.shape}")


def _current(value: Any) -> Any:
    """The name that ``value`` has today, if it is the name of a policy or predictor."""
    return OLD_NAMES.get(value, value) if isinstance(value, str) else value
