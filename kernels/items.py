"""Work items: how a program finds its elements.

A launch takes a table of work items, int64, shape (W, 9). Item w is part of one tensor and is read
by program w. Its fields, in order:

    address       of its first element, in bytes
    tensor        row of its results
    n             elements, below 2**24
    n_aligned     of these, elements in whole tiles, contiguous from a 16-byte boundary
    inner         length of a row of the rest; element i is in row i // inner
    inner_stride  elements between neighbours in a row
    middle        rows of a plane
    middle_stride elements between rows
    outer_stride  elements between planes
"""

import triton
import triton.language as tl

ITEM_FIELDS = tl.constexpr(9)


@triton.jit
def load_item(items_ptr):
    """Fields of this program's item; the counts as int32."""
    field_ptr = items_ptr + tl.program_id(0).to(tl.int64) * ITEM_FIELDS
    address = tl.load(field_ptr)
    tensor = tl.load(field_ptr + 1)
    n = tl.load(field_ptr + 2).to(tl.int32)
    n_aligned = tl.load(field_ptr + 3).to(tl.int32)
    inner = tl.load(field_ptr + 4).to(tl.int32)
    inner_stride = tl.load(field_ptr + 5)
    middle = tl.load(field_ptr + 6).to(tl.int32)
    middle_stride = tl.load(field_ptr + 7)
    outer_stride = tl.load(field_ptr + 8)
    strides = (inner, inner_stride, middle, middle_stride, outer_stride)
    return address, tensor, n, n_aligned, strides


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """float32 of loaded elements; bfloat16 arrives as its bits, int16, and widens exactly."""
    if tl.int16 == DTYPE:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def load_tile(
    address,
    start,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Elements of an aligned run from ``start`` on, float32 (ROWS, THREADS, VECTOR), no mask.

    A vector is 16 bytes and one load. bfloat16 comes in 32-bit words, two to a word.
    """
    rows = tl.arange(0, ROWS)[:, None, None]
    threads = tl.arange(0, THREADS)[None, :, None]
    if tl.int16 == DTYPE:
        WORDS: tl.constexpr = VECTOR // 2
        words_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16) + start // 2
        offsets = (rows * THREADS + threads) * WORDS + tl.arange(0, WORDS)[None, None, :]
        words = tl.load(words_ptr + offsets)
        pairs = tl.join(words << 16, words & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(pairs, [ROWS, THREADS, VECTOR])
    x_ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16) + start
    offsets = (rows * THREADS + threads) * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    return tl.load(x_ptr + offsets).to(tl.float32)


@triton.jit
def load_any(address, strides, offsets, n, other, DTYPE: tl.constexpr):
    """Elements at offsets of any item, as float32; ``other`` where the offset is not below n."""
    inner, inner_stride, middle, middle_stride, outer_stride = strides
    row = offsets // inner
    where = (row // middle) * outer_stride + (row % middle) * middle_stride
    where += (offsets % inner) * inner_stride
    mask = offsets < n
    x = widen(tl.load(address.to(tl.pointer_type(DTYPE)) + where, mask=mask, other=0), DTYPE)
    return tl.where(mask, x, other)
