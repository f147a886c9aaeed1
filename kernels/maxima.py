"""Largest magnitudes of tensors and blocks of 128 x 128: a read before, for scales made of them."""

import triton
import triton.language as tl

from gradstat.kernels.granules import (
    find_tiles,
    load_granules,
    load_ragged,
    load_whole,
    magnitudes,
)


@triton.jit
def maxima_kernel(
    items_ptr,
    maxima_ptr,
    DTYPE: tl.constexpr,
    IN_TILES: tl.constexpr,
    GRANULE: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Largest magnitudes of tensors and blocks of 128 x 128, from work item ``program_id``.

    Args:
        items_ptr: int64 (W, 9), see granules.py.
        maxima_ptr: int32 (M,), zeroed by the caller: bits of a float32 for each tensor and block.
        DTYPE: element type of the tensors; int16 for bfloat16.
        IN_TILES: whether blocks have a maximum; then a granule is 128 columns.
        GRANULE: columns of a granule.
        ROWS: vectors of a tile for each thread.
        THREADS: threads of the program.
        VECTOR: elements in 16 bytes.
    """
    address, tensor, n, n_whole, place = load_granules(items_ptr)
    TILE: tl.constexpr = ROWS * THREADS * VECTOR
    most = tl.zeros((THREADS,), tl.float32)
    for start in range(0, n_whole * GRANULE, TILE):
        x, _ = magnitudes(load_whole(address, start, DTYPE, ROWS, THREADS, VECTOR))
        most = tl.maximum(most, tl.max(tl.max(x, 2), 0))
        if IN_TILES:
            _add_tiles(x, place, n, start, maxima_ptr, TILE)
    for start in range(n_whole * GRANULE, n * GRANULE, TILE):
        x = load_ragged(address, place, n, start, DTYPE, GRANULE, ROWS, THREADS, VECTOR)
        x, _ = magnitudes(x)
        most = tl.maximum(most, tl.max(tl.max(x, 2), 0))
        if IN_TILES:
            _add_tiles(x, place, n, start, maxima_ptr, TILE)
    tl.atomic_max(maxima_ptr + tensor, tl.max(most).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _add_tiles(x, place, n, start, maxima_ptr, TILE: tl.constexpr):
    """Take the granules of a tile to the maxima of their blocks."""
    largest = tl.max(tl.reshape(x, [TILE // 128, 128]), 1).to(tl.int32, bitcast=True)
    at, mask = find_tiles(place, n, start, TILE)
    tl.atomic_max(maxima_ptr + at, largest, mask=mask, sem="relaxed")
