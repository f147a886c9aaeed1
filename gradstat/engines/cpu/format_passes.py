"""Compiled: vectorised passes of a narrow format over a chunk of magnitudes, float32.

A chunk is a run of rows of ``width`` values, or part of one row that begins where a block does. The
format is data, not code: a row of `FORM_FIELDS` int64, float32 fields as their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

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
)
from gradstat.engines.cpu.passes import real
from gradstat.formats import (
    E4M3,
    FORMATS,
    LEAST_EXPONENT,
    LEAST_SCALE,
    LEAST_TENSOR_SCALE,
    NVFP4_LARGEST,
    Format,
)

CHUNK = 8192  # values: a multiple of every block's columns

CONSTANT, AMAX, BLOCK, E8M0, NVFP4 = range(5)
_KINDS = {"none": CONSTANT, "given": CONSTANT, "amax": AMAX, "block": BLOCK, "e8m0": E8M0}
# Kind; columns of a block, 0 for none; bits of the smallest normal element; what takes the bits of
# a power of two to those of the number that rounds its octave when it is added; bits of the largest
# element, of the given scale, its reciprocal; exponent of the largest element; whether it is
# bfloat16, whose largest octave has no such number.
KIND, COLUMNS, LEAST, TO_ROUNDER, LARGEST, SCALE, INVERSE, TOP, IS_BFLOAT16 = range(9)
FORM_FIELDS = 9
_LARGEST_E4M3 = np.float32(E4M3.largest)
_LARGEST_E2M1 = np.float32(FORMATS["nvfp4"].largest)
_MOST_INVERSE = np.float32(1 / LEAST_SCALE)
_NVFP4_LARGEST = np.float32(NVFP4_LARGEST)
_LEAST_TENSOR_SCALE = np.float32(LEAST_TENSOR_SCALE)
_INFINITY, _MAGNITUDE, _EXPONENT = (
    np.uint32(0x7F800000),
    np.uint32(0x7FFFFFFF),
    np.uint32(0x7F800000),
)


def _bits(value: float | np.float32) -> int:
    return int(np.float32(value).view(np.int32))


_E4M3_LEAST, _E4M3_TO_ROUNDER = np.uint32(E4M3.least_normal_bits), np.uint32(E4M3.to_rounder)


def form_row(form: Format) -> list[int]:
    """The fields of a format."""
    columns = form.block[1] if form.block else 0
    inverse = np.float32(1) / np.float32(form.scale)
    return [
        _KINDS.get(form.scaling, NVFP4),
        columns,
        form.least_normal_bits,
        form.to_rounder,
        _bits(form.largest),
        _bits(form.scale),
        _bits(inverse),
        form.max_exponent,
        form.name.startswith("bfloat16"),
    ]


def tensor_scale(form: Format, most: np.float32) -> float:
    """The scale of a tensor whose largest magnitude this is, not 0, as `amax_scale` has it."""
    if form.scaling == "given":
        return form.scale
    with np.errstate(divide="ignore", over="ignore"):
        inverse = min(np.float32(form.largest) / most, _MOST_INVERSE) if most else np.float32(1)
    return float(np.float32(1) / inverse)


@compiler_intrinsic
def minus_product(typing_context: IR, a: IR, b: IR, c: IR) -> IR:
    """``minus_product(a, b, c)``: a - b * c, rounded once."""
    return a(a, b, c), lambda _, builder, __, arguments: builder.fma(
        builder.fneg(arguments[1]), arguments[2], arguments[0]
    )


@compiled_for_types
def magnitudes(x: IR, n: IR, out: IR) -> Callable[..., Any]:
    """Magnitudes of elements, float32, 0 where not finite; returns zeros and non-finite ones."""

    def take(x: Pointer, n: int, out: Pointer) -> tuple[Scalar, Scalar]:
        zeros, nonfinite = np.int32(0), np.int32(0)
        for j in range(n):
            bits = np.uint32(reinterpret(real(x[j]), np.uint32) & _MAGNITUDE)
            is_finite = bits < _INFINITY
            bits = bits if is_finite else np.uint32(0)
            nonfinite = np.int32(nonfinite + np.int32(not is_finite))
            zeros = np.int32(zeros + np.int32(bits == 0))
            out[j] = reinterpret(bits, np.float32)
        return np.int64(zeros - nonfinite), np.int64(nonfinite)

    return take


@compiled_sums_for_types
def sum_of_squares(x: IR, n: IR) -> Callable[..., Any]:
    """Sum of squares of float32 values, in float64: no square overflows or is lost."""

    def add_up(x: Pointer, n: int) -> float:
        total = 0.0
        for j in range(n):
            value = np.float64(x[j])
            total += value * value
        return total

    return add_up


@compiled
def largest(x: Pointer, n: int) -> Scalar:
    """The largest of magnitudes given as their bits, uint32."""
    most = np.uint32(0)
    for j in range(n):
        most = x[j] if x[j] > most else most
    return most


@compiled
def block_maxima(x: Pointer, n: int, width: int, columns: int, maxima: Pointer) -> int:
    """Bits of the largest magnitude of each block, uint32; returns how many there are."""
    if width % columns == 0 and n % columns == 0:
        for block in range(n // columns):
            most, start = np.uint32(0), block * columns
            for j in range(start, start + columns):
                most = x[j] if x[j] > most else most
            maxima[block] = most
        return n // columns
    count = 0
    for row in range(0, n, width):
        for start in range(row, smaller(row + width, n), columns):
            stop, most = smaller(smaller(start + columns, row + width), n), np.uint32(0)
            for j in range(start, stop):
                most = x[j] if x[j] > most else most
            maxima[count] = most
            count += 1
    return count


@compiled
def spread(values: Pointer, n: int, width: int, columns: int, out: Pointer) -> None:
    """Give each value of a chunk what its block has."""
    if width % columns == 0 and n % columns == 0:
        for block in range(n // columns):
            value, start = values[block], block * columns
            for j in range(start, start + columns):
                out[j] = value
        return
    count = 0
    for row in range(0, n, width):
        for start in range(row, smaller(row + width, n), columns):
            for j in range(start, smaller(smaller(start + columns, row + width), n)):
                out[j] = values[count]
            count += 1


@compiled
def rounded(value: Scalar, least: Scalar, to_rounder: Scalar) -> Scalar:
    """A magnitude rounded to the elements of a format, as if there were no largest one."""
    octave = np.uint32(reinterpret(value, np.uint32) & _EXPONENT)
    octave = octave if octave > least else least
    rounder = reinterpret(np.uint32(octave + to_rounder), np.float32)
    return np.float32(np.float32(value + rounder) - rounder)


@compiled
def rounded_bfloat16(value: Scalar) -> Scalar:
    """A magnitude rounded to bfloat16; infinite beyond its largest."""
    bits = reinterpret(value, np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    bits = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)
    return reinterpret(np.uint32(bits & np.uint32(0xFFFF0000)), np.float32)


@compiled
def amax_scale(most: Scalar, largest_element: Scalar) -> tuple[Scalar, Scalar]:
    """Reciprocal and scale that take a magnitude to the largest element."""
    inverse = np.float32(largest_element / most)
    inverse = inverse if inverse < _MOST_INVERSE else _MOST_INVERSE
    inverse = inverse if most > 0 else np.float32(1)
    return inverse, np.float32(np.float32(1) / inverse)


@compiled
def nvfp4_scale(most_of_all: Scalar) -> Scalar:
    """The scale of a tensor."""
    scale = np.float32(most_of_all / _NVFP4_LARGEST)
    return scale if scale > _LEAST_TENSOR_SCALE else _LEAST_TENSOR_SCALE


@compiled
def block_scales(
    maxima: Pointer, n: int, form: Pointer, tensor_scale: Scalar, inverses: Pointer, scales: Pointer
) -> None:
    """Reciprocal and scale of each block from its largest magnitude, all float32."""
    element = reinterpret(np.int32(form[LARGEST]), np.float32)
    if form[KIND] == BLOCK:
        for j in range(n):
            inverses[j], scales[j] = amax_scale(maxima[j], element)
    elif form[KIND] == E8M0:
        top = np.int32(form[TOP] + 127)
        for j in range(n):
            exponent = np.int32(np.int32(reinterpret(maxima[j], np.int32) >> 23) - top)
            exponent = exponent if exponent > LEAST_EXPONENT else np.int32(LEAST_EXPONENT)
            inverses[j] = reinterpret(np.int32(np.int32(127 - exponent) << 23), np.float32)
            bits = np.int32(np.int32(127 + exponent) << 23)
            # The least one is subnormal.
            bits = bits if exponent > LEAST_EXPONENT else np.int32(1 << 22)
            scales[j] = reinterpret(bits, np.float32)
    else:
        inverse_of_tensor = np.float32(np.float32(1) / tensor_scale)
        for j in range(n):
            exact = np.float32(np.float32(maxima[j] / _LARGEST_E2M1) / tensor_scale)
            exact = exact if exact < _LARGEST_E4M3 else _LARGEST_E4M3
            stored = rounded(exact, _E4M3_LEAST, _E4M3_TO_ROUNDER)
            inverse = np.float32(inverse_of_tensor / stored)
            inverses[j] = inverse if stored > 0 else np.float32(0)
            # The scale of the tensor comes later: this one is looked at.
            scales[j] = stored


@compiled
def extreme_scales(maxima: Pointer, scales: Pointer, n: int) -> tuple[Scalar, Scalar, Scalar]:
    """Blocks that are empty; least and greatest scale of the others, but zero, or infinities."""
    least, most, empty = np.float32(np.inf), np.float32(-np.inf), np.int64(0)
    for j in range(n):
        if maxima[j] == 0:
            empty += 1
        elif scales[j] > 0:
            least, most = smaller(least, scales[j]), larger(most, scales[j])
    return empty, np.float64(least), np.float64(most)


@compiled
def quantize(
    x: Pointer, n: int, form: Pointer, inverses: Pointer, scales: Pointer, errors: Pointer
) -> tuple[Scalar, Scalar]:
    """Write each value's error; return how many come to zero and how many saturate.

    ``inverses`` and ``scales`` are one for each value.
    """
    element = reinterpret(np.int32(form[LARGEST]), np.float32)
    least, to_rounder = np.uint32(form[LEAST]), np.uint32(form[TO_ROUNDER])
    zeros, saturated = np.int32(0), np.int32(0)
    if form[IS_BFLOAT16]:
        for j in range(n):
            q = rounded_bfloat16(np.float32(x[j] * inverses[j]))
            saturated = np.int32(saturated + np.int32(q > element))
            q = q if q < element else element
            zeros = np.int32(zeros + np.int32(q == 0))
            errors[j] = minus_product(x[j], q, scales[j])
        return np.int64(zeros), np.int64(saturated)
    beyond = np.float32(element * np.float32(2))
    for j in range(n):
        quotient = np.float32(x[j] * inverses[j])
        quotient = quotient if quotient < beyond else beyond
        q = rounded(quotient, least, to_rounder)
        saturated = np.int32(saturated + np.int32(q > element))
        q = q if q < element else element
        zeros = np.int32(zeros + np.int32(q == 0))
        errors[j] = minus_product(x[j], q, scales[j])
    return np.int64(zeros), np.int64(saturated)
