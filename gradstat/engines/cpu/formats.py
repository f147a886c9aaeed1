"""Narrow formats on the CPU: one pass over memory for all of them, on all of torch's threads.

It computes what `reference` defines. A tensor whose blocks do not lie in memory one after
the other is copied first. Formats with one scale for the tensor, or with blocks of several rows,
need its largest magnitude, or whole blocks, and so a second read.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gradstat.bins import keeps_subnormals
from gradstat.engines import as_matrix, check_storage, reference
from gradstat.engines.cpu import format_work as work
from gradstat.engines.cpu.compiling import passes_trial, trial_tensors
from gradstat.engines.cpu.threads import count_threads, run_together
from gradstat.formats import FORMATS, KIND, TILES, Format
from gradstat.results import NO_SCALE_MAX, NO_SCALE_MIN
from gradstat.util import Array

_ITEM = 1 << 15  # elements, at least
_MAX_ITEMS = 2048  # of one tensor
_ALONE_BELOW = 2 * _ITEM  # elements


@keeps_subnormals
def measure_formats(
    tensors: Sequence[Tensor], formats: Sequence[Format], dim: int = -1
) -> tuple[Tensor, Tensor]:
    """What each format would do to each tensor, as `reference.measure_formats`."""
    return _measure(tensors, formats, dim, _is_trusted)


def _measure(
    tensors: Sequence[Tensor],
    formats: Sequence[Format],
    dim: int,
    is_trusted: Callable[[torch.dtype], bool],
) -> tuple[Tensor, Tensor]:
    """The same; ``is_trusted`` says of a dtype if what is compiled for it is to be used."""
    integers = torch.zeros((len(formats), len(tensors), 8), dtype=torch.int64, device="cpu")
    floats = torch.zeros((len(formats), len(tensors), 2), dtype=torch.float64, device="cpu")
    check_storage(tensors)
    tables: dict[torch.dtype, _FormatTable] = {}
    for row, x in enumerate(tensors):
        if x.dtype == torch.float64 or not is_trusted(x.dtype):
            again = reference.measure_formats([x], formats, dim)
            integers[:, row], floats[:, row] = again[0][:, 0], again[1][:, 0]
            continue
        table = tables.get(x.dtype)
        if table is None:
            table = tables[x.dtype] = _FormatTable(x.dtype, formats)
        table.append(row, x, dim)
    for table in tables.values():
        table.run(integers.numpy(), floats.numpy())
    return integers, floats


@functools.cache
def _is_trusted(dtype: torch.dtype) -> bool:
    """Whether what is compiled for a dtype computes what `reference` does."""
    tensors, formats = trial_tensors(dtype)[:2], list(FORMATS.values())
    return passes_trial(
        work.work_on(dtype),
        f"narrow formats of {dtype}",
        lambda: _measure(tensors, formats, -1, lambda _: True),
        lambda: reference.measure_formats(tensors, formats),
    )


class _FormatTable:
    """The tensors of one dtype, and the stages of the work on them, see `format_work`."""

    def __init__(self, dtype: torch.dtype, formats: Sequence[Format]) -> None:
        self._work, self._formats = work.work_on(dtype), formats
        self._columns = math.lcm(*(form.block[1] for form in formats if form.block))
        self._is_ordered = any(form.block for form in formats)
        self._held: list[Tensor] = []
        self._rows: list[int] = []
        self._shapes: list[tuple[int, int]] = []

    def append(self, row: int, x: Tensor, dim: int) -> None:
        """Add a tensor whose results go to a row."""
        x, height, width = as_matrix(x, dim, self._is_ordered)
        self._held.append(x)
        self._rows.append(row)
        self._shapes.append((height, width))

    def run(self, integers: Array, floats: Array) -> None:
        """Measure; write the rows of the results."""
        maxima = np.zeros(len(self._rows), np.float32)
        if any(form.scaling in ("amax", "nvfp4") for form in self._formats):
            found = self._run([], maxima)[:, 0, work.HIGHEST_SCALE]
            maxima[:] = np.maximum(found, 0)  # minus infinity for an empty tensor
        in_tiles = [form.fields[KIND] == TILES for form in self._formats]
        for is_tiles in dict.fromkeys(in_tiles):
            chosen = [k for k, each in enumerate(in_tiles) if each == is_tiles]
            measured = self._run([self._formats[k] for k in chosen], maxima, in_tiles=is_tiles)
            values = measured[:, 0]
            for j, k in enumerate(chosen, 1):
                of_format = measured[:, j]
                integers[k, self._rows] = _integers(
                    self._formats[k], self._shapes, values, of_format
                )
                squares = values[:, work.SQUARES], of_format[:, work.SQUARES]
                floats[k, self._rows] = np.sqrt(np.stack(squares, 1))

    def _run(self, formats: Sequence[Format], maxima: Array, *, in_tiles: bool = False) -> Array:
        """Partials of the tensors: float64 ``(N, 1 + F, PARTIAL_FIELDS)``; threads share items."""
        lines: list[int] = []
        firsts: list[int] = []
        n_items = n_values = 0
        for x, (height, width) in zip(self._held, self._shapes, strict=True):
            size, numel = _ITEM, height * width
            while numel > size * _MAX_ITEMS:
                size *= 2
            rows = columns = work.TILE
            if not in_tiles:
                if numel and (not formats or width % self._columns == 0):
                    height, width = 1, numel  # blocks lie one after the other
                rows, columns = size // width or 1, min(size, width)
            lines += (x.data_ptr(), height, width, n_items, rows, columns)
            firsts.append(n_items)
            n_items += -(-height // rows) * -(-width // columns) or 1
            n_values += numel
        forms = np.array([form.fields for form in formats], np.float64)
        partials = np.empty((n_items, 1 + len(formats), work.PARTIAL_FIELDS))
        threads = count_threads(n_items) if n_values >= _ALONE_BELOW else 1
        scratch = torch.empty(threads * work.SCRATCH_BYTES, dtype=torch.uint8, device="cpu")
        addresses = (each.ctypes.data for each in (forms, partials, maxima))
        head = (0, 0, threads, scratch.data_ptr(), n_items, len(formats), *addresses)
        table = array("q", (*head, *lines, 0, 0, 0, n_items, 0, 0))
        run_together(self._work, table.buffer_info()[0], threads)
        merged = np.add.reduceat(partials, firsts)
        for how, field in ((np.minimum, work.LOWEST_SCALE), (np.maximum, work.HIGHEST_SCALE)):
            merged[..., field] = how.reduceat(partials[..., field], firsts)
        return merged


def _integers(
    form: Format, shapes: Sequence[tuple[int, int]], values: Array, found: Array
) -> Array:
    """Integers ``(N, 8)`` of matrices, from partials of values and format, ``(N, fields)``."""
    numel = np.array([height * width for height, width in shapes])
    zeros = values[:, work.ZEROS] + values[:, work.SATURATED]
    blocks = np.array([form.count_blocks(*shape) for shape in shapes])
    least, most = found[:, work.LOWEST_SCALE], found[:, work.HIGHEST_SCALE]
    has_scale = (blocks > 0) & (most > 0)
    # Of a scale for a whole tensor each of its chunks had one.
    empty = found[:, work.EMPTY] if form.block else (blocks > 0) & ~has_scale
    return np.stack(
        [
            numel - zeros,
            found[:, work.ZEROS] - zeros,
            found[:, work.SATURATED],
            values[:, work.SATURATED],
            blocks,
            empty,
            np.where(has_scale, np.frexp(least)[1] - 1, NO_SCALE_MIN),
            np.where(has_scale, np.frexp(most)[1] - 1, NO_SCALE_MAX),
        ],
        1,
    ).astype(np.int64)
