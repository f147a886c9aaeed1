"""Compiled: vectorised passes over a block's elements, what they find, and a tensor's row from it.

Elements are given as their bit patterns, in an integer type that says what they are. A block has at
most `BLOCK` of them: it, its slots and the counters they touch stay in the fast caches.

What is known of some elements is a *partial*, a float64 row of the fields below; counts are exact
in it. Its sums are in units of ``UNIT``, a power of two, so that no square overflows or is lost:
``SHIFTED`` of distances from ``PIVOT``, which is 0 or, where values are close to each other, among
them, so that little cancels; ``L1`` of magnitudes; ``CENTRAL`` of squared distances from the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types

from gradstat.engines.cpu.compiling import (
    IR,
    Pointer,
    Scalar,
    compiled,
    compiled_for_types,
    compiled_sums_for_types,
    compiler_intrinsic,
    larger,
    reinterpret,
    smaller,
    target,
)

BLOCK = 8192  # elements, fewer than 32,768: 16 bits count them
_CHAIN = 2048  # elements whose sums are float32: on 64 lanes, 32 in a row


# float16 is told from bfloat16 by its sign.
ELEMENTS = {
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
    torch.float32: np.uint32,
    torch.float64: np.uint64,
}
_INFINITY = {"uint16": 0x7F80, "int16": 0x7C00, "uint32": 0x7F800000, "uint64": 0x7FF0 << 48}

FINITE, ZEROS, NAN, POSINF, NEGINF, NEGATIVE_ZEROS = range(6)
MIN, MAX, UNIT, PIVOT, SHIFTED, L1, CENTRAL = range(6, 13)
FIELDS = 13

# Squares that the mean accounts for to this share are summed about the mean. They always are where
# values of one sign are within this factor of each other.
_CANCELLATION, _CLOSE = 0.9, 1.9


def _types(x: IR) -> tuple[Any, Any, Any, Any]:
    """NumPy's types of a pattern: its own, without and with a sign, of the value computed with."""
    bits = x.dtype.bitwidth
    names = (str(x.dtype), f"uint{bits}", f"int{bits}", f"float{max(bits, 32)}")
    pattern, unsigned, signed, number = (getattr(np, name) for name in names)
    return pattern, unsigned, signed, number


@compiler_intrinsic
def real(typing_context: IR, pattern: IR) -> IR:
    """``real(pattern)``: value of an element, float64 for float64, float32 for the others."""
    number = types.float64 if pattern == types.uint64 else types.float32

    def generate(context: IR, builder: IR, signature: IR, arguments: IR) -> IR:
        (bits,), word = arguments, ir.IntType(32)
        if pattern == types.int16:
            triple, _, features = target()
            if triple.startswith(("aarch64", "arm64")) or "+f16c" in features.split(","):
                return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
            return context.compile_internal(builder, _widen_half, signature, arguments)
        if pattern == types.uint16:
            bits = builder.shl(builder.zext(bits, word), word(16))
        return builder.bitcast(bits, context.get_value_type(number))

    return number(pattern), generate


def _widen_half(bits: Scalar) -> Scalar:
    """float32 of a float16 given as int16, where no instruction makes it."""
    magnitude = np.uint32(np.uint32(np.uint32(bits) & np.uint32(0x7FFF)) << np.uint32(13))
    sign = np.uint32(np.uint32(np.uint32(bits) & np.uint32(0x8000)) << np.uint32(16))
    special = np.uint32(0x7F800000) if magnitude >= np.uint32(0x0F800000) else np.uint32(0)
    # The exponent is corrected by a product, which also makes subnormals what they are.
    value = np.float32(reinterpret(magnitude, np.float32) * np.float32(2.0**112))
    return reinterpret(np.uint32(reinterpret(value, np.uint32) | special | sign), np.float32)


@compiled_for_types
def limits(x: IR) -> Callable[..., Any]:
    """Patterns of infinity, of the largest value, of -0.0; and how far exponents reach."""
    pattern, bits = _types(x)[0], x.dtype.bitwidth
    infinity = _INFINITY[str(x.dtype)]
    negative_zero = np.array([1 << (bits - 1)], np.uint64).astype(pattern)[0]
    found = pattern(infinity), pattern(infinity - 1), negative_zero, 1022 if bits == 64 else 126
    return lambda x: found


@compiled
def count_equal(x: Pointer, n: int, pattern: Scalar) -> Scalar:
    """How many elements have a pattern."""
    count: Scalar = 0
    for j in range(n):
        count += np.int64(x[j] == pattern)
    return count


