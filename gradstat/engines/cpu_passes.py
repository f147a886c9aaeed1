"""The two compiled functions that `cpu` calls: `work` through a list, then `finish` its rows.

The work table, int64 ``(L + 1, 6)``, has a row per tensor and a last one, whose `FIRST` is the
number of items and whose `NEXT` the first item that nobody has taken. An item is a part of one
tensor. Its size depends on that tensor alone, so the floats do not depend on the threads.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gradstat.engines import cpu_blocks, cpu_compile, cpu_counts, cpu_rows
from gradstat.engines.cpu_blocks import (
    FIELDS,
    FINITE,
    FLOAT32,
    FLOAT64,
    MAX,
    MIN,
    clear,
    gather,
    load,
    merge,
    narrow_block,
    summarise,
)
from gradstat.engines.cpu_compile import (
    Array,
    Scalar,
    array_at,
    atomic_add,
    compiled,
    compiled_entry,
    enter_ieee_mode,
    leave_ieee_mode,
    read,
)
from gradstat.engines.cpu_counts import (
    LANES,
    MAX_LANE_BINS,
    STRIDE,
    add_to_row,
    fill_slots,
    flush,
    linear_factors,
    scatter,
    scatter_row,
    slot_of,
)
from gradstat.engines.cpu_rows import (
    HIGH,
    LOW,
    close_linear_row,
    close_log2_row,
    write_range,
    write_values,
)

BLOCK = 4096  # elements; a block, its slots and the counters they touch stay in the fastest cache
SCRATCH_WORDS = 5 * BLOCK + LANES * STRIDE  # uint32 for each thread; the lanes, at the end, zero

ADDRESS, NUMEL, DTYPE, LAYOUT, FIRST, ITEM = range(6)
COLUMNS = 6
NEXT = ADDRESS

# A run does floats and counts in one sweep, or one after the other where the range comes between.
FUSED, FLOATS_ONLY, COUNTS_ONLY = range(3)

_LANES_HOLD = 1 << 31  # values, and what is added before the next look: 32 bits never overflow


@compiled
def _item(
    row: Array,
    start: int,
    stop: int,
    stage: int,
    is_linear: bool,
    straight: bool,
    factors: tuple[Scalar, ...],
    partial: Array,
    rows: tuple[Array, Array],
    scratch: Array,
) -> None:
    """Elements ``start`` to ``stop`` of one tensor, block by block."""
    integers, counts = rows
    slots, lanes = scratch[3 * BLOCK : 4 * BLOCK], scratch[5 * BLOCK :]
    if stage != COUNTS_ONLY:
        clear(partial)
    elif _is_one_slot(partial, stop - start, is_linear, factors):
        slot = slot_of(partial[MIN], is_linear, factors)
        _count_many(slot, stop - start, straight, lanes, integers, counts)
        return
    block = np.empty(FIELDS)
    for begin in range(start, stop, BLOCK):
        size = min(BLOCK, stop - begin)
        x = _block(row, begin, size, stage, is_linear, factors[1], block, scratch)
        if stage != COUNTS_ONLY:
            merge(partial, block)
            if stage == FLOATS_ONLY:
                continue
            if _is_one_slot(block, size, is_linear, factors):
                slot = slot_of(block[MIN], is_linear, factors)
                _count_many(slot, size, straight, lanes, integers, counts)
                continue
        fill_slots(x, is_linear, factors, slots[:size])
        if straight:
            scatter_row(slots[:size], integers, counts)
        else:
            itemsize = _itemsize(row[DTYPE])
            scatter(slots[:size], lanes, row[ADDRESS] + (begin + BLOCK) * itemsize, itemsize)


@compiled
def _is_one_slot(part: Array, size: int, is_linear: bool, factors: tuple[Scalar, ...]) -> bool:
    """Whether a part's values are finite and in one slot; a slot is monotone in the value."""
    if part[FINITE] < size:
        return False
    first = slot_of(part[MIN], is_linear, factors)
    return bool(first == slot_of(part[MAX], is_linear, factors))


@compiled
def _count_many(
    slot: int, n: int, straight: bool, lanes: Array, integers: Array, counts: Array
) -> None:
    if straight:
        add_to_row(slot, n, integers, counts)
    else:
        lanes[slot] += np.uint32(n)


@compiled
def _block(
    row: Array,
    begin: int,
    size: int,
    stage: int,
    is_linear: bool,
    high: float,
    partial: Array,
    scratch: Array,
) -> Array:
    """Load a block as float32 and, unless only counts are wanted, write its partial."""
    raw, wide = scratch[: 2 * BLOCK], scratch[2 * BLOCK : 3 * BLOCK].view(np.float32)
    spare = scratch[3 * BLOCK : 5 * BLOCK]
    dtype = row[DTYPE]
    itemsize = _itemsize(dtype)
    address = row[ADDRESS] + begin * itemsize
    if row[LAYOUT] != 0:
        _gather_block(row, begin, size, itemsize, raw)
        address = np.int64(raw.ctypes.data)
    if dtype == FLOAT64:
        values = array_at(address, np.float64, size)
        if stage != COUNTS_ONLY:
            summarise(values, spare.view(np.float64), partial)
        return narrow_block(values, is_linear, high, wide)
    x = load(address, dtype, size, wide)
    if stage != COUNTS_ONLY:
        summarise(x, spare.view(np.float32), partial)
    return x


