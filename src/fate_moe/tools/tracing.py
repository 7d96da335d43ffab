"""Runs a model to record its routing: traces of decode, and fitted gates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch

from fate_moe.adapter.families import linear_routers, norms_of
from fate_moe.config import OffloadConfig
from fate_moe.core import ExpertSource
from fate_moe.engine.load import build
from fate_moe.engine.prepare import load_tokenizer, prepare, store_for
from fate_moe.errors import ConfigError
from fate_moe.io.progress import count_bar
from fate_moe.predict.gates import LinearRouters
from fate_moe.store.learned import save_gates
from fate_moe.tools.tokens import as_input, first_tokens, num_rows
from fate_moe.trace.fit import GateFitter, Passes
from fate_moe.trace.recall import RecallMeter
from fate_moe.trace.record import Recorder
from fate_moe.trace.schema import RoutingTrace

__all__ = ["fit_gates", "record_routing"]

_log = logging.getLogger(__name__)

WINDOW = 256  # tokens of one pass when fitting


def record_routing(
    model: Any,
    texts: Sequence[str],
    config: OffloadConfig,
    *,
    new_tokens: int,
    max_tokens: int,
    teacher: bool = False,
    prefill: bool = False,
    router_inputs: bool = False,
    source: ExpertSource | None = None,
) -> RoutingTrace:
    """Continue each of ``texts`` greedily by ``new_tokens``, or with ``teacher`` follow it token by token; ``max_tokens`` in all.

    ``prefill``: follow it in passes of many tokens, as fast as a prompt, without lookups and times. ``router_inputs``: record the
    inputs and weights of linear routers too. ``source`` brings the experts' bytes; None: the store. Raises ConfigError if no token
    was decoded.
    """
    if config.on_gpu:
        raise ConfigError("routing is recorded on the CPU; omit vram and device")
    prepared = prepare(store_for(model, config.precision, config.dense_precision))
    tokenizer = load_tokenizer(prepared.store.path)
    plan = prepared.plan(config)
    running = build(prepared, plan, config, source)
    weights = linear_routers(running, prepared.stacks) if router_inputs else None
    routers = None if weights is None else _padded(weights)
    norms = norms_of(running, prepared.stacks) if router_inputs else None
    sizes = [stack.num_experts for stack in prepared.stacks]
    rows = num_rows(running)
    recorder = Recorder(sizes, router_inputs=router_inputs, routers=routers, norms=norms, prompts=prefill)
    with closing(running.fate), count_bar("tracing", max_tokens) as advance, torch.inference_mode():
        for text in texts:
            left = min(max_tokens - recorder.num_tokens, new_tokens)
            if left < 2:
                break
            ids = as_input(first_tokens(tokenizer, text, rows, config.context_length + 1))
            before = recorder.num_tokens
            with running.fate.observe(recorder):
                if teacher or prefill:
                    _follow(running, ids[:, : min(left, config.context_length)], WINDOW if prefill else 1)
                elif ids.shape[1] + left > config.context_length:
                    _log.warning("a prompt is left out: it and %d tokens exceed the context of %d", left, config.context_length)
                elif ids.shape[1]:
                    running.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=left,
                        do_sample=False,
                        pad_token_id=tokenizer.eos_token_id,
                    )
            advance(recorder.num_tokens - before)
    lengths = sorted({layout.length for stack in prepared.stacks for layout in prepared.store.manifest.layouts_of(stack.layer)})
    facts = {
        "model": "embedded" if model is None else str(model),
        "expert_bytes": lengths[0] if len(lengths) == 1 else lengths,
        "slots": plan.num_slots,
        "policy": config.policy_name,
        "predictor": config.predictor_name,
    }
    try:
        return recorder.trace(**facts)
    except ValueError as error:
        raise ConfigError(f"{error}; give longer prompts or more --max-new-tokens") from error


def fit_gates(
    model: Any,
    texts: Sequence[str],
    config: OffloadConfig,
    *,
    max_tokens: int,
    forecast: bool = False,
    test_texts: Sequence[str] = (),
    test_tokens: int = 0,
) -> dict[str, Any]:
    """Fit gates for up to ``config.look_ahead`` layers, and with ``forecast`` the whole-token forecast, on nine tenths of the
    windows of ``texts``, write them into the store, and return their recall on the others.

    Where the layer's own router predicts the others better than the fitted gate, it takes the gate's place: both are one matrix.
    ``test_texts``: recall is measured on the first ``test_tokens`` of these instead. Raises ConfigError for too little text.
    """
    if config.on_gpu:
        raise ConfigError("routing is recorded on the CPU; omit vram and device")
    prepared = prepare(store_for(model, config.precision, config.dense_precision))
    tokenizer = load_tokenizer(prepared.store.path)
    rows = num_rows(prepared.model)
    windows = _windows(tokenizer, texts, rows, max_tokens)
    if len(windows) < 10:
        raise ConfigError(
            f"{WINDOW * len(windows)} tokens of text are too few to fit gates; give at least {10 * WINDOW} (--text, --max-tokens)"
        )
    test_windows = _windows(tokenizer, test_texts, rows, test_tokens)
    if test_texts and not test_windows:
        raise ConfigError(f"the text to test on has fewer than {WINDOW} tokens; give a longer one (--test, --test-tokens)")
    running = build(prepared, prepared.plan(config), config)
    sizes = [stack.num_experts for stack in prepared.stacks]
    with closing(running.fate):
        weights = linear_routers(running, prepared.stacks)
        hidden = running.config.get_text_config().hidden_size
        fitter = GateFitter(sizes, hidden, config.look_ahead, forecast=forecast, routers=weights)
        _show(running, fitter, [window for number, window in enumerate(windows) if number % 10 != 9], "recording")
        with count_bar("solving", len(sizes) * (1 + forecast)) as advance:
            gates, whole = fitter.gates(advance), fitter.forecast(advance)
        routers = None if weights is None else LinearRouters(weights, norms_of(running, prepared.stacks))
        meter = RecallMeter(gates, routers, whole)
        _show(running, meter, windows[9::10], "choosing")
        better = [meter.better(ahead) for ahead in range(1, len(gates) + 1)]
        if test_windows:
            meter = RecallMeter(gates, routers, whole)
            _show(running, meter, test_windows, "testing")
    chosen = [
        [routers.matrix(layer, ahead) if routers and layer >= ahead and layer not in layers else g for layer, g in enumerate(row)]
        for ahead, (row, layers) in enumerate(zip(gates, better, strict=True), start=1)
    ]
    path = save_gates(prepared.store.path, *chosen, forecast=whole)
    counts = {"fitted_tokens": WINDOW * (len(windows) - len(windows) // 10), "tested_tokens": meter.num_tokens}
    return {"gates": str(path), **counts, **meter.table(), "fitted_layers": better}


def _windows(tokenizer: Any, texts: Sequence[str], rows: int, max_tokens: int) -> list[torch.Tensor]:
    """The first ``max_tokens`` of ``texts``, one after another, in whole windows [WINDOW]."""
    ids: list[int] = []
    for text in texts:
        if len(ids) < max_tokens:
            ids += first_tokens(tokenizer, text, rows, max_tokens - len(ids))
    whole = len(ids) // WINDOW
    return list(torch.tensor(ids[: WINDOW * whole], dtype=torch.int64).view(whole, WINDOW))


def _show(model: Any, observer: Passes, windows: Sequence[torch.Tensor], what: str) -> None:
    """Run ``model`` on ``windows``, each from an empty context, for ``observer`` to see."""
    bar = count_bar(what, WINDOW * len(windows))
    with torch.inference_mode(), model.fate.runtime.observe(observer), bar as advance:
        for window in windows:
            model.base_model(window[None], use_cache=False)
            advance(len(window))


def _padded(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """[L, E, D], layers of fewer experts padded with zeros."""
    width = max(len(weight) for weight in weights)
    return torch.stack([torch.nn.functional.pad(weight.float(), (0, 0, 0, width - len(weight))) for weight in weights])


def _follow(model: Any, ids: torch.Tensor, window: int) -> None:
    """Run ``ids`` [1, num_tokens] through the model, ``window`` at a time."""
    past = None
    for part in torch.split(ids, window, dim=1):
        past = model(part, past_key_values=past, use_cache=True).past_key_values
