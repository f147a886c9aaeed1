"""The definition of every number, in plain torch and float64, on any device.

Of narrow formats a quotient of value and scale is the float32 product of the value with the scale's
reciprocal, as kernels compute it; its rounding to an element, the error and the norms are exact or
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradstat.bins import FLOAT32_MAX, Bins, LinearBins, keeps_subnormals, widen
from gradstat.engines import together
from gradstat.formats import (
    E4M3,
    FORMATS,
    LEAST_EXPONENT,
    LEAST_SCALE,
    LEAST_TENSOR_SCALE,
    NVFP4_LARGEST,
    Format,
)
from gradstat.results import NO_SCALE_MAX, NO_SCALE_MIN, Statistics


@keeps_subnormals
def measure(tensors: Sequence[Tensor], bins: Bins) -> Statistics:
    """Statistics of each of L floating-point tensors on one device, of any shapes and strides."""
    rows = [_measure_one(x, bins) for x in tensors]
    integers, floats, counts = (torch.stack(column) for column in zip(*rows, strict=True))
    return Statistics(bins, integers, floats, counts)


class Plan:
    """Measures anew each time; arguments as of `gradstat.engines.Plan`."""

    def __init__(self, tensors: Sequence[Tensor], bins: Bins) -> None:
        self._bins = bins

    def run(
        self, tensors: Sequence[Tensor], formats: Tensor | None = None, due: Tensor | None = None
    ) -> Tensor:
        """All numbers of the rows; a replay measures in any case."""
        return together(measure(tensors, self._bins), formats)


def unit_peaks(x: Tensor, unit: int) -> Tensor:
    """Largest magnitude of each of C units along a dimension: ``(C,)``, NaN where one is."""
    others = [dim for dim in range(x.dim()) if dim != unit]
    if not others:
        return x.abs()
    # Ten times faster on a CPU than torch.linalg.vector_norm, and without a copy of magnitudes.
    return torch.maximum(x.amax(others), -x.amin(others))


def _measure_one(x: Tensor, bins: Bins) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().reshape(-1)
    is_finite = torch.isfinite(x)
    n = is_finite.sum()
    values = torch.where(is_finite, widen(x), 0.0)

    # One more element than there are: amin and amax refuse an empty tensor.
    above = torch.where(is_finite, values, math.inf)
    below = torch.where(is_finite, values, -math.inf)
    minimum = torch.where(n > 0, pad(above, (0, 1), value=math.inf).amin(), math.nan)
    maximum = torch.where(n > 0, pad(below, (0, 1), value=-math.inf).amax(), math.nan)

    # Squares are of values divided by the largest magnitude: none overflows, and none that matters
    # underflows.
    unit = torch.maximum(minimum.abs(), maximum.abs())
    unit = torch.where(unit > 0, unit, 1.0)
    scaled = values / unit
    mean = scaled.sum() / n
    squared_deviation = torch.where(is_finite, (scaled - mean) ** 2, 0.0).sum()
    std = torch.where(n > 1, unit * (squared_deviation / (n - 1)).sqrt(), math.nan)
    l2 = unit * (scaled**2).sum().sqrt()

    ends = bins.known_range if isinstance(bins, LinearBins) else (-math.inf, math.inf)
    if ends is not None:
        low, high = (minimum.new_full((), end) for end in ends)
    elif isinstance(bins, LinearBins):
        low, high = bins.automatic_range(minimum.to(x.dtype), maximum.to(x.dtype))
    index = torch.where(is_finite, bins.index(values, low, high) + 1, bins.bins + 2)
    slots = torch.zeros(bins.bins + 3, dtype=torch.int64, device=x.device)
    slots.scatter_add_(0, index, torch.ones_like(index))
    below, counts, above = slots[0], slots[1:-2], slots[-2]

    integers = torch.stack(
        [
            torch.full((), x.numel(), dtype=torch.int64, device=x.device),
            n,
            (x == 0).sum(),
            torch.isnan(x).sum(),
            torch.isposinf(x).sum(),
            torch.isneginf(x).sum(),
            below,
            above,
        ]
    )
    floats = torch.stack(
        [
            minimum,
            maximum,
            values.sum(),
            std,
            values.abs().sum(),
            l2,
            low.to(values.dtype),
            high.to(values.dtype),
        ]
    )
    return integers, floats, counts


@keeps_subnormals
def measure_formats(
    tensors: Sequence[Tensor], formats: Sequence[Format], dim: int = -1
) -> tuple[Tensor, Tensor]:
    """What F formats would do to L tensors: int64 ``(F, L, 8)`` and float64 ``(F, L, 2)``."""
    rows = [[_measure_format(_matrix(x, dim), form) for x in tensors] for form in formats]
    integers, floats = (
        torch.stack([torch.stack([row[field] for row in each]) for each in rows])
        for field in (0, 1)
    )
    return integers, floats


def _matrix(x: Tensor, dim: int) -> Tensor:
    """A tensor as rows along a dimension, in the order of the other dimensions."""
    x = x.detach()
    if x.dim() == 0:
        return x.reshape(1, 1)
    return x.movedim(dim, -1).reshape(math.prod(x.shape) // max(x.shape[dim], 1), x.shape[dim])


def _measure_format(x: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    is_finite = torch.isfinite(x)
    values = torch.where(is_finite, x, 0.0).abs()
    # One row for each group of values that share a scale, filled up with zeros.
    grouped = _blocks(values, form.block) if form.block else values.reshape(1, -1)
    narrow = grouped.float()
    is_beyond = torch.isinf(narrow)
    narrow = narrow.clamp(max=FLOAT32_MAX)
    largest = pad(narrow, (0, 1)).amax(1, keepdim=True)  # one more: amax refuses no values
    scale, inverse, stored = _scales(largest, form)

    element = _rounded((narrow * inverse).double(), form)
    is_nonzero = grouped != 0
    is_zero = is_nonzero & (element == 0)
    is_saturated = (element > form.largest) | is_beyond
    error = grouped.double() - element.clamp(max=form.largest) * scale.double()

    has_blocks = form.scaling != "none" and x.numel() > 0
    is_empty = ~is_nonzero.any(1, keepdim=True)
    has_scale = ~is_empty & (stored > 0) & has_blocks
    exponent = _exponents(stored.double())
    integers = [
        is_nonzero.sum(),
        is_zero.sum(),
        is_saturated.sum(),
        (~is_finite).sum(),
        torch.full_like(is_empty, has_blocks).sum(),
        (is_empty & has_blocks).sum(),
        _reduce(torch.amin, exponent, has_scale, NO_SCALE_MIN),
        _reduce(torch.amax, exponent, has_scale, NO_SCALE_MAX),
    ]
    return torch.stack(integers), torch.stack([_norm(grouped.double()), _norm(error)])


def _reduce(how: Callable[[Tensor], Tensor], x: Tensor, used: Tensor, none: int) -> Tensor:
    """An extreme of those values of ``x`` that are used, or ``none``."""
    return how(pad(torch.where(used, x, none).reshape(-1), (0, 1), value=none))


def _blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Blocks of a matrix, one a row; those at its ends filled up with zeros."""
    rows, columns = block
    x = pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    down, across = x.shape[0] // rows, x.shape[1] // columns
    grouped = x.reshape(down, rows, across, columns).transpose(1, 2)
    return grouped.reshape(down * across, rows * columns)


