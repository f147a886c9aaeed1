"""Compiled: what is known of some elements of a tensor, and the tensor's row from it.

A partial is a float64 row of the fields below; counts are exact in it. Its sums are in units of
``UNIT``, a power of two, so that no square overflows or is lost. They are sums of distances from
``PIVOT``: 0 or, where values are close to each other, one of them, so that little cancels.
"""

from __future__ import annotations

import math

import numpy as np

from gradstat.engines.cpu.compiling import (
    Pointer,
    Scalar,
    compiled,
    larger,
    reinterpret,
    smaller,
)
from gradstat.engines.cpu.passes import count_equal, extremes, limits, real, sums, sums_about

FINITE, ZEROS, NAN, POSINF, NEGINF, NEGATIVE_ZEROS = range(6)
MIN, MAX, UNIT, PIVOT, SHIFTED, L1, CENTRAL = range(6, 13)
FIELDS = 13

# Squares that the mean accounts for to this share are summed about the mean. They always are where
# values of one sign are within this factor of each other.
_CANCELLATION, _CLOSE = 0.9, 1.9


@compiled
def clear(partial: Pointer) -> None:
    """Make a partial that of no values."""
    for k in range(FIELDS):
        partial[k] = 0.0
    partial[MIN], partial[MAX] = np.inf, -np.inf


@compiled
def merge(into: Pointer, other: Pointer) -> None:
    """Union of two partials; squared deviations by Chan, Golub and LeVeque's formula (1979)."""
    for k in range(FINITE + 1, NEGATIVE_ZEROS + 1):
        into[k] += other[k]
    n, m = into[FINITE], other[FINITE]
    if m == 0:
        return
    if n == 0:
        into[UNIT], into[PIVOT] = other[UNIT], other[PIVOT]
    unit = larger(into[UNIT], other[UNIT])
    a, b = into[UNIT] / unit, other[UNIT] / unit
    # Exact between close pivots, whose means may differ by less than the rounding of either.
    apart = other[PIVOT] * b - into[PIVOT] * a
    delta = apart + (other[SHIFTED] * b / m - (into[SHIFTED] * a / n if n > 0 else 0.0))
    central = into[CENTRAL] * a * a + other[CENTRAL] * b * b
    into[CENTRAL] = central + delta * delta * (n * (m / (n + m)))
    into[SHIFTED] = into[SHIFTED] * a + (other[SHIFTED] * b + m * apart)
    into[L1] = into[L1] * a + other[L1] * b
    into[FINITE], into[UNIT], into[PIVOT] = n + m, unit, into[PIVOT] * a
    into[MIN], into[MAX] = smaller(into[MIN], other[MIN]), larger(into[MAX], other[MAX])


@compiled
def summarise(x: Pointer, size: int, partial: Pointer) -> None:
    """Write the partial of a block of patterns."""
    clear(partial)
    smallest, largest, zeros = extremes(x, size, None)
    low, high, n = np.float64(real(smallest)), np.float64(real(largest)), size
    all_finite = abs(low) < np.inf and abs(high) < np.inf
    if not all_finite:
        smallest, largest, n = _count_nonfinite(x, size, partial)
        low, high = np.float64(real(smallest)), np.float64(real(largest))
    partial[FINITE], partial[ZEROS] = n, zeros
    if n == 0:
        return
    _, _, negative_zero, reach = limits(x)
    partial[MIN], partial[MAX] = low, high
    if zeros > 0 and math.copysign(1.0, low) < 0:
        partial[NEGATIVE_ZEROS] = count_equal(x, size, negative_zero)
    unit = _power_of_two(larger(abs(low), abs(high)), reach)
    scale = 1.0 / unit
    partial[UNIT] = unit
    if low == high:
        partial[PIVOT], partial[L1] = low * scale, n * abs(low * scale)
        return
    pivot = 0.0
    if (low > 0 and high < _CLOSE * low) or (high < 0 and low > _CLOSE * high):
        pivot = 0.5 * (low * scale) + 0.5 * (high * scale)
    else:
        if all_finite:
            total, magnitude, squares = sums(x, size, scale, None)
        else:
            total, magnitude, squares = sums(x, size, scale, False)
        if total * total > _CANCELLATION * n * squares:
            pivot = total / n
    if pivot != 0:
        partial[PIVOT] = pivot
        total, magnitude, squares = sums_about(x, size, scale, pivot)
    partial[SHIFTED], partial[L1] = total, magnitude
    partial[CENTRAL] = larger(squares - total * (total / n), 0.0)


@compiled
def _count_nonfinite(x: Pointer, size: int, partial: Pointer) -> tuple[Scalar, Scalar, int]:
    """Count NaN and infinities; return `extremes` and number of the finite values."""
    infinity, below, _, _ = limits(x)
    smallest, largest, n = extremes(x, size, infinity)
    partial[NAN] = size - n
    if abs(real(smallest)) == np.inf or abs(real(largest)) == np.inf:
        infinite, posinf = n, count_equal(x, size, infinity)
        smallest, largest, n = extremes(x, size, below)
        partial[POSINF], partial[NEGINF] = posinf, infinite - n - posinf
    return smallest, largest, n


@compiled
def _power_of_two(magnitude: float, reach: int) -> Scalar:
    """The largest not above a magnitude, from ``2**-reach`` to ``2**reach``."""
    exponent = (reinterpret(magnitude, np.int64) >> 52) - 1023
    exponent = -reach if exponent < -reach else reach if exponent > reach else exponent
    return reinterpret((exponent + 1023) << 52, np.float64)


@compiled
def write_row(total: Pointer, numel: int, integers: Pointer, floats: Pointer) -> None:
    """A tensor's integers, but for below and above, and its floats, but for the range."""
    n, unit = total[FINITE], total[UNIT]
    integers[0] = numel
    for k in range(FINITE, NEGINF + 1):  # in the order of `INTEGERS`
        integers[k + 1] = np.int64(total[k])
    scaled = total[PIVOT] * n + total[SHIFTED]
    floats[0] = total[MIN] if n > 0 else np.nan
    floats[1] = total[MAX] if n > 0 else np.nan
    floats[2] = scaled * unit
    floats[3] = unit * math.sqrt(total[CENTRAL] / (n - 1)) if n > 1 else np.nan
    floats[4] = total[L1] * unit
    floats[5] = unit * math.sqrt(total[CENTRAL] + scaled * (scaled / n)) if n > 0 else 0.0
