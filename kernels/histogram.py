"""The second sweep for automatic ranges: the histogram alone, once the range is known."""

import triton
import triton.language as tl

from gradstat.kernels.binning import aligned_where_unscaled, linear_factors, linear_slot
from gradstat.kernels.items import load_any, load_item, load_tile
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
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Linear histogram of work item ``program_id``.

    Args:
        due_ptr: int64 (1,), 0 to count nothing.
        items_ptr: int64 (W, 9), see items.py.
        ranges_ptr: float32 (L, 2), low and high of each tensor.
        counts_ptr: int64 (L, BINS); bins are added to it.
        DTYPE: element type of the tensors; int16 for bfloat16.
        BINS: bins of the scheme.
        SLOTS: power of two: slots of the histogram in shared memory.
        ROWS: vectors of a tile for each thread.
        THREADS: threads of the program.
        VECTOR: elements in 16 bytes.
    """
    address, tensor, n, n_aligned, strides = load_item(items_ptr)
    if tl.load(due_ptr) == 0:
        return
    threads = tl.arange(0, THREADS)
    low = tl.load(ranges_ptr + 2 * tensor)
    high = tl.load(ranges_ptr + 2 * tensor + 1)
    scale, inv_width = linear_factors(low, high, BINS)
    n_aligned = aligned_where_unscaled(n_aligned, scale)
    histogram = tl.zeros((SLOTS,), tl.int32)
    TILE: tl.constexpr = ROWS * THREADS * VECTOR
    for start in range(0, n_aligned, TILE):
        x = load_tile(address, start, DTYPE, ROWS, THREADS, VECTOR)
        slot = linear_slot(x, low, high, scale, inv_width, BINS, SLOTS, True)
        slot = tl.reshape(slot, [TILE], can_reorder=True)
        histogram += tl.histogram(slot, SLOTS)
    for start in range(n_aligned, n, THREADS):
        offsets = start + threads
        x = load_any(address, strides, offsets, n, 0.0, DTYPE)
        slot = linear_slot(x, low, high, scale, inv_width, BINS, SLOTS, False)
        histogram += tl.histogram(slot, SLOTS, mask=offsets < n)
    add_histogram(histogram, counts_ptr + tensor * BINS, BINS, SLOTS, False)
