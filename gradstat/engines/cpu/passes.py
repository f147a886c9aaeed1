"""Compiled: vectorised passes over the elements of a block, written once for every dtype.

Elements are given as their bit patterns, in an integer type that says what they are. A block has at
most `BLOCK` of them: it, its slots and the counters they touch stay in the fast caches.
"""

from __future__ import annotations

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
