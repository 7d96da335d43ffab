"""A numeric self-check: whether torch and the extension compute here what they should, under the settings of this process.

Some settings make libraries compute garbage without an error: with OMP_DYNAMIC=TRUE torch's bf16 products read memory that no
thread wrote (torch 2.13, oneDNN 3.12, AMX). What can be mended is mended with a warning; all else is refused, with the settings.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import math
import platform
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from fate_moe.errors import ConfigError, FateError
from fate_moe.io.bounded import load_json
from fate_moe.io.files import atomic_file
from fate_moe.kernels.modes import neutral
from fate_moe.kernels.native import BF16, DTYPES, INT8, PLANES, native
from fate_moe.kernels.reference import linear_quantized
from fate_moe.machine import affinity, usable_cpus
from fate_moe.quant.planes import pack
from fate_moe.switches import cache_home, library_settings

__all__ = ["check_numbers", "fp32_precision", "settings_in_force", "wrong_numbers"]

_log = logging.getLogger(__name__)

_NAME, _MOST_KNOWN = "selfcheck.json", 32
# Largest error of a right result, of the largest output. Right ones are 5 to 10 times better, wrong ones at least 30 times worse
# (fp32 products rounded to bf16).
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_SHAPES = ((1, 256, 192), (5, 130, 96), (33, 512, 576), (3, 512, 2048))  # rows, out, in
_known: set[str] = set()  # conditions that this process found right
_lock = threading.Lock()


def check_numbers() -> None:
    """Make sure, once per process and setting, that numbers are right; what was found is kept in $FATE_HOME for later processes.

    Runs torch on fewer threads where settings would make it wrong, with a warning. Raises ConfigError, naming what is wrong and the
    settings in force, where nothing helps, and where this process may not start the threads that it needs.
    """
    with _lock:
        _require_threads(torch.get_num_threads() + 8)
        _fit_threads()
        if not float(torch.full((1,), 1e-39, dtype=torch.float32, device="cpu")):
            torch.set_flush_denormal(False)
            _log.warning(
                "small numbers were flushed to zero (torch.set_flush_denormal, or a library built with -ffast-math); no longer"
            )
        key = _conditions()
        if key in _known or key in _kept():
            _known.add(key)
            return
        if wrong := wrong_numbers():
            _work_around(wrong)
        key = _conditions()
        _known.add(key)
        _keep(key)


def wrong_numbers() -> list[str]:
    """What is computed wrongly here, a phrase each; [] if all is right. Takes a few tenths of a second."""
    wrong = []
    with torch.random.fork_rng(devices=[]), neutral(), torch.no_grad():
        torch.manual_seed(0)
        for what, dtype, compute in _checks():
            try:
                got, want = compute()
            except RuntimeError as error:
                wrong.append(f"{what} ({str(error).splitlines()[0]})")
                continue
            ratio = float((got.double() - want.double()).abs().max() / want.double().abs().max())
            if not ratio <= _TOLERANCE[dtype]:
                wrong.append(what)
    return wrong


def fp32_precision() -> str:
    """What torch rounds the factors of fp32 products on the CPU to: "bf16" and "tf32" change numbers, "ieee" and "none" do not."""
    return str(_products().fp32_precision)


def _products() -> Any:
    """torch's settings of oneDNN's products, which it makes while it is imported."""
    backend: Any = torch.backends.mkldnn
    return backend.matmul


def settings_in_force() -> list[str]:
    """What is set for the libraries which compute, as NAME=value."""
    return [f"{name}={value}" for name, value in library_settings().items()]


def _checks() -> Iterator[tuple[str, torch.dtype, Callable[[], tuple[torch.Tensor, torch.Tensor]]]]:
    """(what, precision of the result, function that returns what is computed and what it should be)."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for rows, out, cols in _SHAPES:
            what = f"torch's linear in {name}, {rows} rows of {cols} to {out}"
            yield what, dtype, partial(_linear, dtype, rows, out, cols)
        yield f"torch's attention in {name}", dtype, partial(_attention, dtype)
    yield "torch's rounding to bfloat16", torch.float32, _rounding
    yield "torch's softmax", torch.float32, _softmax
    if native is None:
        return
    used = native.instruction_set()
    for kind, widths in ((PLANES, (2, 1, 1)), (INT8, (8,))):
        for exact in (False, True):
            for rows in (1, 5, 19):
                what = f"the {used} kernels, int{sum(widths)}{' exact' if exact else ''}, {rows} rows"
                yield what, torch.float32, partial(_kernel, kind, widths, rows, exact)
    yield f"the {used} kernels, bfloat16", torch.float32, _bf16_kernel


