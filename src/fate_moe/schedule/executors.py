"""Which executor runs a loaded model, with how many requests at once, and what it keeps."""

from __future__ import annotations

import logging
from typing import Any

from fate_moe.core import KV_BLOCK
from fate_moe.engine.cpu import CpuEngine
from fate_moe.engine.fingerprint import kv_fingerprint
from fate_moe.errors import FateError
from fate_moe.io.files import is_writable
from fate_moe.schedule.blocks import blocks_for
from fate_moe.schedule.device_pool import DevicePoolExecutor
from fate_moe.schedule.executor import Executor, ModelExecutor
from fate_moe.schedule.pool import PoolExecutor
from fate_moe.switches import cache_home

__all__ = ["default_parallel", "executor_of"]

_log = logging.getLogger(__name__)

# Where nobody says how many requests run at once: more rows add little to a step's speed on a CPU. Requests that do not share
# passes gain nothing but that a new one does not wait for the others. Each should find room for so many tokens, or they preempt
# one another.
_PARALLEL, _PARALLEL_APART, _TOKENS_EACH = 8, 4, 512
_PARALLEL_ON_GPU = 16  # rows of a captured step


def executor_of(model: Any) -> Executor:
    """The best executor for a loaded model, within the KV cache of its plan."""
    engine = model.fate
    num_blocks, step = blocks_for(engine.plan.context_length), getattr(engine, "step", None)
    decode = getattr(engine, "decode", None)
    if decode is not None and decode.most_rows > 1 and decode.is_unchanged():
        return DevicePoolExecutor(model, decode, num_blocks, _most_kept(engine, num_blocks))
    if step is None or not step.is_unchanged():
        return ModelExecutor(model, num_blocks)
    executor = PoolExecutor(model, step, num_blocks, _most_kept(engine, num_blocks))
    if engine.config.prefix_disk_bytes:
        _keep_on_disk(executor, engine)
    return executor


def _most_kept(engine: Any, num_blocks: int) -> int:
    return int(num_blocks * engine.plan.prefix_cache_bytes // engine.plan.kv_cache_bytes)


def _keep_on_disk(executor: PoolExecutor, engine: CpuEngine) -> None:
    """As ``engine.config`` says; a warning where it cannot be."""
    try:
        home = cache_home() / "kv"
        if engine.store is not None and (model := kv_fingerprint(engine.store, engine.config)) is not None:
            executor.keep_on_disk(home, model, engine.config.prefix_disk_bytes)
            if executor.disk is not None and not is_writable(home):
                executor.disk.files.stop(f"{home} cannot be written")
    except (OSError, FateError) as error:
        _log.warning("prefixes of texts are not kept on the disk (%s)", error)


def default_parallel(executor: Executor) -> int:
    """How many requests run at once unless somebody says: by the KV cache, and by whether they make a step cheaper."""
    fitting = executor.blocks.num_blocks * KV_BLOCK // _TOKENS_EACH
    useful = _PARALLEL if executor.shares_passes else _PARALLEL_APART
    if isinstance(executor, DevicePoolExecutor):
        useful = _PARALLEL_ON_GPU
    states = executor.most_sequences or useful
    if executor.prefixes is not None and executor.prefixes.states is not None:
        states = (states + 1) // 2  # the others hold checkpoints
    return max(1, min(useful, fitting, states))
