"""Measure a reference model's routing and print its page: tables, expert maps, continuations. CPU, a few minutes.

    python recipes/measure_reference.py --model MODEL --text TEXT --page docs/notebook/reference-model.md

MODEL is a model folder with its `training.json`, as `train_reference.py` writes them; TEXT holds `heldout-*.txt`.
matplotlib draws the maps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from reference_text import heldout_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from fate_moe.trace.routing import WINDOW, by_layer, join, record, summary

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


# ---- the page --------------------------------------------------------------------------------------------------------


def draw_maps(loads: dict[str, list[list[int]]], file: Path) -> None:
    """One heat map per domain of tokens per [layer, expert], relative to an even load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(loads), 1, figsize=(10, 2.6 * len(loads)), sharex=True, layout="constrained")
    for axis, (domain, load) in zip(axes, loads.items(), strict=True):
        counts = torch.tensor(load, dtype=torch.float32)
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
    draw_maps(training["load"], picture)

    losses = ["| domain | nats per token, all held-out text | here, fp32 |", "| --- | --- | --- |"]
    losses += [f"| {d.removeprefix('heldout-')} | {training['heldout_loss'][d]:.3f} | {t.loss:.3f} |" for d, t in traces.items()]
    config = model.config
    page = [
        "# The reference model",
        "",
        "Made by `python recipes/measure_reference.py --model MODEL --text TEXT --page docs/notebook/reference-model.md`,",
        "where MODEL is the model's folder, with the `training.json` of its training, and TEXT holds `heldout-*.txt`.",
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
        "The second column is the loss on the tokens whose routing is measured here, not on all tokens.",
        "",
        "## Routing, next to the real Qwen1.5-MoE",
        "",
        *summary(whole),
        "",
        "Predicted: layer l + 1's router, applied to layer l's router input, one layer early. Hits: every layer has slots for that",
        "fraction of its experts, tokens come one at a time, nothing is prefetched; Belady knows the future.",
        "",
        "## By layer",
        "",
        *by_layer(whole),
        "",
        "## Expert maps",
        "",
        "How often each expert is chosen on all held-out text, by domain, relative to an even load.",
        "",
        f"![expert maps by domain]({picture.parent.name}/{picture.name})",
        "",
        "## Continuations",
        "",
        "Prompt, then `[...]`, then 80 sampled tokens with the model's generation settings and seed 0; not selected.",
        *continuations(model, AutoTokenizer.from_pretrained(args.model)),
        "",
    ]
    args.page.write_text("\n".join(page))


if __name__ == "__main__":
    main()
