"""Device twin of gradstat/engines/reference.py: scales and rounding of narrow formats.

A format is a tuple of constants, see `gradstat.formats.Format.fields`. Magnitudes are float32; no
instruction of a narrow type is needed.
"""

import triton
import triton.language as tl

from gradstat import formats
from gradstat.kernels.items import nearly_reciprocal

INF = tl.constexpr(float("inf"))

# Fields of a format, and ways to find its scale, as `gradstat.formats` says.
KIND, COLUMNS, LEAST, TO_ROUNDER, LARGEST, TOP = map(tl.constexpr, formats.FIELDS[:6])
SCALE, INVERSE, IS_BFLOAT16, IS_POWER, LARGEST_PAIR = map(tl.constexpr, formats.FIELDS[6:])
CONSTANT, AMAX, IN_ROW, TILES, E8M0, NVFP4 = map(tl.constexpr, formats.KINDS)

_E4M3_LEAST = tl.constexpr(formats.E4M3.least_normal_bits)
_E4M3_TO_ROUNDER = tl.constexpr(formats.E4M3.to_rounder)
_E4M3_LARGEST = tl.constexpr(formats.E4M3.largest)
_E2M1_LARGEST = tl.constexpr(formats.FORMATS["nvfp4"].largest)
_NVFP4_LARGEST = tl.constexpr(formats.NVFP4_LARGEST)
_LEAST_TENSOR_SCALE = tl.constexpr(formats.LEAST_TENSOR_SCALE)
_MOST_INVERSE = tl.constexpr(1 / formats.LEAST_SCALE)
_FLOAT32_MAX = tl.constexpr((2 - 2.0**-23) * 2.0**127)


@triton.jit
def rounded(x, LEAST_BITS: tl.constexpr, TO_ROUNDER_BITS: tl.constexpr):
    """Magnitudes rounded to elements, ties to even, as if there were no largest one.

    The number that is added and taken away ends its digits where an element of the octave does. A
    product must not be fused with that sum: what comes here is a minimum.
    """
    octave = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, LEAST_BITS)
    rounder = (octave + TO_ROUNDER_BITS).to(tl.float32, bitcast=True)
    return (x + rounder) - rounder


@triton.jit
def rounded_bfloat16(x):
    """Magnitudes rounded to bfloat16; infinite beyond its largest."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0x7FFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _divided(a, b, inverse):
    """Quotients rounded right, for a b of few digits, as an e4m3, and about its reciprocal.

    The remainder is exact, and no such quotient is close to halfway between two numbers.
    """
    q = a * inverse
    return tl.fma(tl.fma(-b, q, a), inverse, q)


@triton.jit
def _divided_twice(a, b, inverse):
    """Quotients rounded right, for any b and its reciprocal, rounded right (Markstein)."""
    q = _divided(a, b, inverse)
    return tl.fma(tl.fma(-b, q, a), inverse, q)


@triton.jit
def find_scales(largest, most, FORM: tl.constexpr, FAST: tl.constexpr):
    """Scales of groups of values.

    Args:
        largest: largest magnitude of each group, float32.
        most: that of the tensor, float32.
        FORM: format.
        FAST: no quotient is subnormal, and products are fused.

    Returns:
        reciprocal and scale, and the scale that is stored with a block, float32.
    """
    if FORM[KIND] == E8M0:
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) - (127 + FORM[TOP])
        exponent = tl.maximum(exponent, -127)
        inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        # The least one is subnormal.
        scale = tl.maximum((127 + exponent) << 23, 1 << 22).to(tl.float32, bitcast=True)
        return inverse, scale, scale
    if FORM[KIND] == NVFP4:
        of_tensor = tl.maximum(tl.div_rn(most, _NVFP4_LARGEST), _LEAST_TENSOR_SCALE)
        inverse_of_tensor = tl.div_rn(1.0, of_tensor)
        if FAST:
            exact = _divided(largest, _E2M1_LARGEST, 1 / _E2M1_LARGEST)
            exact = _divided_twice(exact, of_tensor, inverse_of_tensor)
        else:
            exact = tl.div_rn(tl.div_rn(largest, _E2M1_LARGEST), of_tensor)
        stored = rounded(tl.minimum(exact, _E4M3_LARGEST), _E4M3_LEAST, _E4M3_TO_ROUNDER)
        # A minimum, so that no difference is fused with the product before it is rounded.
        scale = tl.minimum(stored * of_tensor, _FLOAT32_MAX)
        divisor = tl.where(stored > 0.0, stored, 1.0)
        if FAST:
            inverse = _divided(inverse_of_tensor, divisor, nearly_reciprocal(divisor))
        else:
            inverse = tl.div_rn(inverse_of_tensor, divisor)
        return tl.where(stored > 0.0, inverse, 0.0), scale, stored
    used = tl.where(largest > 0.0, largest, FORM[LARGEST])
    inverse = tl.minimum(tl.div_rn(FORM[LARGEST] * 1.0, used), _MOST_INVERSE)
    scale = tl.div_rn(1.0, inverse)
    return inverse, scale, scale


@triton.jit
def elements_of(x, inverse, FORM: tl.constexpr):
    """Elements of magnitudes, as if there were none beyond the largest; float32."""
    element = x * inverse
    if FORM[IS_BFLOAT16]:
        element = rounded_bfloat16(element)
    else:
        # A block's power of two takes none further, and a product with it is exact.
        if FORM[KIND] != E8M0:
            element = tl.minimum(element, 2.0 * FORM[LARGEST])
        element = rounded(element, FORM[LEAST], FORM[TO_ROUNDER])
    return element
