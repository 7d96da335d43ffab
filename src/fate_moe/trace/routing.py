"""Router inputs and choices of a model, and the figures by which its routing is compared with the literature's.

Shapes below: N tokens, L layers, E experts, k chosen, D hidden.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WINDOW = 512
WIDTHS = (4, 6, 8, 12)
RESIDENT = (0.27, 0.50)
# The literature's figures for the real Qwen1.5-MoE-A2.7B: 24 layers, 60 experts, top-4.
KNOWN_OVERLAP, KNOWN_POPULAR = 17.7, 13.9
KNOWN_RECALL = (77, 88, 92, 96)  # by WIDTHS
KNOWN_HITS = {"LRU": (40.4, 66.2), "Belady": (71.0, 87.7)}  # by RESIDENT


@dataclass(frozen=True)
class Trace:
    """Router inputs and choices. `starts` marks the first token of each window, which has no context."""

    inputs: Tensor  # [L, N, D]
    chosen: Tensor  # [L, N, k]
    routers: Tensor  # [L, E, D]
    starts: Tensor  # [N] bool
    loss: float  # nats per token


def record(model: Any, tokens: Tensor) -> Trace:
    """Run a Mixture-of-Experts model, whose routers are linear, on windows of WINDOW tokens, each from an empty context."""
    routers = torch.stack([layer.mlp.gate.weight.detach() for layer in model.model.layers]).float()
    inputs, starts, loss = router_inputs(model, tokens)
    chosen = (inputs @ routers.mT).topk(model.config.num_experts_per_tok).indices
    return Trace(inputs, chosen, routers, starts, loss)


def router_inputs(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor, float]:
    """The input of every layer's `mlp`, [L, N, D], which tokens start a window, [N], and the loss; the same windows as `record`."""
    blocks = [layer.mlp for layer in model.model.layers]
    seen: list[list[Tensor]] = [[] for _ in blocks]
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, 1)))
        for block, kept in zip(blocks, seen, strict=True)
    ]
    windows = (len(tokens) - 1) // WINDOW
    x = tokens[: windows * WINDOW].view(windows, WINDOW).long()
    y = tokens[1 : windows * WINDOW + 1].view(windows, WINDOW).long()
    loss = 0.0
    with torch.no_grad():
        for inputs, targets in zip(x, y, strict=True):
            logits = model(inputs[None], use_cache=False).logits[0]
            loss += torch.nn.functional.cross_entropy(logits.float(), targets).item() / windows
    for hook in hooks:
        hook.remove()
    starts = torch.arange(windows * WINDOW) % WINDOW == 0
    return torch.stack([torch.cat(kept) for kept in seen]).float(), starts, loss


def join(traces: list[Trace]) -> Trace:
    """One trace of all tokens of `traces`, which are of one model; the loss is the mean of theirs."""
    return Trace(
        torch.cat([t.inputs for t in traces], dim=1),
        torch.cat([t.chosen for t in traces], dim=1),
        traces[0].routers,
        torch.cat([t.starts for t in traces]),
        sum(t.loss for t in traces) / len(traces),
    )


# ---- the columns of the tables, each by layer ----------------------------------------------------------------------------


def neighbour_cosine(trace: Trace) -> list[float]:
    """Between the router inputs of layers l and l + 1, by l."""
    return torch.cosine_similarity(trace.inputs[:-1], trace.inputs[1:], dim=-1).mean(1).tolist()


def next_layer_recall(trace: Trace, width: int) -> list[float]:
    """The fraction of layer l + 1's chosen experts that are among the `width` its router ranks first on layer l's input."""
    guessed = (trace.inputs[:-1] @ trace.routers[1:].mT).topk(width).indices  # [L-1, N, width]
    return shared(guessed, trace.chosen[1:]).mean(1).tolist()


def previous_overlap(trace: Trace) -> list[float]:
    """The fraction of a token's experts that the previous token of its window chose too."""
    follows = ~trace.starts[1:]
    return shared(trace.chosen[:, :-1], trace.chosen[:, 1:])[:, follows].mean(1).tolist()


def shared(guessed: Tensor, chosen: Tensor) -> Tensor:
    """[..., g], [..., k] -> the fraction of the k that are among the g, [...]."""
    return (chosen[..., :, None] == guessed[..., None, :]).any(-1).float().mean(-1)


