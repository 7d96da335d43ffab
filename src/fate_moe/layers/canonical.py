"""The code of transformers that this engine knows, and what it means. One class stands for all with the same code.

A class is looked up by the fingerprint of its ``forward``, so a family that copies known code is known without being listed here,
and one that changes a line no longer is. What a class has in attributes (eps, head sizes, flags) is named here and read from the
module.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from fate_moe.layers.fingerprint import fingerprint, function_fingerprint

__all__ = [
    "ATTENTIONS",
    "BLOCKS",
    "DELTAS",
    "GATED_NORMS",
    "HEADS",
    "LAYERS",
    "MLPS",
    "NORMS",
    "ROPES",
    "ROUTERS",
    "TRUNKS",
    "AttentionCode",
    "BlockCode",
    "DeltaCode",
    "HeadCode",
    "LayerCode",
    "MlpCode",
    "NormCode",
    "RopeCode",
    "RouterCode",
    "TrunkCode",
    "attends_as",
    "meaning_of",
]

Meaning = TypeVar("Meaning")


@dataclass(frozen=True)
class NormCode:
    """An RMS norm with its eps in attribute ``eps``; ``rounds_first``: x is rounded to its dtype before the weight, to which
    ``offset`` is added."""

    eps: str = "variance_epsilon"
    rounds_first: bool = True
    offset: float = 0.0


@dataclass(frozen=True)
class MlpCode:
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)); ``limit`` names the attribute that limits both factors. ``joined``:
    output_linear(activation(first half) * second half) of input_linear(x)."""

    limit: str | None = None
    joined: bool = False


@dataclass(frozen=True)
class AttentionCode:
    """q_proj, k_proj, v_proj, rotary embedding (``rope``, ``half_angles``: plain_layer.Attention), o_proj.

    ``norms``: q_norm and k_norm are on each "head", on "all" heads together, or not there; ``norms_if`` names the attribute that
    turns them on. ``clip`` and ``window`` name fields of the configuration, ``partial_rope``: only the channels that cos and sin
    have are turned. ``rope_if``: field and value without which there is none.
    ``latent``: q_proj or q_a_proj, q_a_layernorm, q_b_proj; kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj; rotary
    embedding ("pairs apart" if the configuration's ``rope_interleave`` says so), o_proj. ``sinks``: the module has them, and runs
    "eager" attention of its file, which must be that of the family named here.
    ``norm_names``, ``norm_after_rope``, ``gated``: plain_layer.Attention. ``rope_if_sliding``: with sliding layers only those turn.
    ``bases``: the field of the configuration with each layer's base of rotary frequencies, 0 where there is none.
    ``scaled``: queries are scaled by position, as the configuration's ``rope_parameters`` say.
    """

    norms: str = ""
    norms_if: str | None = None
    clip: str | None = None
    window: str | None = None
    partial_rope: bool = False
    rope_if: tuple[str, str] | None = None
    rope: str = "halves"
    half_angles: bool = False
    sinks: str | None = None
    latent: bool = False
    complex_angles: bool = False
    norm_names: tuple[str, str] = ("q_norm", "k_norm")
    norm_after_rope: bool = False
    gated: bool = False
    rope_if_sliding: bool = False
    bases: str | None = None
    scaled: bool = False


@dataclass(frozen=True)
class DeltaCode:
    """A gated delta rule (plain_layer.Delta) with conv1d, dt_bias, A_log, a gated norm, out_proj and these ``inputs``."""

    inputs: tuple[str, ...]
    by_head: bool = False


@dataclass(frozen=True)
class RouterCode:
    """``weight`` times x (and its bias), scores, the largest (plain_layer.Router). ``normalize``: whether their weights are divided
    by their sum, or the attribute that says so. ``scale``, ``floor``, ``spread`` and ``method`` name attributes; the last says how
    groups limit the choice ("greedy": not). ``correction`` is the path of a tensor in the router, ``groups`` the attributes with
    the number of groups and how many of them are chosen, ``weight`` a linear layer in the router that has it, and whose fp32
    numbers leave logits and weights as they are. ``exact_logits``, ``exact_weights``: they are not rounded to the
    model's dtype.
    """

    normalize: bool | str
    scale: str | None = None
    method: str | None = None
    scores: str = "softmax"
    correction: str | None = None
    groups: tuple[str, str] | None = None
    group_best: int = 1
    floor: float | str = 0.0
    spread: str | None = None
    weight: str | None = None
    exact_logits: bool = False
    exact_weights: bool = False


