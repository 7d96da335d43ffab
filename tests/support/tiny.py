"""A tiny random model of any family that transformers knows: its default config, with every size that we know by name made small.

Families differ in what they call things and agree on what a name means, so one table serves them all. What a family wants
otherwise stands in ``SPECIAL``, with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from fate_moe.adapter.meta_model import TEXT_CLASSES, auto_class

NUM_LAYERS = 4
NUM_EXPERTS = 8
TOP_K = 2

# fmt: off
SIZES: dict[str, Any] = {
    "vocab_size": 128, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 16, "rel_extent": 16,
    "num_experts": NUM_EXPERTS, "num_local_experts": NUM_EXPERTS, "n_routed_experts": NUM_EXPERTS, "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K, "num_experts_per_token": TOP_K, "moe_topk": TOP_K, "moe_k": TOP_K, "top_k_experts": TOP_K,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "shared_intermediate_size": 48,
    "shared_experts_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48, "dense_intermediate_size": 96,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_expert_group": 2,
    # multi-head latent attention, its indexer, hyper-connections
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 16,
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8,
    # linear attention and state space layers
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 16, "linear_num_heads": 4, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_dt_rank": 8,
    "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16, "mamba_chunk_size": 16,
    # what sees and hears, which text does not pass through
    "depth": 1, "num_heads": 4, "out_hidden_size": 64, "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "output_dim": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "projector_hidden_size": 64, "moe_hidden_size": 32, "text_hidden_size": 64,
}
# Families whose default config has no experts at all.
EVEN_IF_UNSET = {
    "num_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "top_k_experts", "moe_intermediate_size",
    "mlp_layer_types",
}


def _sections(*sizes: int) -> dict[str, Any]:
    """Rotary position embedding whose channels are divided among time, height and width."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sizes)}


_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"head_dim": 16, "layer_group_size": 2},  # the linear layers' heads; the rotary ones' size follows
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 16,
    },
    "diffusion_gemma": {"text_config": {"global_head_dim": 16}, "vision_config": {"model_type": "gemma4_vision"}},  # 5.17 has none
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_out_dim": 64, "adapter_input_size": 64},
    },
    "dots3_note_text": {f"swa_{name}": 8 for name in ("q_lora_rank", "kv_lora_rank")},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [32, 16], "rope_parameters": _sections(3, 3, 2)}},
    "gemma4": {"text_config": {"enable_moe_block": True, "global_head_dim": 16}},
    "gemma4_text": {"enable_moe_block": True, "global_head_dim": 16},
    "glm4v_moe": {"text_config": {"rope_parameters": _sections(2, 1, 1)}},
    "glm5_next": {"text_config": {"index_topk": 16, "qk_rope_head_dim": 0, "head_dim": 0, "qk_head_dim": 8}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling_mm_model": {"vision_config": {"patch_size": 4, "n_layers": 8}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "muse_spark": {"audio_config": {"hidden_sizes": [16] * 4, "depths": [1] * 4}},
    "nemo_speechlm": {  # what hears has its query, key and value in one matrix, a third each
        "audio_config": {
            "asr_config": {"num_key_value_heads": 4},
            "diarization_config": {"audio_config": {"num_key_value_heads": 4}, "head_config": {"audio_hidden_size": 64}},
        },
        "word_timestamp_config": {"encoder_config": {"num_key_value_heads": 4}, "num_key_value_heads": 4},
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "nemotron_h": {"layer_types": ["linear_attention", "moe", "full_attention", "moe", "mlp", "moe"], "num_hidden_layers": 6},
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 48}}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "zaya": {"num_experts_per_tok": 1},
}
# fmt: on


def tiny_config(family: str) -> Any:
    """The default config of ``family``, made small."""
    return _shrunk(transformers.CONFIG_MAPPING[family], SPECIAL.get(family, {}))


def _shrunk(config_class: Any, special: dict[str, Any]) -> Any:
    default = config_class().to_dict()
    sizes = {
        name: value for name, value in SIZES.items() if name in default and (default[name] is not None or name in EVEN_IF_UNSET)
    }
    if default.get("kv_lora_rank"):
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]
        if default.get("head_dim") == default["qk_rope_head_dim"]:
            sizes["head_dim"] = SIZES["qk_rope_head_dim"]
    if "mlp_layer_types" in default:
        first = "dense" if "dense" in (default["mlp_layer_types"] or ["dense"]) else "sparse"
        sizes["mlp_layer_types"] = [first, *["sparse"] * (NUM_LAYERS - 1)]
    if kinds := list(dict.fromkeys(default.get("layer_types") or ())):
        sizes["layer_types"] = [kinds[layer % len(kinds)] for layer in range(NUM_LAYERS)]
    for name, value in default.items():
        if name.endswith(("_token_id", "_token_index")) and name not in SIZES and isinstance(value, int):
            sizes[name] = 3
    of_class = config_class()
    for name in of_class.sub_configs:
        of_sub, others = getattr(of_class, name, None), dict(special.get(name, {}))
        kind = others.pop("model_type", None)
        if of_sub is not None or kind is not None:
            sizes[name] = _shrunk(type(of_sub) if of_sub is not None else transformers.CONFIG_MAPPING[kind], others).to_dict()
    return config_class(**{**sizes, **{name: value for name, value in special.items() if name not in of_class.sub_configs}})


def tiny_model(family: str, seed: int = 0) -> Any:
    """A transformers model of ``family`` in fp32 with random weights of a size at which every part matters."""
    config = tiny_config(family)
    config.dtype = torch.float32
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class(config, TEXT_CLASSES[::-1]).from_config(config, dtype=torch.float32, experts_implementation="eager")
        with torch.no_grad():
            for name, value in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("e_score_correction_bias"):
                    value.normal_(0, 0.05)
                elif value.ndim == 1 and "bias" not in name and "inv_freq" not in name:
                    pass
                elif isinstance(value, torch.nn.Parameter) and value.ndim >= 2:
                    value.normal_(0, value.shape[-1] ** -0.5)
    return model.eval()


def text_part(model: Any) -> Any:
    """What of a saved model writes text: the model, or the part that thinks where another part only speaks."""
    return getattr(model, "thinker", model)
