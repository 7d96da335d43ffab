"""Upcycles a trained dense language model (a Llama without biases) to a Qwen2-MoE checkpoint with real text and routing.

Some neurons of each FFN become the shared expert. The others are copied into every routed expert, each copy in its own order and
with up_proj and down_proj rescaled inversely. No two experts have the same bytes, and mixing parts of two experts gives wrong
results, yet all experts compute the same function, so the model equals the dense model whatever the routers choose. Routers are
random directions in the space of their inputs, so that they choose by content. `tools.widen` makes geometries larger than the
dense model's.

Shards are written one layer at a time.
Shapes: E experts, L layers, N tokens, D hidden, F neurons of the dense FFN, of which R are routed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fate_moe.errors import ConfigError
from fate_moe.io.files import require_space
from fate_moe.tools import widen
from fate_moe.tools.widen import GROUP, Geometry
from fate_moe.trace.routing import WINDOW, Trace, router_inputs

__all__ = ["build", "load_dense", "make_routers"]

# Leading principal directions that routers use. The others are mostly noise, which whitening would amplify.
DIRECTIONS = 64
# Standard deviation of a router's logits, chosen so that the top 4 of 60 experts have about the probability that they have in the
# trained reference model.
SPREAD = 1.75
# up_proj is multiplied by 2^r and down_proj divided by it, exactly in any float type. One r per quantization group, so that INT4
# codes do not change.
MAX_SHIFT = 2


def load_dense(gguf: Path) -> tuple[Any, Any]:
    """The dense model of a GGUF file in bf16, and its tokenizer. Needs the gguf package."""
    with _gguf_reading():
        dense = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for parameter in dense.parameters():  # not dense.bfloat16(), which would round the rotary embedding's frequencies too
        parameter.data = parameter.data.bfloat16()
    tokenizer.model_max_length = dense.config.max_position_embeddings
    return dense, tokenizer


@contextmanager
def _gguf_reading() -> Iterator[None]:
    """transformers parses a GGUF file anew for the configuration, the weights and the tokenizer, seconds each: here once.

    It shows its bar for the file's tensors always; here that obeys disable_progress_bar(), as the others do.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reader

    parse, bar = gguf.GGUFReader, reader.tqdm
    gguf.GGUFReader = cache(parse)  # transformers imports it where it is used
    reader.tqdm = partial(bar, disable=not logging.is_progress_bar_enabled())
    try:
        yield
    finally:
        gguf.GGUFReader, reader.tqdm = parse, bar


def build(
    dense: Any,
    geometry: Geometry,
    tokens: Tensor,
    folder: Path,
    seed: int,
    advance: Callable[[int], None] = lambda num_layers: None,
    *,
    together: int = 1,
) -> Trace:
    """Write the checkpoint (without tokenizer) of ``dense``, a LlamaForCausalLM, in its dtype; returns their routing.

    Routers are made on the first half of ``tokens`` [N], the returned routing is of the second. ``advance`` is called with 1 for
    each shard written. ``together`` consecutive neurons stay together, with one sign, so that weights that were quantized in groups
    of that size are again; it divides the widths. Raises ConfigError for too few tokens, DiskSpaceError.
    """
    needed = geometry.num_parameters(dense.config.vocab_size) * dense.dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, needed)
    generator = torch.Generator().manual_seed(seed)
    deep = widen.deepen(dense, geometry.layers)
    inputs, starts, loss = router_inputs(copy.deepcopy(deep).to(torch.float32), tokens)
    half = inputs.shape[1] // (2 * WINDOW) * WINDOW
    if not half:
        raise ConfigError(f"{len(tokens)} tokens of text are too few; give at least {2 * WINDOW + 1}")
    routers = torch.stack([make_routers(x[:half][~starts[:half]], geometry.experts, generator) for x in inputs]).to(dense.dtype)
    (folder / "config.json").write_text(json.dumps(moe_config(dense, geometry), indent=1))
    dense.generation_config.save_pretrained(folder)
    write_shards(folder, parts(deep, geometry, routers, generator, together), geometry.layers + 1, advance)
    chosen = (inputs[:, half:] @ routers.float().mT).topk(geometry.top_k).indices
    return Trace(inputs[:, half:], chosen, routers.float(), starts[half:], loss)


def make_routers(inputs: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """[N, D] -> [E, D]: unit directions in the whitened space, orthogonal to the mean so that no expert is favoured."""
    mean = inputs.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov(inputs.T))  # ascending
    leading = min(DIRECTIONS, inputs.shape[1], len(inputs) - 1)
    whiten = directions[:, -leading:] * variances[-leading:].clamp_min(1e-12).rsqrt()  # [D, leading]
    mean_direction = torch.nn.functional.normalize(mean @ whiten, dim=0)
    points = torch.randn(experts, leading, generator=generator)
    points = torch.nn.functional.normalize(points - (points @ mean_direction)[:, None] * mean_direction, dim=1)
    return torch.mm(SPREAD * points, whiten.T)


