"""A whole decode step of plain decoder layers in a dozen launches a layer, captured in a CUDA graph for each number of rows.

``plain.py`` says which models' layers are plain and which of them this step can run; for all others the transformers modules run as
they are (``engine/cuda.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import triton

from fate_moe.core import KV_BLOCK
from fate_moe.errors import UnsupportedModelError
from fate_moe.gpu.dense import ByteLinear, Matrix, joined
from fate_moe.gpu.experts import DeviceExperts
from fate_moe.gpu.prefill import dot_dtype
from fate_moe.kernels.plain_layer import Norm, PlainLayer
from fate_moe.kernels.triton_dense import attend_kernel, combine_kernel, heads_kernel, matvec_kernel, place_kernel
from fate_moe.layers.plain import plain_decoder, recognise_norm
from fate_moe.layers.reasons import cuda_reasons

__all__ = ["MOST_ROWS", "FusedStep"]

MOST_ROWS = 16
ATTEND_ROWS = 32
NO_NORM = Norm(0.0)
_SPLITS = 16  # of the KV cache's length, per head: 64 programs for 4 key-value heads


@dataclass
class _Norm:
    """A norm's weights; ``bias`` where it has one."""

    kind: Norm
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass
class _Layer:
    """One decoder layer's weights and what it is; q, k and v are one matrix, and so are an MLP's gate and up. ``mlp_*``: of a
    shared expert, or of a layer without experts. ``correction`` is its router's."""

    plain: PlainLayer
    norm: _Norm
    qkv: Matrix
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    sinks: torch.Tensor | None
    out: Matrix
    out_bias: torch.Tensor | None
    post_norm: _Norm
    mlp_gate_up: Matrix | None
    mlp_down: Matrix | None
    correction: torch.Tensor | None
    keys: torch.Tensor  # [kv heads, length, head_dim]
    values: torch.Tensor


@dataclass
class _Buffers:
    """What a step works in, [rows, ...] each."""

    x: torch.Tensor
    normed: torch.Tensor
    qkv: torch.Tensor
    queries: torch.Tensor
    attended: torch.Tensor
    most: torch.Tensor
    sums: torch.Tensor
    parts: torch.Tensor
    router_logits: torch.Tensor
    weights: torch.Tensor
    inner: torch.Tensor
    logits: torch.Tensor

    def first(self, rows: int) -> _Buffers:
        """The first ``rows`` rows."""
        return _Buffers(**{name: value[:rows] for name, value in vars(self).items()})


