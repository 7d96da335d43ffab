"""Measure a reference model's routing and print its page: tables, expert maps, continuations. CPU, a few minutes.

    python recipes/measure_reference.py --model MODEL --text TEXT --page docs/reference-model.md

MODEL is a model folder with its `training.json`, as `train_reference.py` writes them; TEXT holds `heldout-*.txt`.
matplotlib draws the maps. Shapes below: N tokens, L layers, E experts, k chosen, D hidden.
"""

import argparse
import heapq
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference_text import heldout_tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

WINDOW = 512
WIDTHS = (4, 6, 8, 12)
RESIDENT = (0.27, 0.50)
# The literature's figures for the real Qwen1.5-MoE-A2.7B: 24 layers, 60 experts, top-4.
KNOWN_OVERLAP, KNOWN_POPULAR = 17.7, 13.9
KNOWN_RECALL = (77, 88, 92, 96)  # by WIDTHS
KNOWN_HITS = {"LRU": (40.4, 66.2), "Belady": (71.0, 87.7)}  # by RESIDENT
PROMPTS = (
    "It was a cold night in November, and the old man",
    '"I do not believe a word of it," said the captain,',
    "CHAPTER I\n\nThe village of",
    "My dear sister,\n\nI received your letter",
    "The French Revolution was",
    "Mathematics\n\nIn mathematics, a group is",
    "The city of Boston",
    "def read_lines(path):\n",
    "import unittest\n\nclass Test",
    "class Stack:\n    def __init__(self):\n",
)


@dataclass(frozen=True)
class Trace:
    """What the routers saw and chose. `starts` marks the first token of each window, where nothing precedes."""

    inputs: Tensor  # [L, N, D]
    chosen: Tensor  # [L, N, k]
    routers: Tensor  # [L, E, D]
    starts: Tensor  # [N] bool
    loss: float  # nats per token


def record(model: Any, tokens: Tensor) -> Trace:
    """Run windows of WINDOW tokens, each from an empty context."""
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
    inputs = torch.stack([torch.cat(kept) for kept in seen]).float()
    routers = torch.stack([block.gate.weight.detach() for block in blocks]).float()
    chosen = (inputs @ routers.mT).topk(model.config.num_experts_per_tok).indices
    starts = torch.arange(windows * WINDOW) % WINDOW == 0
    return Trace(inputs, chosen, routers, starts, loss)


def join(traces: list[Trace]) -> Trace:
    return Trace(
        torch.cat([t.inputs for t in traces], dim=1),
        torch.cat([t.chosen for t in traces], dim=1),
        traces[0].routers,
        torch.cat([t.starts for t in traces]),
        sum(t.loss for t in traces) / len(traces),
    )


# ---- what the tables hold, each per layer ----------------------------------------------------------------------------


def neighbour_cosine(trace: Trace) -> list[float]:
    """Between the router inputs of layers l and l + 1, by l."""
    return torch.cosine_similarity(trace.inputs[:-1], trace.inputs[1:], dim=-1).mean(1).tolist()


def next_layer_recall(trace: Trace, width: int) -> list[float]:
    """The share of layer l + 1's chosen experts among the `width` that its router ranks first on layer l's input."""
    guessed = (trace.inputs[:-1] @ trace.routers[1:].mT).topk(width).indices  # [L-1, N, width]
    return shared(guessed, trace.chosen[1:]).mean(1).tolist()


def previous_overlap(trace: Trace) -> list[float]:
    follows = ~trace.starts[1:]
    return shared(trace.chosen[:, :-1], trace.chosen[:, 1:])[:, follows].mean(1).tolist()


def shared(guessed: Tensor, chosen: Tensor) -> Tensor:
    """[..., g], [..., k] -> the share of the k that are among the g, [...]."""
    return (chosen[..., :, None] == guessed[..., None, :]).any(-1).float().mean(-1)


def load(trace: Trace) -> Tensor:
    """Times each expert was chosen, [L, E]."""
    return torch.stack([layer.flatten().bincount(minlength=trace.routers.shape[1]) for layer in trace.chosen])