def load(trace: Trace) -> Tensor:
    """Times each expert was chosen, [L, E]."""
    return torch.stack([layer.flatten().bincount(minlength=trace.routers.shape[1]) for layer in trace.chosen])


def popular_share(trace: Trace) -> list[float]:
    """The fraction of all choices that are of the tenth of the experts chosen most."""
    counts = load(trace).sort(dim=1, descending=True).values.float()
    return (counts[:, : counts.shape[1] // 10].sum(1) / counts.sum(1)).tolist()


def lru_hits(accesses: list[int], slots: int) -> float:
    """The hit rate of `slots` slots under least recently used."""
    resident: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in accesses:
        if expert in resident:
            hits += 1
            resident.move_to_end(expert)
        else:
            if len(resident) == slots:
                resident.popitem(last=False)
            resident[expert] = None
    return hits / len(accesses)


def belady_hits(accesses: list[int], slots: int) -> float:
    """The hit rate if the expert that is needed furthest in the future is evicted: the bound for policies without prefetch."""
    next_use = [0] * len(accesses)
    upcoming: dict[int, int] = {}
    for at in range(len(accesses) - 1, -1, -1):
        next_use[at] = upcoming.get(accesses[at], len(accesses))
        upcoming[accesses[at]] = at
    needed: dict[int, int] = {}  # resident expert -> its next use
    furthest: list[tuple[int, int]] = []  # heap of (-next use, expert), stale entries skipped
    hits = 0
    for at, expert in enumerate(accesses):
        if expert in needed:
            hits += 1
        elif len(needed) == slots:
            while True:
                negative, victim = heapq.heappop(furthest)
                if needed.get(victim) == -negative:
                    del needed[victim]
                    break
        needed[expert] = next_use[at]
        heapq.heappush(furthest, (-next_use[at], expert))
    return hits / len(accesses)


def cache_hits(trace: Trace, policy: Any, resident: float) -> list[float]:
    """Hit rates if each layer has slots for the fraction `resident` of its experts and tokens come one by one, as in decode."""
    slots = round(resident * trace.routers.shape[1])
    return [policy(layer.flatten().tolist(), slots) for layer in trace.chosen]


# ---- tables ----------------------------------------------------------------------------------------------------------


def percent(values: list[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f}"


def summary(trace: Trace) -> list[str]:
    """The table against the literature; means over layers."""
    rows = [
        f"| cosine of neighbouring router inputs | {sum(c := neighbour_cosine(trace)) / len(c):.3f} | > 0.83 |",
        f"| previous token's experts chosen again, % | {percent(previous_overlap(trace))} | {KNOWN_OVERLAP} |",
        f"| share of the tenth of experts chosen most, % | {percent(popular_share(trace))} | {KNOWN_POPULAR} |",
    ]
    for width, known in zip(WIDTHS, KNOWN_RECALL, strict=True):
        rows.append(f"| next layer's experts predicted, top-{width}, % | {percent(next_layer_recall(trace, width))} | {known} |")
    for name, policy in (("LRU", lru_hits), ("Belady", belady_hits)):
        for resident, share in zip(RESIDENT, KNOWN_HITS[name], strict=True):
            hits = percent(cache_hits(trace, policy, resident))
            rows.append(f"| {name} hits, {resident:.0%} resident, % | {hits} | {share} |")
    return ["| mean over layers | here | Qwen1.5-MoE-A2.7B |", "| --- | --- | --- |", *rows]


def by_layer(trace: Trace) -> list[str]:
    """The same by layer, as lines of a table."""
    columns: dict[str, Sequence[float | None]] = {"cosine to the layer before": [None, *neighbour_cosine(trace)]}
    columns |= {f"recall at {w}, %": [None, *next_layer_recall(trace, w)] for w in WIDTHS}
    columns |= {"as previous token, %": previous_overlap(trace), "top tenth's share, %": popular_share(trace)}
    for resident in RESIDENT:
        columns[f"LRU {resident:.0%}, %"] = cache_hits(trace, lru_hits, resident)
        columns[f"Belady {resident:.0%}, %"] = cache_hits(trace, belady_hits, resident)
    lines = ["| layer | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for layer in range(len(trace.routers)):
        cells = [
            "" if (value := values[layer]) is None else f"{value:.3f}" if "cosine" in name else f"{100 * value:.1f}"
            for name, values in columns.items()
        ]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return lines
