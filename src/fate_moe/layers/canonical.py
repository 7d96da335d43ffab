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
    "FIXED_ROPES",
    "HEADS",
    "LAYERS",
    "MLPS",
    "NORMS",
    "ROPES",
    "ROUTERS",
    "TRUNKS",
    "AttentionCode",
    "BlockCode",
    "LayerCode",
    "MlpCode",
    "NormCode",
    "RouterCode",
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
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)); ``limit`` names the attribute that limits both factors."""

    limit: str | None = None


@dataclass(frozen=True)
class AttentionCode:
    """q_proj, k_proj, v_proj, rotary embedding (``rope``, ``half_angles``: plain_layer.Attention), o_proj.

    ``norms``: q_norm and k_norm are on each "head", on "all" heads together, or not there; ``norms_if`` names the attribute that
    turns them on. ``clip`` and ``window`` name fields of the configuration, ``partial_rope``: only the channels that cos and sin
    have are turned. ``rope_if``: field and value without which there is none.
    ``latent``: q_proj or q_a_proj, q_a_layernorm, q_b_proj; kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj; rotary
    embedding ("pairs apart" if the configuration's ``rope_interleave`` says so), o_proj. ``sinks``: the module has them, and runs
    "eager" attention of its file, which must be that of the family named here.
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


@dataclass(frozen=True)
class RouterCode:
    """``weight`` times x (and its bias), scores, the largest (plain_layer.Router). ``normalize``: whether their weights are divided
    by their sum, or the attribute that says so. ``scale``, ``floor``, ``spread`` and ``method`` name attributes; the last says how
    groups limit the choice ("greedy": not). ``correction`` is the path of a tensor in the router, ``groups`` the attributes with
    the number of groups and how many of them are chosen. ``exact_logits``, ``exact_weights``: they are not rounded to the
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
    exact_logits: bool = False
    exact_weights: bool = False


@dataclass(frozen=True)
class BlockCode:
    """A MoE block's children beside ``experts``; ``gate`` is the shared expert's, which may be None in the block.
    ``correction``: the tensor that the block gives its router."""

    router: str
    shared: str | None = None
    gate: str | None = None
    correction: str | None = None


@dataclass(frozen=True)
class LayerCode:
    """input_layernorm, self_attn, sum, post_attention_layernorm, ``block``, sum; ``residual`` names the attribute that scales what
    is added."""

    block: str = "mlp"
    residual: str | None = None


NORMS: Mapping[str, NormCode] = {
    "qwen3_moe.Qwen3MoeRMSNorm": NormCode(),
    "gpt_oss.GptOssRMSNorm": NormCode(rounds_first=False),
    "nemotron_h.NemotronHRMSNorm": NormCode(rounds_first=False),
    "gemma4.Gemma4RMSNorm": NormCode(eps="eps", rounds_first=False),
}
MLPS: Mapping[str, MlpCode] = {
    "qwen2_moe.Qwen2MoeMLP": MlpCode(),
    "beam.BeamMLP": MlpCode(),  # the product in fp32
    "glm4v_moe.Glm4vMoeisionMlp": MlpCode(),
    "deepseek_v4.DeepseekV4MLP": MlpCode(limit="limit"),
    "glm5_next.Glm5NextTextMLP": MlpCode(limit="swiglu_limit"),
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
}
LAYERS: Mapping[str, LayerCode] = {
    "qwen3_moe.Qwen3MoeDecoderLayer": LayerCode(),
    "mixtral.MixtralDecoderLayer": LayerCode(),
    "gpt_oss.GptOssDecoderLayer": LayerCode(),
    "granitemoe.GraniteMoeDecoderLayer": LayerCode("block_sparse_moe", residual="residual_multiplier"),
}
# Embedding, layers, norm; rotary frequencies as they are; the head on that alone.
TRUNKS = {
    "qwen3_moe.Qwen3MoeModel": True,
    "qwen2_moe.Qwen2MoeModel": True,
    "mixtral.MixtralModel": True,
    "olmoe.OlmoeModel": True,
    "gpt_oss.GptOssModel": True,
    "dots1.Dots1Model": True,
    "hy_v3.HYV3Model": True,
}
ROPES = {
    "qwen3_moe.Qwen3MoeRotaryEmbedding": True,
    "qwen2_moe.Qwen2MoeRotaryEmbedding": True,
    "mixtral.MixtralRotaryEmbedding": True,
    "gpt_oss.GptOssRotaryEmbedding": True,
    "ernie4_5_moe.Ernie4_5_MoeRotaryEmbedding": True,
    "phimoe.PhimoeRotaryEmbedding": True,  # of the default kind; others depend on the length
}
# Kinds of rotary frequencies that do not depend on how long a text is.
FIXED_ROPES = {"default", "linear", "llama3", "yarn"}
HEADS = {
    "qwen3_moe.Qwen3MoeForCausalLM": True,
    "glm4_moe.Glm4MoeForCausalLM": True,
    "hy_v3.HYV3ForCausalLM": True,
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
