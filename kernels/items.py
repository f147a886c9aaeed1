"""Work items: how a program finds its elements.

A launch takes a table of work items, int64, shape (W, 9). Item w is part of one tensor and is read
by program w. Its fields, in order:

    address       of its first element, in bytes
    tensor        row of its results
    n             elements, below 2**21
    n_aligned     of these, elements in whole tiles, contiguous from a 16-byte boundary
    inner         length of a row of the rest; element i is in row i // inner
    inner_stride  elements between neighbours in a row
    middle        rows of a plane
    middle_stride elements between rows
    outer_stride  elements between planes

A tile is `ROWS` rows, and a row is 16 bytes for each thread: the widest load there is. What is done
to each row stays within a thread, so that no loop over tiles needs a shuffle.

16-bit elements lie in pairs in 32-bit words. A GPU from Ampere on compares both of a pair with one
instruction. Triton has no words for it, so these are written in PTX, and a constant of the kernel,
``PAIRS``, takes the plain form elsewhere: in the interpreter, on AMD and on older GPUs.
"""

import triton
import triton.language as tl

ITEM_FIELDS = tl.constexpr(9)
ROWS = tl.constexpr(4)
WORDS = tl.constexpr(4)  # of 32 bits, in 16 bytes


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
def load_tile(address, start, DTYPE: tl.constexpr, N_ROWS: tl.constexpr, THREADS: tl.constexpr):
    """Rows of an aligned tile from element ``start`` on, each int32 (THREADS, 4) words, no mask."""
    words_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
    words_ptr += start // (32 // DTYPE.primitive_bitwidth)
    at = tl.arange(0, THREADS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    rows = ()
    for row in tl.static_range(N_ROWS):
        rows = rows + (tl.load(words_ptr + row * (THREADS * WORDS) + at),)
    return rows


@triton.jit
def values_of(words, DTYPE: tl.constexpr):
    """Elements of words (THREADS, 4) in the order of memory, float32 (THREADS, 4 or 8)."""
    if tl.float32 == DTYPE:
        values = words.to(tl.float32, bitcast=True)
    else:
        if tl.int16 == DTYPE:
            # A bfloat16 is the upper half of a float32.
            pairs = tl.join(words << 16, words & -65536).to(tl.float32, bitcast=True)
        else:
            pairs = tl.join((words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16))
            pairs = pairs.to(tl.float16, bitcast=True).to(tl.float32)
        values = tl.reshape(pairs, [words.shape[0], 2 * words.shape[1]])
    return values


@triton.jit
def together(rows):
    """Four rows as one tensor, in any order: no value moves to another thread."""
    four = tl.join(tl.join(rows[0], rows[1]), tl.join(rows[2], rows[3]))
    return tl.reshape(four, [four.numel], can_reorder=True)


@triton.jit
def widen(x, DTYPE: tl.constexpr):
    """float32 of loaded elements; bfloat16 arrives as its bits, int16, and widens exactly."""
    if tl.int16 == DTYPE:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


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


@triton.jit
def pair_min(a, b, DTYPE: tl.constexpr):
    """The smaller of each two 16-bit elements in words; a NaN is not taken."""
    if tl.int16 == DTYPE:
        return _of_words(a, b, "min.bf16x2 $0, $1, $2;")
    return _of_words(a, b, "min.f16x2 $0, $1, $2;")


@triton.jit
def pair_max(a, b, DTYPE: tl.constexpr):
    """The larger of each two 16-bit elements in words; a NaN is not taken."""
    if tl.int16 == DTYPE:
        return _of_words(a, b, "max.bf16x2 $0, $1, $2;")
    return _of_words(a, b, "max.f16x2 $0, $1, $2;")


@triton.jit
def pair_add(a, b):
    """Sums of float16 pairs in words: counts, exact up to 2,048."""
    return _of_words(a, b, "add.rn.f16x2 $0, $1, $2;")


@triton.jit
def pair_equal(a, b):
    """1 for each of a float16 pair that is equal, as a float16 pair.

    Zeros of bfloat16 elements as well: the same bits are zero, and no others equal to it.
    """
    return _of_words(a, b, "set.eq.f16x2.f16x2 $0, $1, $2;")


@triton.jit
def pair_unequal(a, b):
    """1 for each of a float16 pair that is not equal, NaN too."""
    return _of_words(a, b, "set.neu.f16x2.f16x2 $0, $1, $2;")


@triton.jit
def pair_above(a, b):
    """1 for each of a float16 pair that is larger."""
    return _of_words(a, b, "set.gt.f16x2.f16x2 $0, $1, $2;")


@triton.jit
def pairs_of(x):
    """Words with pairs of float32 values (THREADS, 2 * N) rounded to float16."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return _of_words(odd, even, "cvt.rn.f16x2.f32 $0, $1, $2;")


@triton.jit
def pair_count(flags):
    """How many of each thread's flags are set, a float16 pair."""
    return tl.reduce(flags, 1, pair_add)


@triton.jit
def nearly_reciprocal(x):
    """1 / x of float32, wrong in the last digit, one instruction."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _of_words(a, b, PTX: tl.constexpr):
    return tl.inline_asm_elementwise(PTX, "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
