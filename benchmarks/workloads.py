"""The workloads of every engine: real prompts, cut to exact lengths, as token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["WORKLOADS", "Workload", "context_tokens", "samples"]

_PROMPTS = Path(__file__).with_name("prompts.json")


@dataclass(frozen=True)
class Workload:
    """``kind`` as in a worker's job; the first of ``num_samples`` warms up. Lengths are in tokens."""

    name: str
    kind: str
    prompt_tokens: int
    new_tokens: int
    batch: int = 1
    num_samples: int = 4


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("decode", "decode", 64, 128),
        Workload("decode-batch-4", "decode", 64, 64, batch=4, num_samples=3),
        Workload("prefill-128", "prefill", 128, 1),
        Workload("prefill-256", "prefill", 256, 1),
        Workload("prefill-512", "prefill", 512, 1),
        Workload("prefill-2048", "prefill", 2048, 1, num_samples=3),
        Workload("chat", "chat", 32, 64, num_samples=4),
    )
}


def context_tokens(workload: Workload, prompts: list[list[list[int]]]) -> int:
    """Tokens of KV cache that each prompt of a batch needs. Given to every engine, since the cache takes memory."""
    turns = len(prompts) if workload.kind == "chat" else 1
    return turns * (workload.prompt_tokens + workload.new_tokens) + 8


def samples(workload: Workload, tokenizer: Any, vocab_size: int) -> list[list[list[int]]]:
    """[sample][prompt of the batch][token id]; every prompt is ``prompt_tokens`` long; shorter texts are repeated.

    Ids stay below ``vocab_size``: a model of random weights may be measured with another model's tokenizer.
    """
    texts = json.loads(_PROMPTS.read_text("utf-8"))
    size = workload.prompt_tokens
    count = workload.num_samples * workload.batch
    if workload.kind == "prefill":
        ids = tokenizer(texts["prefill"])["input_ids"]
        starts = [index * size for index in range(count)]  # different text each time, so that no engine has it cached
    else:
        ids, starts = [], []
        for index in range(count):
            starts.append(len(ids))
            prompt = tokenizer(texts[workload.kind][index % len(texts[workload.kind])])["input_ids"]
            ids += (prompt * (size // len(prompt) + 1))[:size]
    cut = [[ids[(start + k) % len(ids)] % vocab_size for k in range(size)] for start in starts]
    return [cut[index : index + workload.batch] for index in range(0, count, workload.batch)]