@dataclass(frozen=True)
class BlockCode:
    """A MoE block's children beside ``experts``; ``gate`` is the shared expert's, which may be None in the block.
    ``correction``: the tensor that the block gives its router. ``norm``: of what experts and shared expert add."""

    router: str
    shared: str | None = None
    gate: str | None = None
    correction: str | None = None
    norm: str | None = None


@dataclass(frozen=True)
class LayerCode:
    """input_layernorm, self_attn (or linear_attn), sum, post_attention_layernorm, ``block``, sum; ``residual`` names the attribute
    that scales what is added, ``shared`` the shared expert that is the layer's child, and may be None."""

    block: str = "mlp"
    residual: str | None = None
    shared: str | None = None


@dataclass(frozen=True)
class TrunkCode:
    """Embedding, layers, norm. ``embedding`` names the attribute that multiplies embeddings; ``by_kind``: each kind of layer in the
    configuration's ``layer_types`` has its own rotary embedding; ``by_base``: each base in its ``layer_rope_theta``."""

    embedding: str | None = None
    by_kind: bool = False
    by_base: bool = False


@dataclass(frozen=True)
class RopeCode:
    """Rotary frequencies that depend on the position alone, where ``rope_type`` is one of ``kinds``. ``long_scales``: fields of
    ``rope_parameters`` that must be equal; with others, long texts turn otherwise than short ones. ``axes``: it is given a position
    on so many axes, which are the same in a text (0: a position alone)."""

    kinds: frozenset[str] = frozenset({"default", "linear", "llama3", "yarn"})
    long_scales: tuple[str, str] | None = None
    axes: int = 0


@dataclass(frozen=True)
class HeadCode:
    """lm_head on the trunk's result; ``divisor`` names a field of the configuration by which logits are divided."""

    divisor: str | None = None


