"""The residency that this installation has: the extension's, or where that is not built the one in Python.

Both have one face, which ``portable`` documents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fate_moe.kernels.extension import native

if TYPE_CHECKING or native is None:
    from fate_moe.memory.portable import Lease, Residency
else:
    from fate_moe.memory.native_residency import Lease, Residency

__all__ = ["Lease", "Residency"]
