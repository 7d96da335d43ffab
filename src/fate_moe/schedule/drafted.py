"""``generate()`` with drafted tokens, through transformers' seam for loops of one's own (``custom_generate``)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from fate_moe.adapter.kv_cache import RoomyLayer
from fate_moe.schedule.speculation import Draftable, Drafter, Speculation

__all__ = ["drafted"]


def drafted(speculation: Speculation) -> Callable[..., Any]:
    """What ``model.generate(custom_generate=...)`` takes: greedy and sampled texts with drafts, one sequence at a time.

    The text is that of ``generate()`` without it, with the same random numbers. What it cannot draft for goes through
    transformers' own loop: batches, recorded outputs, given caches, models that do not run whole in the extension with quantized
    weights. A streamer has to be given as ``loop_streamer`` too: transformers keeps ``streamer`` from loops of one's own.
    """

    def generate(model: Any, input_ids: torch.Tensor, loop_streamer: Any = None, **options: Any) -> Any:
        if loop_streamer is not None:
            options["streamer"] = loop_streamer
        if speculation.mode == "off" or not _takes_drafts(model, input_ids, options):
            return model._sample(input_ids, **options)
        return _loop(model, input_ids, speculation, **options)

    return generate


def _takes_drafts(model: Any, input_ids: torch.Tensor, options: dict[str, Any]) -> bool:
    config = options["generation_config"]
    cache: Any = options.get("past_key_values")
    step = getattr(model.fate, "step", None)
    mask = options.get("attention_mask")
    return (
        step is not None
        and step.most_rows == sys.maxsize
        and step.is_unchanged()
        and input_ids.shape[0] == 1
        and input_ids.shape[1] > 0
        and type(cache) is DynamicCache
        and cache.get_seq_length() == 0
        and not config.return_dict_in_generate
        and config.use_cache is not False
        and config.prefill_chunk_size is None
        and (mask is None or bool(mask.all()))
        and options.get("inputs_embeds") is None
    )


def _loop(
    model: Any,
    input_ids: torch.Tensor,
    speculation: Speculation,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    past_key_values: DynamicCache,
    streamer: Any = None,
    **others: Any,
) -> torch.Tensor:
    """As transformers' ``_sample``, with drafted tokens behind the last one. Ids int64 [1, tokens]."""
    text, draft, drafter = input_ids[0].tolist(), list[int](), Drafter(speculation)
    rows, most = input_ids, len(text) + generation_config.max_new_tokens if generation_config.max_new_tokens else None
    while True:
        model.fate.step.has_drafts([(rows.shape[1], len(draft))])
        logits = model(rows, past_key_values=past_key_values, use_cache=True, logits_to_keep=1 + len(draft)).logits[0]
        place, is_over = 0, False
        while True:
            scores = logits_processor(input_ids, logits[place : place + 1].to(copy=True, dtype=torch.float32))
            likely = scores.softmax(-1) if generation_config.do_sample else scores
            chosen = torch.multinomial(likely, 1)[:, 0] if generation_config.do_sample else likely.argmax(-1)
            input_ids = torch.cat([input_ids, chosen[:, None]], dim=-1)
            text.append(int(chosen.item()))
            is_over = bool(stopping_criteria(input_ids, None).all())
            if streamer is not None:
                streamer.put(chosen.cpu())
            if is_over or place == len(draft) or text[-1] != draft[place]:
                break
            place += 1
        if place < len(draft):
            for layer in past_key_values.layers:
                layer.take_back(len(draft) - place)
        if draft:
            model.fate.learn([place])
        speculation.passed([place])
        if is_over:
            break
        can_take_back = all(isinstance(layer, RoomyLayer) for layer in past_key_values.layers)
        room = (speculation.most if most is None else most - len(text) - 1) if can_take_back else 0
        draft = speculation.draft([Draftable(drafter, text, max(0, room))])[0]
        rows = torch.tensor([[text[-1], *draft]], device=input_ids.device)
    if streamer is not None:
        streamer.end()
    return input_ids
