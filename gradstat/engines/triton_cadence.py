"""`PassCounter`: counts the passes of CUDA graphs on their device, and flags there what is due."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gradstat.kernels.cadence import flag_kernel

# What CUDA graphs use at every replay: counters, plans, and tables in the host's memory. A graph
# may outlive whoever captured it.
captured: list[Any] = []


class PassCounter:
    """A count and a flag on a device.

    Args:
        device: a CUDA device.
        period: passes from one that is due to the next.
    """

    def __init__(self, device: torch.device, period: int) -> None:
        self._device = device
        # No run has more passes.
        self._period = min(period, 2**31 - 1)
        # Count and flag, both at a multiple of 16 bytes.
        self._cells = torch.zeros((2, 2), dtype=torch.int64, device=device)
        self._n_passes, self._due = self._cells[0, :1], self._cells[1, :1]
        # A capture cannot load kernels.
        self._launch(self._n_passes, self._due, -1)

    def flag(self, n_before: int, first: int) -> Tensor:
        """Find out whether the pass that is captured is due, at each replay.

        Args:
            n_before: passes that this has not counted.
            first: passes before the first one that is due, n_before included.

        Returns:
            int64 ``(1,)``, 0 or 1.
        """
        captured.append(self)
        self._launch(self._n_passes, self._due, (first - n_before) % self._period)
        return self._due

    def count(self) -> None:
        """Count a pass, now or at each replay."""
        self._n_passes.add_(1)

    def stamp(self) -> Tensor:
        """Passes counted so far, and the flag: int64 ``(2,)``."""
        return self._cells[:, 0].clone()

    def _launch(self, n_passes: Tensor, due: Tensor, phase: int) -> None:
        with on_device(self._device):
            flag_kernel[(1,)](n_passes, due, self._period, phase, num_warps=1)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on a CUDA device; on the CPU Triton interprets."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
