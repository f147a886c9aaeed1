"""The engines: `reference` defines every number; `cpu` and `triton` compute the same, faster.

Here is what each offers, and how those that read tensors where they are find them in memory. What
narrow formats would do is in `reference`, `cpu.formats` and `triton_formats`.
"""

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
    ) -> Result:
        """Measure tensors, without waiting for their device.

        Args:
            tensors: L that differ from those it was made for in addresses and values alone.
            formats: what narrow formats would do to each, float64 ``(L, F, 10)``.
            due: for captures: a flag on the device, int64 ``(1,)``. A replay where it is 0 need not
                measure.
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

    def unit_peaks(self, x: Tensor, unit: int) -> Tensor:
        """Largest magnitude of each of C units along a dimension: ``(C,)``, NaN where one is."""
        ...


def together(statistics: Statistics, formats: Tensor | None) -> Tensor:
    """Rows of a list as one `Result`: one tensor takes one transfer."""
    integers, floats, counts = statistics.integers, statistics.floats, statistics.counts
    parts = [integers, floats, counts] if formats is None else [integers, floats, counts, formats]
    if floats.dtype != torch.float64:  # the device has none
        parts = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in parts]
    return torch.cat([x.contiguous().view(torch.int64).flatten() for x in parts])


def merge_dims(x: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides by descending stride, joined where one dimension continues the next.

    No statistic depends on the order of elements, so a transposed or channels-last tensor is one
    run of memory: one dimension is left, of stride 1.
    """
    if x.numel() == 0:
        return [(0, 1)]
    dims = [(size, step) for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]
    merged: list[tuple[int, int]] = []
    for size, step in sorted(dims, key=lambda dim: -dim[1]):
        if merged and merged[-1][1] == size * step:
            merged[-1] = (merged[-1][0] * size, step)
        else:
            merged.append((size, step))
    return merged or [(1, 1)]


def check_storage(tensors: Sequence[Tensor]) -> None:
    """Raise ValueError for a tensor that has elements and no memory for them."""
    for i, x in enumerate(tensors):
        if x.numel() and not x.data_ptr():
            raise ValueError(f"measure() needs tensors with values; tensors[{i}] has no storage")


def as_matrix(x: Tensor, dim: int, ordered: bool) -> tuple[Tensor, int, int]:
    """A tensor as a contiguous matrix with rows along a dimension; a copy where it lies otherwise.

    Returns it with its numbers of rows and of columns, 1 at least. Where it is not ordered, it does
    not matter which values are in a row.
    """
    if x.is_neg():  # torch keeps the sign apart
        x = x.resolve_neg()
    if not x.is_contiguous() or dim not in (-1, x.dim() - 1):
        x = x.detach()
        if not ordered and merge_dims(x) == [(x.numel(), 1)]:
            return x, min(x.numel(), 1), max(x.numel(), 1)
        x = (x.movedim(dim, -1) if x.dim() else x).contiguous()
    width = max(x.shape[-1], 1) if x.dim() else 1
    return x, x.numel() // width, width
