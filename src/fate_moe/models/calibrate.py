"""What a text tells about a model's experts: which of their input channels matter, and what fewer bits would cost each layer."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fate_moe.config import OffloadConfig
from fate_moe.core import BlobLayout, ExpertId
from fate_moe.kernels.reference import expert_mlp, expert_weights
from fate_moe.models.evaluate import windows
from fate_moe.models.load import Prepared, prepare, realize
from fate_moe.quant.blob import encode, views
from fate_moe.quant.solver import DEFAULT_SOLVER, SOLVERS
from fate_moe.runtime import rows_by_expert
from fate_moe.store.format import blob_layout
from fate_moe.store.reader import DiskSource

__all__ = ["Calibration", "calibrate"]

# An expert with few tokens is taken to be like its layer's mean with the weight of so many tokens.
_PRIOR_TOKENS = 16.0


class Calibration:
    """Mean squares of the experts' inputs (by channel, weighed by the squared gate weight), and each layer's error by precision.

    ``harm[layer][precision]`` is the squared error of the layer's experts' summed outputs over the residual stream's square, both
    summed over the text's tokens; ``digest`` tells texts apart.
    """

    def __init__(self, digest: str, precisions: Sequence[str]) -> None:
        self.digest = digest
        self.harm: list[dict[str, float]] = []
        self._precisions = precisions
        self._squares: dict[tuple[int, int], dict[str, Tensor]] = {}  # by layer and expert: matrix -> [in], summed over tokens
        self._mass: dict[tuple[int, int], float] = {}  # summed squared gate weights
        self._errors: list[dict[str, float]] = []
        self._residual: list[float] = []

    def importance(self, layer: int, expert: int) -> dict[str, Tensor] | None:
        """[in] by matrix, for ``quant.blob.encode``; None where the layer saw no token."""
        of_layer = [key for key in self._squares if key[0] == layer]
        if not of_layer:
            return None
        total = sum(self._mass[key] for key in of_layer) or 1.0
        names = self._squares[of_layer[0]].keys()
        mean = {name: torch.stack([self._squares[key][name] for key in of_layer]).sum(0) / total for name in names}
        own, mass = self._squares.get((layer, expert)), self._mass.get((layer, expert), 0.0)
        prior = _PRIOR_TOKENS * total / max(1, len(of_layer)) / max(1.0, total)
        return {name: ((own[name] if own else 0.0) + prior * mean[name]) / (mass + prior) for name in names}


def calibrate(
    path: Path,
    tokens: Tensor,
    *,
    precisions: Sequence[str] = (),
    window: int = 512,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> Calibration:
    """Run the lossless store at ``path`` on ``tokens`` [num_tokens] int64; measure harm for ``precisions``.

    Takes the memory that the model takes, one more expert and one quantized copy of it.
    """
    found = Calibration(hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16], precisions)
    prepared = prepare(path)
    config = OffloadConfig(context_length=window, preset="load-on-demand")
    model = realize(prepared, prepared.plan(config), config)
    with closing(model.fate), closing(_Observer(prepared, model, found)) as observer, torch.inference_mode():
        observer.attach()
        for span in windows(len(tokens), window, window - 1):
            model(tokens[None, span.start : span.end], use_cache=False, logits_to_keep=1)
            advance(span.end - span.scored)
    found.harm = [
        {name: error / (residual or 1.0) for name, error in errors.items()}
        for errors, residual in zip(found._errors, found._residual, strict=True)
    ]
    return found


class _Observer:
    """Stands where the runtime stands: passes each call on, then looks at the experts' inputs with weights read once more."""

    def __init__(self, prepared: Prepared, model: Any, found: Calibration) -> None:
        self._prepared, self._model, self._found = prepared, model, found
        manifest = prepared.store.manifest
        self._source = DiskSource(prepared.store)
        self._memory = mmap.mmap(-1, manifest.slot_bytes)
        self._shapes = [stack.output_rows_first() for stack in prepared.stacks]
        self._layouts: list[dict[str, BlobLayout]] = [
            {name: blob_layout(name, shapes, manifest.dtype) for name in found._precisions} for shapes in self._shapes
        ]
        found._errors = [dict.fromkeys(found._precisions, 0.0) for _ in prepared.stacks]
        found._residual = [0.0] * len(prepared.stacks)
        self._runtime = model.fate.runtime

    def attach(self) -> None:
        """Every layer's experts call the observer from now on, and every decoder layer's input is measured."""
        for stack in self._prepared.stacks:
            self._model.get_submodule(stack.name).fate_runtime = self
            decoder_layer = self._model.get_submodule(stack.block.rpartition(".")[0])
            decoder_layer.register_forward_pre_hook(self._measuring(stack.layer), with_kwargs=True)

    def close(self) -> None:
        self._source.close()

    def compute(self, layer: int, experts: Any, hidden: Tensor, index: Tensor, routing_weights: Tensor) -> Tensor:
        """The runtime's own answer."""
        answer: Tensor = self._runtime.compute(layer, experts, hidden, index, routing_weights)
        flat = routing_weights.reshape(-1).float()
        errors = {name: torch.zeros(hidden.shape, dtype=torch.float32) for name in self._found._precisions}
        for expert, chosen in rows_by_expert(index, self._prepared.stacks[layer].num_experts).items():
            rows = torch.tensor(chosen)
            token = rows // index.shape[1]
            self._look(layer, experts, expert, hidden[token], flat[rows], {name: (errors[name], token) for name in errors})
        for name, error in errors.items():
            self._found._errors[layer][name] += float(error.square().sum())
        return answer

    def _look(
        self, layer: int, experts: Any, expert: int, x: Tensor, gate: Tensor, errors: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        """Expert ``expert`` on its tokens ``x`` [n, hidden] with gate weights [n]; adds to ``errors`` [all, hidden]."""
        layout = self._prepared.store.manifest.layout_of(ExpertId(layer, expert))
        self._source.read(ExpertId(layer, expert), memoryview(self._memory))
        parts = views(layout, torch.frombuffer(self._memory, dtype=torch.uint8)[: layout.length])
        weights = expert_weights(layout, parts, self._shapes[layer], x.dtype)
        into = "gate_up_proj" if experts.has_gate else "up_proj"
        inner = linear(x, weights[into], weights.get(f"{into}_bias"))
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        mass = gate.square()
        squares = {into: (x.float().square() * mass[:, None]).sum(0), "down_proj": (inner.float().square() * mass[:, None]).sum(0)}
        known = self._found._squares.setdefault((layer, expert), {name: torch.zeros_like(s) for name, s in squares.items()})
        for name, square in squares.items():
            known[name] += square
        self._found._mass[layer, expert] = self._found._mass.get((layer, expert), 0.0) + float(mass.sum())
        if errors:
            exact = expert_mlp(experts, weights, x).float()
        for name, (error, token) in errors.items():
            made = self._layouts[layer][name]
            blob = torch.frombuffer(encode(made, weights, SOLVERS[DEFAULT_SOLVER]), dtype=torch.uint8)
            fewer = expert_weights(made, views(made, blob), self._shapes[layer], x.dtype)
            error.index_add_(0, token, (expert_mlp(experts, fewer, x).float() - exact) * gate[:, None])

    def _measuring(self, layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            self._found._residual[layer] += float(stream.float().square().sum())

        return hook
