"""A transformers model without its weights: what to convert, what to load, and what to plan for."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from fate_moe.adapter.config_rules import broken_config_rule, read_config
from fate_moe.adapter.contract import broken_rule, is_experts, lookalikes
from fate_moe.errors import CheckpointError, UnsupportedModelError
from fate_moe.io.bounded import read_bounded
from fate_moe.io.json_file import unmarked_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TEXT_CLASSES", "ExpertStack", "auto_class", "build_meta_model", "expert_stacks", "parameter_dtypes"]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# transformers' Auto classes of models that write text, those of text alone first.
TEXT_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
# Families whose model for text is a part that no Auto class finds.
_TEXT_PART = {"qwen3_omni_moe": "thinker_config"}
# What families call the number of experts that a token takes.
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "top_k")
# Elements. No buffer that a constructor computes is made by torch.empty at this size.
_LARGE = 1 << 20


@dataclass(frozen=True)
class ExpertStack:
    """The routed experts of one MoE block: ``name`` is the experts module's path in the model ("model.layers.3.mlp.experts").

    ``parameters`` maps a parameter's own name to the shape of *one* expert's slice as the module holds it ([in, out] where
    ``is_transposed``, else [out, in]; biases [out]). A token takes ``top_k`` experts. ``layer`` counts MoE blocks from 0.
    ``twins`` are other experts modules with the very same weights (an encoder's, tied to its decoder's).
    """

    layer: int
    name: str
    num_experts: int
    parameters: dict[str, tuple[int, ...]]
    is_transposed: bool
    top_k: int
    twins: tuple[str, ...] = ()

    @property
    def block(self) -> str:
        """Path of the MoE block, the experts module's parent."""
        return self.name.rpartition(".")[0]

    def output_rows_first(self) -> dict[str, tuple[int, ...]]:
        """The shapes as a store has them: every matrix [out, in]."""
        return {name: shape[::-1] if self.is_transposed else shape for name, shape in self.parameters.items()}


def build_meta_model(folder: str | Path) -> PreTrainedModel:
    """The model that ``folder``'s config.json describes, every parameter on the meta device and every buffer real.

    Buffers that no checkpoint holds (rotary frequencies) are computed by the model's own constructor. A ``quantization_config``
    is dropped: stores hold dense weights in the model's own dtype, which is config.json's or else that of the stored weights.
    Raises CheckpointError for a missing or unreadable config.json, UnsupportedModelError for a family transformers does not know,
    for remote code, and for a model without routed experts.
    """
    import transformers
    from transformers.initialization import no_init_weights

    path, raw = Path(folder) / "config.json", read_config(Path(folder))
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise CheckpointError(f"{path} holds no model_type ({family!r}); take the config.json of the checkpoint")
    if family not in transformers.CONFIG_MAPPING:
        remote = "auto_map" in raw
        hint = (
            "it would need the checkpoint's own code, which is never run" if remote else "update transformers if the family is new"
        )
        raise UnsupportedModelError(f"{path}: transformers {transformers.__version__} has no model type {family!r}; {hint}")
    try:
        raw = _config_dict(transformers.CONFIG_MAPPING[family], path)
        raw.pop("quantization_config", None)
        config = transformers.CONFIG_MAPPING[family].from_dict(raw)
        config = getattr(config, _TEXT_PART.get(family, ""), config)
        if wrong := broken_config_rule(config):
            raise CheckpointError(f"{wrong}; correct it, or take the checkpoint's own config.json")
        dtype = config.dtype or _stored_dtype(Path(folder))
        with no_init_weights(), _parameters_on_meta(), _LargeTensorsOnMeta():
            model: Any = auto_class(config).from_config(config, dtype=dtype)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:  # whatever a hostile config makes transformers raise
        raise CheckpointError(f"{path}: transformers cannot build this {family} model from it ({_in_one_line(error)})") from error
    stacks = expert_stacks(model)
    rule = broken_rule((stack.name, model.get_submodule(stack.name)) for stack in stacks) if stacks else None
    if not stacks and (others := lookalikes(model)):
        rule = f"experts are marked by transformers' decorator; {others[0]}"
    if rule is not None:
        raise UnsupportedModelError(
            f"{path}: transformers {transformers.__version__} breaks a rule of {family}: {rule}; `fate models` says which version "
            "was tried: install that one, and report the family"
        )
    if not stacks:
        raise UnsupportedModelError(f"{path}: {family} has no routed experts that transformers lets others run; nothing to offload")
    if odd := next((stack for stack in stacks if not 1 <= stack.top_k <= stack.num_experts), None):
        said = f"a token takes {odd.top_k} of {odd.num_experts} experts"
        raise CheckpointError(f"{path}: {said}, which cannot be; take the checkpoint's own config.json")
    model.eval()
    return model  # type: ignore[no-any-return]


