"""Dense weights in a store: which are quantized, their layouts, and how they are encoded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fate_moe.core import BlobLayout
from fate_moe.quant.blob import views
from fate_moe.quant.planes import pack
from fate_moe.quant.solver import Solver, minmax
from fate_moe.store.format import blob_layout

__all__ = [
    "DenseEncoder",
    "byte_length",
    "default_dense_precision",
    "dense_layouts",
    "encode_dense",
    "one_product",
    "row_read_parameter",
    "tied_modules",
]

# Smaller matrices stay lossless: quantizing them would save too little memory to matter.
MIN_QUANTIZED_ELEMENTS = 1 << 16
# Router modules, by transformers' names. They stay lossless: a wrongly chosen expert costs more than their bytes.
_ROUTERS = ("gate", "router", "wg", "shared_expert_gate")
# Linear layers whose rows of output are in groups, each of which multiplies columns of its own.
_GROUPED = ("DeepseekV4GroupedLinear",)
# Embeddings that their model also multiplies by, with numbers of its own making: it would write the whole matrix out each time.
_MULTIPLIED = ("DiffusionGemmaTextScaledWordEmbedding",)
# Weights solved at a time. A solver needs several times as much in fp32; chosen by peak memory (tests/store/test_streaming.py).
_CHUNK = 1 << 17


def default_dense_precision(precision: str) -> str:
    """int8 if the experts are quantized: every token uses the dense weights, and they are small compared with the experts."""
    return "lossless" if precision == "lossless" else "int8"


def dense_layouts(model: nn.Module, dense_precision: str) -> dict[str, BlobLayout]:
    """Layouts, by name, of the parameters that a store of ``model`` quantizes: matrices ``weight`` in groups of 64.

    These are all Linear modules except routers and small ones, and embeddings. Embeddings and the LM head are int8 at least: a row
    of the one is the whole input of its token, and in four bits the other costs too much (docs/notebook/quality.md). Tied matrices
    are one, under the name that a store has it by.
    """
    if dense_precision == "lossless":
        return {}
    tied, head = _tied(model), model.get_output_embeddings()  # type: ignore[operator]
    layouts = {}
    for path, module in model.named_modules():
        name = f"{path}.weight"
        weight = module._parameters.get("weight")
        if name in tied or weight is None or weight.dim() != 2 or weight.numel() < MIN_QUANTIZED_ELEMENTS:
            continue
        uses = {_use(model, target) for target in (name, *(target for target, source in tied.items() if source == name))}
        if "" not in uses:
            precision = "int8" if "embedding" in uses or module is head else dense_precision
            layouts[name] = blob_layout(precision, {"weight": tuple(weight.shape)}, "BF16")
    return layouts


def _use(model: nn.Module, parameter: str) -> str:
    """What its module does with ``parameter``: "product", "groups" (products of groups of rows with inputs of their own),
    "embedding" (rows are looked up), "" if it must stay as numbers."""
    path, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(path)
    kind = type(module).__name__
    if leaf != "weight":
        return ""
    if type(module) is nn.Linear:
        return "product" if path.rpartition(".")[2] not in _ROUTERS else ""
    if kind in _GROUPED:
        return "groups"
    return "embedding" if isinstance(module, nn.Embedding) and module.max_norm is None and kind not in _MULTIPLIED else ""


def _tied(model: nn.Module) -> dict[str, str]:
    """Of each tied parameter of ``model`` the name of the one that a store has."""
    return getattr(model, "all_tied_weights_keys", {})


def tied_modules(model: nn.Module, parameter: str) -> list[str]:
    """The paths of all modules whose weight is ``parameter``, a name that a store has."""
    names = [parameter, *(target for target, source in _tied(model).items() if source == parameter)]
    return [name.rpartition(".")[0] for name in names]


def one_product(model: nn.Module, parameter: str) -> bool:
    """Whether ``parameter`` is the weight of one plain Linear module and nothing else."""
    return len(tied_modules(model, parameter)) == 1 and _use(model, parameter) == "product"


def byte_length(layout: BlobLayout) -> int:
    """Bytes of a matrix in ``layout`` with one byte per code, as on a GPU: codes, scales and zeros."""
    rows, groups = next(part.shape for part in layout.parts if part.name == "weight.scale")
    return max(rows * groups * (layout.group_size + 4), layout.length if layout.plane_widths == (8,) else 0)


def row_read_parameter(model: nn.Module) -> str | None:
    """The name of the embedding's parameter if a forward pass needs only the rows of its tokens; None if it is small or tied."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, nn.Embedding) or embedding.weight.numel() < MIN_QUANTIZED_ELEMENTS:
        return None
    name = next(f"{path}.weight" for path, module in model.named_modules() if module is embedding)
    tied = _tied(model)
    return name if name not in {*tied, *tied.values()} and _use(model, name) == "embedding" else None


class DenseEncoder:
    """Makes the blob of a matrix [R, C] from its rows, as they come. Codes of 8 bits depend on their row alone."""

    def __init__(self, layout: BlobLayout, solver: Solver = minmax) -> None:
        self.blob = torch.zeros(layout.length, dtype=torch.uint8)
        self.rows = 0  # so many are encoded
        self._layout = layout
        self._parts = views(layout, self.blob)
        self._bits = sum(layout.plane_widths)
        self._solve = minmax if self._bits == 8 else solver  # an 8-bit step is 1/17 of a 4-bit step: a solver gains nothing

    def add(self, weight: Tensor) -> None:
        """The next rows [n, C], all of them finite."""
        step, widths = max(1, _CHUNK // weight.shape[1]), self._layout.plane_widths
        kinds = ["scale", "zero", *(f"plane{i}" for i in range(len(widths)))]
        for rows in torch.split(weight, step):
            codes, scale, zero = self._solve(rows.float(), self._bits, self._layout.group_size)
            encoded = [scale, zero, *pack(codes, self._layout.group_size, widths)]
            for kind, part in zip(kinds, encoded, strict=True):
                self._parts[f"weight.{kind}"][self.rows : self.rows + len(rows)].copy_(part)
            self.rows += len(rows)


def encode_dense(layout: BlobLayout, weight: Tensor, solver: Solver) -> Tensor:
    """The blob uint8 [layout.length] of ``weight`` [R, C], all of it finite."""
    encoder = DenseEncoder(layout, solver)
    encoder.add(weight)
    return encoder.blob
