"""Compiled functions that Python calls: a thread's share of the work on a list, rows, edges, peaks.

An *item* of the work is a part of one tensor. Its size depends on that tensor alone, so the floats
do not depend on the threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gradstat.bins import LOG2_FINITE, LOG2_MAGNITUDES, keeps_subnormals
from gradstat.engines import NUMBERS
from gradstat.engines.cpu import counters, partials
from gradstat.engines.cpu.compiling import (
    NEXT,
    Pointer,
    after,
    atomic_add,
    compile_entry,
    compiled,
    inlined,
    larger,
    own_scratch,
    pointer,
    smaller,
)
from gradstat.engines.cpu.counters import ABOVE, BELOW, TOUCHED_BINS, Counters
from gradstat.results import FLOATS

# A work table is int64: a head, a line for each tensor, and one more line, of which FIRST counts.
# The head: as `compiling` says, with `SCRATCH_BYTES` for each thread, zero, and left so; the stage;
# whether all items are done after it;
STAGE, IS_LAST = range(4, 6)
# how many tensors and items there are; the address of the partials, float64 (items, fields);
TENSORS, ITEMS, PARTIALS = range(6, 9)
# addresses of the results' integers, floats and counts; how many bins a row has;
INTEGERS_AT, FLOATS_AT, COUNTS_AT, BINS = range(9, 13)
# which parts of each row's histogram are touched, see `Counters`; addresses of the elements of each
# row; low and high end of all linear ranges, float64, unless each row has its own.
TOUCHED, ADDRESSES, RANGE_LOW, RANGE_HIGH = range(13, 17)
HEAD = 17
# A line: elements, address of the layout (or 0), row of the results, items before, item's size.
NUMEL, LAYOUT, ROW, FIRST, ITEM = range(5)
COLUMNS = 5

# What to do: numbers and histogram in one sweep, or the one after the other where the range comes
# between.
FUSED, NUMBERS_ONLY, HISTOGRAM_ONLY = range(3)

NARROW_BINS = 1 << 16  # whose numbers take 16 bits

SCRATCH_BYTES = counters.COUNTER_BYTES + 8 * partials.FIELDS + 8 * partials.BLOCK
MAX_SHARED_BINS = counters.MAX_SLOTS - 2  # more are counted straight into a row

LOW, HIGH = FLOATS.index("low"), FLOATS.index("high")

Work = Callable[[int], None]


@compiled
def _gather(x: Pointer, layout: Pointer, begin: int, size: int, block: Pointer) -> None:
    """Copy elements of a strided tensor from the ``begin``-th on, in the order of its layout.

    A layout is int64: how many dimensions, then size and stride of each, the outermost first.
    """
    last = 2 * layout[0] - 1
    inner, step = layout[last], layout[last + 1]
    done = 0
    while done < size:
        # Divisions for each row, not for each element: they take longer than the copy.
        row, column = (begin + done) // inner, (begin + done) % inner
        source = column * step
        for k in range(last - 2, 0, -2):
            source += row % layout[k] * layout[k + 1]
            row //= layout[k]
        for j in range(done, smaller(done + inner - column, size)):
            block[j] = x[source]
            source += step
        done += inner - column


@inlined
def _ends(head: Pointer, stage: int, floats: Pointer) -> tuple[float, float]:
    """Ends of a tensor's linear range: its own, which is in its floats, or that of all."""
    if stage == HISTOGRAM_ONLY:
        return floats[LOW], floats[HIGH]
    ends = pointer(after(head, RANGE_LOW), np.float64)
    return ends[0], ends[1]


@compiled
def _write_range(total: Pointer, floats: Pointer) -> None:
    """Range from the extremes, as `LinearBins.automatic_range` without ``nice``."""
    if total[partials.FINITE] == 0:
        floats[LOW], floats[HIGH] = 0.0, 1.0
        return
    low = counters.below(total[partials.MIN])
    high = np.float32(-counters.below(-total[partials.MAX]))
    low, high = larger(low, np.float32(-counters.LARGEST)), smaller(high, counters.LARGEST)
    if low == high:
        half = larger(np.float32(abs(low) * np.float32(2.0**-21)), np.float32(0.5))
        low, high = np.float32(low - half), np.float32(high + half)
    floats[LOW] = larger(np.float32(low), np.float32(-counters.LARGEST))
    floats[HIGH] = smaller(np.float32(high), counters.LARGEST)


