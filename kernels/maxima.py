"""Largest magnitudes of tensors and blocks of 128 x 128: a read before, for scales made of them."""

import triton
import triton.language as tl

from gradstat.kernels.granules import find_tiles, load_granules, load_ragged, magnitudes
from gradstat.kernels.items import ROWS, load_tile, values_of


@triton.jit
def maxima_kernel(
    items_ptr,
    maxima_ptr,
    DTYPE: tl.constexpr,
    IN_TILES: tl.constexpr,
    GRANULE: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Largest magnitudes of tensors and blocks of 128 x 128, from work item ``program_id``.

    Args:
        items_ptr: int64 (W, 9), see granules.py.
        maxima_ptr: int32 (M,), zeroed by the caller: bits of a float32 for each tensor and block.
        DTYPE: element type of the tensors; int16 for bfloat16.
        IN_TILES: whether blocks have a maximum; then a granule is 128 columns.
        GRANULE: columns of a granule.
        THREADS: threads of the program.
    """
    address, tensor, n, n_whole, place = load_granules(items_ptr)
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # elements in 16 bytes
    ROW: tl.constexpr = THREADS * VECTOR
    most = tl.zeros((THREADS,), tl.float32)
    for start in range(0, n_whole * GRANULE, ROWS * ROW):
        rows = load_tile(address, start, DTYPE, ROWS, THREADS)
        for row in tl.static_range(ROWS):
            x, _ = magnitudes(values_of(rows[row], DTYPE))
            most = tl.maximum(most, tl.max(x, 1))
            if IN_TILES:
                _add_tiles(x, place, n, start + row * ROW, maxima_ptr, ROW)
    for start in range(n_whole * GRANULE, n * GRANULE, ROW):
        x = load_ragged(address, place, n, start, DTYPE, GRANULE, THREADS, VECTOR)
        x, _ = magnitudes(x)
        most = tl.maximum(most, tl.max(x, 1))
        if IN_TILES:
            _add_tiles(x, place, n, start, maxima_ptr, ROW)
    tl.atomic_max(maxima_ptr + tensor, tl.max(most).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _add_tiles(x, place, n, start, maxima_ptr, ROW: tl.constexpr):
    """Take the granules of a row to the maxima of their blocks."""
    largest = tl.max(tl.reshape(x, [ROW // 128, 128]), 1).to(tl.int32, bitcast=True)
    at, mask = find_tiles(place, n, start, ROW)
    tl.atomic_max(maxima_ptr + at, largest, mask=mask, sem="relaxed")
