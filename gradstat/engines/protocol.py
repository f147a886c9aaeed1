"""What each engine offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from gradstat.bins import Bins
from gradstat.results import FLOATS, INTEGERS, Statistics

NUMBERS = len(INTEGERS) + len(FLOATS)  # of a row, beside its counts

# The bytes of a record, see `gradstat.record`, or int64 on a device that are packed on the host:
# all integers, all floats, all counts, and what formats would do to each row.
Result: TypeAlias = bytes | Tensor


class Plan(Protocol):
    """How to measure tensors of which there are others like them at each step of a training."""

    def run(
        self, tensors: Sequence[Tensor], formats: Tensor | None = None, due: Tensor | None = None
    ) -> Result | None:
        """Measure tensors, without waiting for their device.

        Args:
            tensors: L of them.
            formats: what narrow formats would do to each, float64 ``(L, F, 10)``.
            due: for captures: a flag on the device, int64 ``(1,)``. A replay where it is 0 need not
                measure.

        Returns:
            ``None`` where the tensors are not like those that it was made for, or cannot be read as
            they are.
        """
        ...


class Engine(Protocol):
    """What a module of an engine offers."""

    def measure(self, tensors: Sequence[Tensor], bins: Bins) -> Statistics:
        """Statistics of each of L tensors on one device."""
        ...

    def Plan(self, tensors: Sequence[Tensor], bins: Bins) -> Plan:
        """How to measure these and others like them."""
        ...


def together(statistics: Statistics, formats: Tensor | None) -> Tensor:
    """Rows of a list as one `Result`: one tensor takes one transfer."""
    integers, floats, counts = statistics.integers, statistics.floats, statistics.counts
    parts = [integers, floats, counts] if formats is None else [integers, floats, counts, formats]
    if floats.dtype != torch.float64:  # the device has none
        parts = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in parts]
    return torch.cat([x.contiguous().view(torch.int64).flatten() for x in parts])
