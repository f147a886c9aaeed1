"""The CPU engine: one pass over memory, compiled by Numba, on all of torch's threads.

It computes what `reference` defines: every integer is equal, every float within 1e-5 of float64.
Beside a tensor it needs under 0.5 MB, whatever its strides, and a fourth for each more thread;
results do not depend on the threads.
"""

from __future__ import annotations

import functools
import math
import struct
from array import array
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from gradstat.bins import (
    FLOAT32_MAX,
    SUBNORMAL,
    Bins,
    LinearBins,
    Log2Bins,
    keeps_subnormals,
)
from gradstat.engines import NUMBERS, check_storage, merge_dims, reference
from gradstat.engines.cpu import work
from gradstat.engines.cpu.compiling import entry_point, passes_trial, trial_tensors
from gradstat.engines.cpu.partials import FIELDS
from gradstat.engines.cpu.threads import count_threads, run_together
from gradstat.results import Statistics, as_statistics
from gradstat.util import Array

_ITEM = 1 << 16  # elements: enough to hide the taking of an item, few enough to share a tensor out
_MAX_ITEMS = 2048  # of one tensor: its partials stay under 250 KB
_ALONE_BELOW = 3 * _ITEM  # elements: whoever works on an item has taken the next one already
_FEW = 1 << 14  # elements: torch finds peaks of fewer before a compiled function is prepared
# What is kept from one call to the next: bytes of a room, plans, and tensors of a plan.
_KEPT_BYTES, _KEPT_PLANS, _KEPT_TENSORS = 64 << 20, 16, 1024

_put_job = struct.Struct("6q").pack_into  # the head of a work table, up to `IS_LAST`

Rows = tuple[Array, Array, Array]  # integers, floats and counts, as of `Statistics`


