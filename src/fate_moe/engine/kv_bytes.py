"""What sequences keep in each layer, from a model's configuration alone: keys and values of a token, states of a sequence."""

from __future__ import annotations

from typing import Any

from fate_moe.kernels.attention import row_width

__all__ = ["int8_kv_bytes_per_token", "kv_bytes_per_token", "rotary_width", "state_bytes", "width"]


def kv_bytes_per_token(text: Any, itemsize: int) -> int:
    """Upper bound over all layers: sliding windows and layers without a KV cache count as full ones."""
    return sum(_kv_width(layer) for layer in _layers_of(text)) * itemsize


def _layers_of(text: Any) -> list[Any]:
    """The configuration of each layer."""
    return text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * text.num_hidden_layers


def rotary_width(text: Any) -> int:
    """Channels of a head that turn, at most, in any layer."""
    return max(
        width(layer, "qk_rope_head_dim") or width(layer, "head_dim") or layer.hidden_size // layer.num_attention_heads
        for layer in _layers_of(text)
    )


def int8_kv_bytes_per_token(text: Any) -> int:
    """As above, of layers that the extension runs: others have no int8 cache."""
    return sum(_int8_kv_bytes(layer) for layer in _layers_of(text))


def _int8_kv_bytes(layer: Any) -> int:
    if rank := width(layer, "kv_lora_rank"):
        return row_width("int8", rank + layer.qk_rope_head_dim)
    heads = layer.num_attention_heads
    head_dim = width(layer, "head_dim") or layer.hidden_size // heads
    of_window = 2 * width(layer, "swa_num_key_value_heads") * row_width("int8", width(layer, "swa_head_dim"))
    return max(2 * (width(layer, "num_key_value_heads") or heads) * row_width("int8", head_dim), of_window)


def state_bytes(text: Any) -> int:
    """Of one sequence in all layers with a gated delta rule: the convolution's inputs in bf16 and the states in fp32."""
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    key_heads, value_heads, key_dim, value_dim, kernel = (width(text, f"linear_{name}") for name in names)
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    layers = list(getattr(text, "layer_types", None) or ()).count("linear_attention")
    return layers * (2 * channels * kernel + 4 * value_heads * key_dim * value_dim)


def _kv_width(layer: Any) -> int:
    """Numbers cached by one layer for one token; multi-head latent attention is cached expanded, an indexer caches one key."""
    heads = layer.num_attention_heads
    index = width(layer, "index_head_dim") or width(layer, "indexer_head_dim")
    if width(layer, "kv_lora_rank"):
        return int(heads * (layer.qk_nope_head_dim + layer.qk_rope_head_dim + layer.v_head_dim) + index)
    head_dim = width(layer, "head_dim") or layer.hidden_size // heads
    of_window = 2 * width(layer, "swa_num_key_value_heads") * width(layer, "swa_head_dim")
    return max(2 * (width(layer, "num_key_value_heads") or heads) * head_dim, of_window) + index


def width(config: Any, name: str) -> int:
    """A field of ``config``, the largest where it has one for each layer; 0 if it has none."""
    value = getattr(config, name, None) or 0
    return max(value) if isinstance(value, list | tuple) else value
