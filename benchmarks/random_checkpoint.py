"""A checkpoint of random weights with the exact geometry of a config.json, written shard by shard.

    python -m benchmarks.random_checkpoint CONFIG_JSON FOLDER [--layers N] [--set key=value ...] [--tokenizer FOLDER]

Keys are those of published checkpoints of the family (transformers' conversion, reversed). One shard for each layer, so peak memory
is one layer. Weights are normal with the config's initializer range, routers with ten times that, so that routing is as peaked as
in trained models.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from fate_moe.adapter.meta_model import build_meta_model, expert_stacks, parameter_dtypes
from fate_moe.units import format_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the config says")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change an entry of the config")
    parser.add_argument("--tokenizer", type=Path, help="copy the tokenizer of this checkpoint, so that `fate run` works")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text())
    config |= {key: json.loads(value) for key, value in (change.split("=", 1) for change in arguments.set)}
    if arguments.layers:
        config["num_hidden_layers"] = arguments.layers
        config.pop("layer_types", None)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "config.json").write_text(json.dumps(config, indent=1))
    if arguments.tokenizer:
        for path in arguments.tokenizer.glob("tokenizer*.json"):
            shutil.copy(path, arguments.folder)
    size = write(arguments.folder, arguments.seed)
    print(f"{arguments.folder}: {format_bytes(size)}")


def write(folder: Path, seed: int) -> int:
    """Fill ``folder``, which has its config.json, with weights and an index; returns bytes written."""
    model: Any = build_meta_model(folder)
    model._weight_conversions = get_model_conversion_mapping(model)
    dtypes = parameter_dtypes(model)
    routers = tuple(f"{stack.block}.{name}" for stack in expert_stacks(model) for name in ("gate.", "router."))
    spread = getattr(model.config, "initializer_range", None) or 0.02
    tied = set(model.all_tied_weights_keys) if model.config.get_text_config().tie_word_embeddings else set()
    groups: dict[str, list[str]] = defaultdict(list)
    for name in model.state_dict():
        if name not in tied:
            parts = name.split(".")
            groups[".".join(parts[:3]) if "layers" in parts else "rest"].append(name)
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(groups.values(), start=1):
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            if len(shapes[name]) == 1 and name.endswith("norm.weight"):
                tensors[name] = torch.ones(shapes[name], dtype=dtypes[name])
                continue
            scale = spread * (10 if name.startswith(routers) else 1)
            tensors[name] = torch.empty(shapes[name], dtype=dtypes[name]).normal_(0, scale, generator=generator)
        published = {key: value.contiguous() for key, value in revert_weight_conversion(model, tensors).items()}
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(published, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(published, shard)
        total += (folder / shard).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


if __name__ == "__main__":
    main()
