"""The second sweep for automatic ranges: the histogram alone, once the range is known."""

import triton
import triton.language as tl

from gradstat.kernels.binning import inner_slot, linear_factors
from gradstat.kernels.items import (
    ROWS,
    load_any,
    load_item,
    load_tile,
    together,
    values_of,
)
from gradstat.kernels.measure import add_histogram


@triton.jit
def histogram_kernel(
    due_ptr,
    items_ptr,
    ranges_ptr,
    counts_ptr,
    DTYPE: tl.constexpr,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Linear histogram of work item ``program_id``.

    Args:
        due_ptr: int64 (1,), 0 to count nothing.
        items_ptr: int64 (W, 9), see items.py.
        ranges_ptr: float32 (L, 2), low and high of each tensor, around its finite values.
        counts_ptr: int64 (L, BINS); bins are added to it.
        DTYPE: element type of the tensors; int16 for bfloat16.
        BINS: bins of the scheme.
        SLOTS: power of two: slots of the histogram in shared memory.
        THREADS: threads of the program.
    """
    address, tensor, n, n_aligned, strides = load_item(items_ptr)
    if tl.load(due_ptr) == 0:
        return
    low = tl.load(ranges_ptr + 2 * tensor)
    high = tl.load(ranges_ptr + 2 * tensor + 1)
    scale, quarters = linear_factors(low, high, BINS)
    histogram = tl.zeros((SLOTS,), tl.int32)
    TILE: tl.constexpr = ROWS * THREADS * 128 // DTYPE.primitive_bitwidth
    for start in range(0, n_aligned, TILE):
        rows = load_tile(address, start, DTYPE, ROWS, THREADS)
        slots = ()
        for row in tl.static_range(ROWS):
            x = values_of(rows[row], DTYPE)
            slots = slots + (inner_slot(x, low, scale, quarters, BINS, SLOTS),)
        histogram += tl.histogram(together(slots), SLOTS)
    for start in range(n_aligned, n, THREADS):
        offsets = start + tl.arange(0, THREADS)
        x = load_any(address, strides, offsets, n, 0.0, DTYPE)
        slot = inner_slot(x, low, scale, quarters, BINS, SLOTS)
        histogram += tl.histogram(slot, SLOTS, mask=offsets < n)
    add_histogram(histogram, counts_ptr + tensor * BINS, BINS, SLOTS, False)
