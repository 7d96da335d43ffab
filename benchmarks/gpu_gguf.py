"""A GGUF file of a published geometry with random weights, for llama.cpp on the GPU machine: matrices Q4_0, routers and norms F32.

    python -m benchmarks.gpu_gguf Qwen3-30B-A3B FILE.gguf
    llama-bench -m FILE.gguf -ngl 99 -ncmoe 0,26,36,41 -p 512 -n 64     # the number of layers with experts on the CPU

Only for timing: all matrices have the same random blocks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import AutoConfig

from benchmarks.gguf_export import describe
from benchmarks.gpu_model import GEOMETRIES

_KINDS = gguf.GGMLQuantizationType
_ARCHITECTURES = {"qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe"}


def tensors(config: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """GGUF names with shapes and types."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    keys, experts, width = config.num_key_value_heads * size, config.num_experts, config.moe_intermediate_size
    shared = getattr(config, "shared_expert_intermediate_size", None)
    full, quantized = _KINDS.F32, _KINDS.Q4_0
    layer: dict[str, tuple[tuple[int, ...], Any]] = {
        "attn_norm.weight": ((hidden,), full), "ffn_norm.weight": ((hidden,), full),
        "attn_q.weight": ((heads * size, hidden), quantized), "attn_k.weight": ((keys, hidden), quantized),
        "attn_v.weight": ((keys, hidden), quantized), "attn_output.weight": ((hidden, heads * size), quantized),
        "ffn_gate_inp.weight": ((experts, hidden), full), "ffn_gate_exps.weight": ((experts, width, hidden), quantized),
        "ffn_up_exps.weight": ((experts, width, hidden), quantized), "ffn_down_exps.weight": ((experts, hidden, width), quantized),
    }  # fmt: skip
    if config.model_type == "qwen3_moe":
        layer |= {"attn_q_norm.weight": ((size,), full), "attn_k_norm.weight": ((size,), full)}
    else:
        layer |= {f"attn_{name}.bias": ((rows,), full) for name, rows in (("q", heads * size), ("k", keys), ("v", keys))}
    if shared:
        layer |= {
            "ffn_gate_inp_shexp.weight": ((hidden,), full), "ffn_gate_shexp.weight": ((shared, hidden), quantized),
            "ffn_up_shexp.weight": ((shared, hidden), quantized), "ffn_down_shexp.weight": ((hidden, shared), quantized),
        }  # fmt: skip
    vocabulary = (config.vocab_size, hidden)
    whole = {
        "token_embd.weight": (vocabulary, quantized), "output.weight": (vocabulary, quantized),
        "output_norm.weight": ((hidden,), full),
    }  # fmt: skip
    return whole | {f"blk.{number}.{name}": what for number in range(config.num_hidden_layers) for name, what in layer.items()}


def write(name: str, file: Path) -> Path:
    """Write the model called ``name`` in GEOMETRIES."""
    geometry = {key: value for key, value in GEOMETRIES[name].items() if key != "model_type"}
    config = AutoConfig.for_model(GEOMETRIES[name]["model_type"], **geometry)
    writer = gguf.GGUFWriter(file, _ARCHITECTURES[config.model_type])
    describe(writer, config)
    parts = tensors(config)
    for tensor, (shape, kind) in parts.items():
        stored = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(tensor, stored, np.dtype(np.uint8), int(np.prod(stored)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    max_blocks = max(int(np.prod(shape)) for shape, _ in parts.values()) // 32
    blocks = np.empty((max_blocks, 18), np.uint8)  # an fp16 scale and 32 codes
    blocks[:, :2] = np.frombuffer(np.float16(0.003).tobytes(), np.uint8)
    blocks[:, 2:] = random.integers(0, 256, (max_blocks, 16), dtype=np.uint8)
    for shape, kind in parts.values():
        count = int(np.prod(shape))
        if kind == _KINDS.Q4_0:
            writer.write_tensor_data(blocks[: count // 32].reshape(-1))
        else:
            values = np.ones(shape) if len(shape) == 1 else random.normal(0, 2 * shape[-1] ** -0.5, shape)
            writer.write_tensor_data(values.astype(np.float32).reshape(-1).view(np.uint8))
    writer.close()
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=[name for name, g in GEOMETRIES.items() if g["model_type"] in _ARCHITECTURES])
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    file = write(arguments.model, arguments.file)
    print(f"{file}: {file.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