@compiled
def _is_shared(table: Array, tensor: int) -> bool:
    return bool(table[tensor + 1, FIRST] > table[tensor, FIRST] + 1)


@compiled
def _itemsize(dtype: int) -> int:
    return 8 if dtype == FLOAT64 else 4 if dtype == FLOAT32 else 2


@compiled
def _gather_block(row: Array, begin: int, size: int, itemsize: int, raw: Array) -> None:
    """Copy a block of a strided tensor to ``raw``."""
    dimensions = read(row[LAYOUT], np.int64)
    layout = array_at(row[LAYOUT] + 8, np.int64, 2 * dimensions)
    gather(row[ADDRESS], itemsize, layout, begin, size, raw)


def _entry_points(sources: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """`work` and `finish`, in Numba's cache under a key that has ``sources`` in it."""

    @compiled_entry
    def work(
        table: Array,
        stage: int,
        is_linear: bool,
        partials: Array,
        integers: Array,
        floats: Array,
        counts: Array,
        scratch: Array,
    ) -> None:
        """Take items until none is left; any number of threads at once.

        Args:
            table: work table.
            stage: `FUSED`, `FLOATS_ONLY` or `COUNTS_ONLY`.
            is_linear: whether the bins are linear, over the ranges in ``floats``.
            partials: float64 ``(items, FIELDS)``, filled, for `COUNTS_ONLY` read.
            integers: int64 ``(L, 8)``; below and above are added to.
            floats: float64 ``(L, 8)``, read for the range.
            counts: int64 ``(L, bins)``, added to.
            scratch: uint32 ``(SCRATCH_WORDS,)``, this thread's; zero, and left so.
        """
        _ = sources
        mode = enter_ieee_mode()
        last, lanes = table.shape[0] - 1, scratch[5 * BLOCK :]
        tensor, owner, in_lanes = 0, -1, 0
        while True:
            item = atomic_add(table.ctypes.data + 8 * (last * COLUMNS + NEXT), 1)
            if item >= table[last, FIRST]:
                break
            while table[tensor + 1, FIRST] <= item:
                tensor += 1
            if owner >= 0 and (owner != tensor or in_lanes > _LANES_HOLD):
                flush(lanes, integers[owner], counts[owner], _is_shared(table, owner))
                owner, in_lanes = -1, 0
            row = table[tensor]
            straight = row[NUMEL] < 2 * counts.shape[1] or counts.shape[1] > MAX_LANE_BINS
            if not straight and stage != FLOATS_ONLY:
                owner, in_lanes = tensor, in_lanes + row[ITEM]
            start = (item - row[FIRST]) * row[ITEM]
            stop = min(row[NUMEL], start + row[ITEM])
            factors = linear_factors(floats[tensor, LOW], floats[tensor, HIGH], counts.shape[1])
            rows = (integers[tensor], counts[tensor])
            _item(
                row, start, stop, stage, is_linear, straight, factors, partials[item], rows, scratch
            )
        if owner >= 0:
            flush(lanes, integers[owner], counts[owner], _is_shared(table, owner))
        leave_ieee_mode(mode)

    @compiled_entry
    def finish(
        table: Array,
        stage: int,
        is_linear: bool,
        partials: Array,
        integers: Array,
        floats: Array,
        counts: Array,
    ) -> None:
        """Make each tensor's row from its partials, in their order. Arguments as `work`'s."""
        _ = sources
        mode = enter_ieee_mode()
        total = np.empty(FIELDS)
        for tensor in range(table.shape[0] - 1):
            if stage != COUNTS_ONLY:
                clear(total)
                for item in range(table[tensor, FIRST], table[tensor + 1, FIRST]):
                    merge(total, partials[item])
                write_values(total, table[tensor, NUMEL], integers[tensor], floats[tensor])
            if not is_linear:
                close_log2_row(floats[tensor], counts[tensor])
            elif stage == FLOATS_ONLY:
                write_range(total, floats[tensor])
            else:
                close_linear_row(integers[tensor])
        leave_ieee_mode(mode)

    return work, finish


def _checksum() -> int:
    """Of the files that the entry points compile; Numba itself looks at this file only."""
    files = (cpu_blocks.__file__, cpu_compile.__file__, cpu_counts.__file__, cpu_rows.__file__)
    return zlib.crc32(b"".join(Path(file).read_bytes() for file in files))


work, finish = _entry_points(_checksum())
