"""Qwen2-MoE in plain PyTorch for training: the weights of all layers are one stacked parameter.

Stacked parameters need few, large optimizer operations, and one compiled `block` serves every layer. Dimensions:
T tokens, D hidden, L layers, E experts, F expert width, S shared width, A = heads * head size, V vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

SHARD_BYTES = 15 * 2**20  # small enough for a code repository


@dataclass(frozen=True)
class Shape:
    vocab: int = 8192
    hidden: int = 256
    layers: int = 12
    experts: int = 60
    top_k: int = 4
    expert_width: int = 64
    shared_width: int = 512
    heads: int = 8
    kv_heads: int = 4
    context: int = 1024

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def config(self) -> dict[str, Any]:
        """The config.json of transformers' `Qwen2MoeConfig`."""
        return {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.shared_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-06,
            "use_cache": True,
            "tie_word_embeddings": True,
            "rope_theta": 10000.0,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": self.expert_width,
            "shared_expert_intermediate_size": self.shared_width,
            "num_experts_per_tok": self.top_k,
            "num_experts": self.experts,
            "norm_topk_prob": False,
            "mlp_only_layers": [],
            "qkv_bias": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


# The published name of each layer's (and expert e's) part of a stacked parameter.
PUBLISHED = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "moe_norm": "post_attention_layernorm.weight",
    "router": "mlp.gate.weight",
    "expert_gate": "mlp.experts.{e}.gate_proj.weight",
    "expert_up": "mlp.experts.{e}.up_proj.weight",
    "expert_down": "mlp.experts.{e}.down_proj.weight",
    "shared_gate": "mlp.shared_expert.gate_proj.weight",
    "shared_up": "mlp.shared_expert.up_proj.weight",
    "shared_down": "mlp.shared_expert.down_proj.weight",
    "shared_switch": "mlp.shared_expert_gate.weight",
}
TABLES = {"embed", "router", "shared_switch"}  # matrices with one row per token or expert, which Muon does not suit


class ReferenceMoe(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        L, D, E, W, S = shape.layers, shape.hidden, shape.experts, shape.expert_width, shape.shared_width  # noqa: N806
        A, KV = shape.heads * shape.head_size, shape.kv_heads * shape.head_size  # noqa: N806
        deep = (2 * L) ** -0.5  # the additions to the residual stream start small

        def matrix(*size: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(size) * scale * size[-1] ** -0.5)

        self.embed = nn.Parameter(torch.randn(shape.vocab, D) * 0.02)
        self.norm = nn.Parameter(torch.ones(D))
        self.attention_norm, self.moe_norm = nn.Parameter(torch.ones(L, D)), nn.Parameter(torch.ones(L, D))
        self.q, self.k, self.v = matrix(L, A, D), matrix(L, KV, D), matrix(L, KV, D)
        self.o = matrix(L, D, A, scale=deep)
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(L, n)) for n in (A, KV, KV))
        self.router = nn.Parameter(torch.randn(L, E, D) * 0.02)
        self.expert_gate, self.expert_up = matrix(L, E, W, D), matrix(L, E, W, D)
        self.expert_down = matrix(L, E, D, W)
        self.shared_gate, self.shared_up = matrix(L, S, D), matrix(L, S, D)
        self.shared_down = matrix(L, D, S, scale=deep)
        self.shared_switch = nn.Parameter(torch.randn(L, 1, D) * 0.02)

    def kind(self, name: str) -> str:
        """`table`, `matrix` or `vector`, which decides the optimizer and the weight decay."""
        if name in TABLES:
            return "table"
        return "vector" if name.endswith(("norm", "bias")) else "matrix"

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T] ids -> cross-entropy, balancing loss summed over layers (1 each when even), tokens per [L, E]."""
        compiled = inputs.is_cuda and torch.is_grad_enabled()  # evaluation is too short to be worth compiling
        layer, head = (_compiled_block, _compiled_head) if compiled else (block, head_loss)
        precision = torch.bfloat16 if inputs.is_cuda else self.embed.dtype
        stacks = {name: getattr(self, name).to(precision).unbind(0) for name in PUBLISHED}
        rope = rotary(inputs.shape[1], self.shape.head_size, inputs.device, precision)
        embed = self.embed.to(precision)
        x, balance, loads = F.embedding(inputs, embed), torch.zeros((), device=inputs.device), []
        for index in range(self.shape.layers):
            x, uneven, load = layer(self.shape, x, {name: stack[index] for name, stack in stacks.items()}, rope)
            balance = balance + uneven
            loads.append(load)
        loss = head(rms_norm(x, self.norm.to(precision)), embed, targets)
        return loss, balance, torch.stack(loads)


# ---- one layer -------------------------------------------------------------------------------------------------------


def block(shape: Shape, x: Tensor, w: dict[str, Tensor], rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, D] -> x, this layer's balancing loss, tokens per expert [E]."""
    x = x + attention(shape, rms_norm(x, w["attention_norm"]), w, rope)
    h = rms_norm(x, w["moe_norm"]).flatten(0, 1)
    routed, balance, load = experts(shape, h, w)
    shared = swiglu(h @ w["shared_gate"].mT, h @ w["shared_up"].mT) @ w["shared_down"].mT
    y = routed + torch.sigmoid(h @ w["shared_switch"].mT) * shared
    return x + y.view_as(x), balance, load


