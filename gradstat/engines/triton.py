"""The Triton engine: all tensors of a list in one launch, and one small launch to finish it.

A list becomes a table of work items, which says what program reads which elements; its layout is in
kernels/items.py. Tables are uploaded once and kept for the next call with the same addresses.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton import knobs

from gradstat.bins import Bins, LinearBins, Log2Bins, keeps_subnormals
from gradstat.engines import NUMBERS, check_storage, merge_dims, reference, together
from gradstat.kernels.finish import finish_kernel
from gradstat.kernels.items import ROWS
from gradstat.kernels.measure import (
    PARTIAL_FIELDS,
    flag_kernel,
    measure_kernel,
    second_sweep_kernel,
)
from gradstat.results import Statistics

Array = NDArray[np.int64]
Kernel: TypeAlias = Any  # of Triton, which ships no types, compiled or not

MAX_BINS = 4093  # a program keeps its histogram, with three more slots, in registers
THREADS = 256
FINISH_BLOCK = THREADS  # items merged at once: a read of memory for each
VECTOR_BYTES = 16
TILE_BYTES = ROWS.value * VECTOR_BYTES * THREADS
BLACKWELL = 100  # the first of its compute capabilities
# Element types in device code; bfloat16 as its bits.
ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.int16}

MIN_ITEM, MAX_ITEM = 1 << 13, 1 << 16  # elements
TARGET_ITEMS = 1024  # a few programs for each multiprocessor of a large GPU
# Of what is less than a tile. Its loop takes as long for 256 elements as the main one for a tile:
# both wait for memory. So a long rest is shared out, over programs that would be idle.
REST_ITEM = 1 << 10
ALIGNMENT = 16  # bytes of the widest load

MAX_TABLE_BYTES = 64 << 20  # of all tables that are kept

# Work items and spans of tensors of one dtype and of their rows.
MakeTables = Callable[[Sequence[Tensor], Sequence[int]], tuple[NDArray[Any], NDArray[Any]]]
# Of a part of a tensor in elements: a row, a plane of rows, and planes.
Sizes: TypeAlias = tuple[int, int, int]
# Flat memory of integers, floats and counts, as of `Statistics`, or where it begins.
Rows: TypeAlias = tuple[Tensor, Tensor, Tensor] | tuple[int, int, int]

# What CUDA graphs use at every replay: counters, tables, and their copies in the host's memory. A
# graph may outlive whoever captured it.
captured: list[Any] = []


def measure(tensors: Sequence[Tensor], bins: Bins) -> Statistics:
    """Statistics of each of L tensors, as `reference.measure`, without waiting for the device.

    float64 tensors, and all tensors when there are more than 4,093 linear bins, go to the reference
    engine.
    """
    check_device("measure", "tensors[0]", tensors[0].device)
    if any(map(Tensor.is_neg, tensors)):
        tensors = [x.resolve_neg() for x in tensors]  # a copy where torch keeps a sign apart
    n = len(tensors)
    rows = split(Plan(tensors, bins).run(tensors), n, bins.bins)
    integers, floats, counts = (x.view(n, -1) for x in rows)
    return Statistics(bins, integers, floats, counts)


def unit_peaks(x: Tensor, unit: int) -> Tensor:
    """Largest magnitude of each of C units along a dimension, as `reference.unit_peaks`."""
    return reference.unit_peaks(x, unit)


class Plan:
    """As `gradstat.engines.Plan`."""

    def __init__(self, tensors: Sequence[Tensor], bins: Bins) -> None:
        self._bins, self._n, self._device = bins, len(tensors), tensors[0].device
        self._n_bins, self._like = bins.bins, _like(tensors)
        self._on_device, self._is_cuda = on_device(self._device), self._device.type == "cuda"
        self._is_automatic = isinstance(bins, LinearBins) and None in (bins.low, bins.high)
        self._ranges: Tensor | None = None
        self._kernels = {
            dtype: kernels_for(self._device, dtype, bins)
            for dtype in set(self._like[1])
            if dtype in ELEMENTS
        }
        self._needs_views = True
        # The tables of the tensors before, whose addresses are often the same.
        self._addresses: tuple[int, ...] = ()
        self._tables: Tables | None = None

    def run(
        self, tensors: Sequence[Tensor], formats: Tensor | None = None, due: Tensor | None = None
    ) -> Tensor:
        """All numbers of the rows in one tensor.

        In a replay in which they are not due no kernel reads a tensor; `reference` measures always.
        """
        n, n_bins, device = self._n, self._n_bins, self._device
        if n_bins > MAX_BINS:
            return together(reference.measure(tensors, self._bins), formats)
        n_formats = 0 if formats is None else formats.numel()
        size = n * (NUMBERS + n_bins) + n_formats
        rows = torch.zeros(size, dtype=torch.int64, device=device)
        with self._on_device:
            self._measure(tensors, rows, due)
        if formats is not None:
            rows[-n_formats:] = formats.view(torch.int64).flatten()
        return rows

    def _measure(self, tensors: Sequence[Tensor], rows: Tensor, due: Tensor | None) -> None:
        """Write the rows of tensors: integers, floats and counts of all, into zeros."""
        n, bins, device = self._n, self._bins, self._device
        capturing = self._is_cuda and torch.cuda.is_current_stream_capturing()
        tables, ranges = self._find_tables(tensors, capturing), self._ranges
        if ranges is None and not self._is_automatic:
            ranges = _known_ranges(bins, n, device)
            if not capturing:  # what a capture makes is written by its replays alone
                self._ranges = ranges
        to: Any
        if self._needs_views:
            to = split(rows, n, self._n_bins)
        else:
            start = rows.data_ptr()
            to = start, start + 4 * NUMBERS * n, start + 8 * NUMBERS * n
        for group in tables.groups:
            summarise(group, self._kernels[group.dtype], to, ranges, due)
        if isinstance(bins, LinearBins) and ranges is None:
            floats = to[1].view(n, -1)
            found = torch.stack(bins.automatic_range(*floats[:, :2].float().unbind(1)), 1)
            floats[:, -2:] = found
            for group in tables.groups:
                count_again(group, self._kernels[group.dtype], to, found, due)
        for row in tables.float64_rows:
            again = reference.measure([tensors[row]], bins)
            for each, new in zip(to, (again.integers, again.floats, again.counts), strict=True):
                each.view(n, -1)[row].copy_(new[0])
        if self._needs_views and not (self._is_automatic or tables.float64_rows):
            # A compiled kernel takes addresses, in a tenth of the time of views.
            self._needs_views = not all(k.finish.is_compiled for k in self._kernels.values())

    def _find_tables(self, tensors: Sequence[Tensor], capturing: bool) -> Tables:
        addresses = tuple(map(Tensor.data_ptr, tensors))
        tables = self._tables
        if tables is None or addresses != self._addresses or capturing:
            known = addresses, *self._like
            tables = find_tables(tensors, self._device, make_items, known=known)
            if not capturing:
                self._addresses, self._tables = addresses, tables
        else:
            _wait_for_tables(tables)
        return tables


def split(rows: Tensor, n: int, n_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, floats and counts of ``n`` rows, flat."""
    sizes = n * NUMBERS // 2, n * NUMBERS // 2, n * n_bins
    parts = rows.split_with_sizes((*sizes, rows.numel() - sum(sizes)))
    return parts[0], parts[1].view(torch.float64), parts[2]