class _Rows:
    """Memory, zero, for ``n`` numbers of rows, as `_split` cuts it, and for what they touch."""

    def __init__(self, n: int) -> None:
        self.size = n
        # After them more than a byte for each part of a histogram.
        memory = np.zeros(n + n // 64 + 1, np.int64)
        self.held, self.touched = memory[:n], memory[n:].view(np.uint8)
        # In half the time of `numpy.ndarray.ctypes`.
        self.address = torch.from_numpy(memory).data_ptr()
        self.touched_address = self.address + 8 * n


class _Room(_Rows):
    """The same, which packing makes zero again, and room for a packed record: twice as much."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        # The next call uses it again: new memory costs more than to measure small tensors.
        packed = np.empty(2 * n, np.int64)
        self.packed, self.packed_address = packed.data.cast("B"), packed.ctypes.data


# Kept from one call to the next, as all three: for how many threads, the address, the memory, zero.
_scratches: list[tuple[int, int, Tensor]] = []
_rooms: list[_Room] = []
_plans: dict[Hashable, Plan] = {}  # of `measure`; the latest are last


def measure(tensors: Sequence[Tensor], bins: Bins) -> Statistics:
    """Statistics of each tensor of a list on the CPU, as `reference.measure`."""
    return as_statistics(bins, _measure(tensors, bins))


def histogram(x: Tensor, bins: Bins) -> tuple[Tensor, Tensor]:
    """Counts and edges of one tensor, as `measure` and `Bins.edges` have them."""
    _, floats, counts = _measure([x], bins)
    start, end = floats[0, -2:].tolist()  # the last of `FLOATS`
    if isinstance(bins, LinearBins) and max(-start, end) <= FLOAT32_MAX and _are_edges_trusted():
        edges = _edges(start, end, bins.bins)
    else:
        edges = bins.edges(*torch.from_numpy(floats[0, -2:]))
    return torch.from_numpy(counts[0]), edges


def unit_peaks(x: Tensor, unit: int) -> Tensor:
    """As `reference.unit_peaks`, in one read of memory, where torch needs two."""
    if x.numel() < _FEW:
        return reference.unit_peaks(x, unit)
    units, inner = x.shape[unit], 1
    if not x.movedim(unit, -1).is_contiguous():
        inner = math.prod(x.shape[unit + 1 :])
        if not x.is_contiguous():
            return reference.unit_peaks(x, unit)
    # Where torch keeps a sign apart it makes no difference.
    if not _are_peaks_trusted(x.dtype):
        return reference.unit_peaks(x, unit)
    return _peaks(x, x.numel() // (units * inner), units, inner)


class Plan:
    """As `gradstat.engines.Plan`: the work tables and what they point to are made once.

    One call at a time uses a plan; one that an exception has ended leaves it unusable.
    ``is_trusted`` says of a dtype and whether bins are linear if what is compiled for them is to be
    used; `reference` measures the others.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        bins: Bins,
        is_trusted: Callable[[torch.dtype, bool], bool] | None = None,
    ) -> None:
        is_trusted = is_trusted or _is_trusted
        self._bins, self._n = bins, len(tensors)
        self._n_bins, self._pack = bins.bins, entry_point(work.pack_rows())
        self._dtypes = [x.dtype for x in tensors]
        is_linear, ends = isinstance(bins, LinearBins), _known_ends(bins)
        self._is_automatic = is_linear and ends is None
        # Where the elements of each are.
        self._addresses = array("q", bytes(8 * self._n))
        self._put_addresses = struct.Struct(f"{self._n}q").pack_into
        self._room: _Rows | None = None  # where the tables have the results written
        self._tables: list[_Table] = []
        self._others: list[int] = []  # rows that `reference` measures
        for dtype in dict.fromkeys(self._dtypes):
            rows = [row for row, each in enumerate(self._dtypes) if each == dtype]
            if is_trusted(dtype, is_linear):
                table = _Table(dtype, is_linear, rows, tensors, self._addresses, ends)
                self._tables.append(table)
            else:
                self._others += rows

    def run(
        self, tensors: Sequence[Tensor], formats: Tensor | None = None, due: Tensor | None = None
    ) -> bytes:
        """A record of the rows of tensors that fit; nothing is captured on a CPU."""
        n_formats = 0 if formats is None else formats.numel()
        n, n_bins = self._n, self._n_bins
        n_rows = n * (NUMBERS + n_bins)
        room = _take_room(n_rows + n_formats)
        self.measure(tensors, room)
        if formats is not None:
            room.held.view(np.float64)[n_rows : n_rows + n_formats] = formats.numpy().ravel()
        end = self._pack(
            room.address, n, n_bins, n_formats, room.touched_address, room.packed_address
        )
        data = bytes(room.packed[:end])
        _leave(room)
        return data

    def measure(self, tensors: Sequence[Tensor], to: _Rows) -> None:
        """Write the rows of tensors that fit to memory that is zero: `_split` tells how."""
        addresses = list(map(Tensor.data_ptr, tensors))
        if 0 in addresses:
            check_storage(tensors)
        self._put_addresses(self._addresses, 0, *addresses)
        if to is not self._room:
            self._room = to
            for table in self._tables:
                table.write_to(to, self._n, self._n_bins)
        stage, others = work.NUMBERS_ONLY if self._is_automatic else work.FUSED, self._others
        for table in self._tables:
            table.run(stage)
        if isinstance(self._bins, LinearBins) and self._is_automatic:
            rows = _split(to.held, self._n, self._bins.bins)
            if self._bins.nice:
                _write_nice_ranges(self._bins, rows[1])
            for table in self._tables:
                table.run(work.HISTOGRAM_ONLY)
            if torch.float64 in self._dtypes:
                # They have no range in float32; by `reference` they have one in float64.
                beyond = as_statistics(self._bins, rows).abs_max > FLOAT32_MAX
                others = others + beyond.nonzero().flatten().tolist()
        if others:
            to.touched[:] = 1
            self._measure_by_reference(others, tensors, to)

    def _measure_by_reference(self, rows: list[int], tensors: Sequence[Tensor], to: _Rows) -> None:
        memory = _split(to.held, self._n, self._bins.bins)
        for row in rows:
            again = reference.measure([tensors[row]], self._bins)
            for each, new in zip(memory, (again.integers, again.floats, again.counts), strict=True):
                each[row] = new[0]