@compiled_for_types
def extremes(x: IR, n: IR, highest: IR) -> Callable[..., Any]:
    """``extremes(x, n, highest)``: patterns of the smallest and the largest value, and a number.

    The largest unsigned pattern is the most negative value if it has a sign; the largest signed one
    is the most positive value if it has none. A NaN or an infinity comes out as an extreme, so that
    a block without them needs no test per element. The number is that of zeros of either sign;
    but if ``highest``, a pattern, is not ``None``, only elements of at most that magnitude are
    looked at, and the number is theirs.
    """
    pattern, unsigned, signed, _ = _types(x)
    # Of Python's numbers: of uint64 and one of them NumPy 1 makes float64, without the last bits.
    half = 1 << (x.dtype.bitwidth - 1)
    sign, magnitude, most_of_all = (unsigned(each) for each in (half, half - 1, 2 * half - 1))
    zero, least_of_all = unsigned(0), signed(-half)

    def find(x: Pointer, n: int, highest: Scalar | None) -> tuple[Scalar, Scalar, Scalar]:
        least, most, signed_most, count = most_of_all, zero, least_of_all, signed(0)
        limit, stand_in = most_of_all, zero
        if highest is not None:
            limit = unsigned(highest)
            for j in range(n):
                if unsigned(unsigned(x[j]) & magnitude) <= limit:
                    stand_in = unsigned(x[j])
                    break
        for j in range(n):
            bits = unsigned(x[j])
            if highest is not None:
                is_counted = unsigned(bits & magnitude) <= limit
                bits = bits if is_counted else stand_in
            else:
                is_counted = unsigned(bits & magnitude) == zero
            count = signed(count + signed(is_counted))
            least, most = smaller(least, bits), larger(most, bits)
            signed_most = larger(signed_most, signed(bits))
        smallest = most if most >= sign else least
        largest = unsigned(signed_most) if signed_most >= 0 else least
        return pattern(smallest), pattern(largest), np.int64(count)

    return find


@compiled_sums_for_types
def sums(x: IR, n: IR, scale: IR, all_finite: IR) -> Callable[..., Any]:
    """Sum, sum of magnitudes and sum of squares of the values times ``scale``.

    Values that are not finite are left out, or if ``all_finite`` is ``None`` not looked for.
    """
    number = _types(x)[3]

    def add_up(x: Pointer, n: int, scale: float, all_finite: bool | None) -> tuple[float, ...]:
        factor = number(scale)
        total, magnitude, squares = 0.0, 0.0, 0.0
        for start in range(0, n, _CHAIN):
            s, m, q = number(0), number(0), number(0)
            stop = start + _CHAIN
            for j in range(start, stop if stop < n else n):
                value = number(real(x[j]) * factor)
                if all_finite is not None:
                    value = value if abs(value) < number(np.inf) else number(0)
                s += value
                m += abs(value)
                q += value * value
            total += np.float64(s)
            magnitude += np.float64(m)
            squares += np.float64(q)
        return total, magnitude, squares

    return add_up


@compiled_sums_for_types
def sums_about(x: IR, n: IR, scale: IR, pivot: IR) -> Callable[..., Any]:
    """`sums` of the finite values in float64; sum and squares are those of distances to a pivot."""

    def add_up(x: Pointer, n: int, scale: float, pivot: float) -> tuple[float, float, float]:
        total, magnitude, squares = 0.0, 0.0, 0.0
        for j in range(n):
            value: Scalar = np.float64(real(x[j])) * scale
            distance: Scalar = value - pivot
            # Chosen after they are computed, both of them: only then does LLVM make vectors.
            distance = distance if abs(value) < np.inf else 0.0
            value = value if abs(value) < np.inf else 0.0
            total += distance
            magnitude += abs(value)
            squares += distance * distance
        return total, magnitude, squares

    return add_up


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
    for k in range(FINITE, NEGINF + 1):  # in the order of `INTEGERS`, after numel
        integers[k + 1] = np.int64(total[k])
    scaled = total[PIVOT] * n + total[SHIFTED]
    # In the order of `FLOATS`: min, max, sum, std, l1, l2.
    floats[0] = total[MIN] if n > 0 else np.nan
    floats[1] = total[MAX] if n > 0 else np.nan
    floats[2] = scaled * unit
    floats[3] = unit * math.sqrt(total[CENTRAL] / (n - 1)) if n > 1 else np.nan
    floats[4] = total[L1] * unit
    floats[5] = unit * math.sqrt(total[CENTRAL] + scaled * (scaled / n)) if n > 0 else 0.0