def moe_config(dense: Any, geometry: Geometry) -> dict[str, Any]:
    config = dense.config
    copied = ["vocab_size", "hidden_act", "max_position_embeddings", "initializer_range", "tie_word_embeddings"]
    copied += ["bos_token_id", "eos_token_id", "pad_token_id"]
    head_size = {} if geometry.heads * geometry.head_size == geometry.hidden else {"head_dim": geometry.head_size}
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **{name: getattr(config, name) for name in copied},
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.shared_width,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        **head_size,
        "rms_norm_eps": widen.epsilon(config, geometry.hidden),
        "rope_theta": config.rope_parameters["rope_theta"],
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": geometry.experts,
        "num_experts_per_tok": geometry.top_k,
        "moe_intermediate_size": geometry.expert_width,
        "shared_expert_intermediate_size": geometry.shared_width,
        "norm_topk_prob": True,
        "torch_dtype": str(dense.dtype).removeprefix("torch."),
    }


def parts(
    dense: Any, geometry: Geometry, routers: Tensor, generator: torch.Generator, together: int = 1
) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's tensors, a layer at a time, embedding and head last."""
    hidden = geometry.hidden
    for number, layer in enumerate(dense.model.layers):
        tensors = {f"self_attn.{name}": value for name, value in widen.attention(layer, dense.config, geometry, generator).items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.weight"] = widen.norm(getattr(layer, name).weight.detach(), hidden)
        tensors["mlp.gate.weight"] = widen.around(routers[number], geometry.experts, hidden, generator)
        tensors["mlp.shared_expert_gate.weight"] = torch.zeros(1, hidden, dtype=dense.dtype)
        tensors |= {f"mlp.{name}": value for name, value in ffn(layer.mlp, geometry, generator, together).items()}
        yield {f"model.layers.{number}.{name}": value for name, value in tensors.items()}
    embedding = dense.model.embed_tokens.weight.detach()
    rest = {"model.embed_tokens.weight": widen.around(embedding, len(embedding), hidden, None)}
    rest["model.norm.weight"] = widen.norm(dense.model.norm.weight.detach(), hidden)
    if not dense.config.tie_word_embeddings:
        rest["lm_head.weight"] = widen.around(dense.lm_head.weight.detach(), len(embedding), hidden, generator)
    yield rest


def ffn(dense: Any, geometry: Geometry, generator: torch.Generator, together: int = 1) -> dict[str, Tensor]:
    """Shared and routed experts of one layer, one tensor each, as Qwen2-MoE publishes them."""
    gate, up, down = (p.weight.detach() for p in (dense.gate_proj, dense.up_proj, dense.down_proj))  # [F, D] twice, [D, F]
    by_neuron = down.T.contiguous()  # [F, D]
    routed = min(geometry.expert_width, len(gate) - min(geometry.shared_width, GROUP))
    tensors: dict[str, Tensor] = {}

    def add(expert: str, neurons: Tensor, factor: Tensor, width: int) -> None:
        """down_proj is zero for new dimensions and neurons, so gate_proj and up_proj may be noise there."""
        weights = (gate[neurons], up[neurons] * factor, (by_neuron[neurons] / factor).T)
        tensors[f"{expert}.gate_proj.weight"] = widen.around(weights[0], width, geometry.hidden, generator)
        tensors[f"{expert}.up_proj.weight"] = widen.around(weights[1], width, geometry.hidden, generator)
        tensors[f"{expert}.down_proj.weight"] = widen.around(weights[2], geometry.hidden, width, None)

    order = shuffled(len(gate), together, generator)
    unscaled = torch.ones(len(gate) - routed, 1, dtype=gate.dtype)
    add("shared_expert", order[routed:], unscaled, geometry.shared_width)
    tensors["shared_expert.down_proj.weight"] *= 2  # its gate's weight is zero, and the sigmoid of zero one half
    for expert in range(geometry.experts):
        neurons = order[shuffled(routed, together, generator)]
        shifts = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (-(-routed // GROUP),), generator=generator)
        signs = torch.randint(0, 2, (routed // together,), generator=generator) * 2 - 1
        factor = signs.repeat_interleave(together) * torch.exp2(shifts).repeat_interleave(GROUP)[:routed]
        add(f"experts.{expert}", neurons, factor[:, None].to(gate.dtype), geometry.expert_width)
    return tensors


def shuffled(count: int, together: int, generator: torch.Generator) -> Tensor:
    """The numbers below ``count`` in random order, those of each ``together`` consecutive ones side by side."""
    return (torch.randperm(count // together, generator=generator)[:, None] * together + torch.arange(together)).flatten()


def write_shards(folder: Path, shards: Iterator[dict[str, Tensor]], count: int, advance: Callable[[int], None]) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, start=1):
        shard = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(value.nbytes for value in tensors.values())
        advance(1)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
