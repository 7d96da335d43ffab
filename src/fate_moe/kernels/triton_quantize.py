"""Int8 activations on the GPU: ``reference.quantize_activations``, written where the experts' kernels look for them.

Decode's kernels take a *staged* activation: 64 words of 4 bytes for each group of 64 columns, of which 34 are used. A warp asks
for the same word of neighbouring groups at once, so these lie side by side. For codes in planes:

    words 0 .. 16 G - 1     word 4 (j G + g) + i holds elements 16 j + 4 i .. + 3 of group g, as the 2-bit plane has them
    words 16 G .. 32 G - 1  word 16 G + 2 (s G + g) + w holds elements 32 w + s + 0, 8, 16, 24, as the 1-bit planes have them
    words 32 G .. 34 G - 1  the groups' scales, then the sums of their codes, fp32

For codes of one byte the first 16 G words hold the elements in their order. Unquantized weights have fp32 activations in theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = [
    "ASM",
    "dot4",
    "four",
    "halves",
    "quantize_groups",
    "quantize_rows_kernel",
    "stage",
    "stage_token",
    "store_codes",
    "store_group",
    "two",
]

# Whether PTX can be written in place: not under Triton's interpreter. What stands beside it computes the same.
ASM = tl.constexpr(torch.version.cuda is not None and not triton.knobs.runtime.interpret)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to a number below 2^22, it leaves the nearest integer in the low bits
_ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def dot4(a, b, total):
    """total + the sum of four products: bytes of ``a`` (0 to 255) with those of ``b`` (-128 to 127), all int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )
    for i in tl.static_range(4):
        total += ((a >> (8 * i)) & 255) * ((b << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def to_float(x):
    """fp32 of int32 ``x`` below 2^22 in magnitude, by one addition instead of a conversion (a quarter of the rate)."""
    return (x + _ROUND_BITS).to(tl.float32, bitcast=True) - _ROUND


@triton.jit
def four(words, N: tl.constexpr):
    """Four neighbouring words each, of ``words`` [R, 4 N]: each [R, N]."""
    rows: tl.constexpr = words.shape[0]
    even, odd = tl.split(tl.reshape(words, (rows, N, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def two(words, N: tl.constexpr):
    """Two neighbouring words each, of ``words`` [R, 2 N]: each [R, N]."""
    rows: tl.constexpr = words.shape[0]
    return tl.split(tl.reshape(words, (rows, N, 2)))


@triton.jit
def halves(t):
    """The first and the second half of the columns of ``t`` [R, N]: each [R, N / 2]."""
    rows: tl.constexpr = t.shape[0]
    half: tl.constexpr = t.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(t, (rows, 2, half)), (0, 2, 1)))


@triton.jit
def quantize_groups(x):
    """(codes int32, scale [A, 1] fp32, sum of codes [A, 1] fp32) of the groups ``x`` [A, 64]."""
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)[:, None]  # NaN is the largest
    finite = largest < 0x7F800000
    amax = largest.to(tl.float32, bitcast=True)
    some = finite & (amax >= 1e-30)
    inverse = tl.where(some, tl.div_rn(tl.full(amax.shape, 127.0, tl.float32), tl.where(some, amax, 1.0)), 0.0)
    codes = (tl.where(finite, x * inverse, 0.0) + _ROUND).to(tl.int32, bitcast=True) - _ROUND_BITS
    scale = tl.where(finite, tl.div_rn(amax, tl.full(amax.shape, 127.0, tl.float32)), float("nan"))
    return codes, scale, tl.sum(codes, axis=1)[:, None].to(tl.float32)


@triton.jit
def store_group(staged, codes, scale, total, g, mask, groups: tl.constexpr, PLANES: tl.constexpr):
    """Write what ``quantize_groups`` made of groups ``g`` [A, 1] to a staged activation of ``groups`` groups."""
    words = staged.to(tl.pointer_type(tl.int32))
    octets = words.to(tl.pointer_type(tl.int8))
    e = tl.arange(0, 64)[None, :]
    codes = codes.to(tl.int8)
    if PLANES == 8:
        tl.store(octets + g * 64 + e, codes, mask=mask)
    else:
        tl.store(octets + ((e // 16 * groups + g) * 4 + e % 16 // 4) * 4 + e % 4, codes, mask=mask)
        tl.store(octets + 64 * groups + ((e % 8 * groups + g) * 2 + e // 32) * 4 + e % 32 // 8, codes, mask=mask)
    factors = words.to(tl.pointer_type(tl.float32)) + 32 * groups + g
    tl.store(factors, scale, mask=mask)
    tl.store(factors + groups, total, mask=mask)


@triton.jit
def stage(staged, x, start: tl.constexpr, groups: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``x`` fp32 [BLOCK], the elements of an activation from ``start`` (a multiple of 64) on, to its staged form."""
    element = start + tl.arange(0, BLOCK)
    if PLANES == 0:
        tl.store(staged + element, x, mask=element < groups * 64)
    else:
        codes, scale, total = quantize_groups(tl.reshape(x, (BLOCK // 64, 64)))
        g = start // 64 + tl.arange(0, BLOCK // 64)[:, None]
        store_group(staged, codes, scale, total, g, g < groups, groups, PLANES)


@triton.jit
def stage_token(hidden, staged, token, cols: tl.constexpr, groups: tl.constexpr, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    """Stage row ``token`` of ``hidden`` [T, cols]; what pads the last group is 0."""
    for start in tl.static_range(0, groups * 64, BLOCK):
        element = start + tl.arange(0, BLOCK)
        x = tl.load(hidden + token * cols + element, mask=element < cols, other=0.0).to(tl.float32)
        stage(staged + token * (groups * 64), x, start, groups, PLANES, BLOCK)


@triton.jit
def store_codes(to, codes, mask, PLANES: tl.constexpr):
    """Write ``codes`` [A, 64] of groups to ``to`` [A, 1] of a prompt's codes: in their order, and for codes in planes once more as
    a shift and a mask bring them out of the 1-bit planes: four elements of the same parity, 8 apart, in a word."""
    number: tl.constexpr = codes.shape[0]
    e = tl.arange(0, 64)[None, :]
    codes = codes.to(tl.int8)
    tl.store(to + e, codes, mask=mask)
    if PLANES != 8:
        codes = tl.permute(tl.reshape(codes, (number, 2, 4, 4, 2)), (0, 3, 1, 4, 2))
        tl.store(to + 64 + e, tl.reshape(codes, (number, 64)), mask=mask)


@triton.jit
def quantize_rows_kernel(x, codes, scales, sums, cols: tl.constexpr, groups: tl.constexpr, PLANES: tl.constexpr, BG: tl.constexpr):
    """A prompt's activations ``x`` [rows, cols] for ``triton_prompt``. Grid (rows, groups / BG).

    ``codes`` int8 [rows, groups, 64 or 128] (see ``store_codes``), ``scales`` and ``sums`` fp32 [rows, groups].
    """
    row = tl.program_id(0)
    g = tl.program_id(1) * BG + tl.arange(0, BG)[:, None]
    element = g * 64 + tl.arange(0, 64)[None, :]
    values = tl.load(x + row.to(tl.int64) * cols + element, mask=element < cols, other=0.0).to(tl.float32)
    made, scale, total = quantize_groups(values)
    wide: tl.constexpr = 64 if PLANES == 8 else 128
    store_codes(codes + row.to(tl.int64) * (groups * wide) + g * wide, made, g < groups, PLANES)
    tl.store(scales + row * groups + g, scale, mask=g < groups)
    tl.store(sums + row * groups + g, total, mask=g < groups)