def popular_share(trace: Trace) -> list[float]:
    """The share of all choices that fall on the tenth of the experts chosen most."""
    counts = load(trace).sort(dim=1, descending=True).values.float()
    return (counts[:, : counts.shape[1] // 10].sum(1) / counts.sum(1)).tolist()


def lru_hits(accesses: list[int], slots: int) -> float:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in accesses:
        if expert in held:
            hits += 1
            held.move_to_end(expert)
        else:
            if len(held) == slots:
                held.popitem(last=False)
            held[expert] = None
    return hits / len(accesses)


def belady_hits(accesses: list[int], slots: int) -> float:
    """Evict what is needed furthest in the future: the best any policy without prefetch could do."""
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
    """Every layer has slots for its share of `resident`; tokens come one by one, as in decode."""
    slots = round(resident * trace.routers.shape[1])
    return [policy(layer.flatten().tolist(), slots) for layer in trace.chosen]


# ---- the page --------------------------------------------------------------------------------------------------------


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
        rows.append(f"| next layer's experts foretold, top-{width}, % | {percent(next_layer_recall(trace, width))} | {known} |")
    for name, policy in (("LRU", lru_hits), ("Belady", belady_hits)):
        for resident, share in zip(RESIDENT, KNOWN_HITS[name], strict=True):
            hits = percent(cache_hits(trace, policy, resident))
            rows.append(f"| {name} hits, {resident:.0%} resident, % | {hits} | {share} |")
    return ["| mean over layers | here | Qwen1.5-MoE-A2.7B |", "| --- | --- | --- |", *rows]


def by_layer(trace: Trace) -> list[str]:
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


def draw_maps(traces: dict[str, Trace], file: Path) -> None:
    """One heat map per domain: how often each expert is chosen, relative to an even load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(traces), 1, figsize=(10, 2.6 * len(traces)), sharex=True, layout="constrained")
    for axis, (domain, trace) in zip(axes, traces.items(), strict=True):
        counts = load(trace).float()
        image = axis.imshow(counts / counts.mean(1, keepdim=True), aspect="auto", cmap="magma", vmin=0, vmax=4)
        axis.set(title=domain.removeprefix("heldout-"), ylabel="layer")
    axes[-1].set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="times the even load", shrink=0.6)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


def continuations(model: Any, tokenizer: Any) -> list[str]:
    """Each prompt after `<|endoftext|>`, sampled as generation_config.json says, seed 0."""
    lines: list[str] = []
    for prompt in PROMPTS:
        set_seed(0)
        ids = torch.tensor([[0, *tokenizer.encode(prompt)]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, pad_token_id=0)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        lines += ["", "````text", f"{prompt}[...]{text}".replace("````", "'''"), "````"]
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model folder with its training.json")
    parser.add_argument("--text", type=Path, required=True, help="folder of heldout-*.txt")
    parser.add_argument("--page", type=Path, required=True, help="the page to write; its picture goes beside it")
    parser.add_argument("--tokens", type=int, default=6144, help="tokens of each domain to route")
    args = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts = heldout_tokens(args.text, args.model / "tokenizer.json")
    traces = {domain: record(model, tokens[: args.tokens + 1]) for domain, tokens in texts.items()}
    whole = join(list(traces.values()))
    training = json.loads((args.model / "training.json").read_text())
    picture = args.page.with_suffix("") / "expert-maps.png"
    draw_maps(traces, picture)

    losses = ["| domain | nats per token, all held-out text | here, fp32 |", "| --- | --- | --- |"]
    losses += [f"| {d.removeprefix('heldout-')} | {training['heldout_loss'][d]:.3f} | {t.loss:.3f} |" for d, t in traces.items()]
    config = model.config
    page = [
        "# The reference model",
        "",
        "Made by `python recipes/measure_reference.py --model MODEL --text TEXT --page docs/reference-model.md`, where MODEL is",
        "the model's folder, with the `training.json` of its training, and TEXT holds `heldout-*.txt`.",
        "",
        f"{config.num_hidden_layers} layers x {config.num_experts} experts, top-{config.num_experts_per_tok}, "
        f"a gated shared expert; hidden {config.hidden_size}, expert width {config.moe_intermediate_size}, shared width "
        f"{config.shared_expert_intermediate_size}; {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters.",
        f"Trained on {training['tokens_seen'] / 1e6:.0f} M tokens in {training['seconds']:.0f} s, {training['steps']} steps. "
        f"Routing below: {len(whole.starts)} held-out tokens, a third of each domain, in windows of {WINDOW}.",
        "",
        "## Held-out loss",
        "",
        *losses,
        "",
        "The second figure is the loss on the tokens whose routing is measured here, not on all of them.",
        "",
        "## Routing, next to the real Qwen1.5-MoE",
        "",
        *summary(whole),
        "",
        "Foretold: layer l + 1's router, applied to layer l's router input, one layer early. Hits: every layer has slots for that",
        "share of its experts, tokens come one at a time, nothing is prefetched; Belady knows the future.",
        "",
        "## By layer",
        "",
        *by_layer(whole),
        "",
        "## Expert maps",
        "",
        "How often each expert is chosen, by domain, relative to an even load.",
        "",
        f"![expert maps by domain]({picture.parent.name}/{picture.name})",
        "",
        "## Continuations",
        "",
        "Prompt, then `[...]`, then 80 sampled tokens with the model's own generation settings and seed 0. None was chosen.",
        *continuations(model, AutoTokenizer.from_pretrained(args.model)),
        "",
    ]
    args.page.write_text("\n".join(page))


if __name__ == "__main__":
    main()
