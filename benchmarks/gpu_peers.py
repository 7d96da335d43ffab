"""What the GPU tier is compared with: a collection of activation paths, and transformers with accelerate's offload."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.gpu_model import GEOMETRIES, TOPIC_TOKENS, RandomModel
from fate_moe.adapter.meta_model import build_meta_model, expert_stacks

__all__ = ["accelerated", "activation_paths"]


def activation_paths(random: RandomModel, tokens: int = 64) -> torch.Tensor:
    """A collection of activation matrices [sequences, layers, experts] of norm 1, from other tokens of the script's topics, so that
    the collection contains every measured topic once."""
    top_k = random.model.config.num_experts_per_tok
    counts: list[torch.Tensor] = []

    def count(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        router = module.gate.weight.float()
        chosen = (args[0].reshape(-1, router.shape[1]).float() @ router.T).topk(top_k).indices
        counts.append(torch.bincount(chosen.reshape(-1), minlength=router.shape[0]).float())

    hooks = [random.model.get_submodule(stack.block).register_forward_pre_hook(count) for stack in random.stacks]
    matrices = []
    for topic in (random.script[::TOPIC_TOKENS] // TOPIC_TOKENS).tolist():
        ids = topic * TOPIC_TOKENS + torch.randint(0, TOPIC_TOKENS, (1, tokens), device="cuda")
        with torch.no_grad():
            random.model(ids, logits_to_keep=1)
        matrices.append(torch.stack(counts))
        counts.clear()
    for hook in hooks:
        hook.remove()
    return torch.stack([matrix / matrix.norm() for matrix in matrices])


def accelerated(name: str, share: float, num_layers: int | None, seconds: float = 20, prompt: int = 64) -> dict[str, Any]:
    """Decode by transformers and accelerate, bf16, the experts of a fraction ``share`` of layers in VRAM, others on the host.

    All expert matrices have the same random numbers, because the time does not depend on their values.
    """
    import accelerate

    config = dict(GEOMETRIES[name])
    config["num_hidden_layers"] = num_layers or config["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        model: Any = build_meta_model(folder)
    for module in model.modules():
        for key, value in list(module._parameters.items()):
            if value is not None:
                made = torch.empty(value.shape, dtype=value.dtype)
                shape = value.shape[1:] if value.ndim == 3 else value.shape
                made.copy_((torch.randn(shape, device="cuda") * value.shape[-1] ** -0.5).to(value.dtype).cpu())
                module._parameters[key] = nn.Parameter(made, requires_grad=False)
    stacks = expert_stacks(model)
    expert_bytes = 2 * sum(parameter.numel() for stack in stacks for parameter in model.get_submodule(stack.name).parameters())
    dense_bytes = 2 * sum(parameter.numel() for parameter in model.parameters()) - expert_bytes
    resident = round(share * len(stacks))
    where: dict[str, int | str] = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    where |= {f"model.layers.{i}": 0 for i in range(len(stacks))}
    for stack in stacks[resident:]:  # the best case of accelerate: only experts are offloaded
        block = f"model.layers.{stack.layer}"
        del where[block]
        for child, module in model.get_submodule(block).named_children():
            where |= (
                {f"{block}.{child}.{inner}": 0 for inner, _ in module.named_children()}
                if child == "mlp"
                else {f"{block}.{child}": 0}
            )
        where[stack.name] = "cpu"
    model = accelerate.dispatch_model(model, where, main_device=0)
    cache = transformers.StaticCache(config=model.config, max_cache_len=256)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device="cuda")
    times: list[float] = []
    began = time.perf_counter()
    with torch.no_grad():
        while len(times) < 8 and (len(times) < 3 or time.perf_counter() - began < seconds):
            start = time.perf_counter()
            ids = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    took = min(times[1:])
    return {"tokens_per_second": 1 / took, "ms": took * 1e3, "prefill_ms": times[0] * 1e3, "tokens": len(times) - 1,
            "layers": len(stacks), "expert_GB": expert_bytes / 1e9, "dense_GB": dense_bytes / 1e9}  # fmt: skip
