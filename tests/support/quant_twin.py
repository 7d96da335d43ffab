"""The plane layout a second time, in plain Python, written from docs/reference/store-format.md: it defines what is right."""

from __future__ import annotations

from collections.abc import Sequence


def pack_group(codes: Sequence[int], widths: Sequence[int]) -> list[bytes]:
    """The planes of one group of codes, from the high bits down. Missing codes are the caller's to add."""
    planes = []
    remaining = sum(widths)
    for width in widths:
        remaining -= width
        num_bytes = len(codes) * width // 8
        plane = [0] * num_bytes
        for element, code in enumerate(codes):
            bits = (code // 2**remaining) % 2**width
            if width == 1:
                plane[element // 8] += bits * 2 ** (element % 8)
            else:
                lane, byte = divmod(element, num_bytes)
                plane[byte] += bits * 2 ** (width * lane)
        planes.append(bytes(plane))
    return planes


def pack_row(codes: Sequence[int], group_size: int, widths: Sequence[int]) -> list[list[bytes]]:
    """For each plane, the bytes of each group of one row; the last group is filled up with zeros."""
    padded = [*codes, *[0] * (-len(codes) % group_size)]
    groups = [pack_group(padded[i : i + group_size], widths) for i in range(0, len(padded), group_size)]
    return [[group[i] for group in groups] for i in range(len(widths))]
