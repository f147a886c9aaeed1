"""Compiled passes over one block: load it as float32, summarise its values in a partial.

A partial is a float64 row of the fields below; counts are exact in it. Its sums are in units of
``UNIT``, a power of two, so that no square of a float64 overflows or is lost.
"""

from __future__ import annotations

import math

import numpy as np

from gradstat.bins import FLOAT32_MAX
from gradstat.engines.cpu_compile import (
    Array,
    Scalar,
    array_at,
    compiled,
    compiled_sum,
    read,
    widen_half,
)

FINITE, ZEROS, NAN, POSINF, NEGINF, MIN, MAX, UNIT, SUM, L1, SQUARES, CENTRAL = range(12)
FIELDS = 12

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = range(4)

SIGN = np.uint32(0x80000000)
LARGEST = np.float32(FLOAT32_MAX)

# Where the squares cancel down to this share of themselves, they are summed again about the mean.
_CANCELLATION = 2.0**-20


@compiled
def clear(partial: Array) -> None:
    """Make a partial that of no values."""
    for k in range(FIELDS):
        partial[k] = 0.0
    partial[MIN], partial[MAX] = np.inf, -np.inf


@compiled
def merge(into: Array, other: Array) -> None:
    """Union of two partials; squared deviations by Chan, Golub and LeVeque's formula (1979)."""
    for k in range(FINITE + 1, NEGINF + 1):
        into[k] += other[k]
    n, m = into[FINITE], other[FINITE]
    if m == 0:
        return
    unit = max(into[UNIT], other[UNIT])
    a, b = into[UNIT] / unit, other[UNIT] / unit
    delta = other[SUM] * b / m - (into[SUM] * a / n if n > 0 else 0.0)
    central = into[CENTRAL] * a * a + other[CENTRAL] * b * b
    into[CENTRAL] = central + delta * delta * (n * (m / (n + m)))
    into[SQUARES] = into[SQUARES] * a * a + other[SQUARES] * b * b
    into[SUM] = into[SUM] * a + other[SUM] * b
    into[L1] = into[L1] * a + other[L1] * b
    into[FINITE], into[UNIT] = n + m, unit
    into[MIN], into[MAX] = min(into[MIN], other[MIN]), max(into[MAX], other[MAX])


@compiled
def summarise(x: Array, spare: Array, partial: Array) -> None:
    """Write the partial of a float32 or float64 block; ``spare`` is room for a copy of it."""
    clear(partial)
    partial[FINITE], partial[UNIT] = x.size, 1.0
    smallest, largest, zeros = _extremes(x)
    filler, fillers = 0.0, 0.0
    if not (abs(smallest) < np.inf and abs(largest) < np.inf):
        clean = spare[: x.size]
        filler = _replace_nonfinite(x, clean, partial)
        if partial[FINITE] == 0:
            return
        fillers = x.size - partial[FINITE]
        x = clean
        smallest, largest, zeros = _extremes(x)
    partial[MIN], partial[MAX] = smallest, largest
    # The fillers are taken out again: exact for the count, far below float32 for the sums.
    partial[ZEROS] = zeros - (fillers if filler == 0 else 0.0)
    count, scale = partial[FINITE], 1.0
    if x.itemsize == 8:
        partial[UNIT], scale = _unit(max(abs(smallest), abs(largest)))
    low, filler = smallest * scale, filler * scale
    if smallest == largest:
        partial[SUM], partial[L1], partial[SQUARES] = count * low, count * abs(low), count * low**2
        return
    total, magnitude, squares = _sums(x, scale)
    total -= fillers * filler
    squares -= fillers * filler**2
    mean = total / count
    central = squares - total * mean
    if central < _CANCELLATION * squares:
        central = _central_squares(x, scale, mean) - fillers * (filler - mean) ** 2
    partial[SUM], partial[L1] = total, magnitude - fillers * abs(filler)
    partial[SQUARES], partial[CENTRAL] = squares, max(central, 0.0)


@compiled
def _unit(largest: float) -> tuple[float, float]:
    """Power of two near the largest magnitude of a float64 block, and its reciprocal.

    No square of a float32 overflows float64 or is lost in it: there the unit stays 1.
    """
    _, exponent = math.frexp(largest)
    exponent = min(max(exponent - 1, -1022), 1023) if largest > 0 else -1022
    return math.ldexp(1.0, exponent), math.ldexp(1.0, -exponent)


@compiled
def _extremes(x: Array) -> tuple[Scalar, Scalar, Scalar]:
    """The smallest and the largest value, and how many zeros there are of either sign.

    The largest unsigned bit pattern is the most negative value if it has a sign; the largest signed
    one is the most positive value if it has none. NaN and infinities come out as an extreme, so
    that a block without them needs no test per element.
    """
    return _extremes64(x.view(np.uint64)) if x.itemsize == 8 else _extremes32(x.view(np.uint32))


@compiled
def _extremes32(bits: Array) -> tuple[Scalar, Scalar, Scalar]:
    least, most = np.uint32(0xFFFFFFFF), np.uint32(0)
    signed_most, zeros = np.int32(-0x80000000), np.int32(0)
    for j in range(bits.size):
        pattern = bits[j]
        least = min(least, pattern)
        most = max(most, pattern)
        signed_most = max(signed_most, np.int32(pattern))
        zeros = np.int32(zeros + np.int32(np.uint32(pattern & ~SIGN) == np.uint32(0)))
    smallest = most if most >= SIGN else least
    largest = np.uint32(signed_most) if signed_most >= 0 else least
    return (
        np.float64(np.uint32(smallest).view(np.float32)),
        np.float64(np.uint32(largest).view(np.float32)),
        np.int64(zeros),
    )


