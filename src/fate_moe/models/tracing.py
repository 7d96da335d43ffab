"""Runs a model to see how it routes: traces of decode, and fitted gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fate_moe.config import OffloadConfig
from fate_moe.errors import ConfigError
from fate_moe.models.families import ROUTER_NAMES
from fate_moe.models.load import load_tokenizer, prepare, realize, store_for
from fate_moe.store.learned import save_gates
from fate_moe.store.progress import progress_bar
from fate_moe.trace.fit import GateFitter, recall
from fate_moe.trace.record import Recorder
from fate_moe.trace.schema import RoutingTrace

__all__ = ["fit_gates", "record_routing"]

WINDOW = 256  # tokens of one pass when fitting


def record_routing(
    model: Any,
    texts: Sequence[str],
    config: OffloadConfig,
    *,
    new_tokens: int,
    max_tokens: int,
    teacher: bool = False,
    gate_inputs: bool = False,
) -> RoutingTrace:
    """Continue each of ``texts`` greedily by ``new_tokens``, or with ``teacher`` follow it token by token; ``max_tokens`` in all.

    ``gate_inputs`` records what linear routers saw, and their weights. Raises ConfigError if no token was decoded.
    """
    if config.on_gpu:
        raise ConfigError("routing is recorded on the CPU; leave vram and device away")
    prepared = prepare(store_for(model, config.precision, config.dense_precision))
    tokenizer = load_tokenizer(prepared.store.path)
    plan = prepared.plan(config)
    running = realize(prepared, plan, config)
    routers = _router_weights(running, prepared.stacks) if gate_inputs else None
    recorder = Recorder([stack.num_experts for stack in prepared.stacks], gate_inputs=gate_inputs, routers=routers)
    running.fate.runtime.observer = recorder
    with progress_bar("tracing", max_tokens, None) as advance, torch.inference_mode():
        for text in texts:
            left = min(max_tokens - recorder.num_tokens, new_tokens)
            if left < 2:
                break
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            before = recorder.num_tokens
            if teacher:
                _follow(running, ids[:, : min(left, config.context_length)])
            elif ids.shape[1] and ids.shape[1] + left <= config.context_length:
                running.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=left,
                    do_sample=False,
                    pad_token_id=tokenizer.eos_token_id,
                )
            advance(recorder.num_tokens - before)
    facts = {
        "model": "embedded" if model is None else str(model),
        "expert_bytes": plan.slot_bytes,
        "slots": plan.num_slots,
        "policy": config.policy_name,
        "predictor": config.predictor_name,
    }
    try:
        trace = recorder.trace(**facts)
    except ValueError as error:
        raise ConfigError(f"{error}; give longer prompts or more --max-new-tokens") from error
    running.fate.close()
    return trace


def fit_gates(model: Any, texts: Sequence[str], config: OffloadConfig, *, max_tokens: int) -> dict[str, Any]:
    """Fit one gate a layer on nine tenths of ``texts``' windows, write them into the store, and say their recall on the others.

    Where the layer's own router foretells better than what was fitted, it is kept as it is: both are one matrix.
    Raises ConfigError for too little text.
    """
    if config.on_gpu:
        raise ConfigError("routing is recorded on the CPU; leave vram and device away")
    prepared = prepare(store_for(model, config.precision, config.dense_precision))
    tokenizer = load_tokenizer(prepared.store.path)
    running = realize(prepared, prepared.plan(config), config)
    ids = torch.cat([tokenizer(text, return_tensors="pt")["input_ids"][0] for text in _enough(texts, max_tokens)])[:max_tokens]
    windows = list(torch.split(ids, WINDOW))[: max(0, len(ids) // WINDOW)]
    if len(windows) < 10:
        raise ConfigError(f"{len(ids)} tokens of text are too few to fit gates; give at least {10 * WINDOW}")
    hidden = running.config.get_text_config().hidden_size
    fitter = GateFitter([stack.num_experts for stack in prepared.stacks], hidden)
    running.fate.runtime.observer = fitter
    with progress_bar("fitting", len(windows), None) as advance, torch.inference_mode():
        for number, window in enumerate(windows):
            fitter.testing = number % 10 == 9
            running(window[None], use_cache=False)
            advance(1)
    gates = fitter.gates()
    routers = _router_weights(running, prepared.stacks)
    top_k = fitter.chosen[0][0].shape[1]
    widths = (top_k, top_k + 2, 2 * top_k)
    plain: dict[int, list[float]] = {width: [] for width in widths}
    fitted: dict[int, list[float]] = {width: [] for width in widths}
    kept = []
    for layer, gate in enumerate(gates):
        x, chosen = torch.nn.functional.pad(torch.cat(fitter.inputs[layer]), (0, 1), value=1.0), torch.cat(fitter.chosen[layer])
        for width in widths:
            fitted[width].append(recall(x @ gate.mT, chosen, width))
        if layer and routers is not None:
            router = torch.nn.functional.pad(routers[layer, : gate.shape[0]].float(), (0, 1))
            for width in widths:
                plain[width].append(recall(x @ router.mT, chosen, width))
            if plain[top_k + 2][-1] > fitted[top_k + 2][-1]:
                gates[layer] = router
                continue
        kept.append(layer)
    path = save_gates(prepared.store.path, gates)
    running.fate.close()
    mean = {width: (_mean(plain[width]), _mean(values[1:])) for width, values in fitted.items()}
    return {
        "gates": str(path),
        "fitted_tokens": WINDOW * (len(windows) - len(windows) // 10),
        "tested_tokens": WINDOW * (len(windows) // 10),
        "fitted_layers": kept,
        "recall": mean,
        "layer_0_recall": {width: values[0] for width, values in fitted.items()},
        "by_layer": {width: {"plain": [None, *plain[width]], "fitted": values} for width, values in fitted.items()},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _enough(texts: Sequence[str], max_tokens: int) -> list[str]:
    """As many of ``texts`` as may be needed: a token has at least a character."""
    taken, length = [], 0
    for text in texts:
        if length > 8 * max_tokens:
            break
        taken.append(text[: 8 * max_tokens])
        length += len(taken[-1])
    return taken


def _follow(model: Any, ids: torch.Tensor) -> None:
    """Decode ``ids`` [1, num_tokens] one by one, whatever the model would have written."""
    past = None
    for position in range(ids.shape[1]):
        past = model(ids[:, position : position + 1], past_key_values=past, use_cache=True).past_key_values


def _router_weights(model: Any, stacks: Sequence[Any]) -> torch.Tensor | None:
    """[L, E, D], layers of fewer experts padded with zeros; None where a router is not one matrix."""
    width = max(stack.num_experts for stack in stacks)
    weights = []
    for stack in stacks:
        children = dict(model.get_submodule(stack.block).named_children())
        router = next((children[name] for name in ROUTER_NAMES if name in children), None)
        weight = getattr(router, "weight", None)
        if weight is None or weight.ndim != 2 or weight.shape[0] != stack.num_experts:
            return None
        weights.append(torch.nn.functional.pad(weight.detach().float(), (0, 0, 0, width - stack.num_experts)))
    return torch.stack(weights)
