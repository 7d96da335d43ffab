"""What the generated model's routing allows: how alike gate inputs are, what can be predicted, and what no policy can avoid."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu_model import TOPIC_TOKENS, RandomModel
from fate_moe.trace.fit import GateFitter

__all__ = ["as_array", "belady_misses", "better_gates", "fit_gates", "predicted", "recorded", "routers"]

PASS = 1024  # tokens


def routers(random: RandomModel) -> list[torch.Tensor]:
    """Each layer's router [experts, hidden]."""
    return [random.model.get_submodule(stack.block).gate.weight for stack in random.stacks]


@torch.no_grad()
def recorded(random: RandomModel, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The gate inputs [tokens, hidden] and the choices int64 [tokens, top_k] of every layer when ``ids`` [tokens] are read."""
    inputs: list[torch.Tensor] = []
    hooks = [
        random.model.get_submodule(stack.block).register_forward_pre_hook(lambda module, args: inputs.append(args[0][0].clone()))
        for stack in random.stacks
    ]
    random.model(ids[None], logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    top_k = random.model.config.num_experts_per_tok
    gates = routers(random)
    return inputs, [(x.float() @ gate.float().T).topk(top_k).indices for x, gate in zip(inputs, gates, strict=True)]


def other_tokens(random: RandomModel, length: int, seed: int) -> torch.Tensor:
    """Tokens made as the script is, of other topics in another order."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randint(0, random.model.config.vocab_size // TOPIC_TOKENS, (length // TOPIC_TOKENS + 1,), generator=generator)
    within = torch.randint(0, TOPIC_TOKENS, (length,), generator=generator)
    return (topics.repeat_interleave(TOPIC_TOKENS)[:length] * TOPIC_TOKENS + within).to(random.script.device)


@torch.no_grad()
def fit_gates(random: RandomModel, tokens: int = 24 * PASS) -> list[torch.Tensor | None]:
    """By layer, [experts, hidden + 1] as ``fate fit`` fits them, on ``tokens`` that are not the script's; layer 0 has None here."""
    gates = routers(random)
    with gates[0].device:  # where its sums will lie
        fitter = GateFitter([len(gate) for gate in gates], gates[0].shape[1], routers=gates)
    for number in range(tokens // PASS):
        ids = other_tokens(random, PASS, 1000 + number)
        inputs, chosen = recorded(random, ids)
        fitter.whole_pass([random.model.get_input_embeddings()(ids), *inputs], chosen)
    return [None, *fitter.gates()[0][1:]]


def recall(scores: torch.Tensor, chosen: torch.Tensor, width: int) -> float:
    """The share of ``chosen`` [N, k] among the ``width`` best of ``scores`` [N, E]."""
    guessed = scores.topk(min(width, scores.shape[1]), dim=-1).indices
    return float((chosen[:, :, None] == guessed[:, None, :]).any(-1).float().mean())


def better_gates(random: RandomModel, fitted: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """``fitted``, None where the layer's own router names more of the choices of tokens that neither has seen, as ``fate fit``
    keeps them."""
    inputs, chosen = recorded(random, other_tokens(random, PASS, 999))
    width = chosen[0].shape[1] + 2
    kept: list[torch.Tensor | None] = [None]
    for layer, router in list(enumerate(routers(random)))[1:]:
        before, gate = inputs[layer - 1].float(), fitted[layer]
        assert gate is not None
        guesses = before @ router.float().T, before @ gate[:, :-1].T + gate[:, -1]
        plain, ours = (recall(guess, chosen[layer], width) for guess in guesses)
        kept.append(gate if ours >= plain else None)
    return kept


def predicted(random: RandomModel, fitted: list[torch.Tensor | None] | None = None) -> dict[str, float]:
    """On the script's first tokens, mean over layers: cosine of neighbouring gate inputs; of a layer's choices, the share among
    the k and 2k that its router on the gate input before says likeliest (and among a fitted gate's); previous token's experts."""
    inputs, chosen = recorded(random, random.script[:256])
    gates, top_k = [gate.float() for gate in routers(random)], random.model.config.num_experts_per_tok
    rows: dict[str, list[torch.Tensor]] = {}

    def note(name: str, value: torch.Tensor) -> None:
        rows.setdefault(name, []).append(value)

    for layer in range(1, len(inputs)):
        before = inputs[layer - 1].float()
        note("cosine", torch.cosine_similarity(before, inputs[layer].float()).mean())
        real = torch.zeros(len(before), gates[layer].shape[0], device=before.device).scatter_(1, chosen[layer], 1.0)
        note("previous_token", (real[1:] * real[:-1]).sum(1).mean() / top_k)
        guesses = {"recall": before @ gates[layer].T}
        gate = fitted[layer] if fitted else None
        if gate is not None:
            guesses["fitted_recall"] = before @ gate[:, :-1].T + gate[:, -1]
        for name, guess in guesses.items():
            for width, mark in ((top_k, "k"), (2 * top_k, "2k")):
                note(f"{name}_{mark}", real.gather(1, guess.topk(width).indices).sum(1).mean() / top_k)
    return {name: float(torch.stack(values).mean()) for name, values in rows.items()}


def belady_misses(choices: NDArray[np.int64], quotas: list[int], num_experts: int, warm: int) -> float:
    """Misses a token that no choice of victims can avoid; ``choices`` [layers, tokens, k], of which the first ``warm`` do not
    count.

    Every layer keeps its quota and gives up who is used last again (Belady, IBM Systems Journal 1966).
    """
    missed = 0
    for layer, quota in zip(choices, quotas, strict=True):
        never = len(layer)
        upcoming, following = np.full(num_experts, never), np.empty((never, num_experts), np.int64)
        for token in range(never - 1, -1, -1):
            following[token] = upcoming  # who is used when after this token
            upcoming[layer[token]] = token
        resident = np.zeros(num_experts, bool)
        resident[:quota] = True
        for token, chosen in enumerate(layer):
            missing = chosen[~resident[chosen]]
            missed += len(missing) * (token >= warm)
            evictable = resident.copy()
            evictable[chosen] = False
            victims = np.flatnonzero(evictable)
            victims = victims[np.argsort(-following[token][victims], kind="stable")[: len(missing)]]
            resident[victims], resident[missing] = False, True
    return float(missed / (choices.shape[1] - warm))


def as_array(choices: list[torch.Tensor]) -> NDArray[Any]:
    """[layers, tokens, k] on the CPU."""
    array: NDArray[Any] = torch.stack(choices).cpu().numpy()
    return array