class _Launcher:
    """Launches a kernel over a grid of one dimension, the second time without the JIT's front.

    The front binds and classifies all arguments, which takes several times as long as the launch.
    It finds the same each time: all pointers are aligned as memory of PyTorch's is. ``constants``
    are the kernel's last arguments.
    """

    def __init__(self, kernel: Kernel, *constants: object, **options: object) -> None:
        self._kernel, self._constants, self._options = kernel, constants, options
        self._compiled: Kernel | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether it takes addresses in place of tensors."""
        return self._compiled is not None

    def __call__(self, grid: int, *pointers: Tensor | int) -> None:
        if self._compiled is not None:
            self._compiled[grid, 1, 1](*pointers, *self._constants)
            return
        compiled = self._kernel[(grid,)](*pointers, *self._constants, **self._options)
        if hasattr(compiled, "packed_metadata"):  # nothing is, where Triton interprets
            self._compiled = compiled


class Kernels(NamedTuple):
    """What measures tensors of one dtype: ``measure`` with their histogram if the range is known.

    Otherwise that is left to ``second_sweep``.
    """

    measure: _Launcher
    finish: _Launcher
    second_sweep: _Launcher


@functools.cache
def kernels_for(device: torch.device, dtype: torch.dtype, bins: Bins) -> Kernels:
    """Kernels, compiled when they are first launched."""
    is_log2, slots, warps = isinstance(bins, Log2Bins), slots_of(bins), warps_on(device)
    has_range = isinstance(bins, LinearBins) and bins.known_range is not None
    capability, itemsize = capability_of(device), dtype.itemsize
    measure = _Launcher(
        measure_kernel,
        ELEMENTS[dtype],
        bins.bins if is_log2 or has_range else 0,
        slots,
        is_log2,
        compares_pairs(itemsize, capability),
        THREADS,
        num_warps=warps,
        **limit_registers(itemsize, slots, capability),
    )
    finish = _Launcher(
        finish_kernel, has_range, FINISH_BLOCK, num_warps=warps, enable_fp_fusion=False
    )
    constants = ELEMENTS[dtype], bins.bins, slots, THREADS
    return Kernels(measure, finish, _Launcher(second_sweep_kernel, *constants, num_warps=warps))


@keeps_subnormals
def _known_ranges(bins: Bins, n: int, device: torch.device) -> Tensor | None:
    """Low and high of each of ``n`` tensors, float32 ``(n, 2)``, if the scheme has a range."""
    ends = bins.known_range if isinstance(bins, LinearBins) else None
    if ends is None:
        return None
    return torch.stack([torch.full((n,), x, dtype=torch.float32, device=device) for x in ends], 1)


def check_device(function: str, argument: str, device: torch.device) -> None:
    """Raise ValueError unless Triton runs there."""
    if device.type != "cuda" and not knobs.runtime.interpret:
        raise ValueError(
            f"{function}() needs CUDA tensors for the engine 'triton', or TRITON_INTERPRET=1 set "
            f"before triton is imported; {argument} is on {device}"
        )


def summarise(
    group: Group, kernels: Kernels, to: Rows, ranges: Tensor | None, due: Tensor | None
) -> None:
    """Launch all but the histogram of automatic ranges, which are not known yet."""
    n_items, due = group.n_items, group.always if due is None else due
    integers, floats, counts = to
    size = n_items * PARTIAL_FIELDS.value
    partials = torch.empty(size, dtype=torch.float64, device=group.items.device)
    known = floats if ranges is None else ranges  # else not read
    if n_items:
        kernels.measure(n_items, due, group.items, known, partials, counts)
    kernels.finish(group.n_spans, due, group.spans, partials, known, integers, floats)


def count_again(
    group: Group, kernels: Kernels, to: Rows, ranges: Tensor, due: Tensor | None
) -> None:
    """Launch the histogram over ranges that the measurement has found."""
    if group.n_items:
        due = group.always if due is None else due
        kernels.second_sweep(group.n_items, due, group.items, ranges, to[2])


def slots_of(bins: Bins) -> int:
    """Slots of a program's histogram: a power of two, with room for three beside linear bins."""
    return bins.bins if isinstance(bins, Log2Bins) else 1 << (bins.bins + 2).bit_length()


