"""Work items for a list of tensors: which program reads which elements.

The table's layout is in kernels/items.py. Items depend on the list alone, so results do not depend
on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradstat.engines.memory import merge_dims

Array = NDArray[np.int64]

MIN_ITEM, MAX_ITEM = 1 << 13, 1 << 16  # elements
TARGET_ITEMS = 1024  # a few programs for each multiprocessor of a large GPU
ALIGNMENT = 16  # bytes of the widest load


class Run(NamedTuple):
    """A part of a tensor: planes of rows of equally spaced elements.

    Offset and strides in elements; strides from the element to the plane.
    """

    offset: int
    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]


def make_items(
    tensors: Sequence[Tensor], rows: Sequence[int], tile_bytes: int
) -> tuple[Array, Array]:
    """Tables for one launch over tensors of one dtype.

    Args:
        tensors: N tensors.
        rows: row of each one's results.
        tile_bytes: bytes of a whole tile.

    Returns:
        items, int64 ``(W, 9)``, see kernels/items.py; and spans, int64 ``(N, 4)``: row, first
        item, end of its items, numel.
    """
    size = item_size(tensors)
    blocks: list[Array] = []
    spans = np.empty((len(tensors), 4), dtype=np.int64)
    n_items = 0
    for i, (x, row) in enumerate(zip(tensors, rows, strict=True)):
        first = n_items
        for run in _runs(x, size):
            block = _split_run(x, row, run, size, tile_bytes // x.element_size())
            blocks.append(block)
            n_items += len(block)
        spans[i] = row, first, n_items, x.numel()
    items = np.concatenate(blocks) if blocks else np.empty((0, 9), dtype=np.int64)
    return items, spans


def item_size(tensors: Sequence[Tensor]) -> int:
    """Elements of an item, a power of two."""
    total = sum(x.numel() for x in tensors)
    return min(max(1 << (total // TARGET_ITEMS).bit_length(), MIN_ITEM), MAX_ITEM)


def _runs(x: Tensor, size: int) -> Iterator[Run]:
    """Parts of a tensor, each element in one of them, in memory order where there is one."""
    dims = merge_dims(x)
    if len(dims) == 1 and dims[0][1] == 1:
        yield Run(0, (dims[0][0], 1, 1), (1, 0, 0))
        return
    *others, outer, middle, inner = [(1, 0), (1, 0), *dims]
    if inner[0] * middle[0] > size:  # more than an item: its rows are split alone
        others, outer, middle = [*others, outer], middle, (1, 0)
    if inner[1] == 1 and inner[0] >= size:  # so long a row has whole tiles
        others, outer = [*others, outer], (1, 0)
    sizes, strides = zip(inner, middle, outer, strict=True)
    for at in product(*(range(length) for length, _ in others)):
        offset = sum(k * stride for k, (_, stride) in zip(at, others, strict=True))
        yield Run(offset, sizes, strides)


def _split_run(x: Tensor, row: int, run: Run, size: int, tile: int) -> Array:
    address, itemsize = x.data_ptr() + run.offset * x.element_size(), x.element_size()
    inner, middle, outer = run.sizes
    inner_stride, middle_stride, outer_stride = run.strides
    if middle == outer == inner_stride == 1:
        return _split_contiguous(address, row, inner, itemsize, size, tile)
    columns = min(inner, size)
    planes = max(1, size // (columns * middle))
    grid = np.meshgrid(np.arange(0, outer, planes), np.arange(0, inner, columns), indexing="ij")
    plane, column = (axis.reshape(-1) for axis in grid)
    width = np.minimum(columns, inner - column)
    items = np.empty((len(plane), 9), dtype=np.int64)
    items[:, 0] = address + (plane * outer_stride + column * inner_stride) * itemsize
    items[:, 1] = row
    items[:, 2] = width * middle * np.minimum(planes, outer - plane)
    items[:, 3] = 0
    items[:, 4] = width
    items[:, 5:] = inner_stride, middle, middle_stride, outer_stride
    return items


def _split_contiguous(address: int, row: int, n: int, itemsize: int, size: int, tile: int) -> Array:
    """Items of a contiguous run; the elements before the first aligned one are an item too."""
    head = min(-address % ALIGNMENT // itemsize, n)
    starts = np.arange(head, n, size, dtype=np.int64)
    if head:
        starts = np.concatenate([np.zeros(1, dtype=np.int64), starts])
    lengths = np.diff(starts, append=n)
    items = np.empty((len(starts), 9), dtype=np.int64)
    items[:, 0] = address + starts * itemsize
    items[:, 1] = row
    items[:, 2] = lengths
    items[:, 3] = lengths // tile * tile
    items[:, 4] = 1 << 30  # one row
    items[:, 5:] = 1, 1, 0, 0
    if head:
        items[0, 3] = 0
    return items
