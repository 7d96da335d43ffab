"""Train the reference model: a real, small Qwen2-MoE language model, from text files to a Hugging Face folder.

    python recipes/train_reference.py --text TEXT --tokenizer MODEL --out OUT

TEXT holds `train-*.xz` and `heldout-*.txt`, documents separated by `<|endoftext|>`; MODEL is a folder with the
tokenizer files, which are copied. The defaults made the shipped model (12 x 60 experts) on one H100. `--tiny` runs the
same code on a CPU in seconds. A stopped run continues from OUT/state.pt when the command is repeated, so OUT must be on
persistent storage. A line printed before the first step says whether the run continues or starts anew.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference_model import ReferenceMoe, Shape, save_checkpoint
from reference_text import heldout_tokens, training_tokens
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """How long, how fast, in what order. Values for one H100 or H200 unless `--tiny`."""

    seconds: float = 640.0  # wall time of all calls together, which sets the schedule; found by trying, longer overfits
    steps: int = 0  # > 0: a fixed number of steps instead, which sets the schedule
    batch: int = 96
    sequence: int = 1024
    learning_rate: float = 4e-3
    warmup_steps: int = 200
    decay: float = 0.7  # the last part of training, over which the rate falls linearly to nothing
    weight_decay: float = 0.1
    balance: float = 0.01  # weight of each layer's load-balancing loss
    seed: int = 0


TINY_SHAPE = Shape(vocab=8192, hidden=64, layers=2, experts=8, expert_width=64, shared_width=64, heads=2, kv_heads=1)
TINY_RECIPE = Recipe(steps=60, batch=4, sequence=64, warmup_steps=10)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def orthogonalize(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix of each [rows, cols] in [N, rows, cols], by five Newton-Schulz steps (Muon).

    Coefficients from Keller Jordan's Muon: singular values end in 0.7..1.2, which is close enough to 1 for training.
    """
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for parameters that are stacks [..., rows, cols] of matrices.

    Updates are scaled by 0.2 sqrt(max(rows, cols)), the size of AdamW's updates, so that both use the same learning rate.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])  # Nesterov
                precision = torch.bfloat16 if p.is_cuda else torch.float32
                direction = orthogonalize(update.flatten(0, -3).to(precision)).view_as(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction.to(p.dtype), alpha=-0.2 * max(p.shape[-2:]) ** 0.5 * group["lr"])


