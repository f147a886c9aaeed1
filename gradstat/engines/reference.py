"""The definition of every number, in plain torch and float64, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradstat.bins import Bins, LinearBins, keeps_subnormals, widen
from gradstat.engines.protocol import together
from gradstat.results import Statistics


@keeps_subnormals
def measure(tensors: Sequence[Tensor], bins: Bins) -> Statistics:
    """Statistics of each tensor of a list.

    Args:
        tensors: L floating-point tensors on one device, any shapes and strides.
        bins: scheme of the histogram.

    Returns:
        Statistics of shape ``(L,)``.
    """
    rows = [_measure_one(x, bins) for x in tensors]
    integers, floats, counts = (torch.stack(column) for column in zip(*rows, strict=True))
    return Statistics(bins, integers, floats, counts)


class Plan:
    """Measures anew each time; arguments as of `gradstat.engines.protocol.Plan`."""

    def __init__(self, tensors: Sequence[Tensor], bins: Bins) -> None:
        self._bins = bins

    def run(
        self, tensors: Sequence[Tensor], formats: Tensor | None = None, due: Tensor | None = None
    ) -> Tensor | None:
        """All numbers of the rows; a replay measures in any case."""
        if any(x.layout != torch.strided for x in tensors):
            return None
        return together(measure(tensors, self._bins), formats)


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
