"""A whole decode step of plain decoder layers in a dozen launches a layer, captured in one CUDA graph.

``plain.py`` says which models' layers are plain and which of them this step can run; for all others the transformers modules run as
they are (``engine/cuda.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from fate_moe.errors import UnsupportedModelError
from fate_moe.gpu.dense import ByteLinear, Matrix, joined
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.prefill import dot_dtype
from fate_moe.kernels.plain_layer import PlainLayer
from fate_moe.kernels.triton_dense import attend_kernel, combine_kernel, matvec_kernel
from fate_moe.layers.plain import plain_layers
from fate_moe.layers.reasons import cuda_reasons

__all__ = ["FusedStep"]

ATTEND_ROWS = 32
_SPLITS = 16  # of the KV cache's length, per head: 64 programs for 4 key-value heads


@dataclass
class _Layer:
    """One layer's weights; q, k and v are one matrix, and so are a shared expert's gate and up. ``qkv_bias`` may be empty."""

    norm: torch.Tensor
    qkv: Matrix
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: Matrix
    post_norm: torch.Tensor
    shared_gate_up: Matrix | None
    shared_down: Matrix | None
    keys: torch.Tensor  # [kv heads, length, head_dim]
    values: torch.Tensor


class FusedStep:
    """``step()`` turns the token in ``token`` int64 [1] at ``position`` int64 [1] into ``logits`` fp32 [vocabulary] and the next
    token.

    It reads and extends ``cache`` (transformers' StaticCache of one sequence, already used once), writes the likeliest next token
    to ``token`` and to ``tokens[position]``, and advances ``position``. ``capture`` records the step; ``replay`` runs the record.
    """

    def __init__(self, model: Any, experts: DeviceExperts, cache: Any) -> None:
        """Raises UnsupportedModelError, with every reason, where ``cuda_reasons`` has some."""
        found = plain_layers(model)
        if reasons := cuda_reasons(model, found):
            raise UnsupportedModelError(f"no fused decode step: {'; '.join(reasons)}; let transformers' layers run")
        layers = [layer for layer in found if isinstance(layer, PlainLayer)]
        plain = layers[0]  # the others differ in their weights alone
        self._experts, self._model, self._cache = experts, model, cache
        self._eps = plain.input_norm.eps
        self._heads, self._kv, self._dim = plain.attention.heads, plain.attention.kv_heads, plain.attention.head_dim
        self._normalize = plain.router.normalize
        self._layers = [_layer(model, layer, cache.layers[layer.attention.index]) for layer in layers]
        self._length = self._layers[0].keys.shape[1]
        device, dtype = model.device, model.dtype
        self._dot = dot_dtype(dtype, device)
        self._rows = plain.router.num_experts + (plain.shared is not None)
        self._routers = _routers(model, layers, experts.state.fitted)
        self._inv_freq = model.model.rotary_emb.inv_freq.float()
        hidden = plain.hidden

        def empty(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        self._x, self._normed = empty(1, hidden, kind=dtype), empty(hidden, kind=dtype)
        self._qkv, self._attended = empty(_shape(self._layers[0].qkv)[0], kind=dtype), empty(self._heads * self._dim, kind=dtype)
        self._most, self._sums = empty(self._heads, _SPLITS), empty(self._heads, _SPLITS)
        self._parts = empty(self._heads, _SPLITS, self._dim)
        self._router_logits = empty(2 * self._rows)
        self._weights = empty(1, experts.state.top_k, kind=dtype)
        down = self._layers[0].shared_down
        self._shared = empty(1 if down is None else _shape(down)[1], kind=dtype)
        self._head = joined([model.lm_head])
        self.token, self.position = empty(1, kind=torch.int64), empty(1, kind=torch.int64)
        self.logits = empty(_shape(self._head)[0])
        self.tokens = empty(self._length + 1, kind=torch.int64)
        # For measurements: int64 [length + 1], tokens to go on with instead of the likeliest, and fp32 [layers, experts], what to
        # predict layers by instead of their routers.
        self.script: torch.Tensor | None = None
        self.predicted: torch.Tensor | None = None
        self._graph: Any = None

    def begin(self, token: int, position: int) -> None:
        """The next step is given ``token`` at ``position`` (tokens already in the cache)."""
        self.token.fill_(token)
        self.position.fill_(position)

    @torch.no_grad()
    def step(self) -> None:
        torch.index_select(self._model.model.embed_tokens.weight, 0, self.token, out=self._x)
        for number, layer in enumerate(self._layers):
            self._attend(layer)
            self._moe(number, layer)
        self._matvec(self._x, self._head, self.logits, norm=self._model.model.norm.weight)
        torch.argmax(self.logits, 0, keepdim=True, out=self.token)
        self.position.add_(1)
        self.tokens.index_copy_(0, self.position, self.token)
        if self.script is not None:
            torch.index_select(self.script, 0, self.position, out=self.token)

    @torch.no_grad()
    def capture(self) -> None:
        """Record one step; the model's state afterwards is as before, except for residency, which moves."""
        token, position = self.token.clone(), self.position.clone()
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles what is not compiled yet
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.step()
        self.token.copy_(token)
        self.position.copy_(position)

    def replay(self) -> None:
        """Run the recorded step."""
        self._graph.replay()

    def _attend(self, layer: _Layer) -> None:
        self._matvec(self._x, layer.qkv, self._qkv, norm=layer.norm, bias=layer.qkv_bias)
        group = self._heads // self._kv
        norm = layer.q_norm is not None
        attend_kernel[(self._kv, _SPLITS)](
            self._qkv, layer.q_norm if norm else self._qkv, layer.k_norm if norm else self._qkv, self._inv_freq, self.position,
            layer.keys, layer.values, self._most, self._sums, self._parts, self._eps, self._dim**-0.5, self._length,
            num_kv=self._kv, group=group, NORM=norm, D=self._dim, GP=max(16, triton.next_power_of_2(group)), DOT=self._dot,
            CHUNK=triton.cdiv(self._length, _SPLITS), BS=ATTEND_ROWS, num_warps=4,
        )  # fmt: skip
        combine_kernel[(self._heads,)](
            self._most,
            self._sums,
            self._parts,
            self._attended,
            _SPLITS,
            D=self._dim,
            SP=triton.next_power_of_2(_SPLITS),
            num_warps=4,
        )
        self._matvec(self._attended, layer.out, self._x, residual=self._x)

    def _moe(self, number: int, layer: _Layer) -> None:
        last = number == len(self._layers) - 1
        rows, bias = self._routers[number]
        self._matvec(self._x, rows, self._router_logits, norm=layer.post_norm, bias=bias, stage=True)
        ahead = self._router_logits[self._rows :] if self.predicted is None or last else self.predicted[number + 1]
        self._experts.route(number, self._router_logits, ahead, self._normed, self._weights, self._normalize)
        beside = None
        if layer.shared_gate_up is not None and layer.shared_down is not None:
            gate_up, down, gate = layer.shared_gate_up, layer.shared_down, self._router_logits[self._rows - 1 :]

            def beside() -> None:
                self._matvec(self._normed, gate_up, self._shared, silu=True)
                self._matvec(self._shared, down, self._x, residual=self._x, gate=gate)

        self._experts.run(number, self._weights, self._x, add=True, beside=beside)

    def _matvec(
        self,
        x: torch.Tensor,
        matrix: Matrix,
        out: torch.Tensor,
        *,
        norm: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        silu: bool = False,
        stage: bool = False,
    ) -> None:
        rows, cols = _shape(matrix)
        rows //= 2 if silu else 1
        none = out  # a pointer for what a flag turns off
        codes = isinstance(matrix, ByteLinear)
        weight, scale, zero = (matrix.codes, matrix.scale, matrix.zero) if isinstance(matrix, ByteLinear) else (matrix, none, none)
        block, wide, warps = matvec_tile(rows, cols)
        matvec_kernel[(triton.cdiv(rows, block),)](
            x, none if norm is None else norm, weight, scale, zero, none if bias is None else bias,
            none if residual is None else residual, none if gate is None else gate, self._normed, self._experts.state.staged, out,
            self._eps, cols=cols, rows=rows, CODES=codes, NORM=norm is not None, BIAS=bias is not None,
            RESIDUAL=residual is not None, GATE=gate is not None, SILU=silu, STAGE=stage,
            STAGE_PLANES=self._experts.state.layouts[0].planes, BN=block, BK=wide, num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip


def matvec_tile(rows: int, cols: int) -> tuple[int, int, int]:
    """(rows of a program, columns at once, warps)."""
    return 4 if rows < 32768 else 16, min(2048, max(64, triton.next_power_of_2(cols))), 8


def _layer(model: Any, plain: PlainLayer, cache: Any) -> _Layer:
    block = model.get_submodule(plain.path)
    attention = block.self_attn
    shared = block.get_submodule(f"{plain.block}.{plain.shared.name}") if plain.shared is not None else None
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    with_norms = plain.attention.qk_norm is not None
    return _Layer(
        norm=block.input_layernorm.weight,
        qkv=joined(parts),
        qkv_bias=_with_views([part.bias for part in parts]) if plain.attention.qkv_bias else None,
        q_norm=attention.q_norm.weight if with_norms else None,
        k_norm=attention.k_norm.weight if with_norms else None,
        out=joined([attention.o_proj]),
        post_norm=block.post_attention_layernorm.weight,
        shared_gate_up=joined([shared.gate_proj, shared.up_proj]) if shared is not None else None,
        shared_down=joined([shared.down_proj]) if shared is not None else None,
        keys=cache.keys[0],
        values=cache.values[0],
    )


def _routers(
    model: Any, layers: Sequence[PlainLayer], fitted: Sequence[torch.Tensor | None]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Of each layer one matrix, and its bias: the router, the shared expert's gate, then what predicts the next layer's choice.

    Where that is the next layer's own router, which comes next, the matrix is a view.
    """
    blocks, rows = [], layers[0].router.num_experts + (layers[0].shared is not None)
    for layer in layers:
        block = model.get_submodule(f"{layer.path}.{layer.block}")
        blocks.append(block.get_submodule(layer.router_name).weight)
        if layer.shared is not None and layer.shared.gate is not None:
            blocks.append(block.get_submodule(layer.shared.gate).weight)
    whole, per_layer = _with_views(blocks), len(blocks) // len(layers)
    made: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for number, gate in enumerate([*fitted[1:], None]):
        own = whole[number * rows : (number + 1) * rows]
        if gate is None:
            made.append((whole[number * rows : (number + 2) * rows], None))
        else:
            weight, bias = gate[:, :-1].to(own), gate[:, -1].to(own)
            both = _with_views(blocks[number * per_layer : (number + 1) * per_layer], weight)
            made.append((both, torch.nn.functional.pad(bias, (rows, 0))))
    return made


def _with_views(parameters: Sequence[torch.Tensor], *others: torch.Tensor) -> torch.Tensor:
    """``parameters``, then ``others``, as one tensor, of which ``parameters`` become views: an edit in place is seen in both."""
    whole = torch.cat([*(parameter.data for parameter in parameters), *others])
    sizes = [len(parameter) for parameter in parameters]
    for parameter, view in zip(parameters, torch.split(whole[: sum(sizes)], sizes), strict=True):
        parameter.data = view
    return whole


def _shape(matrix: Matrix) -> tuple[int, int]:
    if isinstance(matrix, ByteLinear):
        return matrix.out_features, matrix.in_features
    return matrix.shape[0], matrix.shape[1]