class FusedStep:
    """``step(rows)`` turns the tokens in ``ids`` int64 [MOST_ROWS] at ``positions`` int64 [MOST_ROWS] into ``all_logits`` fp32
    [MOST_ROWS, vocabulary] and the next tokens. ``token``, ``position`` and ``logits`` are the first row's, of which alone is told
    where not more is said.

    It reads and extends ``cache`` (transformers' StaticCache of one sequence, already used once), whose positions are KV_BLOCK at a
    time the blocks of ``table`` int32 [MOST_ROWS, blocks]: a row's sequence has position p in block table[row, p // KV_BLOCK]. At
    first the cache is one sequence. Of ``rows`` only the first ``live`` int32 [1] are there; rows of one sequence see those before
    them. A row's logits have the same bits in any company. The likeliest next tokens are written to ``ids`` (the first row's to
    ``tokens[position]`` as well), and ``positions`` advance. ``capture`` records steps; ``replay`` runs the record.
    """

    def __init__(self, model: Any, experts: DeviceExperts, cache: Any) -> None:
        """Raises UnsupportedModelError, with every reason, where ``cuda_reasons`` has some."""
        if reasons := cuda_reasons(model):
            raise UnsupportedModelError(f"no fused decode step: {'; '.join(reasons)}; let transformers' layers run")
        layers = [layer for layer in plain_decoder(model) if isinstance(layer, PlainLayer)]
        with_experts = [layer for layer in layers if not layer.is_dense]
        plain = with_experts[0]  # the others differ in their weights and windows alone, or have no experts
        self._experts, self._model, self._cache = experts, model, cache
        self._heads, self._kv, self._dim = plain.attention.heads, plain.attention.kv_heads, plain.attention.head_dim
        self._router = plain.router
        self._layers = [_layer(model, layer, cache.layers[layer.attention.index]) for layer in layers]
        self._length = self._layers[0].keys.shape[1]
        device, dtype = model.device, model.dtype
        self._dot = dot_dtype(dtype, device)
        self._router_rows = plain.router.num_experts + (plain.shared is not None and plain.shared.gate is not None)
        self._routers = _routers(model, with_experts, experts.state.fitted)
        self._corrections = [*(layer.correction for layer in self._layers if not layer.plain.is_dense), None]
        rope = model.model.rotary_emb
        self._inv_freq, self._rope_scale = rope.inv_freq.float(), float(rope.attention_scaling)
        one = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._rounds_angles = rope(torch.zeros(1, 1, plain.hidden, dtype=dtype, device=device), one)[0].dtype == dtype
        hidden = plain.hidden

        def empty(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(MOST_ROWS, *shape, dtype=kind, device=device)

        inner = max(1 if layer.mlp_down is None else _shape(layer.mlp_down)[1] for layer in self._layers)
        last = recognise_norm(model.model.norm)
        assert isinstance(last, Norm)
        self._last_norm, self._head = _norm(last, model.model.norm), joined([model.lm_head])
        self._all = _Buffers(
            x=empty(hidden, kind=dtype),
            normed=empty(hidden, kind=dtype),
            qkv=empty(_shape(self._layers[0].qkv)[0], kind=dtype),
            queries=empty(self._heads * self._dim, kind=dtype),
            attended=empty(self._heads * self._dim, kind=dtype),
            most=empty(self._heads, _SPLITS),
            sums=empty(self._heads, _SPLITS),
            parts=empty(self._heads, _SPLITS, self._dim),
            router_logits=empty(2 * self._router_rows),
            weights=empty(experts.state.top_k, kind=dtype if plain.router.rounds_weights else torch.float32),
            inner=empty(inner, kind=dtype),
            logits=empty(_shape(self._head)[0]),
        )
        self._rows = self._all.first(1)  # those of the step that is being enqueued
        self.most_rows = experts.most_tokens(MOST_ROWS)
        self.numbers = torch.zeros(2, MOST_ROWS, dtype=torch.int64, device=device)
        self.ids, self.positions = self.numbers
        self.token, self.position = self.ids[:1], self.positions[:1]
        self.all_logits, self.logits = self._all.logits, self._all.logits[0]
        self.live = torch.ones(1, dtype=torch.int32, device=device)
        self.table = torch.empty(MOST_ROWS, triton.cdiv(self._length, KV_BLOCK), dtype=torch.int32, device=device)
        self.whole()
        self.tokens = torch.zeros(self._length + 1, dtype=torch.int64, device=device)
        # For measurements: int64 [length + 1], tokens to go on with instead of the likeliest, and fp32 [layers, experts], what to
        # predict layers by instead of their routers.
        self.script: torch.Tensor | None = None
        self.predicted: torch.Tensor | None = None
        self._graphs = dict[int, Any]()

    def whole(self) -> None:
        """The cache is one sequence, and steps are of one row."""
        self.live.fill_(1)
        self.table.copy_(torch.arange(self.table.shape[1]))

    def begin(self, token: int, position: int) -> None:
        """The next step is given ``token`` at ``position`` (tokens already in the cache)."""
        self.token.fill_(token)
        self.position.fill_(position)

    @torch.no_grad()
    def step(self, rows: int = 1) -> None:
        """Enqueue a step of ``rows``, a power of two up to ``most_rows``."""
        self._rows = here = self._all.first(rows)
        ids, positions = self.ids[:rows], self.positions[:rows]
        torch.index_select(self._model.model.embed_tokens.weight, 0, ids, out=here.x)
        number = 0
        for layer in self._layers:
            self._attend(layer)
            if layer.plain.is_dense:
                self._mlp(layer, here.x, layer.post_norm)
            else:
                self._moe(number, layer)
                number += 1
        self._matvec(here.x, self._head, here.logits, norm=self._last_norm, bias=self._model.lm_head.bias)
        torch.argmax(here.logits, 1, out=ids)
        positions.add_(1)
        if rows == 1:
            self.tokens.index_copy_(0, self.position, self.token)
            if self.script is not None:
                torch.index_select(self.script, 0, self.position, out=self.token)

    @torch.no_grad()
    def capture(self, rows: int = 1) -> None:
        """Record one step of ``rows``; the model's state afterwards is as before, except for residency, which moves."""
        ids, positions = self.ids.clone(), self.positions.clone()
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles what is not compiled yet
                self.step(rows)
        torch.cuda.current_stream().wait_stream(side)
        self._graphs[rows] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graphs[rows]):
            self.step(rows)
        self.ids.copy_(ids)
        self.positions.copy_(positions)

    def replay(self, rows: int = 1) -> None:
        """Run the recorded step of ``rows``."""
        self._graphs[rows].replay()

    def _attend(self, layer: _Layer) -> None:
        attention, here = layer.plain.attention, self._rows
        self._matvec(here.x, layer.qkv, here.qkv, norm=layer.norm, bias=layer.qkv_bias)
        group, norm, none, rows = self._heads // self._kv, attention.qk_norm, here.qkv, len(here.x)
        q_norm, k_norm = (none if weight is None else weight for weight in (layer.q_norm, layer.k_norm))
        eps = 0.0 if norm is None else norm.eps
        if attention.norm_over_heads or attention.clip is not None:
            heads_kernel[(3, rows)](
                here.qkv, q_norm, k_norm, eps, attention.clip or 0.0, Q=self._heads * self._dim, K=self._kv * self._dim,
                NORM=attention.norm_over_heads, CLIP=attention.clip is not None,
                BLOCK=triton.next_power_of_2(self._heads * self._dim), num_warps=8,
            )  # fmt: skip
        blocks = self.table.shape[1]
        place_kernel[(self._heads + 2 * self._kv, rows)](
            here.qkv, q_norm, k_norm, self._inv_freq, self.positions, self.table, self.live, here.queries, layer.keys, layer.values,
            eps, self._rope_scale, self._length, blocks, num_kv=self._kv, group=group,
            NORM=norm is not None and not attention.norm_over_heads, TURNED=attention.rotary_dim, PAIRS=attention.rope == "pairs",
            ROUNDS=self._rounds_angles, BLOCK=KV_BLOCK, D=self._dim, num_warps=1,
        )  # fmt: skip
        attend_kernel[(self._kv, _SPLITS, rows)](
            here.queries, self.positions, self.table, self.live, layer.keys, layer.values, here.most, here.sums, here.parts,
            attention.scaling, self._length, blocks, num_kv=self._kv, group=group, WINDOW=attention.window or 0, DOT=self._dot,
            D=self._dim, GP=max(16, triton.next_power_of_2(group)), CHUNK=triton.cdiv(blocks, _SPLITS) * KV_BLOCK, BLOCK=KV_BLOCK,
            BS=ATTEND_ROWS, num_warps=4,
        )  # fmt: skip
        combine_kernel[(self._heads, rows)](
            here.most, here.sums, here.parts, none if layer.sinks is None else layer.sinks, self.live, here.attended, _SPLITS,
            SINKS=layer.sinks is not None, D=self._dim, SP=triton.next_power_of_2(_SPLITS), num_warps=4,
        )  # fmt: skip
        self._matvec(here.attended, layer.out, here.x, bias=layer.out_bias, residual=here.x)

    def _mlp(self, layer: _Layer, x: torch.Tensor, norm: _Norm | None, gate: torch.Tensor | None = None) -> None:
        """Add the MLP of ``x`` to the residual stream."""
        assert layer.mlp_gate_up is not None
        assert layer.mlp_down is not None
        here = self._rows
        inner = here.inner.flatten()[: len(x) * _shape(layer.mlp_down)[1]].view(len(x), -1)
        self._matvec(x, layer.mlp_gate_up, inner, norm=norm, silu=True)
        self._matvec(inner, layer.mlp_down, here.x, residual=here.x, gate=gate)

    def _moe(self, number: int, layer: _Layer) -> None:
        here, last = self._rows, number == len(self._routers) - 1
        rows, bias = self._routers[number]
        self._matvec(here.x, rows, here.router_logits, norm=layer.post_norm, bias=bias, stage=True)
        predicted = self.predicted is not None and not last
        ahead = self.predicted[number + 1, None] if predicted and self.predicted is not None else None
        own = self._router_rows
        self._experts.route(
            number, here.router_logits, here.router_logits[:, own:] if ahead is None else ahead, here.normed, here.weights,
            self._router, self.live, (self._corrections[number], self._corrections[number + 1]), predicted=predicted,
        )  # fmt: skip
        beside, shared = None, layer.plain.shared
        if shared is not None:
            gate = here.router_logits[:, own - 1 :] if shared.gate is not None else None

            def beside() -> None:
                self._mlp(layer, here.normed, None, gate)

        self._experts.run(number, here.weights, here.x, add=True, beside=beside)

    def _matvec(
        self,
        x: torch.Tensor,
        matrix: Matrix,
        out: torch.Tensor,
        *,
        norm: _Norm | None = None,
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
        of = NO_NORM if norm is None else norm.kind
        block, wide, warps = matvec_tile(rows, cols)
        matvec_kernel[(len(x), triton.cdiv(rows, block))](
            x, none if norm is None else norm.weight, none if norm is None or norm.bias is None else norm.bias, weight, scale, zero,
            none if bias is None else bias, none if residual is None else residual, none if gate is None else gate,
            self._rows.normed, self._experts.state.staged, out, of.eps, out.stride(0), 0 if gate is None else gate.stride(0),
            cols=cols, rows=rows, CODES=codes, NORM=norm is not None, ROUNDS=of.rounds_first, CENTERED=of.centered,
            NORM_BIAS=of.bias, BIAS=bias is not None,
            RESIDUAL=residual is not None, GATE=gate is not None, SILU=silu, STAGE=stage,
            STAGE_PLANES=self._experts.state.layouts[0].planes, BN=block, BK=wide, num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip


def matvec_tile(rows: int, cols: int) -> tuple[int, int, int]:
    """(rows of a program, columns at once, warps)."""
    return 4 if rows < 32768 else 16, min(2048, max(64, triton.next_power_of_2(cols))), 8


def _layer(model: Any, plain: PlainLayer, cache: Any) -> _Layer:
    block = model.get_submodule(plain.path)
    attention, moe = block.self_attn, block.get_submodule(plain.block)
    mlp = None if plain.shared is None else moe.get_submodule(plain.shared.name)
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    with_norms = plain.attention.qk_norm is not None
    correction = attrgetter(plain.router.correction)(moe).flatten() if plain.router.correction else None
    return _Layer(
        plain=plain,
        norm=_norm(plain.input_norm, block.input_layernorm),
        qkv=joined(parts),
        qkv_bias=_with_views([part.bias for part in parts]) if plain.attention.qkv_bias else None,
        q_norm=attention.q_norm.weight if with_norms else None,
        k_norm=attention.k_norm.weight if with_norms else None,
        sinks=attention.sinks if plain.attention.sinks else None,
        out=joined([attention.o_proj]),
        out_bias=attention.o_proj.bias,
        post_norm=_norm(plain.post_norm, block.post_attention_layernorm),
        mlp_gate_up=joined([mlp.gate_proj, mlp.up_proj]) if mlp is not None else None,
        mlp_down=joined([mlp.down_proj]) if mlp is not None else None,
        correction=correction,
        keys=cache.keys[0],
        values=cache.values[0],
    )


def _norm(kind: Norm, module: Any) -> _Norm:
    return _Norm(kind, module.weight, module.bias if kind.bias else None)


def _routers(
    model: Any, layers: Sequence[PlainLayer], fitted: Sequence[torch.Tensor | None]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Of each layer one matrix, and its bias: the router, the shared expert's gate, then what predicts the next layer's choice.

    Where that is the next layer's own router, which comes next, the matrix is a view.
    """
    first = layers[0]
    with_gate = first.shared is not None and first.shared.gate is not None
    blocks, biases, rows = [], list[torch.Tensor](), first.router.num_experts + with_gate
    for layer in layers:
        block = model.get_submodule(f"{layer.path}.{layer.block}")
        router = block.get_submodule(layer.router_name)
        blocks.append(router.weight)
        if layer.router.bias:
            biases.append(router.bias)
        if with_gate and layer.shared is not None and layer.shared.gate is not None:
            blocks.append(block.get_submodule(layer.shared.gate).weight)
            if layer.router.bias:
                biases.append(torch.zeros_like(router.bias[:1]))
    whole, per_layer = _with_views(blocks), len(blocks) // len(layers)
    biases = [torch.cat(biases)] if biases else []  # as whole's rows
    made: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for number, gate in enumerate([*fitted[1:], None]):
        own = whole[number * rows : (number + 1) * rows]
        own_bias = biases[0][number * rows : (number + 1) * rows] if biases else None
        if gate is None:
            both = slice(number * rows, (number + 2) * rows)
            made.append((whole[both], biases[0][both] if biases else None))
        else:
            weight, bias = gate[:, :-1].to(own), gate[:, -1].to(own)
            joint = _with_views(blocks[number * per_layer : (number + 1) * per_layer], weight)
            made.append((joint, torch.cat([torch.zeros_like(bias[:1]).expand(rows) if own_bias is None else own_bias, bias])))
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