class _Table:
    """The tensors of one dtype as a work table, see `work`, and what must live as long as it."""

    def __init__(
        self,
        dtype: torch.dtype,
        is_linear: bool,
        rows: Sequence[int],  # that have this dtype
        tensors: Sequence[Tensor],  # of all rows
        addresses: array[int],  # where each run finds those of their elements
        ends: tuple[float, float] | None,  # of the range of all of them, if that is known
    ) -> None:
        self._shared_work = work.work_on(dtype, is_linear)
        self._work = entry_point(self._shared_work)
        self._layouts: list[array[int]] = []
        lines: list[int] = []
        n_items = n_values = 0
        for row in rows:
            x, size = tensors[row], _ITEM
            numel = x.numel()
            while numel > size * _MAX_ITEMS:
                size *= 2
            lines += (numel, self._layout_of(x), row, n_items, size)
            n_items += -(-numel // size)
            n_values += numel
        self._partials = array("d", bytes(8 * FIELDS * n_items))
        head = [0] * work.HEAD  # `write_to` and `run` know the others
        head[work.TENSORS], head[work.ITEMS] = len(rows), n_items
        head[work.PARTIALS] = self._partials.buffer_info()[0]
        head[work.ADDRESSES] = addresses.buffer_info()[0]
        head[work.RANGE_LOW :] = array("q", array("d", ends or (0.0, 0.0)).tobytes())
        self._table = array("q", (*head, *lines, 0, 0, 0, n_items, 0))
        self._address = self._table.buffer_info()[0]
        self._n_items, self._is_large = n_items, n_values >= _ALONE_BELOW

    def write_to(self, rows: _Rows, n: int, n_bins: int) -> None:
        """Let later runs write ``n`` rows there."""
        address = rows.address
        to = address, address + 64 * n, address + 8 * NUMBERS * n, n_bins, rows.touched_address
        self._table[work.INTEGERS_AT : work.TOUCHED + 1] = array("q", to)
        self._is_shared = self._is_large and n_bins <= work.MAX_SHARED_BINS

    def run(self, stage: int) -> None:
        """Do a stage of the work, see `work`: threads share the items, then the rows are made."""
        threads, item = count_threads(self._n_items) if self._is_shared else 1, 0
        scratch = _take_scratch(threads)
        if threads > 1:
            _put_job(self._table, 0, 0, 0, threads, scratch[1], stage, False)
            run_together(self._shared_work, self._address, threads)
            item = self._n_items
        _put_job(self._table, 0, item, 0, 1, scratch[1], stage, True)
        # Their product is zero in a thread that flushes subnormal numbers.
        take_items = self._work if SUBNORMAL * 1.0 else keeps_subnormals(self._work)
        take_items(self._address)
        _scratches.append(scratch)

    def _layout_of(self, x: Tensor) -> int:
        """Address of sizes and strides; 0 for a tensor without gaps."""
        if x.is_contiguous():
            return 0
        dims = merge_dims(x)
        if dims == [(x.numel(), 1)]:
            return 0
        numbers = array("q", [len(dims), *(number for pair in dims for number in pair)])
        self._layouts.append(numbers)
        return numbers.buffer_info()[0]


def pack(rows: Tensor, start: int, n: int, n_bins: int, n_formats: int) -> bytes:
    """A record of ``n`` rows that another engine has measured, an `engines.Result`.

    They begin at ``start`` in memory of the host, which is zero afterwards. ``n_formats`` is how
    many numbers of formats all of them have.
    """
    room = _take_room(n * (NUMBERS + n_bins) + n_formats)
    address = rows.data_ptr() + 8 * start
    end = entry_point(work.pack_rows())(address, n, n_bins, n_formats, 0, room.packed_address)
    data = bytes(room.packed[:end])
    _leave(room)
    return data


def _measure(tensors: Sequence[Tensor], bins: Bins) -> Rows:
    tensors = [x.resolve_neg() if x.is_neg() else x for x in tensors]  # torch keeps the sign apart
    rows = _Rows(len(tensors) * (NUMBERS + bins.bins))
    # A plan takes longer than to measure small tensors, and many calls are like the one before.
    like = bins, *[(x.dtype, x.shape, x.stride()) for x in tensors]
    # One call at a time has it, and none after an exception.
    plan = _plans.pop(like, None) or Plan(tensors, bins)
    plan.measure(tensors, rows)
    plan._room = None  # the memory is the result's
    if len(tensors) <= _KEPT_TENSORS:
        _plans[like] = plan
        for oldest in list(_plans)[:-_KEPT_PLANS]:
            _plans.pop(oldest, None)
    return _split(rows.held, len(tensors), bins.bins)


@functools.cache
def _is_trusted(dtype: torch.dtype, is_linear: bool) -> bool:
    """Whether what is compiled for a dtype and a kind of bins computes what `reference` does."""
    tensors, schemes = trial_tensors(dtype), list[Bins]([Log2Bins()])
    if is_linear:
        schemes = [LinearBins(20), LinearBins(200, -1.0, 2.0)]

    def measured() -> list[Tensor]:
        found: list[Tensor] = []
        for bins in schemes:
            rows = _Rows(len(tensors) * (NUMBERS + bins.bins))
            Plan(tensors, bins, lambda *_: True).measure(tensors, rows)
            found += map(torch.from_numpy, _split(rows.held, len(tensors), bins.bins))
        return found

    def defined() -> list[Tensor]:
        each = [reference.measure(tensors, bins) for bins in schemes]
        return [x for s in each for x in (s.integers, s.floats, s.counts)]

    return passes_trial(work.work_on(dtype, is_linear), f"statistics of {dtype}", measured, defined)


def _edges(low: float, high: float, bins: int) -> Tensor:
    """As `LinearBins.edges`, compiled."""
    edges = torch.empty(bins + 1, dtype=torch.float64, device="cpu")
    work.fill_edges()(low, high, bins, edges.data_ptr())
    return edges


@functools.cache
def _are_edges_trusted() -> bool:
    ends = (-1.0, 2.0), (0.0, 2.0**-120), (-(2.0**127), 2.0**127)
    return passes_trial(
        work.fill_edges(),
        "edges",
        lambda: [_edges(*each, 20) for each in ends],
        lambda: [
            LinearBins(20).edges(*torch.tensor(each, dtype=torch.float64, device="cpu"))
            for each in ends
        ],
    )


def _peaks(x: Tensor, outer: int, units: int, inner: int) -> Tensor:
    threads = count_threads(outer) if x.numel() >= _ALONE_BELOW else 1
    n_each = -(-outer // threads)
    parts = -(-outer // n_each)
    peaks = torch.zeros((parts, units), dtype=x.dtype, device="cpu")
    addresses = x.data_ptr(), peaks.data_ptr()
    job = array("q", (0, parts, n_each, outer, units, inner, *addresses))
    run_together(work.find_peaks(x.itemsize), job.buffer_info()[0], parts)
    return peaks[0] if parts == 1 else peaks.amax(0)


@functools.cache
def _are_peaks_trusted(dtype: torch.dtype) -> bool:
    _, values, _ = trial_tensors(dtype)
    values = values[5:].reshape(2, 30, 10)  # without special ones

    def found() -> list[Tensor]:
        return [_peaks(values, 60, 10, 1), _peaks(values, 2, 30, 10)]

    def defined() -> list[Tensor]:
        return [reference.unit_peaks(values, unit) for unit in (2, 1)]

    return passes_trial(work.find_peaks(dtype.itemsize), f"peaks of {dtype}", found, defined)


def _split(memory: Array, n: int, n_bins: int) -> Rows:
    """Rows in memory: all integers, then all floats, then all counts."""
    integers, floats = memory[: n * NUMBERS].reshape(2, n, NUMBERS // 2)
    counts = memory[n * NUMBERS : n * (NUMBERS + n_bins)]
    return integers, floats.view(np.float64), counts.reshape(n, n_bins)


@keeps_subnormals
def _known_ends(bins: Bins) -> tuple[float, float] | None:
    return bins.known_range if isinstance(bins, LinearBins) else None


@keeps_subnormals
def _write_nice_ranges(bins: LinearBins, floats: Array) -> None:
    minimum, maximum, *_, low, high = torch.from_numpy(floats).unbind(-1)  # as `FLOATS`
    for end, found in zip((low, high), bins.automatic_range(minimum, maximum), strict=True):
        end.copy_(found)


def _take_room(size: int) -> _Room:
    """Memory for rows of so many numbers."""
    try:
        room = _rooms.pop()
    except IndexError:  # all are in use
        return _Room(size)
    return room if room.size >= size else _Room(size)


def _leave(room: _Room) -> None:
    """Keep memory for the next call, if that is not too much."""
    if 8 * room.size <= _KEPT_BYTES:
        _rooms.append(room)


def _take_scratch(threads: int) -> tuple[int, int, Tensor]:
    """Memory for what so many threads count."""
    try:
        scratch = _scratches.pop()
        if scratch[0] >= threads:
            return scratch
    except IndexError:  # all are in use
        pass
    memory = torch.zeros(threads * work.SCRATCH_BYTES, dtype=torch.uint8, device="cpu")
    return threads, memory.data_ptr(), memory