@functools.cache
def warps_on(device: torch.device) -> int:
    """Warps of a program: of 32 threads, on AMD's data-centre GPUs of 64."""
    warp = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return int(THREADS // warp)


@functools.cache
def capability_of(device: torch.device) -> int:
    """Compute capability of an NVIDIA GPU, as 90; 0 of another device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def compares_pairs(itemsize: int, capability: int) -> bool:
    """Whether a GPU has minima of 16-bit elements in pairs: from Ampere on."""
    return itemsize == 2 and capability >= 80


def limit_registers(itemsize: int, slots: int, capability: int) -> dict[str, int]:
    """The option that holds `measure_kernel` to so many registers as let enough programs run.

    Left alone, the compiler takes as many as let two programs of 256 threads run on a
    multiprocessor. Where three to five run, more bytes are on their way from memory at once, and
    the loop grows by 1 % at most. A program's histogram is in its registers too. For 16-bit
    elements Blackwell needs no limit, and spills with one.
    """
    if not capability or (itemsize == 2 and capability >= BLACKWELL):
        return {}
    least = 72 if itemsize == 2 else 48 if capability < BLACKWELL else 56
    return {"maxnreg": least + -(-(slots // THREADS) // 8) * 8}  # they come in eights


def make_items(tensors: Sequence[Tensor], rows: Sequence[int]) -> tuple[Array, Array]:
    """Tables for one launch over N tensors of one dtype, which have those rows of the results.

    They are the items, int64 ``(W, 9)``, see kernels/items.py, and the spans, int64 ``(N, 4)``:
    row, first item, end of its items, numel.
    """
    size = item_size(tensors)
    blocks: list[Array] = []
    spans = np.empty((len(tensors), 4), dtype=np.int64)
    n_items = 0
    for i, (x, row) in enumerate(zip(tensors, rows, strict=True)):
        first = n_items
        for part in _parts(x, size):
            block = _split_part(x, row, *part, size, TILE_BYTES // x.element_size())
            blocks.append(block)
            n_items += len(block)
        spans[i] = row, first, n_items, x.numel()
    items = np.concatenate(blocks) if blocks else np.empty((0, 9), dtype=np.int64)
    return items, spans


def item_size(tensors: Sequence[Tensor]) -> int:
    """Elements of an item, a power of two."""
    total = sum(x.numel() for x in tensors)
    return min(max(1 << (total // TARGET_ITEMS).bit_length(), MIN_ITEM), MAX_ITEM)


def _parts(x: Tensor, size: int) -> Iterator[tuple[int, Sizes, Sizes]]:
    """Offset, sizes and strides of each part of a tensor, in memory order where there is one."""
    dims = merge_dims(x)
    if len(dims) == 1 and dims[0][1] == 1:
        yield 0, (dims[0][0], 1, 1), (1, 0, 0)
        return
    *others, outer, middle, inner = [(1, 0), (1, 0), *dims]
    if inner[0] * middle[0] > size:  # more than an item: its rows are split alone
        others, outer, middle = [*others, outer], middle, (1, 0)
    if inner[1] == 1 and inner[0] >= size:  # so long a row has whole tiles
        others, outer = [*others, outer], (1, 0)
    sizes, strides = zip(inner, middle, outer, strict=True)
    for at in product(*(range(length) for length, _ in others)):
        offset = sum(k * stride for k, (_, stride) in zip(at, others, strict=True))
        yield offset, sizes, strides


def _split_part(
    x: Tensor, row: int, offset: int, sizes: Sizes, strides: Sizes, size: int, tile: int
) -> Array:
    address, itemsize = x.data_ptr() + offset * x.element_size(), x.element_size()
    inner, middle, outer = sizes
    inner_stride, middle_stride, outer_stride = strides
    if middle == outer == inner_stride == 1:
        return _split_contiguous(address, row, inner, itemsize, size, tile)
    columns = min(inner, size)
    planes = max(1, size // (columns * middle))
    grid = np.meshgrid(np.arange(0, outer, planes), np.arange(0, inner, columns), indexing="ij")
    plane, column = (axis.reshape(-1) for axis in grid)
    width = np.minimum(columns, inner - column)
    items = np.empty((len(plane), 9), dtype=np.int64)
    items[:, 0] = address + (plane * outer_stride + column * inner_stride) * itemsize
    items[:, 1] = row
    items[:, 2] = width * middle * np.minimum(planes, outer - plane)
    items[:, 3] = 0
    items[:, 4] = width
    items[:, 5:] = inner_stride, middle, middle_stride, outer_stride
    return items


def _split_contiguous(address: int, row: int, n: int, itemsize: int, size: int, tile: int) -> Array:
    """Items of a contiguous run; the elements before the first aligned one are an item too."""
    head = min(-address % ALIGNMENT // itemsize, n)
    whole = head + (n - head) // tile * tile
    rest = whole if n - whole > REST_ITEM else n  # a short one is read with the last tiles
    starts = np.concatenate(
        [
            np.zeros(1 if head else 0, dtype=np.int64),
            np.arange(head, rest, size, dtype=np.int64),
            np.arange(rest, n, REST_ITEM, dtype=np.int64),
        ]
    )
    lengths = np.diff(starts, append=n)
    items = np.empty((len(starts), 9), dtype=np.int64)
    items[:, 0] = address + starts * itemsize
    items[:, 1] = row
    items[:, 2] = lengths
    items[:, 3] = lengths // tile * tile
    items[:, 4] = 1 << 30  # one row
    items[:, 5:] = 1, 1, 0, 0
    if head:
        items[0, 3] = 0
    return items


@dataclass(frozen=True)
class Group:
    """Tensors of one dtype: their work items and spans on the device, see `make_items`."""

    dtype: torch.dtype
    items: Tensor
    spans: Tensor
    always: Tensor  # flag of what is measured in any case, int64
    n_items: int
    n_spans: int


@dataclass(frozen=True)
class Tables:
    """What to launch for a list, and its rows of float64."""

    groups: list[Group]
    float64_rows: list[int]
    stream: int  # on which the tables were uploaded
    uploaded: torch.cuda.Event | None

    @property
    def table_bytes(self) -> int:
        """Bytes of its tables on the device."""
        return sum(group.items.nbytes + group.spans.nbytes for group in self.groups)


_tables: OrderedDict[tuple[Any, ...], Tables] = OrderedDict()
_tables_lock = threading.Lock()


def _like(tensors: Sequence[Tensor]) -> tuple[Hashable, tuple[torch.dtype, ...], Hashable]:
    """What tables depend on beside addresses."""
    gaps = None
    if not all(map(Tensor.is_contiguous, tensors)):
        gaps = tuple([(x.shape, x.stride()) for x in tensors])
    return tuple([x.numel() for x in tensors]), tuple([x.dtype for x in tensors]), gaps


def find_tables(
    tensors: Sequence[Tensor],
    device: torch.device,
    make_tables: MakeTables,
    *more: Hashable,
    known: tuple[Hashable, ...] | None = None,
) -> Tables:
    """Tables of a list; built and uploaded anew only when addresses, shapes or dtypes change.

    They depend on ``more``, too; ``known`` are the addresses and what `_like` says, if known.
    """
    known = known or (tuple(map(Tensor.data_ptr, tensors)), *_like(tensors))
    key = (device, *known, *more)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _tables_lock:
        tables = _tables.get(key)
        if tables is not None:
            _tables.move_to_end(key)
    if tables is None:
        tables = _make_tables(tensors, device, capturing, make_tables)
        if not capturing:
            _keep_tables(key, tables)
    elif capturing:
        captured.append(tables)
    else:
        _wait_for_tables(tables)
    return tables


def _make_tables(
    tensors: Sequence[Tensor], device: torch.device, is_capturing: bool, make_tables: MakeTables
) -> Tables:
    rows: dict[torch.dtype, list[int]] = {}
    check_storage(tensors)
    for i, x in enumerate(tensors):
        rows.setdefault(x.dtype, []).append(i)
    float64_rows = rows.pop(torch.float64, [])
    groups = []
    for dtype, members in rows.items():
        items, spans = make_tables([tensors[i] for i in members], members)
        ones = np.ones_like(spans[:1])
        tables = [_upload(x, device, is_capturing) for x in (items, np.concatenate([spans, ones]))]
        counts = len(items), len(spans)
        groups.append(Group(dtype, tables[0], tables[1][:-1], tables[1][-1], *counts))
    if device.type != "cuda" or is_capturing:
        return Tables(groups, float64_rows, 0, None)
    stream = torch.cuda.current_stream(device)
    return Tables(groups, float64_rows, stream.cuda_stream, stream.record_event())


def _keep_tables(key: tuple[Any, ...], tables: Tables) -> None:
    with _tables_lock:
        _tables[key] = tables
        total = sum(each.table_bytes for each in _tables.values())
        while total > MAX_TABLE_BYTES and len(_tables) > 1:
            total -= _tables.popitem(last=False)[1].table_bytes


def _wait_for_tables(tables: Tables) -> None:
    """Let the current stream use tables that another one uploaded."""
    if tables.uploaded is None:  # the CPU has no streams
        return
    stream = torch.cuda.current_stream()
    if stream.cuda_stream != tables.stream:
        stream.wait_event(tables.uploaded)
        for group in tables.groups:
            group.items.record_stream(stream)
            group.spans.record_stream(stream)


def _upload(table: NDArray[Any], device: torch.device, is_capturing: bool) -> Tensor:
    host = torch.from_numpy(table)
    if device.type == "cpu":
        return host
    host = host.pin_memory()
    if is_capturing:
        # Every replay copies the table anew from here.
        captured.append(host)
    return host.to(device, non_blocking=True)


class PassCounter:
    """A count of passes on a CUDA device, and a flag: one of so many is due."""

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
        """Whether the pass that is captured is due at a replay, int64 ``(1,)``: 0 or 1.

        ``n_before`` passes have not been counted here; ``first`` come before the first one that is
        due, those included.
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
