"""The rare path: sums of a work item that plain float32 sums would get wrong."""

import triton
import triton.language as tl

from gradstat.kernels.items import load_any

INF = tl.constexpr(float("inf"))


@triton.jit
def _extremes(address, strides, n, DTYPE, IS_BFLOAT16: tl.constexpr, LANES: tl.constexpr):
    """Smallest and largest finite value (infinite if there is none) and non-finite counts."""
    lanes = tl.arange(0, LANES)
    smallest = tl.full((LANES,), INF, tl.float32)
    largest = tl.full((LANES,), -INF, tl.float32)
    nans = tl.zeros((LANES,), tl.int32)
    posinfs = tl.zeros((LANES,), tl.int32)
    neginfs = tl.zeros((LANES,), tl.int32)
    for start in range(0, n, LANES):
        offsets = start + lanes
        x = load_any(address, strides, offsets, n, 0.0, DTYPE, IS_BFLOAT16)
        used = (tl.abs(x) < INF) & (offsets < n)
        smallest = tl.minimum(smallest, tl.where(used, x, INF))
        largest = tl.maximum(largest, tl.where(used, x, -INF))
        nans += (x != x).to(tl.int32)
        posinfs += (x == INF).to(tl.int32)
        neginfs += (x == -INF).to(tl.int32)
    return tl.min(smallest), tl.max(largest), tl.sum(nans), tl.sum(posinfs), tl.sum(neginfs)


@triton.jit
def _sums(
    address, strides, n, scale, center, DTYPE, IS_BFLOAT16: tl.constexpr, LANES: tl.constexpr
):
    """Sums of d, abs(d) and d * d, with d = x * scale - center, over finite x."""
    lanes = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float32)
    magnitudes = tl.zeros((LANES,), tl.float32)
    squares = tl.zeros((LANES,), tl.float32)
    for start in range(0, n, LANES):
        x = load_any(address, strides, start + lanes, n, INF, DTYPE, IS_BFLOAT16)
        d = tl.where(tl.abs(x) < INF, x * scale - center, 0.0)
        total += d
        magnitudes += tl.abs(d)
        squares += d * d
    return tl.sum(total), tl.sum(magnitudes), tl.sum(squares)


@triton.jit
def zero_counts(address, strides, n, DTYPE, IS_BFLOAT16: tl.constexpr, LANES: tl.constexpr):
    """Elements equal to zero, and those of them with a minus sign."""
    lanes = tl.arange(0, LANES)
    zeros = tl.zeros((LANES,), tl.int32)
    negative = tl.zeros((LANES,), tl.int32)
    for start in range(0, n, LANES):
        x = load_any(address, strides, start + lanes, n, 1.0, DTYPE, IS_BFLOAT16)
        zeros += (x == 0.0).to(tl.int32)
        negative += (x.to(tl.int32, bitcast=True) == -0x80000000).to(tl.int32)
    return tl.sum(zeros), tl.sum(negative)


@triton.jit
def careful_sums(address, strides, n, DTYPE, IS_BFLOAT16: tl.constexpr, LANES: tl.constexpr):
    """Sums over the finite elements, whatever their magnitude, and non-finite counts.

    Values are scaled by the power of two that brings the largest magnitude into [1, 2); deviations
    are taken from the mean in a pass of their own. The item is still in cache.

    Args:
        address: see items.py, as strides and n.
        strides: see items.py.
        n: elements.
        DTYPE: element type; int16 for bfloat16.
        IS_BFLOAT16: whether the elements are bfloat16.
        LANES: elements loaded at once.

    Returns:
        sum, l1, sum of squares, sum of squared deviations from the mean (float64); smallest and
        largest (float32, infinite when there is no finite element); finite, nan, posinf, neginf
        (int32).
    """
    lo, hi, nan, posinf, neginf = _extremes(address, strides, n, DTYPE, IS_BFLOAT16, LANES)
    finite = n - nan - posinf - neginf
    largest_magnitude = tl.maximum(tl.maximum(-lo, hi), 0.0)
    exponent = largest_magnitude.to(tl.int32, bitcast=True) >> 23
    # 2**(127 - exponent), kept a normal float32; its inverse in float64 is exact.
    scale_exponent = tl.minimum(tl.maximum(254 - exponent, 1), 253)
    scale = (scale_exponent << 23).to(tl.float32, bitcast=True)
    unit = 1.0 / scale.to(tl.float64)
    total, l1, _ = _sums(address, strides, n, scale, 0.0, DTYPE, IS_BFLOAT16, LANES)
    center = tl.where(finite > 0, total / finite, 0.0)
    rest, _, squares = _sums(address, strides, n, scale, center, DTYPE, IS_BFLOAT16, LANES)

    count = tl.maximum(finite, 1).to(tl.float64)
    rest64 = rest.to(tl.float64)
    sum64 = center.to(tl.float64) * finite + rest64
    deviations = tl.maximum(squares.to(tl.float64) - rest64 * rest64 / count, 0.0)
    squares64 = deviations + sum64 * sum64 / count
    return (
        sum64 * unit,
        l1.to(tl.float64) * unit,
        squares64 * unit * unit,
        deviations * unit * unit,
        lo,
        hi,
        finite,
        nan,
        posinf,
        neginf,
    )
