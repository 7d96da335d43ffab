"""Planes: golden bytes, an independent twin, and shorter views."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_moe.kernels.reference import dequantize
from fate_moe.quant.planes import pack, unpack
from tests.support.quant_twin import pack_row

WIDTHS = (2, 1, 1)
PI = "243f6a8885a308d313198a2e03707344a4093822299f31d0082efa98ec4e6c89"
# Any widths of 1, 2, 4 or 8 bits that make a code of at most 8.
any_widths = st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=8).filter(lambda widths: sum(widths) <= 8).map(tuple)


@st.composite
def codes_and_widths(draw: st.DrawFn, group_sizes: tuple[int, ...] = (8, 16, 64)) -> tuple[list[list[int]], int, tuple[int, ...]]:
    widths = draw(any_widths)
    rows, cols = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    code = st.integers(0, 2 ** sum(widths) - 1)
    matrix = draw(st.lists(st.lists(code, min_size=cols, max_size=cols), min_size=rows, max_size=rows))
    return matrix, draw(st.sampled_from(group_sizes)), widths


def test_golden_bytes_of_a_group() -> None:
    """Codes 0..15 four times over: element 16j+b of the h plane is in bits 2j of byte b, of the m and l planes in bit 16j+b."""
    h, m, low = pack(torch.arange(64, dtype=torch.uint8).remainder(16).view(1, 64), 64, WIDTHS)
    assert bytes(h[0, 0].tolist()).hex() == "00000000" + "55555555" + "aaaaaaaa" + "ffffffff"
    assert bytes(m[0, 0].tolist()).hex() == "cccccccccccccccc"  # codes 2, 3, 6, 7, ... have the bit of weight 2
    assert bytes(low[0, 0].tolist()).hex() == "aaaaaaaaaaaaaaaa"  # odd codes


def test_golden_bytes_of_an_uneven_group() -> None:
    """Irregular codes, so that no two bytes or lanes can be exchanged unnoticed."""
    codes = torch.tensor([[int(digit, 16) for digit in PI]], dtype=torch.uint8)
    h, m, low = pack(codes, 64, WIDTHS)
    assert bytes(h[0, 0].tolist()).hex() == "209100ebc9aa828ec2e166f044c2b784"
    assert bytes(m[0, 0].tolist()).hex() == "3d8ce236d1193c19"
    assert bytes(low[0, 0].tolist()).hex() == "0cca0f36187e5080"


def test_each_bit_has_its_place() -> None:
    """One code of one element at a time: exactly the bits of the layout are set."""
    for element in (0, 1, 7, 8, 15, 16, 17, 31, 32, 47, 48, 63):
        for code in range(1, 16):
            codes = torch.zeros(1, 64, dtype=torch.uint8)
            codes[0, element] = code
            h, m, low = (int.from_bytes(bytes(plane[0, 0].tolist()), "little") for plane in pack(codes, 64, WIDTHS))
            lane, byte = divmod(element, 16)
            assert h == code // 4 << 8 * byte + 2 * lane
            assert m == code // 2 % 2 << element
            assert low == code % 2 << element


@given(codes_and_widths())
@settings(deadline=None)
def test_pack_matches_its_twin(made: tuple[list[list[int]], int, tuple[int, ...]]) -> None:
    matrix, group_size, widths = made
    planes = pack(torch.tensor(matrix, dtype=torch.uint8), group_size, widths)
    assert [plane.dtype for plane in planes] == [torch.uint8] * len(widths)
    for row, codes in enumerate(matrix):
        expected = pack_row(codes, group_size, widths)
        assert [[bytes(group) for group in plane[row].tolist()] for plane in planes] == expected


@given(codes_and_widths())
@settings(deadline=None)
def test_unpack_undoes_pack_and_truncates_to_lower_edges(made: tuple[list[list[int]], int, tuple[int, ...]]) -> None:
    matrix, group_size, widths = made
    codes = torch.tensor(matrix, dtype=torch.uint8)
    cols = codes.shape[1]
    planes = pack(codes, group_size, widths)
    for num_planes in range(1, len(widths) + 1):
        bits_left_out = sum(widths[num_planes:])
        got = unpack(planes, widths, group_size, num_planes)
        assert got.shape == (len(matrix), -(-cols // group_size) * group_size)
        assert torch.equal(got[:, :cols], codes >> bits_left_out << bits_left_out)
        assert not got[:, cols:].any(), "codes that no column has are zero"
        assert torch.equal(unpack(planes[:num_planes], widths, group_size, num_planes), got), "later planes are not looked at"
    assert torch.equal(unpack(planes, widths, group_size)[:, :cols], codes)


@pytest.mark.parametrize(
    ("group_size", "widths"),
    [(64, ()), (64, (3, 1)), (64, (2, 2, 2, 2, 1)), (64, (8, 1)), (12, (2, 1, 1)), (64, (0, 2)), (4, (2,))],
)
def test_layouts_that_fill_no_whole_bytes_are_refused(group_size: int, widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths must be"):
        pack(torch.zeros(1, 64, dtype=torch.uint8), group_size, widths)
    with pytest.raises(ValueError, match="widths must be"):
        unpack([torch.zeros(1, 1, 16, dtype=torch.uint8)], widths, group_size)


@pytest.mark.parametrize(("num_planes", "bits"), [(1, 2), (2, 3), (3, 4)])
def test_a_shorter_view_is_the_middle_of_its_bin(num_planes: int, bits: int) -> None:
    """A view equals the mean of all codes of a bin, and no code is further away than half the bin."""
    codes = torch.arange(16, dtype=torch.uint8).view(1, 16)
    one, nothing = torch.ones(1, 1).half(), torch.zeros(1, 1).half()
    seen = dequantize(pack(codes, 64, WIDTHS), one, nothing, cols=16, group_size=64, widths=WIDTHS, num_planes=num_planes)
    in_bin = 2 ** (4 - bits)
    assert len(set(seen.flatten().tolist())) == 2**bits
    assert torch.equal(seen.view(-1, in_bin).mean(1), codes.float().view(-1, in_bin).mean(1))
    assert (seen - codes).abs().max() == (in_bin - 1) / 2