def _config_dict(kind: Any, path: Path) -> dict[str, Any]:
    """config.json as transformers reads it (infinities, old names), which refuses byte order marks."""
    data = read_bounded(path)
    if (clean := unmarked_json(data)) == data:
        return kind.get_config_dict(path.parent)[0]  # type: ignore[no-any-return]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).write_bytes(clean)
        return kind.get_config_dict(folder)[0]  # type: ignore[no-any-return]


def auto_class(config: Any, names: Sequence[str] = TEXT_CLASSES) -> Any:
    """transformers' Auto class of the model that writes text under ``config``: the first of ``names`` that knows it.

    Raises UnsupportedModelError when none does: a classifier, an encoder, a part of a larger model.
    """
    import transformers

    for name in names:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return auto
    raise UnsupportedModelError(
        f"transformers {transformers.__version__} has no model that writes text for {config.model_type} "
        f"(looked in {', '.join(names)}); give a language model's checkpoint"
    )


def expert_stacks(model: nn.Module) -> list[ExpertStack]:
    """All routed experts of ``model``, in module order, which is the order in which the layers run."""
    stacks: list[ExpertStack] = []
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name, module in model.named_modules():
        if not is_experts(module):
            continue
        shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        if all(f"{name}.{key}" in tied for key in shapes):
            continue
        counts = {shape[0] for shape in shapes.values()}
        if len(counts) != 1:
            raise UnsupportedModelError(f"{name}: its parameters do not share one leading dimension of experts: {shapes}")
        per_expert = {key: shape[1:] for key, shape in shapes.items()}
        first = f"{name}.{next(iter(shapes))}"
        twins = tuple(key.rpartition(".")[0] for key, source in tied.items() if source == first)
        stacks.append(
            ExpertStack(len(stacks), name, counts.pop(), per_expert, bool(module.is_transposed), _top_k(model, name), twins)
        )
    return stacks


def _top_k(model: nn.Module, experts: str) -> int:
    """How many experts a token takes: what the configuration says, under any of the names that families have for it."""
    text = model.config.get_text_config()  # type: ignore[operator,union-attr]
    said = next((value for name in _TOP_K if (value := getattr(text, name, None)) is not None), None)
    if said is None:
        raise UnsupportedModelError(
            f"{experts}: the configuration of {text.model_type} does not say how many experts a token takes "
            f"(none of {', '.join(_TOP_K)}); please report the family"
        )
    return int(max(said) if isinstance(said, list | tuple) else said)


def parameter_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """The dtype in which transformers would hold each entry of ``model.state_dict()``, ``keep_in_fp32`` rules included.

    Patterns match anywhere in a name, as in transformers' convert_and_load_state_dict_in_model.
    """
    kept = {re.compile(pattern.replace("*", ".*")): dtype for pattern, dtype in model._get_dtype_plan(model.dtype).items()}
    return {
        name: next((dtype for pattern, dtype in kept.items() if pattern.search(name)), value.dtype)
        for name, value in model.state_dict().items()
    }


def _stored_dtype(folder: Path) -> torch.dtype:
    """The floating dtype of most of the weights in ``folder``'s first safetensors file; fp32 when there is none."""
    sizes: dict[torch.dtype, int] = dict.fromkeys(_DTYPES.values(), 0)
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                if part.get_dtype() in _DTYPES:
                    sizes[_DTYPES[part.get_dtype()]] += math.prod(part.get_shape())
    return max(sizes, key=lambda dtype: sizes[dtype])


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Within it, ``torch.empty`` of a large parameter asks for no memory, not even for addresses.

    Linux refuses addresses for more than all of memory at once, and one layer's experts of a large model are that.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **{**(kwargs or {}), "device": "meta"}) if func is torch.empty else None
        return made if made is not None and made.numel() >= _LARGE else func(*args, **(kwargs or {}))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it, every parameter a module registers is replaced by one on the meta device (empty memory is never touched)."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if value is not None and value.device.type != "meta":
            value = nn.Parameter(value.to("meta"), requires_grad=False)
        register(module, name, value)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _in_one_line(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    said = f"it does not know {said}" if isinstance(error, KeyError) else said
    return said if len(said) < 300 else f"{said[:300]} ..."
