"""Compiled: the slot of each value, a thread's private counters, and how they get to a row.

For `LinearBins` a *slot* is a bin plus one: slot 0 takes what lies below the range, slot
``bins + 1`` what lies above it, and NaN. For `Log2Bins` it is the top 11 bits of the float32
pattern: bins in the order of patterns, -0.0 and NaN among them. ``within``, the range, is ``None``
for it.

Neighbours in one slot would wait for each other at one counter, so a slot has one in each of
several *lanes*. Few linear slots of a large tensor are counted two values at a time, with a counter
for each pair of slots. Lanes are emptied into the row before they can overflow, and at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numba import types

from gradstat.bins import FLOAT32_MAX, LOG2_MAGNITUDES, LOG2_SHIFT
from gradstat.engines.cpu.compiling import (
    IR,
    Pointer,
    Scalar,
    after,
    atomic_add,
    compiled,
    compiled_for_types,
    inlined,
    pointer,
    prefetch,
    reinterpret,
    smaller,
)
from gradstat.engines.cpu.partials import BLOCK, real
from gradstat.results import INTEGERS

LARGEST = np.float32(FLOAT32_MAX)

# Of `LinearBins`: low, high, scale, scaled low end, bins per scaled unit, last bin, all float32.
Range: TypeAlias = Any

LANES = 8  # enough that no addition waits for the one before
LOG2_LAST = 2 * LOG2_MAGNITUDES - 1  # slot
STRIDE = 2112  # from lane to lane; 256 bytes off a multiple of 4096: lanes do not evict each other
MAX_SLOTS, MAX_PAIR_SLOTS = 2050, 90  # more than these are counted straight, or one by one
LANES_HOLD, PAIRS_HOLD = 1 << 24, 2 * LANES * 65535  # values: no counter overflows
TOUCHED_BINS = 64  # most of a small tensor's are empty, and need not be looked at again
MANY_FROM = 1 << 15  # elements of a tensor: fewer do not pay for many counters

LANE_BYTES = 2 * LANES * BLOCK  # of pairs, uint16; those of slots, uint32, need less
COUNTER_BYTES = 8 + 8 * MAX_PAIR_SLOTS + LANE_BYTES + 6 * BLOCK

STRAIGHT, IN_LANES, IN_PAIRS = range(3)
BELOW, ABOVE = INTEGERS.index("below"), INTEGERS.index("above")


@compiled
def linear_range(low: float, high: float, bins: int) -> Range:
    """Ends and factors, as `LinearBins._factors`."""
    lo, hi, scale = np.float32(low), np.float32(high), np.float32(1)
    width = np.float32(hi - lo)
    if width < np.float32(2.0**-100):
        scale = np.float32(2.0**100)
    if width > np.float32(2.0**126):
        scale = np.float32(2.0**-8)
    origin = np.float32(lo * scale)
    inv_width = np.float32(np.float32(bins) / np.float32(np.float32(hi * scale) - origin))
    return lo, hi, scale, origin, inv_width, np.float32(bins - 1)


@compiled
def below(value: float) -> Scalar:
    """Largest float32 not above a float64, as `bins.float32_below`; -inf below all of them."""
    x = np.float32(value)
    bits = reinterpret(x, np.uint32)
    # The pattern before it in the order of values; without branches, so that a block is vectors.
    before = np.uint32(bits - np.uint32(1)) if x > 0 else np.uint32(bits + np.uint32(1))
    before = np.uint32(0x80000001) if x == 0 else before
    return reinterpret(np.uint32(before if np.float64(x) > value else bits), np.float32)


@compiled
def narrow(value: float, within: Range) -> Scalar:
    """A float64 as a float32 in the same bin.

    What lies outside a linear range becomes infinite, to be counted outside. For `Log2Bins` the
    magnitude is rounded down, and the outermost bins hold what lies beyond float32.
    """
    if within is None:
        x = np.float32(value)
        bits = reinterpret(x, np.uint32)
        is_larger = abs(np.float64(x)) > abs(value)
        return reinterpret(
            np.uint32(np.uint32(bits - np.uint32(1)) if is_larger else bits), np.float32
        )
    return np.float32(np.inf) if value > np.float64(within[1]) else below(value)


@compiled
def slot_of(x: Scalar, within: Range) -> Scalar:
    """Slot of a float32, int32."""
    if within is None:
        return np.int32(np.uint32(reinterpret(x, np.uint32) >> np.uint32(LOG2_SHIFT)))
    low, high, scale, origin, inv_width, last = within
    t = np.float32(np.float32(np.float32(x * scale) - origin) * inv_width)
    t = t if t > np.float32(0) else np.float32(0)
    t = t if t < last else last
    slot = np.int32(np.int32(t) + np.int32(1))
    slot = slot if x <= high else np.int32(np.int32(last) + np.int32(2))
    return np.int32(0) if x < low else slot


@compiled
def ordered(x: Scalar) -> Scalar:
    """A float32 as an int64 that keeps the order; -0.0 comes just before 0.0."""
    bits = np.int64(reinterpret(x, np.int32))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@compiled
def from_ordered(key: Scalar) -> Scalar:
    """The float32 of which `ordered` is ``key``."""
    return reinterpret(np.int32(key ^ ((key >> 31) & 0x7FFFFFFF)), np.float32)


@compiled
def common_slot(low: float, high: float, within: Range) -> int:
    """Slot of all finite values from ``low`` to ``high``, or -1."""
    first = slot_of(narrow(low, within), within)
    return first if first == slot_of(narrow(high, within), within) else -1


@compiled
def is_plain(low: float, high: float, within: Range) -> bool:
    """Whether finite values from ``low`` to ``high`` are all in a linear range without a scale."""
    if within is None:
        return False
    return bool(low >= within[0] and high <= within[1] and within[2] == 1)


@compiled
def _plain_bin(x: Scalar, within: Range) -> Scalar:
    """Slot less one of a float32 for which `is_plain` holds."""
    t = np.float32(np.float32(x - within[0]) * within[4])
    slot, last = np.int32(t), np.int32(within[5])
    return slot if slot < last else last


@compiled_for_types
def _two_values(x: IR, j: IR, half: IR) -> Callable[..., tuple[Scalar, Scalar]]:
    """The ``j``-th two of ``2 * half`` values, in some order, as float32."""
    if x.dtype != types.uint16:
        return lambda x, j, half: (real(x[j]), real(x[half + j]))

    def split_word(x: Pointer, j: int, half: int) -> tuple[Scalar, Scalar]:
        word = pointer(x, np.uint32)[j]
        first, second = np.uint32(word << np.uint32(16)), np.uint32(word & np.uint32(0xFFFF0000))
        return reinterpret(first, np.float32), reinterpret(second, np.float32)

    return split_word


@compiled
def fill_pairs(x: Pointer, half: int, within: Range, plain: bool, pairs: Pointer) -> None:
    """The slots of two values at a time, of ``2 * half``, in one number: uint16 ``(half,)``."""
    width = np.int32(np.int32(within[5]) + np.int32(3))
    one_each = np.int32(width + np.int32(1))
    if plain:
        for j in range(half):
            a, b = _two_values(x, j, half)
            bins = np.int32(_plain_bin(a, within) + np.int32(_plain_bin(b, within) * width))
            pairs[j] = np.uint16(np.int32(bins + one_each))
    else:
        for j in range(half):
            a, b = _two_values(x, j, half)
            pairs[j] = np.uint16(slot_of(a, within) + np.int32(slot_of(b, within) * width))


@compiled_for_types
def as_float32(x: IR, n: IR, within: IR, wide: IR) -> Callable[..., Pointer]:
    """A block in a form that can be counted: float64 as float32 in ``wide``, others as they are."""
    if x.dtype != types.uint64:
        return lambda x, n, within, wide: x

    def narrow_block(x: Pointer, n: int, within: Range, wide: Pointer) -> Pointer:
        for j in range(n):
            wide[j] = reinterpret(narrow(real(x[j]), within), np.uint32)
        return wide

    return narrow_block


class Counters(NamedTuple):
    """Where a tensor's values are counted: its row, and memory of this thread."""

    integers: Pointer  # int64 (8,), of the row
    counts: Pointer  # int64 (bins,), of the row
    slots: int
    mode: int
    touched: Pointer  # uint8, whether something was counted in each `TOUCHED_BINS` of the row
    is_shared: bool  # the row, by several threads
    waiting: Pointer  # int64, how many values the lanes hold; zero between tensors, as what follows
    totals: Pointer  # int64 (MAX_PAIR_SLOTS,), of pairs
    lanes: Pointer  # uint32 (LANES * STRIDE,), or uint16 if pairs
    stride: int  # from lane to lane of slots; 0: there is one lane
    wide: Pointer  # uint32 (BLOCK,)
    block: Pointer  # uint16 (BLOCK,), the slots of a block


