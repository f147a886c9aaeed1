"""Narrow formats by Triton: all tensors of a list in one launch, and one small one to finish it.

It computes what `reference` defines. A tensor whose blocks do not lie in memory one after
the other is copied first. Scales that are made of the largest magnitude of a tensor, or of a block
of several rows, take a launch before that finds it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat.engines import as_matrix, reference
from gradstat.engines import triton as triton_engine
from gradstat.engines.triton import Group
from gradstat.formats import Format
from gradstat.kernels.formats import (
    FORMAT_FIELDS,
    finish_formats_kernel,
    formats_kernel,
    maxima_kernel,
)

Array = NDArray[np.int64]

TILE_ROWS = 128  # of a block of several rows
WIDEST = 128  # columns of a group, at most


def in_tiles(formats: Sequence[Format]) -> bool:
    """Whether a format has blocks of several rows."""
    return any(form.block is not None and form.block[0] > 1 for form in formats)


def group_columns(formats: Sequence[Format]) -> int:
    """Columns of a group: blocks of all formats fit in it."""
    return max((form.block[1] for form in formats if form.block), default=WIDEST)


def measure_formats(
    tensors: Sequence[Tensor], formats: Sequence[Format], dim: int = -1
) -> tuple[Tensor, Tensor]:
    """As `reference.measure_formats`, without waiting for the device; float64 tensors go there."""
    device, n = tensors[0].device, len(tensors)
    triton_engine.check_device("measure_formats", "tensors[0]", device)
    integers = torch.empty((len(formats), n, 8), dtype=torch.int64, device=device)
    floats = torch.empty((len(formats), n, 2), dtype=torch.float64, device=device)
    ordered = any(form.block for form in formats)
    matrices = [as_matrix(x, dim, ordered) for x in tensors]
    shapes = tuple((height, width) for _, height, width in matrices)
    n_tiles = [-(-height // TILE_ROWS) * -(-width // WIDEST) for height, width in shapes]
    # Largest magnitudes of the tensors, then of their blocks of several rows.
    tiles = np.cumsum([n, *n_tiles])
    make_tables = functools.partial(_tables, shapes, tiles, formats)
    with triton_engine.on_device(device):
        tables = triton_engine.find_tables(
            [x for x, _, _ in matrices], device, make_tables, shapes, tuple(formats)
        )
        maxima = integers.new_zeros(int(tiles[-1]), dtype=torch.int32)
        for group in tables.groups:
            _measure(group, formats, maxima, integers, floats)
    for i in tables.float64_rows:
        found = reference.measure_formats([tensors[i]], formats, dim)
        integers[:, i].copy_(found[0][:, 0])
        floats[:, i].copy_(found[1][:, 0])
    return integers, floats


def _measure(
    group: Group, formats: Sequence[Format], maxima: Tensor, integers: Tensor, floats: Tensor
) -> None:
    """Launch the kernels for the tensors of one dtype."""
    n_items, device = len(group.items), floats.device
    element, warps = triton_engine.ELEMENTS[group.dtype], triton_engine.warps_on(device)
    has_tiles, columns = in_tiles(formats), group_columns(formats)
    in_pairs = triton_engine.compares_pairs(2, triton_engine.capability_of(device))
    forms = tuple(form.fields for form in formats)
    if n_items and (has_tiles or any(form.scaling in ("amax", "nvfp4") for form in formats)):
        maxima_kernel[(n_items,)](
            group.items, maxima, element, has_tiles, columns, triton_engine.THREADS, num_warps=warps
        )
    maxima = maxima.view(torch.float32)
    partials = floats.new_empty((n_items, 1 + len(formats), FORMAT_FIELDS.value))
    if n_items:
        formats_kernel[(n_items,)](
            group.items,
            maxima,
            partials,
            element,
            forms,
            has_tiles,
            columns,
            in_pairs,
            triton_engine.THREADS,
            num_warps=warps,
        )
    finish_formats_kernel[(len(group.spans),)](
        group.spans,
        maxima,
        partials,
        integers,
        floats,
        integers.shape[1],
        forms,
        triton_engine.FINISH_BLOCK,
        num_warps=warps,
        enable_fp_fusion=False,
    )


def _tables(
    shapes: Sequence[tuple[int, int]],  # of all matrices
    tiles: Array,  # rows of the maxima of their first blocks of several rows
    formats: Sequence[Format],
    tensors: Sequence[Tensor],
    rows: Sequence[int],  # of these among all matrices
) -> tuple[Array, Array]:
    """Items, see kernels/block_groups.py, and spans, see kernels/formats.py, of one launch."""
    columns, n_items = group_columns(formats), 0
    size = triton_engine.item_size(tensors) // columns
    per_tile = triton_engine.TILE_BYTES // tensors[0].element_size() // columns
    tables = [np.empty((0, 9), np.int64)]
    spans = np.empty((len(rows), 4 + len(formats)), np.int64)
    for i, (x, row) in enumerate(zip(tensors, rows, strict=True)):
        height, width = shapes[row]
        per_row = -(-width // columns)
        starts = np.arange(0, height * per_row, size, dtype=np.int64)
        n = np.diff(starts, append=height * per_row)
        # Groups that lie one after the other, without a gap.
        whole = height * per_row if width % columns == 0 else per_row - 1 if height == 1 else 0
        whole = whole if x.data_ptr() % triton_engine.ALIGNMENT == 0 else 0
        first_row, column = np.divmod(starts, per_row)
        table = np.empty((len(starts), 9), np.int64)
        table[:, 0] = x.data_ptr() + (first_row * width + column * columns) * x.element_size()
        table[:, 1], table[:, 2], table[:, 4] = row, n, column
        table[:, 3] = np.clip(whole - starts, 0, n) // per_tile * per_tile
        table[:, 5:7] = per_row, per_row * columns - width
        table[:, 7], table[:, 8] = first_row, tiles[row]
        tables.append(table)
        blocks = [form.count_blocks(height, width) for form in formats]
        spans[i] = row, n_items, n_items + len(table), tiles[row], *blocks
        n_items += len(table)
    return np.concatenate(tables), spans
