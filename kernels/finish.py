"""The finishing kernel: one program merges the partial results of one tensor, in fixed order."""

import triton
import triton.language as tl

from gradstat.kernels.measure import PARTIAL_FIELDS

INF = tl.constexpr(float("inf"))


@triton.jit
def finish_kernel(
    due_ptr,
    spans_ptr,
    partials_ptr,
    ranges_ptr,
    integers_ptr,
    floats_ptr,
    KNOWN_RANGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of the tensor that row ``program_id`` of the spans names.

    Args:
        due_ptr: int64 (1,), 0 to write nothing.
        spans_ptr: int64 (N, 4): row of the results, first work item, end of its items, numel.
        partials_ptr: float64 (W, 13), see measure.py.
        ranges_ptr: float32 (L, 2); read for known ranges.
        integers_ptr: int64 (L, 8), fields of `gradstat.results.INTEGERS`.
        floats_ptr: float64 (L, 8), fields of `gradstat.results.FLOATS`.
        KNOWN_RANGE: whether there are ranges to write down.
        BLOCK: items merged at once.
    """
    span_ptr = spans_ptr + tl.program_id(0).to(tl.int64) * 4
    row = tl.load(span_ptr)
    first = tl.load(span_ptr + 1)
    end = tl.load(span_ptr + 2)
    numel = tl.load(span_ptr + 3)
    if tl.load(due_ptr) == 0:
        return
    block = tl.arange(0, BLOCK)

    # What is added up: sum, l1 and sum of squares, then the counts in the order of the integers.
    sums = ()
    for _ in tl.static_range(10):
        sums = sums + (tl.zeros((BLOCK,), tl.float64),)
    smallest = tl.full((BLOCK,), INF, tl.float64)
    largest = tl.full((BLOCK,), -INF, tl.float64)
    for start in range(first, end, BLOCK):
        item = start + block
        mask = item < end
        p = partials_ptr + item * PARTIAL_FIELDS
        added = ()
        for k in tl.static_range(10):
            field_ptr = p + (k if k < 3 else k + 3)
            added = added + (sums[k] + tl.load(field_ptr, mask=mask, other=0.0),)
        sums = added
        smallest = tl.minimum(smallest, tl.load(p + 4, mask=mask, other=INF))
        largest = tl.maximum(largest, tl.load(p + 5, mask=mask, other=-INF))
    n = tl.sum(sums[3])
    sum_ = tl.sum(sums[0])
    mean = sum_ / tl.maximum(n, 1.0)

    # Deviations from the whole mean: each item's own, and those of its mean.
    deviations = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, end, BLOCK):
        item = start + block
        mask = item < end
        p = partials_ptr + item * PARTIAL_FIELDS
        part = tl.load(p + 6, mask=mask, other=0.0)
        away = tl.load(p, mask=mask, other=0.0) / tl.maximum(part, 1.0) - mean
        deviations += tl.load(p + 3, mask=mask, other=0.0) + part * away * away
    variance = tl.maximum(tl.sum(deviations), 0.0) / tl.maximum(n - 1.0, 1.0)
    lo = tl.where(n > 0.0, tl.min(smallest), float("nan"))
    hi = tl.where(n > 0.0, tl.max(largest), float("nan"))
    std = tl.where(lo == hi, 0.0, tl.sqrt(variance))
    std = tl.where(n > 1.0, std, float("nan"))

    low = -INF
    high = INF
    if KNOWN_RANGE:
        low = tl.load(ranges_ptr + 2 * row)
        high = tl.load(ranges_ptr + 2 * row + 1)

    i = integers_ptr + 8 * row
    tl.store(i, numel)
    for k in tl.static_range(7):
        tl.store(i + 1 + k, tl.sum(sums[3 + k]).to(tl.int64))
    f = floats_ptr + 8 * row
    tl.store(f, lo)
    tl.store(f + 1, hi)
    tl.store(f + 2, sum_)
    tl.store(f + 3, std)
    tl.store(f + 4, tl.sum(sums[1]))
    tl.store(f + 5, tl.sqrt(tl.sum(sums[2])))
    tl.store(f + 6, low)
    tl.store(f + 7, high)
