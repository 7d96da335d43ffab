"""Misses computed on the host: the C++ kernels at the other end of a mailbox that the captured step writes to and waits on.

The host reads its memory two to three times as fast as the link carries it, so it may compute a missing expert in less time than a
copy takes. Of quantized experts it gives the device's bits. Unquantized ones are summed in another order here than there, so that
these are computed here only where that was asked for by number: it gives up the guarantee "same numbers" between budgets.

Mail: the device writes a question (which blobs, and the activation) and counts it in ``asked``; the threads write the answer (each
expert's output). csrc/host_compute.h says where each word lies.
"""

from __future__ import annotations

from typing import Any

import torch

from fate_moe.core import BlobLayout
from fate_moe.errors import UnsupportedModelError
from fate_moe.gpu.memory import PinnedArena
from fate_moe.kernels.cpu import layer_kernel
from fate_moe.kernels.native import native
from fate_moe.kernels.triton_host_compute import collect_kernel
from fate_moe.machine import usable_cpus

__all__ = ["HostCompute"]

_BLOCK = 512  # words of a collecting program: 4 KiB


class HostCompute:
    """Threads that compute experts of ``arena``, all of ``layout``, for up to ``top_k`` choices of up to ``tokens`` each.

    ``threads`` (None: all usable processors but two, which are left to the driver and Python) spin while questions come.
    """

    def __init__(
        self,
        layout: BlobLayout,
        shapes: dict[str, tuple[int, ...]],
        experts: Any,
        arena: PinnedArena,
        top_k: int,
        device: torch.device,
        threads: int | None = None,
        tokens: int = 1,
    ) -> None:
        """``shapes`` ([out, in] by name) and ``experts`` (the transformers module) as for ``device_layout``.

        Raises UnsupportedModelError where the C++ kernels cannot compute these experts.
        """
        kernel = layer_kernel(layout, shapes, experts)
        if isinstance(kernel, str) or kernel.whole is None:
            why = kernel if isinstance(kernel, str) else "the family combines gate and up in its own way"
            raise UnsupportedModelError(f"the host cannot compute these experts: {why}; omit --host-compute")
        self.cols = shapes["down_proj"][0]
        self.most = most = tokens * top_k
        question, answer = 1 + 2 * most + tokens * self.cols, most * self.cols
        self._arena = arena  # the threads read it by address
        self._mail = PinnedArena(1, -(-8 * (question + answer) // 4096) * 4096, device)
        words = self._mail.bytes.view(torch.int64)
        self.questions, self.answers = words[:question], words[question : question + answer]
        self.asked = torch.zeros(1, dtype=torch.int32, device=device)
        self.outside = torch.zeros(most, self.cols, dtype=torch.float32, device=device)
        threads = threads or max(1, usable_cpus() - 2)
        self._team: Any = native.HostCompute.make(
            kernel.whole,
            arena.bytes.data_ptr(),
            layout.length,
            self.questions.data_ptr(),
            self.answers.data_ptr(),
            most,
            tokens,
            threads,
        )

    def collect(self, pending_rows: torch.Tensor) -> None:
        """Enqueue the copy of the answer to the last question to the rows of ``outside`` that ``pending_rows`` names."""
        grid = (pending_rows.numel(), -(-self.cols // _BLOCK))
        collect_kernel[grid](pending_rows, self.asked, self.answers, self.outside, cols=self.cols, BLOCK=_BLOCK, num_warps=4)

    def __del__(self) -> None:
        self._team = None  # before the mailbox and the arena that the threads read

    def close(self) -> None:
        """Stop the threads; the device must have ended all steps."""
        self._team = None
        self._mail.close()
