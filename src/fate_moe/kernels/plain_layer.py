"""What a plain decoder layer is, as numbers and names: the input of the executors, and of the twin that defines it
(``reference.decoder_layer``). How a model's layer becomes one of these is in ``layers/plain.py``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NO_ROUTER", "Attention", "Delta", "Latent", "Mlp", "Norm", "PlainLayer", "Router", "SharedExpert"]


@dataclass(frozen=True)
class Norm:
    """RMS norm: x / sqrt(mean of x squared + eps), times the weight. ``rounds_first``: x is rounded to its dtype before that.

    ``centered``: the mean of x is taken off first (layer norm). ``offset`` is added to the weight; ``bias``: so is one to the
    result.
    """

    eps: float
    rounds_first: bool = True
    centered: bool = False
    bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Latent:
    """What multi-head latent attention has: heads of ``nope`` channels and ``rotary_dim`` that turn, values of ``value_dim``, from
    latent rows of ``rank``, which with the turned channels are the one head of keys that is cached. ``two_steps``: queries are made
    by two matrices with a norm between (the attention's ``qk_norm``, which latent rows have too)."""

    rank: int
    nope: int
    value_dim: int
    two_steps: bool


@dataclass(frozen=True)
class Delta:
    """What a gated delta rule has in place of keys and values (``kernels/recurrent.py``): of a sequence the last ``kernel`` inputs
    of a convolution over queries, keys and values, and a state [key_dim, value_dim] of each of ``value_heads``.

    ``inputs`` names the linear layers that make a token's queries, keys, values, gates, strengths and decays: one of the first
    four and one of the last two, by key head (``by_head``); or four, of queries with keys and values, then one of each.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    norm: Norm
    inputs: tuple[str, ...]
    by_head: bool

    @property
    def channels(self) -> int:
        """Of the convolution: all queries, all keys, all values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def places(self) -> tuple[list[int], list[int]]:
        """In a token's results of ``inputs``, one after the other: where queries, keys, values, gates, strengths (b) and decays
        (a) of the first key head begin, and how far apart those of two key heads are. The last four are those of all its value
        heads."""
        keys, group = self.key_dim, self.value_heads // self.key_heads
        values, all_keys, all_values = group * self.value_dim, self.key_heads * self.key_dim, self.value_heads * self.value_dim
        if self.by_head:
            last = 2 * all_keys + 2 * all_values
            step = 2 * keys + 2 * values
            return [0, keys, 2 * keys, 2 * keys + values, last, last + group], [step] * 4 + [2 * group] * 2
        first = 2 * all_keys + all_values
        starts = [0, all_keys, 2 * all_keys, first, first + all_values, first + all_values + self.value_heads]
        return starts, [keys, keys, values, values, group, group]


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention with rotary embedding of a head's first ``rotary_dim`` channels.

    ``rope``: "halves" (channels i and i + half of them turn together), "pairs" (2i and 2i + 1), or "pairs apart" (these, and the
    results are at i and i + half); ``half_angles``: cos and sin have one column for both. ``index`` is the layer in the KV cache.
    ``qk_norm`` is applied to each head, or, with ``norm_over_heads``, to all heads of a token together. ``clip`` limits queries,
    keys and values. ``window``: tokens that a query sees; None: all before it. ``sinks``: each head has a score of no position.
    ``complex_angles``: cos and sin come as one complex tensor. ``norm_names`` are those of queries and keys; ``norm_after_rope``:
    they come after the turn. ``gated``: q_proj gives each head its queries, then as many gates, and the head's result is
    multiplied by their sigmoid. ``scale_every``, ``scale_slope``: queries at position p are multiplied by 1 + slope * ln(1 +
    floor(p / every)). ``angles_unused``: nothing turns, and cos and sin
    come all the same. ``delta``: it is no attention, but a gated delta rule.
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
    sinks: bool = False
    rope: str = "halves"
    half_angles: bool = False
    latent: Latent | None = None
    complex_angles: bool = False
    norm_names: tuple[str, str] = ("q_norm", "k_norm")
    norm_after_rope: bool = False
    gated: bool = False
    scale_every: int = 0
    scale_slope: float = 0.0
    angles_unused: bool = False
    delta: Delta | None = None

    @property
    def cached_dims(self) -> tuple[int, int]:
        """Of what the KV cache has as keys and as values."""
        return (self.latent.rank, self.rotary_dim) if self.latent is not None else (self.head_dim, self.head_dim)

    @property
    def num_angles(self) -> int:
        """Columns of cos and sin."""
        return self.rotary_dim // 2 if self.half_angles else self.rotary_dim


@dataclass(frozen=True)
class Router:
    """How ``top_k`` experts are chosen and weighed: ``kernels/routing.py`` defines it.

    ``bias``: logits have one. ``scores``: the "softmax" or the "sigmoid" of the logits, or "sparse mixer" (with ``spread``).
    ``correction`` names the tensor in the block that is added to scores where experts are chosen. Only experts of the
    ``top_groups`` groups with the largest sums of ``group_best`` scores are chosen. ``normalize``: weights are divided by their
    sum, or by ``floor`` where that is more; ``scale`` multiplies them. ``rounds_logits``, ``rounds_weights``: to the model's dtype.
    """

    num_experts: int
    top_k: int
    normalize: bool
    scale: float = 1.0
    scores: str = "softmax"
    correction: str | None = None
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    floor: float = 0.0
    spread: float = 0.0
    rounds_logits: bool = True
    rounds_weights: bool = True
    bias: bool = False


NO_ROUTER = Router(0, 0, False)


@dataclass(frozen=True)
class Mlp:
    """down(act(gate(x)) * up(x)). With ``limit``, gate(x) is at most that and up(x) within plus and minus that. ``joined``: gate
    and up are the halves of one matrix."""

    activation: str
    limit: float | None = None
    joined: bool = False


@dataclass(frozen=True)
class SharedExpert:
    """An MLP that every token takes beside its experts, times the sigmoid of ``gate`` if it has one. By the names of
    the block's children, or, ``of_layer``, the layer's; no name: the block is this MLP."""

    mlp: Mlp
    name: str
    gate: str | None = None
    of_layer: bool = False


@dataclass(frozen=True)
class PlainLayer:
    """Norm, attention, sum, norm, experts behind a router (and perhaps a shared expert), sum. A dense layer has no experts, and its
    MLP is the shared one.

    ``layer`` counts MoE blocks from 0, and is -1 in a dense layer; ``path`` is the decoder layer's place in the
    model, ``block`` and ``router_name`` the names of the MoE block in it and of the router in the block. ``residual_scale``
    multiplies what attention and block add. ``block_norm`` is of what experts and shared expert add together, and the child of the
    block with that name.
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
    block_norm: tuple[str, Norm] | None = None

    @property
    def attention_name(self) -> str:
        """The attention's place in the layer."""
        return "self_attn" if self.attention.delta is None else "linear_attn"

    @property
    def is_dense(self) -> bool:
        return not self.router.num_experts

    def describe(self) -> str:
        """One line for people."""
        attention, router = self.attention, self.router
        parts = [f"{attention.heads} heads over {attention.kv_heads} of keys and values, {attention.head_dim} wide"]
        if attention.latent is not None:
            parts = [f"{attention.heads} heads over latent rows of {attention.latent.rank}"]
        elif attention.delta is not None:
            of = attention.delta
            parts = [f"gated delta rule, {of.value_heads} heads with states of {of.key_dim} by {of.value_dim}"]
        elif attention.qk_norm is not None:
            parts.append("norms of queries and keys")
        if attention.window is not None:
            parts.append(f"a window of {attention.window} tokens")
        if attention.sinks:
            parts.append("attention sinks")
        if self.is_dense:
            return ", ".join([*parts, "no experts"])
        parts.append(
            f"{router.top_k} of {router.num_experts} experts, weights {'normalized' if router.normalize else 'as they are'}"
        )
        if self.shared is not None:
            parts.append("a shared expert with a gate" if self.shared.gate else "a shared expert")
        return ", ".join(parts)