def _scales(largest: Tensor, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    """The scale of each block, its reciprocal, and what is stored with it: float32 ``(B, 1)``."""
    # All are zero where the scale of an nvfp4 block rounds to zero.
    if form.scaling == "e8m0":
        exponent = _exponents(largest.double()) - form.max_exponent
        exponent = exponent.clamp(min=LEAST_EXPONENT)
        scale, inverse = (_power_of_two(each).float() for each in (exponent, -exponent))
        return scale, inverse, scale
    if form.scaling == "nvfp4":
        of_tensor = _quotient(pad(largest, (0, 0, 0, 1)).amax(), NVFP4_LARGEST)
        of_tensor = of_tensor.clamp(min=LEAST_TENSOR_SCALE)
        exact = _quotient(_quotient(largest, FORMATS["nvfp4"].largest), of_tensor)
        stored = _rounded(exact.double(), E4M3).clamp(max=E4M3.largest).float()
        inverse = _quotient(_quotient(1.0, of_tensor), stored)
        return stored * of_tensor, torch.where(stored == 0, 0.0, inverse), stored
    if form.scaling in ("amax", "block"):
        inverse = _quotient(form.largest, largest).clamp(max=1 / LEAST_SCALE)
        scale = _quotient(1.0, inverse)
        return scale, inverse, scale
    scale = torch.full_like(largest, form.scale)
    return scale, _quotient(1.0, scale), scale


def _quotient(a: Tensor | float, b: Tensor | float) -> Tensor:
    """The quotient rounded once to float32; torch multiplies by the reciprocal of a number."""
    like = a if isinstance(a, Tensor) else b
    assert isinstance(like, Tensor)
    a, b = (x if isinstance(x, Tensor) else torch.full_like(like, x) for x in (a, b))
    return torch.div(a, b)


def _exponents(x: Tensor) -> Tensor:
    """floor(log2(x)) of float64 values that are normal; -1023 of zero."""
    return (x.view(torch.int64) >> 52) - 1023


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 1023) << 52).view(torch.float64)


def _rounded(x: Tensor, form: Format) -> Tensor:
    """The nearest elements, ties to even, as if there were no largest one; float64."""
    exponent = _exponents(x).clamp(min=form.min_exponent)
    step = _power_of_two(exponent - form.mantissa_bits)
    return (x / step).round() * step


def _norm(x: Tensor) -> Tensor:
    """L2 norm, whatever the magnitude of the values."""
    unit = pad(x.abs().reshape(-1), (0, 1)).amax()
    unit = torch.where(unit > 0, unit, 1.0)
    return unit * ((x / unit) ** 2).sum().sqrt()
