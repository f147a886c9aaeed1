"""Work items of narrow formats: how a program finds its block groups.

A tensor is a contiguous matrix of rows. A block group, or group, is so many columns of one row, or
what is left of it, and whole blocks of every format that is measured. A launch takes a table of
work items, int64, shape (W, 9). Its fields, in order:

    address  of the first group, in bytes
    tensor   row of its maximum
    n        groups, below 2**24 elements, row by row
    n_whole  of these, groups in whole tiles, contiguous from a 16-byte boundary
    column   groups of its row before the first one
    per_row  groups of a row
    pad      columns that the last group of a row lacks
    row      of the first group
    tiles    row of the maximum of the tensor's first block of 128 x 128
"""

import triton
import triton.language as tl

from gradstat.kernels.items import widen

GROUP_FIELDS = tl.constexpr(9)


@triton.jit
def load_groups(items_ptr):
    """Fields of this program's item; all but address, tensor, row and tiles as int32."""
    field_ptr = items_ptr + tl.program_id(0).to(tl.int64) * GROUP_FIELDS
    n = tl.load(field_ptr + 2).to(tl.int32)
    n_whole = tl.load(field_ptr + 3).to(tl.int32)
    column = tl.load(field_ptr + 4).to(tl.int32)
    per_row = tl.load(field_ptr + 5).to(tl.int32)
    pad = tl.load(field_ptr + 6).to(tl.int32)
    place = (column, per_row, pad, tl.load(field_ptr + 7), tl.load(field_ptr + 8))
    return tl.load(field_ptr), tl.load(field_ptr + 1), n, n_whole, place


@triton.jit
def magnitudes(x):
    """Magnitudes of float32 values, 0 where they are not finite; and where they are not."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    is_not = bits >= 0x7F800000
    return tl.where(is_not, 0, bits).to(tl.float32, bitcast=True), is_not


@triton.jit
def load_ragged(
    address,
    place,
    n,
    start,
    DTYPE: tl.constexpr,
    GROUP: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Values of a row of a tile of any item, float32 (THREADS, VECTOR); 0 beyond the ends."""
    column, per_row, pad, _, _ = place
    at = start + tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    group = column + at // GROUP
    row = group // per_row
    is_there = (group - row * per_row < per_row - 1) | (at % GROUP < GROUP - pad)
    mask = (at < n * GROUP) & is_there
    x_ptr = address.to(tl.pointer_type(DTYPE))
    # Each row that is passed lacks so many.
    return widen(tl.load(x_ptr + (at - row * pad), mask=mask, other=0), DTYPE)


@triton.jit
def load_tile_maxima(maxima_ptr, place, n, start, VALUES: tl.constexpr):
    """Of the block of 128 x 128 that each group of 128 is part of, float32 (VALUES // 128,)."""
    at, mask = find_tiles(place, n, start, VALUES)
    return tl.load(maxima_ptr + at, mask=mask, other=0.0)


@triton.jit
def find_tiles(place, n, start, VALUES: tl.constexpr):
    """Row of the maximum of that block, int64, and which groups are there."""
    column, per_row, _, first_row, tiles = place
    at = start // 128 + tl.arange(0, VALUES // 128)
    group = column + at
    row = group // per_row
    return tiles + (first_row + row) // 128 * per_row + (group - row * per_row), at < n
