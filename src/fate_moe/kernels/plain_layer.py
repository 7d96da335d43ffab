"""What a plain decoder layer is, as numbers and names: the input of the executors, and of the twin that defines it
(``reference.decoder_layer``). How a model's layer becomes one of these is in ``layers/plain.py``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Attention", "Mlp", "Norm", "PlainLayer", "Router", "SharedExpert"]


@dataclass(frozen=True)
class Norm:
    """RMS norm: x / sqrt(mean of x squared + eps), times the weight. ``rounds_first``: x is rounded to its dtype before that."""

    eps: float
    rounds_first: bool = True


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention with rotary halves (the first and the second half of ``rotary_dim`` channels turn together).

    ``index`` is its layer in the KV cache; ``qk_norm`` is applied to each head, or, with ``norm_over_heads``, to all heads of a
    token together. ``clip`` limits queries, keys and values. ``window``: tokens that a query sees; None: all before it.
    """

    index: int
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    rotary_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    norm_over_heads: bool = False
    clip: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class Router:
    """Softmax over the experts' logits, then the ``top_k`` largest. ``normalize``: their weights are divided by their sum;
    ``scale`` multiplies them."""

    num_experts: int
    top_k: int
    normalize: bool
    scale: float = 1.0


@dataclass(frozen=True)
class Mlp:
    """down(act(gate(x)) * up(x)). With ``limit``, gate(x) is at most that and up(x) within plus and minus that."""

    activation: str
    limit: float | None = None


@dataclass(frozen=True)
class SharedExpert:
    """An MLP that every token takes beside its experts, times the sigmoid of ``gate`` if it has one. By the names of
    the block's children."""

    mlp: Mlp
    name: str
    gate: str | None = None


@dataclass(frozen=True)
class PlainLayer:
    """Norm, attention, sum, norm, experts behind a router (and perhaps a shared expert), sum.

    ``layer`` counts MoE blocks from 0; ``path`` is the decoder layer's place in the model, ``block`` and ``router`` the names of
    the MoE block in it and of the router in the block. ``residual_scale`` multiplies what attention and block add.
    """

    layer: int
    path: str
    block: str
    router_name: str
    hidden: int
    input_norm: Norm
    attention: Attention
    post_norm: Norm
    router: Router
    shared: SharedExpert | None = None
    residual_scale: float = 1.0

    def describe(self) -> str:
        """One line for people."""
        attention, router = self.attention, self.router
        parts = [f"{attention.heads} heads over {attention.kv_heads} of keys and values, {attention.head_dim} wide"]
        if attention.qk_norm is not None:
            parts.append("norms of queries and keys")
        if attention.window is not None:
            parts.append(f"a window of {attention.window} tokens")
        parts.append(
            f"{router.top_k} of {router.num_experts} experts, weights {'normalized' if router.normalize else 'as they are'}"
        )
        if self.shared is not None:
            parts.append("a shared expert with a gate" if self.shared.gate else "a shared expert")
        return ", ".join(parts)
