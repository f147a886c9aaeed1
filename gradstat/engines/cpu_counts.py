"""Compiled counting: the slot of each value of a block, private counters, the tensor's row.

A *slot* is a bin plus one: slot 0 takes what lies below the range, slot ``bins + 1`` what lies
above it, and NaN.
"""

from __future__ import annotations

import numpy as np

from gradstat.engines.cpu_blocks import narrow
from gradstat.engines.cpu_compile import Array, Scalar, atomic_add, compiled, prefetch
from gradstat.results import INTEGERS

LANES = 8  # private counters of each slot: neighbours in one bin do not wait for each other
STRIDE = 4160  # counters of a lane, 256 bytes off a multiple of 4096: lanes do not evict each other
MAX_LANE_BINS = STRIDE - 66  # more bins than this count straight into the row

BELOW, ABOVE = INTEGERS.index("below"), INTEGERS.index("above")
_NEGATIVE_ZERO = np.int32(-0x80000000)


@compiled
def log2_slot(bits: Scalar) -> Scalar:
    """Slot of a float32 given as int32: `Log2Bins.index` plus one.

    NaN and infinities come out in the four outer bins of each side, which are cleared at the end.
    """
    bits = np.int32(0) if bits == _NEGATIVE_ZERO else np.int32(bits)
    top = np.int32(np.int32(bits >> np.int32(21)) & np.int32(2047))
    order = np.int32(np.int32(np.int32(bits >> np.int32(31)) & np.int32(1023)) ^ np.int32(1024))
    return np.int32(np.int32(top ^ order) + np.int32(1))


@compiled
def linear_factors(low: float, high: float, bins: int) -> tuple[Scalar, ...]:
    """Ends, scale, scaled low end, bins per scaled unit and last bin, as `LinearBins._factors`."""
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
def linear_slot(x: Scalar, factors: tuple[Scalar, ...]) -> Scalar:
    """Slot of a float32: `LinearBins.index` plus one."""
    low, high, scale, origin, inv_width, last = factors
    t = np.float32(np.float32(np.float32(x * scale) - origin) * inv_width)
    t = t if t > np.float32(0) else np.float32(0)
    t = t if t < last else last
    slot = np.int32(np.int32(t) + np.int32(1))
    slot = slot if x <= high else np.int32(np.int32(last) + np.int32(2))
    return np.int32(0) if x < low else slot


@compiled
def slot_of(value: float, is_linear: bool, factors: tuple[Scalar, ...]) -> Scalar:
    """Slot of one finite float64."""
    x = np.float32(narrow(value, is_linear, factors[1]))
    return linear_slot(x, factors) if is_linear else log2_slot(x.view(np.int32))


@compiled
def fill_slots(x: Array, is_linear: bool, factors: tuple[Scalar, ...], slots: Array) -> None:
    """Slot of each value of a float32 block, uint32."""
    if is_linear:
        for j in range(x.size):
            slots[j] = linear_slot(x[j], factors)
    else:
        bits = x.view(np.int32)
        for j in range(bits.size):
            slots[j] = log2_slot(bits[j])


@compiled
def scatter(slots: Array, lanes: Array, ahead: int, itemsize: int) -> None:
    """Count slots in the lanes, uint32 ``(LANES * STRIDE,)``.

    Counting waits for the cache, not for memory: the time is used to fetch as many elements of
    ``itemsize`` bytes from ``ahead`` on.
    """
    whole = slots.size // LANES * LANES
    for j in range(0, whole, LANES):
        prefetch(ahead + j * itemsize)
        for lane in range(LANES):
            lanes[np.uint64(slots[j + lane]) + np.uint64(lane * STRIDE)] += np.uint32(1)
    for j in range(whole, slots.size):
        lanes[slots[j]] += np.uint32(1)


@compiled
def scatter_row(slots: Array, integers: Array, counts: Array) -> None:
    """Count slots straight into a tensor's row, which no other thread touches."""
    last = np.uint32(counts.size - 1)
    for j in range(slots.size):
        # One comparison for both ends, and no second counter beside the first: LLVM would make a
        # masked store of each, which the next load cannot be forwarded from.
        column = np.uint32(slots[j] - np.uint32(1))
        if column <= last:
            counts[np.uint64(column)] += 1
        else:
            add_to_row(slots[j], 1, integers, counts)


@compiled
def add_to_row(slot: int, n: int, integers: Array, counts: Array) -> None:
    """Count ``n`` values of one slot in a tensor's row."""
    if slot == 0:
        integers[BELOW] += n
    elif slot > counts.size:
        integers[ABOVE] += n
    else:
        counts[np.uint64(slot - 1)] += n


@compiled
def flush(lanes: Array, integers: Array, counts: Array, is_shared: bool) -> None:
    """Move the lanes' counts to a tensor's row, which other threads may share."""
    total = lanes[: counts.size + 2]
    for lane in range(1, LANES):
        row = lanes[lane * STRIDE : lane * STRIDE + total.size]
        for j in range(total.size):
            total[j] += row[j]
            row[j] = np.uint32(0)
    if is_shared:
        atomic_add(integers.ctypes.data + 8 * BELOW, np.int64(total[0]))
        atomic_add(integers.ctypes.data + 8 * ABOVE, np.int64(total[total.size - 1]))
        for j in range(counts.size):
            if total[j + 1] != 0:
                atomic_add(counts.ctypes.data + 8 * j, np.int64(total[j + 1]))
    else:
        integers[BELOW] += total[0]
        integers[ABOVE] += total[total.size - 1]
        inner = total[1:]
        for j in range(counts.size):
            counts[j] += np.int64(inner[j])
    for j in range(total.size):
        total[j] = np.uint32(0)