@compiled
def _extremes64(bits: Array) -> tuple[Scalar, Scalar, Scalar]:
    least, most = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0)
    signed_most, zeros = np.int64(-0x8000000000000000), np.int64(0)
    for j in range(bits.size):
        pattern = bits[j]
        least = min(least, pattern)
        most = max(most, pattern)
        signed_most = max(signed_most, np.int64(pattern))
        zeros += np.int64(np.uint64(pattern << np.uint64(1)) == np.uint64(0))
    smallest = most if most >> np.uint64(63) else least
    largest = np.uint64(signed_most) if signed_most >= 0 else least
    return np.uint64(smallest).view(np.float64), np.uint64(largest).view(np.float64), zeros


@compiled_sum
def _sums(x: Array, scale: float) -> tuple[float, float, float]:
    """Sum, sum of magnitudes and of squares, in float64, of the values times ``scale``."""
    total, magnitude, squares = 0.0, 0.0, 0.0
    for j in range(x.size):
        value = np.float64(x[j]) * scale
        total += value
        magnitude += abs(value)
        squares += value * value
    return total, magnitude, squares


@compiled_sum
def _central_squares(x: Array, scale: float, mean: float) -> float:
    squares = 0.0
    for j in range(x.size):
        deviation = np.float64(x[j]) * scale - mean
        squares += deviation * deviation
    return squares


@compiled
def _replace_nonfinite(x: Array, clean: Array, partial: Array) -> float:
    """Copy a block with NaN and infinities counted and replaced by its first finite value.

    Returns that value; ``partial[FINITE] == 0`` says that there is none.
    """
    filler = x[0]
    for j in range(x.size):
        if abs(x[j]) < np.inf:
            filler = x[j]
            break
    nan, posinf, neginf = np.int32(0), np.int32(0), np.int32(0)
    for j in range(x.size):
        value = x[j]
        nan = np.int32(nan + np.int32(value != value))
        posinf = np.int32(posinf + np.int32(value == np.inf))
        neginf = np.int32(neginf + np.int32(value == -np.inf))
        clean[j] = value if abs(value) < np.inf else filler
    partial[NAN], partial[POSINF], partial[NEGINF] = nan, posinf, neginf
    partial[FINITE] = x.size - nan - posinf - neginf
    return np.float64(filler)


@compiled
def load(address: int, dtype: int, size: int, wide: Array) -> Array:
    """A block of bfloat16, float16 or float32 at an address as float32, in ``wide`` if need be."""
    if dtype == FLOAT32:
        return array_at(address, np.float32, size)
    words = array_at(address, np.uint16, size)
    if dtype == BFLOAT16:
        bits = wide.view(np.uint32)
        for j in range(size):
            bits[j] = np.uint32(np.uint32(words[j]) << np.uint32(16))
    else:
        for j in range(size):
            wide[j] = widen_half(words[j])
    return wide[:size]


@compiled
def narrow(value: float, is_linear: bool, high: Scalar) -> Scalar:
    """Largest float32 not above a float64, as `bins.float32_below`.

    What lies outside float32 or above a linear range becomes infinite, to be counted outside; for
    `Log2Bins` it goes to the outermost bins instead.
    """
    x = np.float32(value)
    bits = np.float32(x).view(np.uint32)
    # The pattern before it in the order of values; without branches, so that a block is vectors.
    before = np.uint32(bits - np.uint32(1)) if x > 0 else np.uint32(bits + np.uint32(1))
    before = SIGN | np.uint32(1) if x == 0 else before
    bits = before if np.float64(x) > value else bits
    x = np.uint32(bits).view(np.float32)
    if is_linear:
        return np.float32(np.inf) if value > np.float64(high) else x
    return np.float32(-LARGEST) if x == -np.inf and value != -np.inf else x


@compiled
def narrow_block(x: Array, is_linear: bool, high: Scalar, wide: Array) -> Array:
    """`narrow` each value of a block into ``wide``."""
    for j in range(x.size):
        wide[j] = narrow(x[j], is_linear, high)
    return wide[: x.size]


@compiled
def gather(address: int, itemsize: int, layout: Array, begin: int, size: int, raw: Array) -> None:
    """Copy elements of a strided tensor, in the order of its layout.

    Args:
        address: of the first element.
        itemsize: 2, 4 or 8 bytes.
        layout: size and stride, in elements, of each dimension, the outermost first.
        begin: position of the first element to copy.
        size: how many to copy.
        raw: uint32, where to.
    """
    inner, step = layout[-2], layout[-1] * itemsize
    out16, out64 = raw.view(np.uint16), raw.view(np.uint64)
    done = 0
    while done < size:
        row, column = (begin + done) // inner, (begin + done) % inner
        source = address + column * step
        for k in range(layout.size - 4, -1, -2):
            source += row % layout[k] * layout[k + 1] * itemsize
            row //= layout[k]
        for j in range(done, min(done + inner - column, size)):
            if itemsize == 2:
                out16[j] = read(source, np.uint16)
            elif itemsize == 4:
                raw[j] = read(source, np.uint32)
            else:
                out64[j] = read(source, np.uint64)
            source += step
        done += inner - column
