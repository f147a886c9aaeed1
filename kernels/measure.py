"""The measuring kernels: one program reads one work item and writes its partial results.

An automatic range takes a second sweep, which counts over the range that the first has found. In a
CUDA graph `flag_kernel` says before both whether the pass is due.
"""

import triton
import triton.language as tl

from gradstat.kernels.binning import (
    LOG2_FINITE,
    LOG2_MAGNITUDES,
    aligned_where_unscaled,
    inner_slot,
    linear_factors,
    linear_slot,
    log2_bin,
    log2_slot,
)
from gradstat.kernels.careful import careful_sums, find_unit, negative_zeros
from gradstat.kernels.items import (
    ROWS,
    WORDS,
    load_any,
    load_item,
    load_tile,
    pair_add,
    pair_equal,
    pair_max,
    pair_min,
    together,
    values_of,
)

# Fields of a row of partials, float64.
PARTIAL_FIELDS = tl.constexpr(13)

# A sum of squares from here on has lost less to underflow than a float32 does to rounding.
SAFE_SQUARES = tl.constexpr(2.0**-100)
INF = tl.constexpr(float("inf"))


@triton.jit
def _sums_in_pairs(x, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Sums of a row's values, two for each thread: Blackwell adds two float32 at once."""
    return tl.sum(tl.reshape(x, [THREADS, VECTOR // 2, 2]), 1)


@triton.jit
def find_slots(
    x, ends, BINS: tl.constexpr, SLOTS: tl.constexpr, LOG2: tl.constexpr, SIGN: tl.constexpr
):
    """Slot of each value: see `log2_slot` and `linear_slot`."""
    if LOG2:
        return log2_slot(x)
    low, high, scale, quarters = ends
    return linear_slot(x, low, high, scale, quarters, BINS, SLOTS, SIGN)


@triton.jit
def measure_kernel(
    due_ptr,
    items_ptr,
    ranges_ptr,
    partials_ptr,
    counts_ptr,
    DTYPE: tl.constexpr,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    LOG2: tl.constexpr,
    PAIRS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Sums, extremes, zero and non-finite counts and the histogram of work item ``program_id``.

    Args:
        due_ptr: int64 (1,), 0 to measure nothing.
        items_ptr: int64 (W, 9), see items.py.
        ranges_ptr: float32 (L, 2), low and high of each tensor; not read for log2 bins.
        partials_ptr: float64 (W, 13): sum, l1, sum of squares, squared deviations from the mean,
            min, max, finite, zeros, nan, posinf, neginf, below, above.
        counts_ptr: int64 (L, BINS), zeroed by the caller; bins are added to it.
        DTYPE: element type of the tensors; int16 for bfloat16.
        BINS: bins of the scheme; 0 for no histogram.
        SLOTS: power of two: slots of the histogram in shared memory.
        LOG2: log2 bins, not linear ones.
        PAIRS: take minima, maxima and zeros of 16-bit elements in pairs, see items.py.
        THREADS: threads of the program.
    """
    # float16 has no value but zero in the slots of zero, so these count zeros.
    ZERO_SLOTS: tl.constexpr = LOG2 and tl.float16 == DTYPE
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # elements in 16 bytes
    TILE: tl.constexpr = ROWS * THREADS * VECTOR
    # Before the flag is there: one wait for both.
    address, tensor, n, n_aligned, strides = load_item(items_ptr)
    if tl.load(due_ptr) == 0:
        return
    threads = tl.arange(0, THREADS)
    slots = tl.arange(0, SLOTS)
    low = -INF
    high = INF
    scale = 0.0
    quarters = 0.0
    if BINS > 0 and not LOG2:
        low = tl.load(ranges_ptr + 2 * tensor)
        high = tl.load(ranges_ptr + 2 * tensor + 1)
        scale, quarters = linear_factors(low, high, BINS)
        n_aligned = aligned_where_unscaled(n_aligned, scale)
    ends = (low, high, scale, quarters)

    # Sums are of y = x * unit - center: where that is of the order of 1, no square overflows or
    # underflows, and the variance does not cancel. The first elements say what to take.
    unit, center = find_unit(address, strides, n, DTYPE, THREADS)
    total = tl.zeros((THREADS, 2), tl.float32)
    magnitudes = tl.zeros((THREADS, 2), tl.float32)
    # A sum for each value of a row: a square and its addition are then one instruction.
    squares = tl.zeros((THREADS, VECTOR), tl.float32)
    if PAIRS:
        INF_PAIR: tl.constexpr = 0x7F807F80 if tl.int16 == DTYPE else 0x7C007C00
        smallest = tl.full((THREADS, WORDS), INF_PAIR, tl.int32)
        largest = smallest | -0x7FFF8000  # minus infinity
        zeros = tl.zeros((THREADS, WORDS), tl.int32)
    else:
        smallest = tl.full((THREADS,), INF, tl.float32)
        largest = tl.full((THREADS,), -INF, tl.float32)
        zeros = tl.zeros((THREADS,), tl.float32)
    histogram = tl.zeros((SLOTS,), tl.int32)

    for start in range(0, n_aligned, TILE):
        rows = load_tile(address, start, DTYPE, ROWS, THREADS)
        row_slots = ()
        for row in tl.static_range(ROWS):
            x = values_of(rows[row], DTYPE)
            y = x * unit - center
            total += _sums_in_pairs(y, THREADS, VECTOR)
            magnitudes += _sums_in_pairs(tl.abs(x), THREADS, VECTOR)
            squares += y * y
            if PAIRS:
                smallest = pair_min(smallest, rows[row], DTYPE)
                largest = pair_max(largest, rows[row], DTYPE)
                if not ZERO_SLOTS:
                    zeros = pair_add(zeros, pair_equal(rows[row], 0))
            else:
                smallest = tl.minimum(smallest, tl.min(x, 1))
                largest = tl.maximum(largest, tl.max(x, 1))
                if not ZERO_SLOTS:
                    # Exact in float32, and an instruction cheaper.
                    zeros += tl.sum((x == 0.0).to(tl.float32), 1)
            if BINS > 0:
                row_slots = row_slots + (find_slots(x, ends, BINS, SLOTS, LOG2, True),)
        if BINS > 0:
            histogram += tl.histogram(together(row_slots), SLOTS)

    total = tl.sum(total, 1)
    magnitudes = tl.sum(magnitudes, 1)
    squares = tl.sum(squares, 1)
    if PAIRS:
        smallest = tl.min(values_of(smallest, DTYPE), 1)
        largest = tl.max(values_of(largest, DTYPE), 1)
        zeros = tl.sum(values_of(zeros, tl.float16), 1)
    for start in range(n_aligned, n, THREADS):
        offsets = start + threads
        mask = offsets < n
        x = load_any(address, strides, offsets, n, 0.0, DTYPE)
        y = tl.where(mask, x * unit - center, 0.0)
        total += y
        squares += y * y
        magnitudes += tl.abs(x)
        smallest = tl.minimum(smallest, tl.where(mask, x, INF))
        largest = tl.maximum(largest, tl.where(mask, x, -INF))
        zeros += (mask & (x == 0.0)).to(tl.float32)
        if BINS > 0:
            slot = find_slots(x, ends, BINS, SLOTS, LOG2, False)
            histogram += tl.histogram(slot, SLOTS, mask=mask)

    s = tl.sum(total)
    q = tl.sum(squares)
    a = tl.sum(magnitudes)
    lo = tl.min(smallest)
    hi = tl.max(largest)
    # Not where the squares underflowed, where the center is large beside the values, or where it is
    # far from their mean. A NaN or an infinity makes q one as well.
    centered = (tl.abs(center) * n <= 4.0 * unit * a) & (s * s <= 0.5 * q * n)
    below = 0
    above = 0
    if BINS > 0 and not LOG2:
        below = tl.sum(tl.where(slots == SLOTS - 1, histogram, 0))
        above = tl.sum(tl.where(slots == BINS + 1, histogram, 0))
    if ((lo == hi) | ((q >= SAFE_SQUARES) & centered)) & (q < INF) & (a < INF):
        inverse = 1.0 / unit.to(tl.float64)
        shift = center.to(tl.float64) * n
        sum64 = (s.to(tl.float64) + shift) * inverse
        l1 = a.to(tl.float64)
        deviations = (q.to(tl.float64) - s.to(tl.float64) * s / n) * inverse * inverse
        finite = n
        nan = 0
        posinf = 0
        neginf = 0
    else:
        sum64, l1, deviations, lo, hi, finite, nan, posinf, neginf, below, above = careful_sums(
            address, strides, n, low, high, DTYPE, THREADS
        )
    squares64 = deviations + sum64 * sum64 / tl.maximum(finite, 1)

    z = tl.sum(zeros).to(tl.int32)
    if LOG2:
        in_zero_slots = tl.sum(tl.where((slots & (LOG2_MAGNITUDES - 1)) == 0, histogram, 0))
        negative = tl.sum(tl.where(slots == LOG2_MAGNITUDES, histogram, 0))
        if ZERO_SLOTS:
            z = in_zero_slots
        else:
            # Magnitudes below 2**-128 are in these slots too.
            if in_zero_slots != z:
                negative = negative_zeros(address, strides, n, DTYPE, THREADS)
        # A zero with a minus sign counts as one without.
        moved = (slots == 0).to(tl.int32) - (slots == LOG2_MAGNITUDES).to(tl.int32)
        histogram += moved * negative
    partial_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * PARTIAL_FIELDS
    partial = (sum64, l1, squares64, deviations, lo, hi, finite, z)
    partial = partial + (nan, posinf, neginf, below, above)
    for k in tl.static_range(PARTIAL_FIELDS):
        tl.store(partial_ptr + k, partial[k].to(tl.float64))
    if BINS > 0:
        add_histogram(histogram, counts_ptr + tensor * BINS, BINS, SLOTS, LOG2)


@triton.jit
def second_sweep_kernel(
    due_ptr,
    items_ptr,
    ranges_ptr,
    counts_ptr,
    DTYPE: tl.constexpr,
    BINS: tl.constexpr,
    SLOTS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Linear histogram of work item ``program_id``, over a range that the first sweep has found.

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


@triton.jit
def add_histogram(
    histogram, counts_ptr, BINS: tl.constexpr, SLOTS: tl.constexpr, LOG2: tl.constexpr
):
    """Add a program's slots, int32, to the counts of its tensor, int64: finite values alone."""
    slots = tl.arange(0, SLOTS)
    if LOG2:
        bins = log2_bin(slots)
        kept = (slots & (LOG2_MAGNITUDES - 1)) < LOG2_FINITE
    else:
        bins = tl.minimum(slots, BINS - 1)
        kept = slots <= BINS
    mask = kept & (histogram != 0)
    tl.atomic_add(counts_ptr + bins, histogram.to(tl.int64), mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["period", "phase"])
def flag_kernel(n_passes_ptr, due_ptr, period, phase):
    """Set the flag that all other kernels of a pass read first.

    Args:
        n_passes_ptr: int64 (1,), passes before this one.
        due_ptr: int64 (1,): 1 where this pass is to be measured, else 0.
        period: passes from one that is due to the next.
        phase: passes before the first one that is due, below the period.
    """
    tl.store(due_ptr, (tl.load(n_passes_ptr) % period == phase).to(tl.int64))
