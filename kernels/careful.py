"""The rare path: sums of a work item that plain float32 sums would get wrong."""

import triton
import triton.language as tl

from gradstat.kernels.items import load_any

INF = tl.constexpr(float("inf"))


@triton.jit
def power_of_two(magnitude):
    """The power of two that brings a magnitude into [1, 2), or nearest to it as a normal float32.

    1 for zero.
    """
    exponent = magnitude.to(tl.int32, bitcast=True) >> 23
    scale_exponent = tl.minimum(tl.maximum(254 - exponent, 1), 253)
    scale = (scale_exponent << 23).to(tl.float32, bitcast=True)
    return tl.where(magnitude > 0.0, scale, 1.0)


@triton.jit
def find_unit(address, strides, n, DTYPE, THREADS: tl.constexpr):
    """A power of two and a center, both float32, such that ``x * unit - center`` is of order 1.

    They suit the first elements, and so, as a rule, the rest.
    """
    offsets = tl.arange(0, THREADS)
    x = load_any(address, strides, offsets, n, 0.0, DTYPE)
    is_finite = tl.abs(x) < INF
    unit = power_of_two(tl.max(tl.where(is_finite, tl.abs(x), 0.0)))
    # The selection stands between product and sum: fused with its first addition, a product would
    # leave the lanes of a warp with sums that differ in the last bit.
    return unit, tl.sum(tl.where(is_finite, x * unit, 0.0)) / tl.minimum(n, THREADS)


@triton.jit
def negative_zeros(address, strides, n, DTYPE, THREADS: tl.constexpr):
    """Elements that are -0.0."""
    negative = tl.zeros((THREADS,), tl.int32)
    for start in range(0, n, THREADS):
        x = load_any(address, strides, start + tl.arange(0, THREADS), n, 0.0, DTYPE)
        negative += (x.to(tl.int32, bitcast=True) == -0x80000000).to(tl.int32)
    return tl.sum(negative)


@triton.jit
def careful_sums(address, strides, n, low, high, DTYPE, THREADS: tl.constexpr):
    """Sums over the finite elements in float64, and non-finite counts.

    Deviations are taken from the mean in a pass of their own. The item is still in cache. The ends
    of the histogram's range, float32, are infinite where there is none.

    Returns:
        sum, l1, sum of squared deviations from the mean (float64); smallest and largest (float32,
        infinite when there is no finite element); finite, nan, posinf, neginf and, of the finite
        ones, below and above the range (int32).
    """
    threads = tl.arange(0, THREADS)
    total = tl.zeros((THREADS,), tl.float64)
    magnitudes = tl.zeros((THREADS,), tl.float64)
    smallest = tl.full((THREADS,), INF, tl.float32)
    largest = tl.full((THREADS,), -INF, tl.float32)
    none = tl.zeros((THREADS,), tl.int32)
    counts = (none, none, none, none, none)
    for start in range(0, n, THREADS):
        offsets = start + threads
        x = load_any(address, strides, offsets, n, 0.0, DTYPE)
        is_finite = tl.abs(x) < INF
        used = is_finite & (offsets < n)
        value = tl.where(is_finite, x, 0.0).to(tl.float64)
        total += value
        magnitudes += tl.abs(value)
        smallest = tl.minimum(smallest, tl.where(used, x, INF))
        largest = tl.maximum(largest, tl.where(used, x, -INF))
        found = (x != x, x == INF, x == -INF, used & (x < low), used & (x > high))
        counted = ()
        for k in tl.static_range(5):
            counted = counted + (counts[k] + found[k].to(tl.int32),)
        counts = counted
    nan = tl.sum(counts[0])
    posinf = tl.sum(counts[1])
    neginf = tl.sum(counts[2])
    finite = n - nan - posinf - neginf
    sum64 = tl.sum(total)
    mean = sum64 / tl.maximum(finite, 1)

    squares = tl.zeros((THREADS,), tl.float64)
    for start in range(0, n, THREADS):
        x = load_any(address, strides, start + threads, n, INF, DTYPE)
        is_finite = tl.abs(x) < INF
        away = tl.where(is_finite, x, 0.0).to(tl.float64) - mean
        squares += tl.where(is_finite, away * away, 0.0)
    return (
        sum64,
        tl.sum(magnitudes),
        tl.sum(squares),
        tl.min(smallest),
        tl.max(largest),
        finite,
        nan,
        posinf,
        neginf,
        tl.sum(counts[3]),
        tl.sum(counts[4]),
    )
