"""Log probabilities: of a chosen token, and of a prompt's own tokens."""

from __future__ import annotations

from typing import Any

import torch

from fate_moe.schedule.request import TokenRecord

__all__ = ["prompt_records", "record_of"]

# Rows of logits held at once: 128 x 150,000 fp32 numbers are 77 MB, which a budget can spare where a whole prompt's would not fit.
_ROWS = 128


def record_of(logits: torch.Tensor, token: int, top: int) -> TokenRecord:
    """``token`` among ``logits`` [vocab] fp32, with the ``top`` likeliest."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(top, len(logprobs))) if top else (torch.empty(0), torch.empty(0))
    return TokenRecord(token, float(logprobs[token]), tuple(zip(map(int, ids.tolist()), values.tolist(), strict=True)))


def prompt_records(model: Any, inputs: torch.Tensor, top: int) -> tuple[TokenRecord, ...]:
    """A record for each of ``inputs`` [1, tokens]; the first has no log probability, for nothing is before it."""
    tokens = inputs[0].tolist()
    records = [TokenRecord(tokens[0])]
    if len(tokens) > 1:
        head, hidden, kept = model.get_output_embeddings(), list[torch.Tensor](), len(tokens) - 1

        def keep(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden.append(args[0])
            return (args[0][:, -1:], *args[1:])

        handle = head.register_forward_pre_hook(keep, prepend=True)
        try:
            last = model(inputs[:, :-1], use_cache=False, logits_to_keep=kept).logits[0, -1].float()
        finally:
            handle.remove()
        rows = hidden[0][0, -kept:]
        shared = torch.equal(last, head(rows[None, -1:])[0, -1].float())
        for start in range(0, kept, _ROWS):
            if shared:
                logits = head(rows[None, start : start + _ROWS])[0].float()
            else:  # a family that scales its logits after the head: only its own forward knows how
                end = min(start + _ROWS, kept)
                logits = model(inputs[:, :end], use_cache=False, logits_to_keep=end - start).logits[0].float()
            for row, token in zip(logits, tokens[start + 1 : start + 1 + _ROWS], strict=False):
                records.append(record_of(row, token, top))
    return tuple(records)
