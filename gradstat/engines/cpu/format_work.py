"""Compiled: narrow formats, their passes over magnitudes, and a thread's share of the work.

A *chunk* is a run of rows of ``width`` magnitudes, float32, or part of one row that begins where a
block does, or a block of several rows. The format is data, not code: its `Format.fields`.

The work table is int64: first `HEAD` fields, then a line of `COLUMNS` for each tensor, then one of
which only `FIRST` is read: the number of items. An *item* is a rectangle of a matrix: some rows,
part of one, or a block of several rows. Without formats, items only have their largest magnitude
found, of which the scale of a whole tensor is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gradstat import formats
from gradstat.engines.cpu.compiling import (
    IR,
    NEXT,
    Pointer,
    Scalar,
    after,
    atomic_add,
    compile_entry,
    compiled,
    compiled_for_types,
    compiled_sums_for_types,
    compiler_intrinsic,
    larger,
    own_scratch,
    pointer,
    reinterpret,
    smaller,
)
from gradstat.engines.cpu.partials import ELEMENTS, real

TILE = 128  # rows and columns of a block of several rows
CHUNK = TILE * TILE  # values, at most: a multiple of every block's columns

_LARGEST_E4M3 = np.float32(formats.E4M3.largest)
_E4M3_LEAST = np.uint32(formats.E4M3.least_normal_bits)
_E4M3_TO_ROUNDER = np.uint32(formats.E4M3.to_rounder)
_LARGEST_E2M1 = np.float32(formats.FORMATS["nvfp4"].largest)
_MOST_INVERSE = np.float32(1 / formats.LEAST_SCALE)
_NVFP4_LARGEST = np.float32(formats.NVFP4_LARGEST)
_LEAST_TENSOR_SCALE = np.float32(formats.LEAST_TENSOR_SCALE)
_LEAST_EXPONENT = np.int32(formats.LEAST_EXPONENT)
_INFINITY = _EXPONENT = np.uint32(0x7F800000)  # all bits of the exponent
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_N_FIELDS = len(formats.FIELDS)

# The head: as `compiling` says, with `SCRATCH_BYTES` for each thread; how many items and formats
# there are, and addresses: of the formats, float64 (F, fields); of the partials, float64
# (items, 1 + F, `PARTIAL_FIELDS`); of the largest magnitude of each tensor, float32.
ITEMS, FORMS, FORMS_AT, PARTIALS, MAXIMA = range(4, 9)
HEAD = 9
# Address of the elements, rows and columns of the matrix, items before, of an item its rows and
# columns.
ADDRESS, ROWS, WIDTH, FIRST, ITEM_ROWS, ITEM_WIDTH = range(6)
COLUMNS = 6

# Of an item and a format. Zeros are all that come to zero, those of the tensor too. The first row
# of an item's is of the values: its zeros, non-finite ones, and sum of squares.
ZEROS, SATURATED, SQUARES, EMPTY, LOWEST_SCALE, HIGHEST_SCALE = range(6)
PARTIAL_FIELDS = 6

_BUFFER = 4 * CHUNK
SCRATCH_BYTES = 7 * _BUFFER

Work = Callable[[int], None]


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
    if form[formats.KIND] == formats.E8M0:
        top = np.int32(form[formats.TOP] + 127)
        for j in range(n):
            exponent = np.int32(np.int32(reinterpret(maxima[j], np.int32) >> 23) - top)
            exponent = exponent if exponent > _LEAST_EXPONENT else _LEAST_EXPONENT
            inverses[j] = reinterpret(np.int32(np.int32(127 - exponent) << 23), np.float32)
            bits = np.int32(np.int32(127 + exponent) << 23)
            # The least one is subnormal.
            bits = bits if exponent > _LEAST_EXPONENT else np.int32(1 << 22)
            scales[j] = reinterpret(bits, np.float32)
    elif form[formats.KIND] == formats.NVFP4:
        inverse_of_tensor = np.float32(np.float32(1) / tensor_scale)
        for j in range(n):
            exact = np.float32(np.float32(maxima[j] / _LARGEST_E2M1) / tensor_scale)
            exact = exact if exact < _LARGEST_E4M3 else _LARGEST_E4M3
            stored = rounded(exact, _E4M3_LEAST, _E4M3_TO_ROUNDER)
            inverse = np.float32(inverse_of_tensor / stored)
            inverses[j] = inverse if stored > 0 else np.float32(0)
            # The scale of the tensor comes later: this one is looked at.
            scales[j] = stored
    else:
        element = np.float32(form[formats.LARGEST])
        for j in range(n):
            inverses[j], scales[j] = amax_scale(maxima[j], element)


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
    element = np.float32(form[formats.LARGEST])
    least, to_rounder = np.uint32(form[formats.LEAST]), np.uint32(form[formats.TO_ROUNDER])
    zeros, saturated = np.int32(0), np.int32(0)
    if form[formats.IS_BFLOAT16]:
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


@compiled
def _measure_chunk(
    n: int, width: int, nonzero: int, form: Pointer, most: Scalar, scratch: int, partial: Pointer
) -> None:
    """Add what a format does to the chunk of magnitudes at the beginning of the scratch memory.

    ``nonzero`` is how many of them are not zero, ``most`` the tensor's largest magnitude.
    """
    x = pointer(scratch, np.float32)
    inverses = pointer(scratch + _BUFFER, np.float32)
    scales = pointer(scratch + 2 * _BUFFER, np.float32)
    errors = pointer(scratch + 3 * _BUFFER, np.float32)
    maxima = pointer(scratch + 4 * _BUFFER, np.float32)
    of_blocks = pointer(scratch + 5 * _BUFFER, np.float32)
    to_blocks = pointer(scratch + 6 * _BUFFER, np.float32)
    kind, columns = int(form[formats.KIND]), int(form[formats.COLUMNS])
    of_tensor = nvfp4_scale(most)
    if kind in (formats.CONSTANT, formats.AMAX, formats.TILES):
        columns = width = n  # one scale for all of them
    if kind in (formats.CONSTANT, formats.AMAX):
        # Whether the tensor has a scale depends on whether it has a value.
        blocks, maxima[0] = 1, np.float32(nonzero)
        to_blocks[0] = np.float32(form[formats.INVERSE])
        of_blocks[0] = np.float32(form[formats.SCALE])
        if kind == formats.AMAX:
            to_blocks[0], of_blocks[0] = amax_scale(most, np.float32(form[formats.LARGEST]))
    else:
        bits, of_bits = pointer(scratch, np.uint32), pointer(scratch + 4 * _BUFFER, np.uint32)
        blocks = block_maxima(bits, n, width, columns, of_bits)
        block_scales(maxima, blocks, form, of_tensor, to_blocks, of_blocks)
    empty, least, greatest = extreme_scales(maxima, of_blocks, blocks)
    partial[EMPTY] += empty
    partial[LOWEST_SCALE] = smaller(partial[LOWEST_SCALE], least)
    partial[HIGHEST_SCALE] = larger(partial[HIGHEST_SCALE], greatest)
    if kind == formats.NVFP4:
        for j in range(blocks):
            of_blocks[j] = np.float32(of_blocks[j] * of_tensor)
    spread(to_blocks, n, width, columns, inverses)
    spread(of_blocks, n, width, columns, scales)
    zeros, saturated = quantize(x, n, form, inverses, scales, errors)
    partial[ZEROS] += zeros
    partial[SATURATED] += saturated
    partial[SQUARES] += sum_of_squares(errors, n)


@compiled
def _clear(partials: Pointer, rows: int) -> None:
    for row in range(rows):
        partial = after(partials, row * PARTIAL_FIELDS)
        for k in range(PARTIAL_FIELDS):
            partial[k] = 0.0
        partial[LOWEST_SCALE], partial[HIGHEST_SCALE] = np.inf, -np.inf


def _make_work(element: object) -> Work:
    def work(address: int) -> None:
        """Take items of the work table there until none is left; several threads at once."""
        head = pointer(address, np.int64)
        scratch = own_scratch(head, SCRATCH_BYTES)
        if scratch == 0:
            return
        x = pointer(scratch, np.float32)
        forms, n_forms = pointer(head[FORMS_AT], np.float64), head[FORMS]
        line, tensor = after(head, HEAD), 0
        item = atomic_add(after(head, NEXT), 1)
        while item < head[ITEMS]:
            while line[COLUMNS + FIRST] <= item:
                line = after(line, COLUMNS)
                tensor += 1
            elements, width = pointer(line[ADDRESS], element), line[WIDTH]
            most = pointer(head[MAXIMA], np.float32)[tensor]
            rows = item * (1 + n_forms)
            partials = after(pointer(head[PARTIALS], np.float64), rows * PARTIAL_FIELDS)
            _clear(partials, 1 + n_forms)
            across = (width + line[ITEM_WIDTH] - 1) // line[ITEM_WIDTH]
            top = (item - line[FIRST]) // across * line[ITEM_ROWS]
            left = (item - line[FIRST]) % across * line[ITEM_WIDTH]
            bottom = smaller(top + line[ITEM_ROWS], line[ROWS])
            right = smaller(left + line[ITEM_WIDTH], width)
            columns = smaller(CHUNK, right - left)
            rows = CHUNK // columns
            for row in range(top, bottom, rows):
                for column in range(left, right, columns):
                    wide = smaller(columns, right - column)
                    n, zeros, nonfinite = smaller(rows, bottom - row) * wide, 0, 0
                    # Whole rows are one run of memory.
                    run = n if wide == width else wide
                    for at in range(0, n, run):
                        start = (row + at // wide) * width + column
                        of_run = magnitudes(after(elements, start), run, after(x, at))
                        zeros, nonfinite = zeros + of_run[0], nonfinite + of_run[1]
                    if n_forms == 0:
                        bits = largest(pointer(scratch, np.uint32), n)
                        partials[HIGHEST_SCALE] = larger(
                            partials[HIGHEST_SCALE], np.float64(reinterpret(bits, np.float32))
                        )
                        continue
                    partials[ZEROS] += zeros
                    partials[SATURATED] += nonfinite
                    partials[SQUARES] += sum_of_squares(x, n)
                    nonzero = n - zeros - nonfinite
                    for k in range(n_forms):
                        form = after(forms, k * _N_FIELDS)
                        partial = after(partials, (1 + k) * PARTIAL_FIELDS)
                        _measure_chunk(n, wide, nonzero, form, most, scratch, partial)
            item = atomic_add(after(head, NEXT), 1)

    return work


@functools.cache
def work_on(dtype: torch.dtype) -> Work:
    """The compiled function for tensors of one dtype, idle in a thread that flushes subnormals."""
    name = f"{str(dtype).removeprefix('torch.')}_formats"
    work = _make_work(ELEMENTS[dtype])
    return compile_entry(work, name, "void(int64)")
