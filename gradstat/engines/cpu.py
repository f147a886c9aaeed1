"""The CPU engine: one pass over memory, compiled by Numba, on all of torch's threads.

It computes what `reference` defines: every integer is equal, every float in float64 arithmetic.
Beside a tensor it needs under 1 MB, whatever its strides; results do not depend on the threads.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradstat.bins import Bins, LinearBins
from gradstat.engines.cpu_blocks import BFLOAT16, FIELDS, FLOAT16, FLOAT32, FLOAT64
from gradstat.engines.cpu_compile import Array
from gradstat.engines.cpu_counts import MAX_LANE_BINS
from gradstat.engines.cpu_passes import (
    COLUMNS,
    COUNTS_ONLY,
    FIRST,
    FLOATS_ONLY,
    FUSED,
    NEXT,
    SCRATCH_WORDS,
    finish,
    work,
)
from gradstat.engines.cpu_threads import run_together
from gradstat.engines.memory import merge_dims, no_storage
from gradstat.results import FLOATS, INTEGERS, Statistics

_CODES = {
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float32: FLOAT32,
    torch.float64: FLOAT64,
}
_ITEM = 1 << 16  # elements: enough to hide the taking of an item, few enough to share a tensor out
_MAX_ITEMS = 2048  # of one tensor: its partials stay under 200 KB
_ALONE_BELOW = 1 << 18  # elements: waking another thread takes longer than these

_LOW, _HIGH = FLOATS.index("low"), FLOATS.index("high")

_scratches: list[Array] = []  # between calls; the lanes in them are zero


def measure(
    tensors: Sequence[Tensor], bins: Bins, low: Tensor | None = None, high: Tensor | None = None
) -> Statistics:
    """Statistics of each tensor of a list, as `reference.measure`.

    Args:
        tensors: L floating-point tensors on the CPU, any shapes and strides.
        bins: scheme of the histogram.
        low: lower ends of the ranges of `LinearBins`, float32 ``(L,)``; ``None`` for an automatic
            range, and for `Log2Bins`.
        high: upper ends.

    Returns:
        Statistics of shape ``(L,)``.
    """
    rows, is_linear = len(tensors), isinstance(bins, LinearBins)
    table, numel, held = _tabulate(tensors)
    partials = np.empty((int(table[-1, FIRST]), FIELDS))
    integers = np.zeros((rows, len(INTEGERS)), np.int64)
    floats = np.empty((rows, len(FLOATS)))
    counts = np.zeros((rows, bins.bins), np.int64)
    alone = numel < _ALONE_BELOW or bins.bins > MAX_LANE_BINS  # such rows are not shared
    threads = 1 if alone else torch.get_num_threads()

    def run(stage: int) -> None:
        table[-1, NEXT] = 0
        arguments = (table, stage, is_linear, partials, integers, floats, counts)
        if threads == 1:
            _work(*arguments)
        else:
            run_together(functools.partial(_work, *arguments), threads)
        finish(*arguments)

    if not isinstance(bins, LinearBins):
        run(FUSED)
    elif low is not None and high is not None:
        floats[:, _LOW], floats[:, _HIGH] = low.numpy(), high.numpy()
        run(FUSED)
    else:
        run(FLOATS_ONLY)
        if bins.nice:
            minimum, maximum = torch.from_numpy(floats[:, 0]), torch.from_numpy(floats[:, 1])
            low, high = bins.automatic_range(minimum, maximum)
            floats[:, _LOW], floats[:, _HIGH] = low.numpy(), high.numpy()
        run(COUNTS_ONLY)
    del held  # the table has its addresses
    return Statistics(
        bins, torch.from_numpy(integers), torch.from_numpy(floats), torch.from_numpy(counts)
    )


def _work(*arguments: object) -> None:
    """`work`, with a scratch."""
    try:
        scratch = _scratches.pop()
    except IndexError:  # all are in use
        scratch = np.zeros(SCRATCH_WORDS, np.uint32)
    work(*arguments, scratch)
    _scratches.append(scratch)


def _tabulate(tensors: Sequence[Tensor]) -> tuple[Array, int, list[object]]:
    """The work table of a list, how many elements it has, and what must live as long."""
    cells: list[int] = []
    held: list[object] = []
    total, items = 0, 0
    for x in tensors:
        if x.is_neg():  # torch keeps the sign apart
            x = x.resolve_neg()
            held.append(x)
        numel, address = x.numel(), 0
        if numel and not x.data_ptr():
            raise no_storage(len(cells) // COLUMNS)
        if not x.is_contiguous():
            layout = _layout(x)
            if layout[0]:
                held.append(layout)
                address = layout.buffer_info()[0]
        size = _ITEM
        while numel > size * _MAX_ITEMS:
            size *= 2
        cells += (x.data_ptr(), numel, _CODES[x.dtype], address, items, size)
        items += -(-numel // size)
        total += numel
    cells += (0, 0, 0, 0, items, 0)
    return np.array(cells, np.int64).reshape(-1, COLUMNS), total, held


def _layout(x: Tensor) -> array[int]:
    """Number of dimensions, then size and stride of each; none if the memory has no gaps."""
    dims = merge_dims(x)
    if len(dims) == 1 and dims[0][1] == 1:
        return array("q", [0])
    return array("q", [len(dims), *(number for pair in dims for number in pair)])
