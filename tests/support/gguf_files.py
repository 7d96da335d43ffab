"""GGUF files written as llama.cpp's converter names and lays things out, from tiny models of every architecture that is read."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch

Kind = gguf.GGMLQuantizationType
_IN_BLOCK = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn": "attn_sinks.weight",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate": "ffn_gate_inp", "mlp.router": "ffn_gate_inp", "block_sparse_moe.router": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "shared_mlp.output_linear": "ffn_down_shexp",
    **{f"mlp.shared_expert{s}.{half}_proj": f"ffn_{half}_shexp" for s in ("", "s") for half in ("gate", "up", "down")},
}  # fmt: skip
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    kind: Any = Kind.BF16,
    pack: Callable[[np.ndarray, Any], np.ndarray] = gguf.quants.quantize,
    absorbed: bool = True,
    vocabulary: bool = True,
    **options: Any,
) -> None:
    """``model`` as a GGUF file, matrices packed as ``kind`` (which need not mean anything).

    ``absorbed``: DeepSeek's keys and values are decompressed by two tensors, as in newer files. ``vocabulary``: stand-in tokens,
    without which llama.cpp does not load a file. ``options`` are the writer's: ``split_max_tensors`` makes several files.
    """
    writer = gguf.GGUFWriter(path, architecture, **options)
    _describe(writer, model.config, architecture, absorbed)
    if vocabulary:
        _add_vocabulary(writer, model.config.vocab_size)
    written: dict[str, torch.Tensor] = {}
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name not in tied:
            written |= _pieces(name, tensor.float(), model.config, architecture, absorbed)
    for name, tensor in written.items():
        data = tensor.contiguous().numpy()
        if tensor.ndim == 1 or "_inp" in name or name.endswith(".bias"):
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, pack(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rewrite_gguf(
    source: Path,
    target: Path,
    drop: Collection[str] = (),
    put: Mapping[str, Any] = MappingProxyType({}),
    tensors: Mapping[str, np.ndarray | None] = MappingProxyType({}),
    **options: Any,
) -> Path:
    """A copy of ``source`` without the fields ``drop``, with those of ``put`` (by their Python type) and other ``tensors``.

    Keys without a dot before them, as in ".block_count", are the architecture's. A tensor of None is left out.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    fields |= {_full(key, architecture): value for key, value in put.items()}
    for key in drop:
        del fields[_full(key, architecture)]
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture"), **options)
    for key, value in fields.items():
        _add_field(writer, key, value)
    held = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    for name, data in (dict.fromkeys(held) | dict(tensors)).items():
        if name in tensors and data is not None:
            writer.add_tensor(name, data)
        elif name not in tensors:
            writer.add_tensor(name, held[name][0], raw_dtype=held[name][1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _full(key: str, architecture: str) -> str:
    return architecture + key if key.startswith(".") else key


def _add_field(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def raw_gguf(
    tensors: Sequence[tuple[str, tuple[int, ...], int, int]],
    data: int = 4096,
    fields: Mapping[str, int] = MappingProxyType({}),
    version: int = 3,
    order: str = "<",
) -> bytes:
    """A file as its bytes, however wrong: ``tensors`` are (name, dimensions as stored, type, offset), ``fields`` 32-bit ints."""

    def text(word: str) -> bytes:
        return struct.pack(f"{order}Q", len(word)) + word.encode()

    made = b"GGUF" + struct.pack(f"{order}IQQ", version, len(tensors), len(fields))
    for key, value in fields.items():
        made += text(key) + struct.pack(f"{order}II", 4, value)
    for name, shape, kind, offset in tensors:
        made += text(name) + struct.pack(f"{order}I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return made + bytes(-len(made) % fields.get("general.alignment", 32)) + bytes(data)


def _pieces(name: str, tensor: torch.Tensor, config: Any, architecture: str, absorbed: bool) -> dict[str, torch.Tensor]:
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTSIDE:
        return {f"{_OUTSIDE[stem]}.{suffix}": tensor}
    layer, rest = re.match(r"model\.layers\.(\d+)\.(.*)", stem).groups()  # type: ignore[union-attr]
    block = f"blk.{layer}."
    if suffix == "e_score_correction_bias":
        return {f"{block}exp_probs_b.bias": tensor.flatten()}
    if rest.endswith(".experts"):
        kind = "bias" if suffix.endswith("_bias") else "weight"
        oss = architecture == "gpt-oss"
        tensor = tensor.mT if oss and kind == "weight" else tensor
        if suffix.startswith("down"):
            return {f"{block}ffn_down_exps.{kind}": tensor}
        halves = (tensor[:, ::2], tensor[:, 1::2]) if oss else tensor.chunk(2, 1)
        return {f"{block}ffn_{half}_exps.{kind}": part for half, part in zip(("gate", "up"), halves, strict=True)}
    if rest == "shared_mlp.input_linear":
        return {f"{block}ffn_{half}_shexp.weight": part for half, part in zip(("gate", "up"), tensor.chunk(2), strict=True)}
    if rest == "self_attn.kv_b_proj" and absorbed:
        heads = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, values = heads[:, : config.qk_nope_head_dim], heads[:, config.qk_nope_head_dim :]
        return {f"{block}attn_k_b.weight": keys.mT, f"{block}attn_v_b.weight": values}
    gguf_name = _IN_BLOCK[rest]
    if gguf_name == "ffn_norm" and architecture in ("gpt-oss", "glm4moe"):
        gguf_name = "post_attention_norm"
    if gguf_name in ("attn_q", "attn_k") and architecture in ("llama", "granitemoe"):
        heads = config.num_attention_heads if gguf_name == "attn_q" else config.num_key_value_heads
        tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    if rest == "mlp.shared_expert_gate":
        tensor = tensor[0]
    return {block + (gguf_name if gguf_name.endswith(".weight") else f"{gguf_name}.{suffix}"): tensor}


def _describe(writer: Any, config: Any, architecture: str, absorbed: bool) -> None:
    def get(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    extra = 1 if architecture == "glm4moe" else 0  # published with a layer that predicts a second token
    writer.add_block_count(config.num_hidden_layers + extra)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(get("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))
    writer.add_expert_used_count(get("num_experts_per_tok", "moe_k"))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if architecture == "deepseek2":
        rotary, rank = config.qk_rope_head_dim, config.kv_lora_rank
        lengths = (config.qk_nope_head_dim + rotary, config.v_head_dim)
        writer.add_head_count_kv(1 if absorbed else config.num_attention_heads)
        writer.add_key_length(rank + rotary if absorbed else lengths[0])
        writer.add_value_length(rank if absorbed else lengths[1])
        if absorbed:
            writer.add_key_length_mla(lengths[0])
            writer.add_value_length_mla(lengths[1])
        writer.add_kv_lora_rank(rank)
        if config.q_lora_rank is not None:
            writer.add_q_lora_rank(config.q_lora_rank)
        writer.add_rope_dimension_count(rotary)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(int(head * config.rope_parameters.get("partial_rotary_factor", 1.0)))
    if extra:
        writer.add_nextn_predict_layers(extra)
    if (width := get("moe_intermediate_size")) is not None:
        writer.add_expert_feed_forward_length(width)
        if (shared := get("n_shared_experts", "moe_num_shared_experts")) is not None:
            writer.add_expert_shared_count(shared)
            writer.add_expert_shared_feed_forward_length(shared * width)
    if (width := get("shared_expert_intermediate_size", "shared_intermediate_size")) is not None:
        writer.add_expert_shared_feed_forward_length(width)
    if architecture in ("gpt-oss", "minimax-m2"):
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if architecture == "gpt-oss":
        writer.add_sliding_window(config.sliding_window)
    if config.rope_parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
        if everywhere := config.rope_parameters.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * everywhere)
    for names, add in (
        (("first_k_dense_replace", "moe_layer_start_index"), writer.add_leading_dense_block_count),
        (("routed_scaling_factor",), writer.add_expert_weights_scale),
        (("n_group",), writer.add_expert_group_count),
        (("topk_group",), writer.add_expert_group_used_count),
        (("attention_multiplier",), writer.add_attention_scale),
        (("embedding_multiplier",), writer.add_embedding_scale),
        (("residual_multiplier",), writer.add_residual_scale),
        (("logits_scaling",), writer.add_logit_scale),
        (("moe_layer_interval",), writer.add_interleave_moe_layer_step),
    ):
        if (value := get(*names)) is not None:
            add(value)
    if get("norm_topk_prob") and architecture not in ("qwen2moe", "qwen3moe"):
        writer.add_expert_weights_norm(True)
    if architecture in ("deepseek2", "dots1", "glm4moe", "minimax-m2"):
        sigmoid = config.model_type != "deepseek_v2"
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)


def _add_vocabulary(writer: Any, size: int) -> None:
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{token}>" for token in range(size)])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * size)
    writer.add_token_merges(["< 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