def optimizers(model: ReferenceMoe, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for every projection; AdamW for embedding, routers, norms and biases, the last two without decay."""
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "table": [], "vector": []}
    for name, p in model.named_parameters():
        groups[model.kind(name)].append(p)
    tables = [
        {"params": groups["table"], "weight_decay": recipe.weight_decay},
        {"params": groups["vector"], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(tables, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=model.embed.is_cuda)
    return [Muon(groups["matrix"], recipe.learning_rate, recipe.weight_decay), adamw]


def rate_at(recipe: Recipe, step: int, progress: float) -> float:
    """Warm-up by steps, then constant, then linear to nothing over the last `decay` of the run; progress in 0..1."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * warmup * min(1.0, (1.0 - progress) / recipe.decay)


# ---- data order ------------------------------------------------------------------------------------------------------


def batches(tokens: Tensor, recipe: Recipe, first_step: int) -> Iterator[Tensor]:
    """Endless batches [batch, sequence + 1] of token ids, from `first_step` on; the same for the same seed.

    Every epoch cuts the text at another offset and visits every window once: no token occurs twice before all have
    occurred, and no two epochs have the same windows.
    """
    span = torch.arange(recipe.sequence + 1, device=tokens.device)
    per_epoch = (len(tokens) - recipe.sequence - 1) // recipe.sequence // recipe.batch
    epoch, skipped = divmod(first_step, per_epoch)
    while True:
        random = np.random.default_rng((recipe.seed, epoch))
        offset = random.integers(recipe.sequence)
        pieces = (len(tokens) - offset - 1) // recipe.sequence
        starts = torch.from_numpy(offset + recipe.sequence * random.permutation(pieces)).to(tokens.device)
        for index in range(skipped, per_epoch):
            chosen = starts[index * recipe.batch : (index + 1) * recipe.batch]
            yield tokens[chosen[:, None] + span].long()
        epoch, skipped = epoch + 1, 0


# ---- the loop --------------------------------------------------------------------------------------------------------


def evaluate(model: ReferenceMoe, heldout: dict[str, Tensor], window: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Nats per token and tokens per [layer, expert], per domain, over windows that do not overlap."""
    losses, loads = {}, {}
    for domain, tokens in heldout.items():
        count = (len(tokens) - 1) // window
        inputs = tokens[: count * window].view(count, window).long()
        targets = tokens[1 : count * window + 1].view(count, window).long()
        total, load = 0.0, torch.zeros(model.shape.layers, model.shape.experts, dtype=torch.long, device=tokens.device)
        with torch.no_grad():
            for x, y in zip(torch.split(inputs, 64), torch.split(targets, 64), strict=True):
                loss, _, chosen = model(x, y)
                total += loss.item() * x.numel()
                load += chosen
        losses[domain], loads[domain] = total / inputs.numel(), load.cpu()
    return losses, loads


def report(model: ReferenceMoe, recipe: Recipe, heldout: dict[str, Tensor], run: dict[str, float]) -> dict[str, Any]:
    """The content of `training.json`; loads are relative to the mean load of an expert."""
    losses, loads = evaluate(model, heldout, window=min(512, recipe.sequence))
    load = torch.stack(list(loads.values())).sum(0).double()
    relative = load / load.mean(dim=1, keepdim=True)
    return {
        **run,
        "tokens_per_second": round(run["tokens_seen"] / run["seconds"]),
        "heldout_loss": {domain: round(loss, 4) for domain, loss in losses.items()},
        "load_max": [round(v, 3) for v in relative.amax(1).tolist()],
        "load_min": [round(v, 3) for v in relative.amin(1).tolist()],
        "dead_experts": int((load == 0).sum()),
        "load": {domain: counts.tolist() for domain, counts in loads.items()},
        "shape": asdict(model.shape),
        "recipe": asdict(recipe),
    }


def train(model: ReferenceMoe, tokens: Tensor, recipe: Recipe, state_file: Path, stop_after: float = math.inf) -> dict[str, float]:
    """Train until the budget is spent, or for `stop_after` seconds; continue from `state_file` if it exists."""
    step, spent = 0, 0.0
    optims = optimizers(model, recipe)
    if state_file.exists():
        state = torch.load(state_file, map_location=tokens.device, weights_only=True)
        step, spent = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optimizers"], strict=True):
            optim.load_state_dict(saved)
    print(f"continues from step {step}, {spent:.0f} s" if step else f"starts anew: no {state_file}", flush=True)
    began, stream, seen = time.monotonic() - spent, batches(tokens, recipe, step), step
    losses: list[float] = []

    def seconds() -> float:
        return time.monotonic() - began

    def progress() -> float:
        return min(1.0, step / recipe.steps if recipe.steps else seconds() / recipe.seconds)

    while progress() < 1.0 and seconds() - spent < stop_after:
        rate = rate_at(recipe, step, progress())
        batch = next(stream)
        loss, balance, _ = model(batch[:, :-1], batch[:, 1:])
        (loss + recipe.balance * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = rate
            optim.step()
            optim.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0 or progress() >= 1.0:  # .item() waits for the GPU: rarely
            losses.append(loss.item())
            speed = (step - seen) * recipe.batch * recipe.sequence / (seconds() - spent)
            print(
                f"step {step} loss {losses[-1]:.4f} balance {balance.item() / model.shape.layers:.3f} rate {rate:.2e} "
                f"{seconds():.0f} s {speed / 1e3:.0f} ktok/s",
                flush=True,
            )
    seen_tokens = step * recipe.batch * recipe.sequence
    run = {"steps": step, "tokens_seen": seen_tokens, "seconds": round(seconds(), 1), "progress": progress()}
    state = {"model": model.state_dict(), "optimizers": [optim.state_dict() for optim in optims]}
    partial = state_file.with_suffix(".partial")
    torch.save(state | {"step": step, "seconds": seconds()}, partial)
    partial.replace(state_file)
    return run


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of train-*.xz and heldout-*.txt")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder whose tokenizer files are used and copied")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write; also holds state.pt")
    parser.add_argument("--tiny", action="store_true", help="two small layers, for a CPU")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds of this call; give it again to go on")
    parser.add_argument("--every", type=float, default=300.0, help="seconds between checkpoints and held-out losses")
    for record in (Shape, Recipe):
        for name, kind in record.__annotations__.items():
            parser.add_argument("--" + name.replace("_", "-"), type=kind, help=f"default {getattr(record, name)}")
    return parser.parse_args(argv)


def chosen(default: Shape | Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `default`, replaced by what the command line says."""
    return {name: v if (given := getattr(args, name)) is None else given for name, v in asdict(default).items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    shape = Shape(**chosen(TINY_SHAPE if args.tiny else Shape(), args))
    recipe = Recipe(**chosen(TINY_RECIPE if args.tiny else Recipe(), args))
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(args.tokenizer / name, args.out / name)

    tokenizer_file = args.tokenizer / "tokenizer.json"
    tokens = training_tokens(args.text, tokenizer_file, args.out / "tokens.npy").to(device)
    heldout = {domain: ids.to(device) for domain, ids in heldout_tokens(args.text, tokenizer_file).items()}
    torch.manual_seed(recipe.seed)
    model = ReferenceMoe(shape).to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(tokens) / 1e6:.1f} M tokens", flush=True)

    stop = time.monotonic() + args.stop_after
    while True:
        run = train(model, tokens, recipe, args.out / "state.pt", min(args.every, stop - time.monotonic()))
        save_checkpoint(model, args.out)
        result = report(model, recipe, heldout, run)
        (args.out / "training.json").write_text(json.dumps(result, indent=1))
        print(json.dumps({name: value for name, value in result.items() if name != "load"}), flush=True)
        if run["progress"] >= 1.0 or time.monotonic() >= stop:
            return result


if __name__ == "__main__":
    main()