NORMS: Mapping[str, NormCode] = {
    "qwen3_moe.Qwen3MoeRMSNorm": NormCode(),
    "gpt_oss.GptOssRMSNorm": NormCode(rounds_first=False),
    "nemotron_h.NemotronHRMSNorm": NormCode(rounds_first=False),
    "gemma4.Gemma4RMSNorm": NormCode(eps="eps", rounds_first=False),
    "qwen3_next.Qwen3NextRMSNorm": NormCode(eps="eps", rounds_first=False, offset=1.0),
}
GATED_NORMS: Mapping[str, NormCode] = {"qwen3_next.Qwen3NextRMSNormGated": NormCode()}  # times the silu of a gate
MLPS: Mapping[str, MlpCode] = {
    "qwen2_moe.Qwen2MoeMLP": MlpCode(),
    "beam.BeamMLP": MlpCode(),  # the product in fp32
    "glm4v_moe.Glm4vMoeisionMlp": MlpCode(),
    "deepseek_v4.DeepseekV4MLP": MlpCode(limit="limit"),
    "glm5_next.Glm5NextTextMLP": MlpCode(limit="swiglu_limit"),
    "granitemoeshared.GraniteMoeSharedMLP": MlpCode(joined=True),
}
ATTENTIONS: Mapping[str, AttentionCode] = {
    "qwen2_moe.Qwen2MoeAttention": AttentionCode(),
    "qwen2.Qwen2Attention": AttentionCode(),
    "qwen3_moe.Qwen3MoeAttention": AttentionCode(norms="head"),
    "mixtral.MixtralAttention": AttentionCode(window="sliding_window"),
    "qwen3_vl_moe.Qwen3VLMoeTextAttention": AttentionCode(norms="head"),
    "hy_v3.HYV3Attention": AttentionCode(norms="head"),
    "granitemoehybrid.GraniteMoeHybridAttention": AttentionCode(rope_if=("position_embedding_type", "rope")),
    "glm4_moe.Glm4MoeAttention": AttentionCode(norms="head", norms_if="use_qk_norm", partial_rope=True),
    "glm4v_moe.Glm4vMoeTextAttention": AttentionCode(partial_rope=True),
    "deepseek_v3.DeepseekV3Attention": AttentionCode(latent=True),
    "deepseek_v2.DeepseekV2Attention": AttentionCode(latent=True, rope="pairs", half_angles=True, complex_angles=True),
    "gpt_oss.GptOssAttention": AttentionCode(half_angles=True, sinks="gpt_oss"),
    "ernie4_5_moe.Ernie4_5_MoeAttention": AttentionCode(rope="pairs"),
    "minimax_m2.MiniMaxM2Attention": AttentionCode(norms="all", partial_rope=True),
    "olmoe.OlmoeAttention": AttentionCode(norms="all", clip="clip_qkv", window="sliding_window"),
    "hunyuan_v1_moe.HunYuanMoEV1Attention": AttentionCode(
        norms="head", norm_names=("query_layernorm", "key_layernorm"), norm_after_rope=True
    ),
    "exaone_moe.ExaoneMoeAttention": AttentionCode(norms="head", rope_if_sliding=True),
    "granitemoe_swa.GraniteMoeSWAAttention": AttentionCode(sinks="granitemoe_swa", bases="layer_rope_theta"),
    "axk1.AXK1Attention": AttentionCode(latent=True),
    "mistral4.Mistral4Attention": AttentionCode(latent=True, scaled=True),
    "qwen3_next.Qwen3NextAttention": AttentionCode(norms="head", partial_rope=True, gated=True),
}
DELTAS: Mapping[str, DeltaCode] = {
    "qwen3_next.Qwen3NextGatedDeltaNet": DeltaCode(("in_proj_qkvz", "in_proj_ba"), by_head=True),
    "qwen3_5_moe.Qwen3_5MoeGatedDeltaNet": DeltaCode(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),
}
ROUTERS: Mapping[str, RouterCode] = {
    "qwen3_moe.Qwen3MoeTopKRouter": RouterCode("norm_topk_prob"),
    "mixtral.MixtralTopKRouter": RouterCode(True),
    "qwen3_vl_moe.Qwen3VLMoeTextTopKRouter": RouterCode(True),
    "deepseek_v2.DeepseekV2TopkRouter": RouterCode(
        False,
        scale="routed_scaling_factor",
        method="topk_method",
        groups=("num_group", "topk_group"),
        exact_logits=True,
        exact_weights=True,
    ),
    "deepseek_v3.DeepseekV3TopkRouter": RouterCode(
        "norm_topk_prob",
        scale="routed_scaling_factor",
        scores="sigmoid",
        correction="e_score_correction_bias",
        groups=("num_group", "topk_group"),
        group_best=2,
        floor=1e-20,
        exact_logits=True,
        exact_weights=True,
    ),
    "hy_v3.HYV3TopKRouter": RouterCode(
        True, scale="router_scaling_factor", scores="sigmoid", floor=1e-20, exact_logits=True, exact_weights=True
    ),
    "ernie4_5_moe.Ernie4_5_MoeTopKRouter": RouterCode(
        True, correction="moe_statics.e_score_correction_bias", floor="norm_min", exact_logits=True
    ),
    "minimax_m2.MiniMaxM2TopKRouter": RouterCode(True, scores="sigmoid", exact_weights=True),
    "phimoe.PhimoeTopKRouter": RouterCode(False, scores="sparse mixer", spread="router_jitter_noise"),
    # The softmax of the largest logits alone: the same weights as the largest of a softmax, normalized.
    "aria.AriaTextTopKRouter": RouterCode(True),
    "granitemoe.GraniteMoeTopKRouter": RouterCode(True),
    "gpt_oss.GptOssTopKRouter": RouterCode(True),
    "hunyuan_v1_moe.HunYuanMoEV1Gate": RouterCode(True, weight="wg"),
    "mistral4.Mistral4TopkRouter": RouterCode(
        "norm_topk_prob", scale="routed_scaling_factor", groups=("num_group", "topk_group"), group_best=2, floor=1e-20
    ),
}
BLOCKS: Mapping[str, BlockCode] = {
    "qwen3_moe.Qwen3MoeSparseMoeBlock": BlockCode("gate"),
    "qwen2_moe.Qwen2MoeSparseMoeBlock": BlockCode("gate", "shared_expert", "shared_expert_gate"),
    "mixtral.MixtralSparseMoeBlock": BlockCode("gate"),
    "olmoe.OlmoeSparseMoeBlock": BlockCode("gate"),
    "deepseek_v2.DeepseekV2Moe": BlockCode("gate", "shared_experts"),
    "aria.AriaTextMoELayer": BlockCode("router", "shared_experts"),
    "hy_v3.HYV3MoE": BlockCode("gate", "shared_experts", correction="e_score_correction_bias"),
    "ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock": BlockCode("gate", "shared_experts"),
    "minimax_m2.MiniMaxM2SparseMoeBlock": BlockCode("gate", correction="e_score_correction_bias"),
    "phimoe.PhimoeSparseMoeBlock": BlockCode("router"),
    "gpt_oss.GptOssMLP": BlockCode("router"),
    "granitemoe.GraniteMoeMoE": BlockCode("router"),
    "hunyuan_v1_moe.HunYuanMoEV1Moe": BlockCode("gate", "shared_mlp"),
    "axk1.AXK1MoE": BlockCode("gate", "shared_experts", norm="post_mlp_layernorm"),
}
LAYERS: Mapping[str, LayerCode] = {
    "qwen3_moe.Qwen3MoeDecoderLayer": LayerCode(),
    "mixtral.MixtralDecoderLayer": LayerCode(),
    "gpt_oss.GptOssDecoderLayer": LayerCode(),
    "granitemoe.GraniteMoeDecoderLayer": LayerCode("block_sparse_moe", residual="residual_multiplier"),
    "granitemoeshared.GraniteMoeSharedDecoderLayer": LayerCode("block_sparse_moe", "residual_multiplier", "shared_mlp"),
    "qwen3_next.Qwen3NextDecoderLayer": LayerCode(),
    "qwen3_5_moe.Qwen3_5MoeDecoderLayer": LayerCode(),
}
TRUNKS: Mapping[str, TrunkCode] = {
    "qwen3_moe.Qwen3MoeModel": TrunkCode(),
    "qwen2_moe.Qwen2MoeModel": TrunkCode(),
    "mixtral.MixtralModel": TrunkCode(),
    "olmoe.OlmoeModel": TrunkCode(),
    "gpt_oss.GptOssModel": TrunkCode(),
    "dots1.Dots1Model": TrunkCode(),
    "hy_v3.HYV3Model": TrunkCode(),
    "mellum.MellumModel": TrunkCode(by_kind=True),
    "granitemoe.GraniteMoeModel": TrunkCode("embedding_multiplier"),
    "granitemoe_swa.GraniteMoeSWAModel": TrunkCode("embedding_multiplier", by_base=True),
    "qwen3_next.Qwen3NextModel": TrunkCode(),
    "qwen3_5_moe.Qwen3_5MoeTextModel": TrunkCode(),
}
ROPES: Mapping[str, RopeCode] = {
    "qwen3_moe.Qwen3MoeRotaryEmbedding": RopeCode(),
    "qwen2_moe.Qwen2MoeRotaryEmbedding": RopeCode(),
    "mixtral.MixtralRotaryEmbedding": RopeCode(),
    "gpt_oss.GptOssRotaryEmbedding": RopeCode(),
    "ernie4_5_moe.Ernie4_5_MoeRotaryEmbedding": RopeCode(),
    "deepseek_v2.DeepseekV2RotaryEmbedding": RopeCode(),
    "mellum.MellumRotaryEmbedding": RopeCode(),
    "qwen3_5_moe.Qwen3_5MoeTextRotaryEmbedding": RopeCode(axes=3),
    "phimoe.PhimoeRotaryEmbedding": RopeCode(frozenset({"default", "longrope"}), ("short_mscale", "long_mscale")),
}
HEADS: Mapping[str, HeadCode] = {
    "qwen3_moe.Qwen3MoeForCausalLM": HeadCode(),
    "glm4_moe.Glm4MoeForCausalLM": HeadCode(),
    "hy_v3.HYV3ForCausalLM": HeadCode(),
    "granitemoe.GraniteMoeForCausalLM": HeadCode("logits_scaling"),
}


def meaning_of(kind: type, known: Mapping[str, Meaning]) -> Meaning | None:
    """What ``kind``'s code means, if it is that of one of the ``known`` classes."""
    wanted = fingerprint(kind)
    for path, meaning in known.items():
        canonical = _canonical(path)
        if canonical is not None and fingerprint(canonical) == wanted:
            return meaning
    return None


def attends_as(kind: type, family: str) -> bool:
    """Whether the eager attention of ``kind``'s file is that of ``family``'s."""
    own, other = (
        getattr(importlib.import_module(name), "eager_attention_forward", None)
        for name in (kind.__module__, f"transformers.models.{family}.modeling_{family}")
    )
    return own is not None and other is not None and function_fingerprint(own) == function_fingerprint(other)


@functools.cache
def _canonical(path: str) -> type | None:
    """ "family.Class" of the installed transformers; None where this version has no such class."""
    family, _, name = path.partition(".")
    try:
        return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name, None)
    except ImportError:
        return None
