"""Compiled: the slot of each value, in which it is counted.

For `LinearBins` a slot is a bin plus one: slot 0 takes what lies below the range, slot ``bins + 1``
what lies above it, and NaN. For `Log2Bins` it is the top 11 bits of the float32 pattern: bins in
the order of patterns, -0.0 and NaN among them. ``within``, the range, is ``None`` for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numba import types

from gradstat.bins import FLOAT32_MAX, LOG2_SHIFT
from gradstat.engines.cpu.compiling import (
    IR,
    Pointer,
    Scalar,
    compiled,
    compiled_for_types,
    pointer,
    reinterpret,
)
from gradstat.engines.cpu.passes import real

LARGEST = np.float32(FLOAT32_MAX)

# Of `LinearBins`: low, high, scale, scaled low end, bins per scaled unit, last bin, all float32.
Range: TypeAlias = Any


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