@inlined
def _item(
    line: Pointer,
    first: Pointer,
    item: int,
    next_item: int,
    stage: int,
    within: counters.Range,
    partial: Pointer,
    known: Pointer,
    raw: Pointer,
    to: Counters,
) -> None:
    """Go through an item of the tensor that begins at ``first``, block by block.

    ``next_item`` is this thread's, ``known`` is room for a block's partial, ``raw`` for elements
    that do not lie side by side.
    """
    start = (item - line[FIRST]) * line[ITEM]
    stop = smaller(line[NUMEL], start + line[ITEM])
    # Other threads have these: what this one counts next lies behind them.
    skipped = (next_item - item - 1) * line[ITEM]
    if stage == HISTOGRAM_ONLY:
        # The first sweep has left the whole item's extremes, which hold for each of its blocks.
        known = partial
    else:
        partials.clear(partial)
    for begin in range(start, stop, partials.BLOCK):
        x, size = after(first, begin), smaller(partials.BLOCK, stop - begin)
        if line[LAYOUT] != 0:
            _gather(first, pointer(line[LAYOUT], np.int64), begin, size, raw)
            x = raw
        if stage != HISTOGRAM_ONLY:
            partials.summarise(x, size, known)
            partials.merge(partial, known)
        if stage == NUMBERS_ONLY:
            continue
        # Slots ascend with values: if both extremes are in one slot, no other value needs a look.
        slot, plain = -1, False
        if known[partials.NAN] + known[partials.POSINF] + known[partials.NEGINF] == 0:
            slot = counters.common_slot(known[partials.MIN], known[partials.MAX], within)
            plain = counters.is_plain(known[partials.MIN], known[partials.MAX], within)
        if slot >= 0:
            counters.add_to_row(slot, size, within, to)
        else:
            ahead = begin + partials.BLOCK if begin + partials.BLOCK < stop else stop + skipped
            counters.count(x, size, within, plain, to, after(first, ahead))


@inlined
def parts_of(bins: int) -> int:
    """How many parts of a histogram are touched or not."""
    return (bins + TOUCHED_BINS - 1) // TOUCHED_BINS


@inlined
def _counters(head: Pointer, line: Pointer, n: int, scratch: int) -> Counters:
    """Counters of ``n`` slots for a tensor."""
    integers = pointer(head[INTEGERS_AT] + line[ROW] * 8 * 8, np.int64)
    counts = pointer(head[COUNTS_AT] + line[ROW] * 8 * head[BINS], np.int64)
    touched = pointer(head[TOUCHED] + line[ROW] * parts_of(head[BINS]), np.uint8)
    # Threads may have items of one tensor, and then add to its row at the same time.
    is_shared = line[COLUMNS + FIRST] > line[FIRST] + 1
    return counters.make_counters(integers, counts, touched, n, line[NUMEL], is_shared, scratch)


