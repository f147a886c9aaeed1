"""The compiled function of narrow formats that Python calls: a thread's share of the work.

The work table is int64: first `HEAD` fields, then a line of `COLUMNS` for each tensor, then one of
which only `FIRST` is read: the number of items. The work has up to three stages:

    MAXIMUM  largest magnitude of each item: what the scale of a whole tensor is made of
    IN_ROWS  all formats whose blocks lie in a row; an item is some rows, or part of one
    TILES    formats whose blocks have several rows; an item is a block
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from gradstat.bins import keeps_subnormals
from gradstat.engines.cpu.compiling import (
    Pointer,
    Scalar,
    after,
    atomic_add,
    compile_entry,
    compiled,
    larger,
    pointer,
    reinterpret,
    smaller,
)
from gradstat.engines.cpu.format_passes import (
    AMAX,
    CHUNK,
    CONSTANT,
    FORM_FIELDS,
    INVERSE,
    KIND,
    LARGEST,
    NVFP4,
    SCALE,
    amax_scale,
    block_maxima,
    block_scales,
    extreme_scales,
    largest,
    magnitudes,
    nvfp4_scale,
    quantize,
    spread,
    sum_of_squares,
)
from gradstat.engines.cpu.format_passes import COLUMNS as BLOCK_COLUMNS
from gradstat.engines.cpu.passes import ELEMENTS

MAXIMUM, IN_ROWS, TILES = range(3)

# The next item that nobody has taken, how many items and formats there are, and addresses: of the
# formats, int64 (F, `FORM_FIELDS`); of the partials, float64 (items, 1 + F, `FIELDS`); of the
# largest magnitude of each tensor, float32.
NEXT, ITEMS, FORMS, FORMS_AT, PARTIALS, MAXIMA = range(6)
HEAD = 6
# Address of the elements, rows and columns of the matrix, items before, elements of an item.
ADDRESS, ROWS, WIDTH, FIRST, ITEM = range(5)
COLUMNS = 5

# Of an item and a format. Zeros are all that come to zero, those of the tensor too. The first row
# of an item's is of the values: its zeros, non-finite ones, and sum of squares.
ZEROS, SATURATED, SQUARES, EMPTY, LEAST_SCALE, MOST_SCALE = range(6)
FIELDS = 6

TILE = 128  # rows and columns of a block of several rows
_BUFFER = 4 * max(CHUNK, TILE * TILE)
SCRATCH_BYTES = 7 * _BUFFER

Work = Callable[[int, int, int], None]


@compiled
def _measure_chunk(
    n: int, width: int, columns: int, form: Pointer, most: Scalar, scratch: int, partial: Pointer
) -> None:
    """Add what a format does to the chunk of magnitudes at the beginning of the scratch memory.

    ``columns`` is how many values share a scale, ``most`` the tensor's largest magnitude.
    """
    x = pointer(scratch, np.float32)
    inverses = pointer(scratch + _BUFFER, np.float32)
    scales = pointer(scratch + 2 * _BUFFER, np.float32)
    errors = pointer(scratch + 3 * _BUFFER, np.float32)
    maxima = pointer(scratch + 4 * _BUFFER, np.float32)
    of_blocks = pointer(scratch + 5 * _BUFFER, np.float32)
    to_blocks = pointer(scratch + 6 * _BUFFER, np.float32)
    if form[KIND] == CONSTANT or form[KIND] == AMAX:
        columns = width = n
        to_blocks[0] = reinterpret(np.int32(form[INVERSE]), np.float32)
        of_blocks[0] = reinterpret(np.int32(form[SCALE]), np.float32)
        if form[KIND] == AMAX:
            element = reinterpret(np.int32(form[LARGEST]), np.float32)
            to_blocks[0], of_blocks[0] = amax_scale(most, element)
    else:
        of_tensor, bits = nvfp4_scale(most), pointer(scratch, np.uint32)
        blocks = block_maxima(bits, n, width, columns, pointer(scratch + 4 * _BUFFER, np.uint32))
        block_scales(maxima, blocks, form, of_tensor, to_blocks, of_blocks)
        empty, least, greatest = extreme_scales(maxima, of_blocks, blocks)
        partial[EMPTY] += empty
        partial[LEAST_SCALE] = smaller(partial[LEAST_SCALE], least)
        partial[MOST_SCALE] = larger(partial[MOST_SCALE], greatest)
        if form[KIND] == NVFP4:
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
        partial = after(partials, row * FIELDS)
        for k in range(FIELDS):
            partial[k] = 0.0
        partial[LEAST_SCALE], partial[MOST_SCALE] = np.inf, -np.inf


@compiled
def _measure_formats(
    n: int, width: int, columns: int, head: Pointer, most: Scalar, scratch: int, partials: Pointer
) -> None:
    """All formats of a stage over a chunk; ``columns`` is 0 for those of the format."""
    for k in range(head[FORMS]):
        form = after(pointer(head[FORMS_AT], np.int64), k * FORM_FIELDS)
        own = columns if columns > 0 else form[BLOCK_COLUMNS]
        partial = after(partials, (1 + k) * FIELDS)
        _measure_chunk(n, width, own, form, most, scratch, partial)


def _make_work(element: object) -> Work:
    def work(address: int, stage: int, scratch: int) -> None:
        """Take items until none is left; any number of threads at once.

        Args:
            address: of the work table.
            stage: `MAXIMUM`, `IN_ROWS` or `TILES`.
            scratch: address of `SCRATCH_BYTES`, this thread's.
        """
        head, x = pointer(address, np.int64), pointer(scratch, np.float32)
        line, tensor = after(head, HEAD), 0
        item = atomic_add(head, 1)
        while item < head[ITEMS]:
            while line[COLUMNS + FIRST] <= item:
                line = after(line, COLUMNS)
                tensor += 1
            elements = pointer(line[ADDRESS], element)
            most = pointer(head[MAXIMA], np.float32)[tensor]
            partials = after(pointer(head[PARTIALS], np.float64), item * (1 + head[FORMS]) * FIELDS)
            _clear(partials, 1 + head[FORMS])
            rows, width, at = line[ROWS], line[WIDTH], item - line[FIRST]
            if stage == TILES:
                across = (width + TILE - 1) // TILE
                top, left = at // across * TILE, at % across * TILE
                right, n = smaller(left + TILE, width), 0
                for row in range(top, smaller(top + TILE, rows)):
                    start = after(elements, row * width + left)
                    magnitudes(start, right - left, after(x, n))
                    n += right - left
                _measure_formats(n, n, n, head, most, scratch, partials)
                item = atomic_add(head, 1)
                continue
            # From here on an item is a run of memory: part of one row, or some rows.
            if width > CHUNK:
                parts = (width + line[ITEM] - 1) // line[ITEM]
                start = at // parts * width + at % parts * line[ITEM]
                stop = smaller(start + line[ITEM], (at // parts + 1) * width)
                width = stop - start
            else:
                start = at * (line[ITEM] // width) * width
                stop = smaller(start + line[ITEM] // width * width, rows * width)
            step = CHUNK if width > CHUNK else CHUNK // width * width
            for begin in range(start, stop, step):
                n = smaller(step, stop - begin)
                zeros, nonfinite = magnitudes(after(elements, begin), n, x)
                if stage == MAXIMUM:
                    bits = largest(pointer(scratch, np.uint32), n)
                    partials[MOST_SCALE] = larger(
                        partials[MOST_SCALE], np.float64(reinterpret(bits, np.float32))
                    )
                    continue
                partials[ZEROS] += zeros
                partials[SATURATED] += nonfinite
                partials[SQUARES] += sum_of_squares(x, n)
                _measure_formats(n, smaller(n, width), 0, head, most, scratch, partials)
            item = atomic_add(head, 1)

    return work


@functools.cache
def work_on(dtype: torch.dtype) -> Work:
    """The compiled function for tensors of one dtype."""
    name = f"{str(dtype).removeprefix('torch.')}_formats"
    work = _make_work(ELEMENTS[dtype])
    return keeps_subnormals(compile_entry(work, name, "void(int64, int64, int64)"))
