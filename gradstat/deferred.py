"""`Deferred`: passes of small tensors, several of which are measured in one launch."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from gradstat.launches import Launcher
from gradstat.records import Launch

# Up to so many bytes a copy costs less than a launch does.
MOST_BYTES = 1 << 18
_MOST_PASSES = 16
_LONGEST_S = 1.0


class Deferred:
    """Copies of what passes have left to measure, until there are enough of them."""

    def __init__(self) -> None:
        self._passes: list[tuple[int, tuple[int, ...], tuple[Tensor, ...]]] = []
        self._first_s = 0.0

    def __len__(self) -> int:
        """Number of passes."""
        return len(self._passes)

    @property
    def is_due(self) -> bool:
        """Whether enough passes are there, or the first one has waited for long enough."""
        n_passes = len(self._passes)
        late = n_passes > 0 and time.monotonic() - self._first_s >= _LONGEST_S
        return n_passes >= _MOST_PASSES or late

    def take(self, step: int, tensors: Mapping[int, Tensor]) -> bool:
        """Copy the tensors of a pass, which are on one device.

        Args:
            step: its number.
            tensors: by layer.

        Returns:
            Whether it is done: not for several dtypes, nor for those of another device.
        """
        values = list(tensors.values())
        first = self._passes[0][2][0] if self._passes else values[0]
        for x in values:
            if x.dtype != first.dtype or x.device != first.device:
                return False
        # In one copy, for as many launches less.
        flat = torch.cat([x.reshape(-1) for x in values])
        copies = torch.split(flat, [x.numel() for x in values])
        if not self._passes:
            self._first_s = time.monotonic()
        self._passes.append((step, tuple(tensors), copies))
        return True

    def measure(self, launcher: Launcher) -> tuple[list[tuple[int, tuple[int, ...]]], Launch]:
        """Measure all of them, and begin anew.

        Returns:
            Step and layers of each pass, and the launch: its rows are theirs, one after the other.
        """
        passes, self._passes = self._passes, []
        listed = (x for _, _, copies in passes for x in copies)
        (launch,) = launcher.measure(dict(enumerate(listed)), {})
        return [(step, layers) for step, layers, _ in passes], launch