@compiled
def _close_log2(total: Pointer, floats: Pointer, counts: Pointer, touched: Pointer) -> None:
    """Write the range; put NaN and infinities into no bin, -0.0 into that of 0.0."""
    floats[LOW], floats[HIGH] = -np.inf, np.inf
    for j in range(LOG2_MAGNITUDES - LOG2_FINITE):
        counts[j] = 0
        counts[2 * LOG2_MAGNITUDES - 1 - j] = 0
    counts[LOG2_MAGNITUDES - 1] -= np.int64(total[partials.NEGATIVE_ZEROS])
    counts[LOG2_MAGNITUDES] += np.int64(total[partials.NEGATIVE_ZEROS])
    touched[LOG2_MAGNITUDES // TOUCHED_BINS] = 1


def _make_work(element: object, is_linear: bool) -> Work:
    def work(address: int) -> None:
        """Take items of the work table there until none is left; several threads at once.

        Whoever is told that all are done after it makes the rows, from the partials in their order.
        """
        head = pointer(address, np.int64)
        stage, scratch = head[STAGE], own_scratch(head, SCRATCH_BYTES)
        if scratch == 0:
            return
        parts = pointer(head[PARTIALS], np.float64)
        total = pointer(scratch + counters.COUNTER_BYTES, np.float64)
        raw = pointer(scratch + counters.COUNTER_BYTES + 8 * partials.FIELDS, element)
        line = lines = after(head, HEAD)
        addresses = pointer(head[ADDRESSES], np.int64)
        n_slots = head[BINS] + 2 if is_linear else head[BINS]
        item = atomic_add(after(head, NEXT), 1)
        while item < head[ITEMS]:
            while line[COLUMNS + FIRST] <= item:  # items are taken in their order
                line = after(line, COLUMNS)
            first = pointer(addresses[line[ROW]], element)
            to = _counters(head, line, n_slots, scratch)
            within = None
            if is_linear:
                floats = pointer(head[FLOATS_AT] + line[ROW] * 8 * 8, np.float64)
                low, high = _ends(head, stage, floats)
                within = counters.linear_range(low, high, head[BINS])
            while item < line[COLUMNS + FIRST]:
                partial = after(parts, item * partials.FIELDS)
                # Taken before it is needed, so that its memory can be fetched meanwhile.
                next_item = atomic_add(after(head, NEXT), 1)
                _item(line, first, item, next_item, stage, within, partial, total, raw, to)
                item = next_item
            # The next tensor has the same counters.
            if to.mode != counters.STRAIGHT and stage != NUMBERS_ONLY:
                counters.empty(within, to)
        if head[IS_LAST]:
            for tensor in range(head[TENSORS]):
                line = after(lines, tensor * COLUMNS)
                to = _counters(head, line, n_slots, scratch)
                floats = pointer(head[FLOATS_AT] + line[ROW] * 8 * 8, np.float64)
                partials.clear(total)
                # Whoever did them: sums in this order do not depend on the threads.
                for item in range(line[FIRST], line[COLUMNS + FIRST]):
                    partials.merge(total, after(parts, item * partials.FIELDS))
                partials.write_row(total, line[NUMEL], to.integers, floats)
                if not is_linear:
                    _close_log2(total, floats, to.counts, to.touched)
                elif stage == NUMBERS_ONLY:
                    _write_range(total, floats)
                else:
                    floats[LOW], floats[HIGH] = _ends(head, stage, floats)
                    # NaN and infinities were counted outside the range.
                    to.integers[BELOW] -= np.int64(total[partials.NEGINF])
                    to.integers[ABOVE] -= np.int64(total[partials.NAN] + total[partials.POSINF])

    return work


@functools.cache
def work_on(dtype: torch.dtype, is_linear: bool) -> Work:
    """The compiled function for tensors of one dtype and one kind of bins.

    It is idle in a thread that flushes subnormals: `keeps_subnormals` around it would cost each
    call.
    """
    work = _make_work(partials.ELEMENTS[dtype], is_linear)
    name = f"{str(dtype).removeprefix('torch.')}_{'linear' if is_linear else 'log2'}"
    return compile_entry(work, name, "void(int64)")


@functools.cache
def fill_edges() -> Callable[[float, float, int, int], None]:
    """The compiled function that writes the edges of linear bins, as `LinearBins.edges`."""

    def edges(low: float, high: float, bins: int, address: int) -> None:
        within = counters.linear_range(low, high, bins)
        out = pointer(address, np.float64)
        out[0], out[bins] = low, high
        first, last = counters.ordered(np.float32(low)), counters.ordered(np.float32(high))
        # The first float32 of each bin, by bisection: `slot_of` ascends, and says what is in which.
        for edge in range(1, bins):
            below, reached = first, last
            while below < reached:
                middle = (below + reached) >> 1
                if counters.slot_of(counters.from_ordered(middle), within) > edge:
                    reached = middle
                else:
                    below = middle + 1
            first = reached
            out[edge] = np.float64(counters.from_ordered(reached)) + 0.0  # not -0.0

    return keeps_subnormals(compile_entry(edges, "linear", "void(float64, float64, int64, int64)"))


@functools.cache
def find_peaks(element_bytes: int) -> Work:
    """The compiled function that finds largest magnitudes, for elements of so many bytes."""
    bits: Any = {2: np.int16, 4: np.int32, 8: np.int64}[element_bytes]
    magnitude = bits(np.iinfo(bits).max)  # all but the sign

    def peaks(address: int) -> None:
        """Take parts of elements ``(outer, units, inner)`` until none is left.

        There are eight int64: 0; how many parts; outer of a part, and of all; units; inner; the
        addresses of the elements and of magnitudes ``(parts, units)``, at first zero. Magnitudes
        are in the order of their bits, whatever their type: NaN is above infinity.
        """
        job = pointer(address, np.int64)
        parts, each, outer, units, inner = job[1], job[2], job[3], job[4], job[5]
        part = atomic_add(job, 1)
        while part < parts:
            x = after(pointer(job[6], bits), part * each * units * inner)
            found = after(pointer(job[7], bits), part * units)
            for _ in range(smaller(each, outer - part * each)):
                # Units side by side are one vector's lanes; else one unit's elements are.
                if inner == 1:
                    for unit in range(units):
                        found[unit] = larger(found[unit], bits(x[unit] & magnitude))
                    x = after(x, units)
                else:
                    for unit in range(units):
                        most = found[unit]
                        for j in range(inner):
                            most = larger(most, bits(x[j] & magnitude))
                        found[unit] = most
                        x = after(x, inner)
            part = atomic_add(job, 1)

    return compile_entry(peaks, f"{element_bytes}", "void(int64)")


@functools.cache
def pack_rows() -> Callable[[int, int, int, int, int, int], int]:
    """The compiled function that makes rows a record, see `gradstat.record`, and their memory zero.

    `watch` calls it for the results of every engine.
    """

    def pack(source: int, n: int, bins: int, n_formats: int, touched: int, target: int) -> int:
        """Pack ``n`` rows, all zero afterwards; returns the number of bytes.

        Args:
            source: address of the rows, as `engines.Result` has them.
            n: how many rows.
            bins: of each.
            n_formats: how many numbers the formats' are, for all rows.
            touched: address of uint8, which parts of each histogram to look at; 0: all.
            target: address of twice as much memory.
        """
        rows, packed = pointer(source, np.int64), pointer(target, np.int64)
        numbers = n * NUMBERS
        # No count of a row is larger than its numel.
        is_wide = False
        for row in range(n):
            is_wide |= rows[8 * row] >= 1 << 32
        for j in range(numbers):
            packed[j] = rows[j]
            rows[j] = 0
        after_counts = n * (NUMBERS + bins)
        for j in range(n_formats):
            packed[numbers + j] = rows[after_counts + j]
            rows[after_counts + j] = 0
        start = target + 8 * (numbers + n_formats)
        ends = pointer(start, np.uint32)
        if n & 1:
            ends[n] = 0
        start += 4 * (n + (n & 1))
        narrow, wide = pointer(start, np.uint16), pointer(start, np.uint32)
        # How many bins there are decides where their counts begin: they wait behind all that.
        held, end = after(packed, after_counts + n_formats), 0
        parts = parts_of(bins)
        marks = pointer(touched, np.uint8)
        for row in range(n):
            counts = after(rows, numbers + row * bins)
            for part in range(parts):
                if touched != 0:
                    if marks[row * parts + part] == 0:
                        continue
                    marks[row * parts + part] = 0
                first = part * TOUCHED_BINS
                stop = smaller(first + TOUCHED_BINS, bins)
                # One test for all of them: most of a histogram is empty.
                filled = np.int64(0)
                for j in range(first, stop):
                    filled |= counts[j]
                if filled != 0:
                    for j in range(first, stop):
                        if counts[j] != 0:
                            if bins <= NARROW_BINS:
                                narrow[end] = j
                            else:
                                wide[end] = j
                            held[end] = counts[j]
                            counts[j] = 0
                            end += 1
            ends[row] = end
        if bins <= NARROW_BINS:
            for j in range(end, (end + 3) // 4 * 4):
                narrow[j] = 0
            start += (end + 3) // 4 * 8
        else:
            if end & 1:
                wide[end] = 0
            start += (end + 1) // 2 * 8
        if is_wide:
            longs = pointer(start, np.int64)
            for j in range(end):
                longs[j] = held[j]
            return start + 8 * end - target
        shorts = pointer(start, np.uint32)
        for j in range(end):
            shorts[j] = held[j]
        if end & 1:
            shorts[end] = 0
        return start + (end + 1) // 2 * 8 - target

    return compile_entry(pack, "rows", "int64(int64, int64, int64, int64, int64, int64)")
