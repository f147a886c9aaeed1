"""The CPU engine: one pass over memory, compiled by Numba, on all of torch's threads.

It computes what `reference` defines: every integer is equal, every float within 1e-5 of float64.
Beside a tensor it needs under 1 MB, whatever its strides; results do not depend on the threads.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradstat.arrays import Array
from gradstat.bins import FLOAT32_MAX, Bins, LinearBins
from gradstat.engines import reference
from gradstat.engines.cpu.partials import FIELDS
from gradstat.engines.cpu.pool import count_threads, run_together
from gradstat.engines.cpu.work import (
    COLUMNS,
    COUNTS_ONLY,
    FLOATS_ONLY,
    FUSED,
    MAX_SHARED_BINS,
    SCRATCH_BYTES,
    fill_edges,
    work_on,
)
from gradstat.engines.memory import merge_dims, no_storage
from gradstat.float_mode import keeps_subnormals
from gradstat.results import FLOATS, INTEGERS, Statistics, as_statistics

_ITEM = 1 << 16  # elements: enough to hide the taking of an item, few enough to share a tensor out
_MAX_ITEMS = 2048  # of one tensor: its partials stay under 250 KB
_ALONE_BELOW = 1 << 18  # elements: waking another thread takes longer than these

_scratches: list[Tensor] = []  # between calls; zero


Rows = tuple[Array, Array, Array]  # integers, floats and counts, as of `Statistics`
Addresses = tuple[int, int, int]  # of these


def measure(
    tensors: Sequence[Tensor], bins: Bins, low: Tensor | None = None, high: Tensor | None = None
) -> Statistics:
    """Statistics of each tensor of a list on the CPU, as `reference.measure`."""
    return as_statistics(bins, measure_rows(tensors, bins, low, high))


def measure_rows(
    tensors: Sequence[Tensor], bins: Bins, low: Tensor | None = None, high: Tensor | None = None
) -> Rows:
    """The same as arrays: a history keeps them, and tensors take long to make."""
    n, n_bins = len(tensors), bins.bins
    n_integers, n_floats = n * len(INTEGERS), n * len(FLOATS)
    memory = np.zeros(n_integers + n_floats + n * n_bins, np.int64)
    # In a third of the time of memory.__array_interface__.
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory.data))
    addresses = address, address + 8 * n_integers, address + 8 * (n_integers + n_floats)
    integers = memory[:n_integers].reshape(n, len(INTEGERS))
    floats = memory[n_integers : n_integers + n_floats].view(np.float64).reshape(n, len(FLOATS))
    rows = integers, floats, memory[n_integers + n_floats :].reshape(n, n_bins)
    tables: dict[torch.dtype, _Table] = {}
    is_linear = isinstance(bins, LinearBins)
    for row, x in enumerate(tensors):
        table = tables.get(x.dtype)
        if table is None:
            table = tables[x.dtype] = _Table(x.dtype, is_linear, n_bins, (memory, addresses))
        table.append(row, x)
    is_automatic = is_linear and low is None
    for table in tables.values():
        table.run(FLOATS_ONLY if is_automatic else FUSED, low, high)
    if isinstance(bins, LinearBins) and is_automatic:
        if bins.nice:
            low, high = _nice_range(bins, floats)
        for table in tables.values():
            table.run(COUNTS_ONLY, low, high)
        if torch.float64 in tables:
            _measure_again_beyond_float32(tensors, bins, rows)
    return rows


@keeps_subnormals
def _nice_range(bins: LinearBins, floats: Array) -> tuple[Tensor, Tensor]:
    minimum, maximum = torch.from_numpy(floats[:, :2]).unbind(-1)  # the first of `FLOATS`
    low, high = bins.automatic_range(minimum, maximum)
    return low.float(), high.float()


def _measure_again_beyond_float32(tensors: Sequence[Tensor], bins: Bins, rows: Rows) -> None:
    """Measure rows that have no range in float32 by `reference`, which has one in float64."""
    abs_max = as_statistics(bins, rows).abs_max
    for row in (abs_max > FLOAT32_MAX).nonzero().flatten().tolist():
        again = reference.measure([tensors[row]], bins)
        for each, new in zip(rows, (again.integers, again.floats, again.counts), strict=True):
            each[row] = new[0]


def histogram(
    x: Tensor, bins: Bins, low: Tensor | None, high: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Counts and edges of one tensor, as `measure` and `Bins.edges` have them."""
    _, floats, counts = measure_rows([x], bins, low, high)
    start, end = floats[0, -2:].tolist()  # the last of `FLOATS`
    if isinstance(bins, LinearBins) and max(-start, end) <= FLOAT32_MAX:
        edges = torch.empty(bins.bins + 1, dtype=torch.float64, device="cpu")
        fill_edges()(start, end, bins.bins, edges.data_ptr())
    else:
        edges = bins.edges(*torch.from_numpy(floats[0, -2:]))
    return torch.from_numpy(counts[0]), edges


class _Table:
    """The tensors of one dtype as a work table, see `work`, and what must live as long as it."""

    def __init__(
        self, dtype: torch.dtype, is_linear: bool, n_bins: int, memory: tuple[Array, Addresses]
    ) -> None:
        self._work = work_on(dtype, is_linear)
        self._n_bins = n_bins
        self._memory, self._addresses = memory
        self._held: list[object] = []
        self._lines: list[int] = []
        self._items = self._numel = 0
        self._partials = array("d")

    def append(self, row: int, x: Tensor) -> None:
        """Add a tensor whose results go to a row."""
        if x.is_neg():  # torch keeps the sign apart
            x = x.resolve_neg()
        numel, address, layout = x.numel(), x.data_ptr(), 0
        if numel and not address:
            raise no_storage(row)
        if not x.is_contiguous():
            dims = merge_dims(x)
            if dims != [(numel, 1)]:
                numbers = array("q", [len(dims), *(number for pair in dims for number in pair)])
                self._held.append(numbers)
                layout = numbers.buffer_info()[0]
        size = _ITEM
        while numel > size * _MAX_ITEMS:
            size *= 2
        self._lines += (address, numel, layout, row, self._items, size)
        self._items += -(-numel // size)
        self._numel += numel
        self._held.append(x)

    def run(self, stage: int, low: Tensor | None, high: Tensor | None) -> None:
        """Do a stage of the work: threads share the items, then the rows are made."""
        if not self._partials:
            self._partials = array("d", bytes(8 * FIELDS * self._items))
        low = None if low is None else low.contiguous()
        high = None if high is None else high.contiguous()
        head = (
            0,
            len(self._lines) // COLUMNS,
            self._items,
            self._partials.buffer_info()[0],
            *self._addresses,
            self._n_bins,
            0 if low is None else low.data_ptr(),
            0 if high is None else high.data_ptr(),
        )
        end = (0, 0, 0, 0, self._items, 0)
        table = array("q", (*head, *self._lines, *end))

        def share(is_last: bool = False) -> None:
            _ = self, low, high  # whose memory the table has the addresses of
            try:
                scratch = _scratches.pop()
            except IndexError:  # all are in use
                scratch = torch.zeros(SCRATCH_BYTES, dtype=torch.uint8, device="cpu")
            self._work(table.buffer_info()[0], stage, is_last, scratch.data_ptr())
            _scratches.append(scratch)

        if self._numel >= _ALONE_BELOW and self._n_bins <= MAX_SHARED_BINS:
            threads = count_threads()
            if threads > 1:
                run_together(share, threads)
        share(is_last=True)
