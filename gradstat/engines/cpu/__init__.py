"""The CPU engine: one pass over memory, compiled by Numba, on all of torch's threads.

It computes what `reference` defines: every integer is equal, every float within 1e-5 of float64.
Beside a tensor it needs under 1 MB, whatever its strides; results do not depend on the threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradstat.arrays import Array, Counts, PackedRows
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
    NUMBERS,
    SCRATCH_BYTES,
    fill_edges,
    pack_rows,
    work_on,
)
from gradstat.engines.memory import merge_dims, no_storage
from gradstat.float_mode import keeps_subnormals
from gradstat.results import FLOATS, INTEGERS, Statistics, as_statistics

_ITEM = 1 << 16  # elements: enough to hide the taking of an item, few enough to share a tensor out
_MAX_ITEMS = 2048  # of one tensor: its partials stay under 250 KB
_ALONE_BELOW = 1 << 18  # elements: waking another thread takes longer than these

_MOST = 1 << 19  # numbers of a list's rows: 4 MB, kept between calls

Memory = TypeVar("Memory")
Rows = tuple[Array, Array, Array]  # integers, floats and counts, as of `Statistics`


class _Room(NamedTuple):
    """Memory for the rows of a call, which the next one uses again.

    New memory for them costs more than to measure small tensors.

    Args:
        rows: int64, as `_rows` has them; zero between calls.
        packed: the same with the counts packed, as bytes.
        addresses: of both.
    """

    rows: Array
    packed: memoryview
    addresses: tuple[int, int]

    @classmethod
    def new(cls) -> _Room:
        rows, packed = (np.zeros(n * _MOST, np.int64) for n in (1, 2))
        return cls(rows, packed.data.cast("B"), (rows.ctypes.data, packed.ctypes.data))


_scratches: list[tuple[Tensor, int]] = []  # between calls, with their addresses; zero
_rooms: list[_Room] = []  # between calls


def measure(tensors: Sequence[Tensor], bins: Bins) -> Statistics:
    """Statistics of each tensor of a list on the CPU, as `reference.measure`."""
    return as_statistics(bins, _dense_rows(tensors, bins))


def measure_rows(tensors: Sequence[Tensor], bins: Bins) -> tuple[Array, Array, Counts]:
    """The same as arrays: a history keeps them, and tensors take long to make.

    Each NumPy call costs a training step more than to measure a small gradient: there are few.
    """
    n, n_bins = len(tensors), bins.bins
    if n * (n_bins + NUMBERS) > _MOST:
        return _dense_rows(tensors, bins)
    room = _take(_rooms, _Room.new)
    address, packed = room.addresses
    _measure_into(room.rows, address, tensors, bins)
    length = pack_rows()(address, n, n_bins, packed)
    memory = bytearray(room.packed[: 8 * length])
    _rooms.append(room)
    integers = np.ndarray((n, len(INTEGERS)), np.int64, memory)
    floats = np.ndarray((n, len(FLOATS)), np.float64, memory, integers.nbytes)
    start = n * NUMBERS
    counts = np.ndarray((length - start,), np.int64, memory, 8 * start)
    return integers, floats, PackedRows(counts, n, n_bins)


def _dense_rows(tensors: Sequence[Tensor], bins: Bins) -> Rows:
    memory = np.zeros(len(tensors) * (NUMBERS + bins.bins), np.int64)
    _measure_into(memory, memory.ctypes.data, tensors, bins)
    return _rows(memory, len(tensors), bins.bins)


def _rows(memory: Array, n: int, n_bins: int) -> Rows:
    """All integers, then all floats, then all counts."""
    integers, floats = memory[: n * NUMBERS].reshape(2, n, len(INTEGERS))
    counts = memory[n * NUMBERS : n * (NUMBERS + n_bins)]
    return integers, floats.view(np.float64), counts.reshape(n, n_bins)


def _measure_into(memory: Array, address: int, tensors: Sequence[Tensor], bins: Bins) -> None:
    """Write the rows of tensors to memory that is zero."""
    tables: dict[torch.dtype, _Table] = {}
    is_linear = isinstance(bins, LinearBins)
    for row, x in enumerate(tensors):
        table = tables.get(x.dtype)
        if table is None:
            table = tables[x.dtype] = _Table(x.dtype, is_linear)
        table.append(row, x)
    n, n_bins = len(tensors), bins.bins
    ranges = _known_ranges(bins, n)
    is_automatic = is_linear and ranges is None
    to = address, address + 8 * n * len(INTEGERS), address + 8 * n * NUMBERS, n_bins
    for table in tables.values():
        table.run(FLOATS_ONLY if is_automatic else FUSED, to, ranges)
    if isinstance(bins, LinearBins) and is_automatic:
        rows = _rows(memory, n, n_bins)
        if bins.nice:
            ranges = _nice_ranges(bins, rows[1])
        for table in tables.values():
            table.run(COUNTS_ONLY, to, ranges)
        if torch.float64 in tables:
            _measure_again_beyond_float32(tensors, bins, rows)


@keeps_subnormals
def _known_ranges(bins: Bins, n: int) -> array[float] | None:
    """The low and then the high ends of ``n`` tensors, float32, if the scheme has a range."""
    ends = bins.known_range if isinstance(bins, LinearBins) else None
    return None if ends is None else array("f", [ends[0]] * n + [ends[1]] * n)


@keeps_subnormals
def _nice_ranges(bins: LinearBins, floats: Array) -> array[float]:
    minimum, maximum = torch.from_numpy(floats[:, :2]).unbind(-1)  # the first of `FLOATS`
    low, high = bins.automatic_range(minimum, maximum)
    return array("f", low.tolist() + high.tolist())


def _measure_again_beyond_float32(tensors: Sequence[Tensor], bins: Bins, rows: Rows) -> None:
    """Measure rows that have no range in float32 by `reference`, which has one in float64."""
    abs_max = as_statistics(bins, rows).abs_max
    for row in (abs_max > FLOAT32_MAX).nonzero().flatten().tolist():
        again = reference.measure([tensors[row]], bins)
        for each, new in zip(rows, (again.integers, again.floats, again.counts), strict=True):
            each[row] = new[0]


def histogram(x: Tensor, bins: Bins) -> tuple[Tensor, Tensor]:
    """Counts and edges of one tensor, as `measure` and `Bins.edges` have them."""
    _, floats, counts = _dense_rows([x], bins)
    start, end = floats[0, -2:].tolist()  # the last of `FLOATS`
    if isinstance(bins, LinearBins) and max(-start, end) <= FLOAT32_MAX:
        edges = torch.empty(bins.bins + 1, dtype=torch.float64, device="cpu")
        fill_edges()(start, end, bins.bins, edges.data_ptr())
    else:
        edges = bins.edges(*torch.from_numpy(floats[0, -2:]))
    return torch.from_numpy(counts[0]), edges


class _Table:
    """The tensors of one dtype as a work table, see `work`, and what must live as long as it."""

    def __init__(self, dtype: torch.dtype, is_linear: bool) -> None:
        self._work = work_on(dtype, is_linear)
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

    def run(self, stage: int, to: tuple[int, int, int, int], ranges: array[float] | None) -> None:
        """Do a stage of the work: threads share the items, then the rows are made.

        Args:
            stage: see `work`.
            to: addresses of integers, floats and counts, and how many bins there are.
            ranges: as of `_known_ranges`.
        """
        if not self._partials:
            self._partials = array("d", bytes(8 * FIELDS * self._items))
        ends = 0, 0
        if ranges is not None:
            address, length = ranges.buffer_info()
            ends = address, address + length // 2 * ranges.itemsize
        n, items = len(self._lines) // COLUMNS, self._items
        head = 0, n, items, self._partials.buffer_info()[0], *to, *ends
        table = array("q", (*head, *self._lines, 0, 0, 0, 0, items, 0))

        def share(is_last: bool = False) -> None:
            _ = self, ranges  # whose memory the table has the addresses of
            scratch = _take(_scratches, _new_scratch)
            self._work(table.buffer_info()[0], stage, is_last, scratch[1])
            _scratches.append(scratch)

        if self._numel >= _ALONE_BELOW and to[-1] <= MAX_SHARED_BINS:
            threads = count_threads()
            if threads > 1:
                run_together(share, threads)
        share(is_last=True)


def _take(kept: list[Memory], make: Callable[[], Memory]) -> Memory:
    """Memory that an earlier call has left, or new."""
    try:
        return kept.pop()
    except IndexError:  # all is in use
        return make()


def _new_scratch() -> tuple[Tensor, int]:
    scratch = torch.zeros(SCRATCH_BYTES, dtype=torch.uint8, device="cpu")
    return scratch, scratch.data_ptr()