@inlined
def make_counters(
    integers: Pointer,
    counts: Pointer,
    touched: Pointer,
    slots: int,
    numel: int,
    is_shared: bool,
    memory: int,
) -> Counters:
    """Counters in `COUNTER_BYTES` at an address, of a mode that a tensor of ``numel`` pays for."""
    mode = IN_PAIRS
    if 2 * numel < slots or slots > MAX_SLOTS:
        mode = STRAIGHT
    elif slots > MAX_PAIR_SLOTS or numel < MANY_FROM:
        mode = IN_LANES
    lanes = memory + 8 + 8 * MAX_PAIR_SLOTS
    wide = lanes + LANE_BYTES
    return Counters(
        integers,
        counts,
        slots,
        mode,
        touched,
        is_shared,
        pointer(memory, np.int64),
        pointer(memory + 8, np.int64),
        pointer(lanes, np.uint32),
        # Values in few slots often have the same one, and few are soon emptied.
        STRIDE if numel >= MANY_FROM or slots <= MAX_PAIR_SLOTS else 0,
        pointer(wide, np.uint32),
        pointer(wide + 4 * BLOCK, np.uint16),
    )


@compiled
def _pair_stride(slots: int) -> int:
    """`STRIDE` of pairs: an odd multiple of 128 bytes, so few slots lie close together."""
    return ((slots * slots + 63) // 64 | 1) * 64


def _make_scatter(width: int, shift: int, mask: int, lanes: int) -> Callable[..., None]:
    """Counts slots that lie ``shift`` bits up in fields of ``width`` bits."""
    fields = 64 // width
    words = lanes // fields

    @compiled
    def scatter(
        source: Pointer, n: int, counters: Pointer, stride: int, ahead: Pointer, step: int
    ) -> None:
        """Count ``n`` fields, a multiple of the lanes, which are ``stride`` counters apart.

        Counting waits for the cache, not for memory: the time is used to fetch what comes
        ``ahead``, ``step`` elements for each word of fields.
        """
        x = pointer(source, np.uint64)
        for j in range(0, n // fields, words):
            prefetch(after(ahead, j * step))
            for k in range(words):
                word = x[j + k]
                for field in range(fields):
                    slot = np.uint64(word >> np.uint64(width * field + shift)) & np.uint64(mask)
                    counters[slot + np.uint64((k * fields + field) * stride)] += 1

    return scatter


_scatter_float32 = _make_scatter(32, LOG2_SHIFT, LOG2_LAST, LANES)  # Log2Bins
_scatter_bfloat16 = _make_scatter(16, LOG2_SHIFT - 16, LOG2_LAST, LANES)
_scatter_slots = _make_scatter(16, 0, 0xFFFF, LANES)
_scatter_pairs = _make_scatter(16, 0, 0xFFFF, LANES)


@compiled_for_types
def _count_in_lanes(x: IR, n: IR, within: IR, to: IR, ahead: IR) -> Callable[..., None]:
    """Count a block in the lanes."""

    def count_slots(x: Pointer, n: int, within: Range, to: Counters, ahead: Pointer) -> None:
        for j in range(n):
            to.block[j] = np.uint16(slot_of(real(x[j]), within))
        whole = n // LANES * LANES
        _scatter_slots(to.block, whole, to.lanes, to.stride, ahead, 4)
        for j in range(whole, n):
            to.lanes[to.block[j]] += 1

    def count_patterns(x: Pointer, n: int, within: Range, to: Counters, ahead: Pointer) -> None:
        whole = n // LANES * LANES
        scatter(x, whole, to.lanes, to.stride, ahead, step)
        for j in range(whole, n):
            to.lanes[slot_of(real(x[j]), within)] += 1

    is_bfloat16 = x.dtype == types.uint16
    scatter, step = (_scatter_bfloat16, 4) if is_bfloat16 else (_scatter_float32, 2)
    is_direct = isinstance(within, types.NoneType) and x.dtype != types.int16
    return count_patterns if is_direct else count_slots


@inlined
def count(x: Pointer, n: int, within: Range, plain: bool, to: Counters, ahead: Pointer) -> None:
    """Count a block; ``plain``: `is_plain` holds for it; ``ahead``: what will be counted next."""
    y = as_float32(x, n, within, to.wide)
    if to.mode == STRAIGHT:
        for j in range(n):
            add_to_row(slot_of(real(y[j]), within), 1, within, to)
        return
    if to.waiting[0] + n > (PAIRS_HOLD if to.mode == IN_PAIRS else LANES_HOLD):
        empty(within, to)
    to.waiting[0] += n
    if within is not None and to.mode == IN_PAIRS:
        half = n // (2 * LANES) * LANES
        fill_pairs(y, half, within, plain, to.block)
        pairs, stride = pointer(to.lanes, np.uint16), _pair_stride(to.slots)
        _scatter_pairs(to.block, half, pairs, stride, ahead, 8)
        for j in range(2 * half, n):
            add_to_row(slot_of(real(y[j]), within), 1, within, to)
    else:
        _count_in_lanes(y, n, within, to, ahead)


@compiled
def add_to_row(slot: int, n: Scalar, within: Range, to: Counters) -> None:
    """Count ``n`` values of one slot in the row."""
    at = slot - 1
    if within is None:
        # In the order of values: behind a sign, patterns run backwards.
        at = slot ^ (LOG2_LAST if slot >= LOG2_MAGNITUDES else LOG2_MAGNITUDES)
    cell = after(to.counts, at)
    if within is not None and slot in (0, to.slots - 1):
        cell = after(to.integers, BELOW if slot == 0 else ABOVE)
    else:
        to.touched[at // TOUCHED_BINS] = 1
    if to.is_shared:
        atomic_add(cell, n)
    else:
        cell[0] += n


@compiled
def empty(within: Range, to: Counters) -> None:
    """Move what the lanes hold to the row."""
    to.waiting[0] = 0
    n = to.slots
    if within is not None and to.mode == IN_PAIRS:
        _empty_pairs(within, to)
        return
    n_lanes = 1 if to.stride == 0 else LANES
    for first in range(0, n, TOUCHED_BINS):
        size, sums, lane = smaller(TOUCHED_BINS, n - first), to.wide, after(to.lanes, first)
        filled = np.uint32(0)
        for j in range(size):
            total = lane[j]
            if to.stride != 0:
                for k in range(1, LANES):
                    total = np.uint32(total + lane[k * STRIDE + j])
            sums[j] = total
            filled |= total
        # One test for all of them: most of a histogram is empty.
        if filled != 0:
            for k in range(n_lanes):
                for j in range(size):
                    lane[k * STRIDE + j] = 0
            for j in range(size):
                if sums[j] != 0:
                    add_to_row(first + j, np.int64(sums[j]), within, to)


@compiled
def _empty_pairs(within: Range, to: Counters) -> None:
    n = to.slots
    pairs, stride = pointer(to.lanes, np.uint16), _pair_stride(n)
    for j in range(n * n):
        to.wide[j] = 0
    for lane in range(LANES):
        for j in range(n * n):
            to.wide[j] += pairs[lane * stride + j]
            pairs[lane * stride + j] = 0
    for second in range(n):
        of_second = np.int64(0)
        for first in range(n):
            both = np.int64(to.wide[second * n + first])
            to.totals[first] += both
            of_second += both
        to.totals[second] += of_second
    for slot in range(n):
        if to.totals[slot] != 0:
            add_to_row(slot, to.totals[slot], within, to)
            to.totals[slot] = 0
