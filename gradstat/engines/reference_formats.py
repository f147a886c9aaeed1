"""The definition of every number of a `Quantization`, in plain torch, on any device with float64.

A quotient of value and scale is the float32 product of the value with the scale's reciprocal, as
kernels compute it; its rounding to an element, the error and the norms are exact or float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradstat.bins import keeps_subnormals
from gradstat.formats import (
    FORMATS,
    LEAST_EXPONENT,
    LEAST_SCALE,
    LEAST_TENSOR_SCALE,
    NVFP4_LARGEST,
    Format,
)
from gradstat.results import NO_SCALE_MAX, NO_SCALE_MIN

FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127


@keeps_subnormals
def measure_formats(
    tensors: Sequence[Tensor], formats: Sequence[Format], dim: int = -1
) -> tuple[Tensor, Tensor]:
    """What each format would do to each tensor of a list.

    Args:
        tensors: L floating-point tensors on one device, any shapes and strides.
        formats: F formats.
        dim: dimension that blocks run along.

    Returns:
        integers, int64 ``(F, L, 8)``, and floats, float64 ``(F, L, 2)``, the fields of
        `gradstat.results`.
    """
    rows = [[_measure_one(_matrix(x, dim), form) for x in tensors] for form in formats]
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


def _measure_one(x: Tensor, form: Format) -> tuple[Tensor, Tensor]:
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
    """The scale of each block, its reciprocal, and the scale that is stored with the block.

    Args:
        largest: largest magnitude of each block, float32 ``(B, 1)``.
        form: format.

    Returns:
        three tensors, float32 ``(B, 1)``; zero where the scale of an nvfp4 block rounds to zero.
    """
    if form.scaling == "e8m0":
        exponent = _exponents(largest.double()) - form.max_exponent
        exponent = exponent.clamp(min=LEAST_EXPONENT)
        scale, inverse = (_power_of_two(each).float() for each in (exponent, -exponent))
        return scale, inverse, scale
    if form.scaling == "nvfp4":
        of_tensor = _quotient(pad(largest, (0, 0, 0, 1)).amax(), NVFP4_LARGEST)
        of_tensor = of_tensor.clamp(min=LEAST_TENSOR_SCALE)
        exact = _quotient(_quotient(largest, FORMATS["nvfp4"].largest), of_tensor)
        e4m3 = FORMATS["float8_e4m3fn"]
        stored = _rounded(exact.double(), e4m3).clamp(max=e4m3.largest).float()
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