def attention(shape: Shape, x: Tensor, w: dict[str, Tensor], rope: tuple[Tensor, Tensor]) -> Tensor:
    def heads(name: str, count: int) -> Tensor:
        y = F.linear(x, w[name], w[name + "_bias"])
        return y.view(*y.shape[:-1], count, shape.head_size).transpose(1, 2)

    q, k, v = heads("q", shape.heads), heads("k", shape.kv_heads), heads("v", shape.kv_heads)
    y = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2).flatten(-2) @ w["o"].mT


def experts(shape: Shape, h: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """h [T, D] -> output [T, D], balancing loss, tokens per expert [E].

    Copies of each token are sorted by expert, go through two grouped products, and return to token order.
    """
    probabilities = torch.softmax(h @ w["router"].mT, dim=-1, dtype=torch.float32)
    chosen = top_indices(probabilities.detach(), shape.top_k)
    weights = probabilities.gather(1, chosen)
    order = chosen.flatten().argsort()  # [T k] positions, by expert
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=h.device))
    load = F.one_hot(chosen, shape.experts).sum((0, 1))
    bounds = load.cumsum(0).to(torch.int32)
    balance = shape.experts * (load / len(order) * probabilities.mean(0)).sum()

    rows = cast(Tensor, Dispatch.apply(h, order, inverse))  # type: ignore[no-untyped-call]
    gate_up = torch._grouped_mm(rows, torch.cat([w["expert_gate"], w["expert_up"]], dim=1).mT, offs=bounds)
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch._grouped_mm(swiglu(gate, up), w["expert_down"].mT, offs=bounds)
    y = cast(Tensor, Permute.apply(out, inverse, order)).view(len(h), shape.top_k, -1)  # type: ignore[no-untyped-call]
    return (y * weights[..., None].to(y.dtype)).sum(1), balance, load


def top_indices(values: Tensor, count: int) -> Tensor:
    """The indices that `topk` returns, computed as `count` maxima, which compile into the surrounding kernels and are faster."""
    columns, indices = torch.arange(values.shape[1], device=values.device), []
    for _ in range(count):
        indices.append(values.argmax(dim=1, keepdim=True))
        values = torch.where(columns == indices[-1], -1.0, values)
    return torch.cat(indices, dim=1)


class Permute(torch.autograd.Function):
    """rows[order]; backward is a gather by `inverse`, where autograd would use a scatter with atomic additions."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


class Dispatch(torch.autograd.Function):
    """h [T, D] -> [T k, D], row r a copy of token order[r] // k; backward gathers and sums each token's k rows."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.tokens = len(h)
        return h[order // (len(order) // len(h))]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(ctx.tokens, -1, grad.shape[-1]).sum(1), None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotary(length: int, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** (-torch.arange(0, size, 2, device=device) / size)
    angle = torch.outer(torch.arange(length, device=device), frequency).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to x [..., T, head size]; entry i of each half forms one complex number."""
    low, high = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((-high, low), dim=-1) * rope[1]


def head_loss(x: Tensor, embed: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((x @ embed.mT).flatten(0, 1).float(), targets.flatten())


_compiled_block = torch.compile(block, dynamic=False)
_compiled_head = torch.compile(head_loss, dynamic=False)


# ---- the published form ----------------------------------------------------------------------------------------------


def published(model: ReferenceMoe) -> dict[str, Tensor]:
    """Every tensor by its Hugging Face name, bf16, one per expert."""
    weights = {name: p.detach().to("cpu", torch.bfloat16) for name, p in model.named_parameters()}
    tensors = {"model.embed_tokens.weight": weights["embed"]}
    for index in range(model.shape.layers):
        for name, key in PUBLISHED.items():
            part, prefix = weights[name][index], f"model.layers.{index}."
            if "{e}" in key:
                tensors |= {prefix + key.format(e=e): part[e] for e in range(model.shape.experts)}
            else:
                tensors[prefix + key] = part
    return tensors | {"model.norm.weight": weights["norm"]}


def save_checkpoint(model: ReferenceMoe, folder: Path) -> None:
    """config.json, shards of at most SHARD_BYTES, and their index, in the format of transformers."""
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for key, tensor in published(model).items():
        if tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][key] = tensor.contiguous()
        room -= tensor.nbytes + 128  # 128: about a tensor's entry in the header
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(model.shape.config(), indent=1))