def _linear(dtype: torch.dtype, rows: int, out: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = torch.randn(rows, cols, dtype=torch.float32).to(dtype), torch.randn(out, cols, dtype=torch.float32).to(dtype)
    return linear(x, weight), x.double() @ weight.double().T


def _attention(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (torch.randn(1, 2, 33, 32, dtype=torch.float32).to(dtype) for _ in range(3))
    scores = (q.double() @ k.double().mT) / math.sqrt(32)
    scores = scores.masked_fill(torch.ones(33, 33, dtype=torch.bool).triu(1), -math.inf)
    return scaled_dot_product_attention(q, k, v, is_causal=True), _exact_softmax(scores) @ v.double()


def _softmax() -> tuple[torch.Tensor, torch.Tensor]:
    x = 4 * torch.randn(5, 1031, dtype=torch.float32)
    return x.softmax(-1), _exact_softmax(x.double())


def _exact_softmax(x: torch.Tensor) -> torch.Tensor:
    powers = (x - x.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


def _rounding() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(1023, dtype=torch.float32)
    bits = x.view(torch.int32)
    return x.bfloat16(), ((bits + 0x7FFF + (bits >> 16 & 1)) & -0x10000).view(torch.float32)


def _kernel(kind: int, widths: tuple[int, ...], rows: int, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out, cols, group = 37, 200, 64
    planes = pack(torch.randint(0, 1 << sum(widths), (out, cols), dtype=torch.uint8), group, widths)
    scale, zero = (torch.rand(out, -(-cols // group), dtype=torch.float32).half() for _ in range(2))
    memory, (*places, scale_at, zero_at) = _side_by_side([*planes, scale, zero])
    place = native.Place.make(kind, out, cols, places, scale_at, zero_at, -1, 0, group)
    x = torch.randn(rows, cols, dtype=torch.float32)
    got, threads = torch.full((rows, out), math.nan, dtype=torch.float32), torch.get_num_threads()
    native.linear(
        place, memory.data_ptr(), PLANES, x.data_ptr(), DTYPES[x.dtype], rows, got.data_ptr(), DTYPES[got.dtype], exact, threads
    )
    return got, linear_quantized(x, planes, scale, zero, group_size=group, widths=widths, exact=exact)


def _bf16_kernel() -> tuple[torch.Tensor, torch.Tensor]:
    weight, x = torch.randn(37, 192, dtype=torch.float32).bfloat16(), torch.randn(3, 192, dtype=torch.float32)
    memory, (at,) = _side_by_side([weight])
    place = native.Place.make(BF16, 37, 192, [at], 0, 0, -1, 0)
    got, threads = torch.full((3, 37), math.nan, dtype=torch.float32), torch.get_num_threads()
    native.linear(
        place, memory.data_ptr(), PLANES, x.data_ptr(), DTYPES[x.dtype], 3, got.data_ptr(), DTYPES[got.dtype], True, threads
    )
    return got, x.double() @ weight.double().T


def _side_by_side(parts: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """``parts`` in one buffer, and the multiple of 64 at which each begins."""
    starts, end = [], 0
    for part in parts:
        starts.append(end)
        end += -(-part.nbytes // 64) * 64
    memory = torch.zeros(end, dtype=torch.uint8)
    for part, start in zip(parts, starts, strict=True):
        memory[start : start + part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
    return memory, starts


def _fit_threads() -> None:
    """Run torch on no more threads than the processors that this process may use, and than OpenMP will give it."""
    threads, usable = torch.get_num_threads(), usable_cpus()
    if usable < threads == affinity() and "OMP_NUM_THREADS" not in library_settings():
        torch.set_num_threads(usable)
        _log.info("torch runs on %d threads: a control group gives no more processors", usable)
    team, reason = _openmp_team(torch.get_num_threads())
    if team < torch.get_num_threads():
        torch.set_num_threads(team)
        _log.warning(
            "%s: OpenMP may give torch fewer threads than it asks for, and products would be wrong; using %d; unset it",
            reason,
            team,
        )


def _openmp_team(threads: int) -> tuple[int, str]:
    """How many threads OpenMP surely gives to a team of ``threads``, and the setting that says so ("" if it is all)."""
    try:
        openmp = ctypes.CDLL(None)
        dynamic, limit, levels = openmp.omp_get_dynamic(), openmp.omp_get_thread_limit(), openmp.omp_get_max_active_levels()
    except (AttributeError, OSError, TypeError):  # no GNU OpenMP in this process
        return threads, ""
    if dynamic:
        return 1, f"OMP_DYNAMIC={library_settings().get('OMP_DYNAMIC', 'TRUE')}"
    if levels < 1:
        return 1, f"OMP_MAX_ACTIVE_LEVELS={levels}"
    return min(threads, max(1, limit)), f"OMP_THREAD_LIMIT={limit}"


def _work_around(wrong: list[str]) -> None:
    """Change torch's settings so that numbers are right, with a warning. Raises ConfigError where nothing helps."""
    settings = ", ".join(settings_in_force()) or "none"
    if fp32_precision() in ("bf16", "tf32"):
        with warnings.catch_warnings(action="ignore"):  # torch would have one of its two ways to set this used alone
            torch.set_float32_matmul_precision("highest")
            _products().fp32_precision = "ieee"
        if not (still := wrong_numbers()):
            _log.warning("torch.set_float32_matmul_precision was not 'highest', which changes numbers (%s); it is now", wrong[0])
            return
        wrong = still
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
        if not wrong_numbers():
            _log.warning("on %d threads numbers are wrong (%s; settings: %s); using one thread", threads, wrong[0], settings)
            return
        torch.set_num_threads(threads)
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise ConfigError(f"numbers are wrong here: {wrong[0]}{more}; unset what changes how libraries compute (settings: {settings})")


def _require_threads(count: int) -> None:
    """Raise ConfigError unless this process may start ``count`` threads: GNU OpenMP would end the process."""
    end = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        message = f"only {len(started)} of {count} threads can be started here; raise `ulimit -u` or the control group's pids limit"
        raise ConfigError(f"{message}, or set OMP_NUM_THREADS=1") from error
    finally:
        end.set()
        for thread in started:
            thread.join()


def _conditions() -> str:
    """A digest of all that may change what is computed."""
    facts: list[Any] = [torch.__version__, torch.get_num_threads(), torch.backends.mkldnn.enabled, platform.machine(), _processor()]
    facts += [fp32_precision(), settings_in_force()]
    if native is not None:
        built = Path(native.__file__).stat()
        facts += [native.instruction_set(), built.st_size, built.st_mtime_ns]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _processor() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return [platform.processor()]
    return [line for line in lines if line.startswith(("model name", "flags", "Features", "microcode", "CPU part"))]


def _kept() -> list[str]:
    """Conditions that earlier processes found right, oldest first; [] where none can be read."""
    with suppress(OSError, ValueError, FateError):
        found = load_json(cache_home() / _NAME)
        if isinstance(found, list) and all(isinstance(key, str) for key in found):
            return found
    return []


def _keep(key: str) -> None:
    try:
        home = cache_home()
        home.mkdir(parents=True, exist_ok=True)
        with atomic_file(home / _NAME, shared=True) as file:
            file.write(json.dumps([*(one for one in _kept() if one != key), key][-_MOST_KNOWN:]).encode())
    except (OSError, FateError) as error:
        _log.info("the result of the self-check cannot be kept, each process makes it again: %s", error)
