"""Device twin of gradstat/bins.py: the same arithmetic, rounding for rounding."""

import triton
import triton.language as tl

LOG2_SHIFT = tl.constexpr(21)
LOG2_MAGNITUDES = tl.constexpr(1024)
LOG2_FINITE = tl.constexpr(1020)


@triton.jit
def log2_slot(x):
    """Top 11 bits of float32 values, int32 in 0..2047: sign, exponent, 2 mantissa bits.

    ``-0.0`` is in slot 1024, not in that of ``0.0``: `measure_kernel` moves it. The mask changes
    nothing; it tells the compiler that no slot lies outside the histogram.
    """
    return (x.to(tl.int32, bitcast=True) >> LOG2_SHIFT) & (2 * LOG2_MAGNITUDES - 1)


@triton.jit
def log2_bin(slot):
    """Bin of a slot: slots ascend in magnitude, bins from the most negative value."""
    positive = slot < LOG2_MAGNITUDES
    return tl.where(positive, slot + LOG2_MAGNITUDES, 2 * LOG2_MAGNITUDES - 1 - slot)


@triton.jit
def linear_factors(low, high, BINS: tl.constexpr):
    """Scale, as `LinearBins._factors`, and quarter bins per scaled unit; scalars.

    Quarters, which are as exact: a slot's address is four bytes times its number, so where a value
    is in quarter bins, the two lowest bits cleared are the address, and no shift is needed.
    """
    width = high - low
    scale = tl.where(width < 7.888609052210118e-31, 1.2676506002282294e30, 1.0)
    scale = tl.where(width > 8.507059173023462e37, 0.00390625, scale)
    return scale, 4.0 * tl.div_rn(BINS * 1.0, high * scale - low * scale)


@triton.jit
def quarters_above(x, low, scale, quarters):
    """How far values are above ``low``, in quarter bins.

    Fusing the first product with the addition changes no bin. Not -(low * scale): -0.0 must come to
    0.0 where low is zero, without a sign.
    """
    return (x * scale + (0.0 - low * scale)) * quarters


@triton.jit
def aligned_where_unscaled(n_aligned, scale):
    """``n_aligned``, or 0 for values that are scaled down: the masked loop compares them."""
    return tl.where(scale < 1.0, 0, n_aligned)


@triton.jit
def linear_slot(
    x, low, high, scale, quarters, BINS: tl.constexpr, SLOTS: tl.constexpr, SIGN: tl.constexpr
):
    """Bin of each value in 0..BINS-1, or BINS where rounding takes the end of the last bin there.

    BINS + 1 above the range, SLOTS - 1 below it, either of them for NaN. What is above, a
    comparison says, since t is rounded. What is below, the sign of t says, an instruction cheaper:
    with SIGN, not where values are scaled down, since subnormals then round to zero. Scale and
    quarters are those of `linear_factors`; SLOTS is a power of two, more than BINS + 2.
    """
    t = quarters_above(x, low, scale, quarters)
    slot = tl.where(x <= high, t.to(tl.int32), 4 * (BINS + 1))
    below = t.to(tl.int32, bitcast=True) >> 31 if SIGN else tl.where(x < low, -1, 0)
    # The mask tells the compiler that no slot lies outside the histogram.
    return ((slot | below) >> 2) & (SLOTS - 1)


@triton.jit
def inner_slot(x, low, scale, quarters, BINS: tl.constexpr, SLOTS: tl.constexpr):
    """The same for a range that holds all finite values: BINS + 1 for NaN and infinities.

    A minimum takes the number, not the NaN.
    """
    t = tl.abs(quarters_above(x, low, scale, quarters))
    t = tl.minimum(t, 4.0 * (BINS + 1))
    return (t.to(tl.int32) >> 2) & (SLOTS - 1)
