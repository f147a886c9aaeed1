"""Kurtosis, read off a histogram whose count, mean, deviation and extremes are known."""

from __future__ import annotations

import torch
from torch import Tensor

# A histogram tells nothing of the shape of what lies in a few of its bins, far from zero.
_FARTHEST_MEAN = 2.0  # standard deviations


def kurtosis(
    counts: Tensor,
    low: Tensor,
    high: Tensor,
    extremes: tuple[Tensor, Tensor],
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Fourth central moment over the square of the second one.

    One element is the least exactly and one the greatest; the others are taken to lie evenly in
    their bins, between the extremes, and then scaled so that the second moment is the known one.

    Args:
        counts: int64 ``(..., N)``, all finite elements.
        low: lower ends of their bins, float64, of a shape that broadcasts to it.
        high: upper ends.
        extremes: least and greatest element, ``(...)``.
        mean: of the elements, ``(...)``.
        std: their deviation, correction 1, ``(...)``.

    Returns:
        float64 ``(...)``; NaN where it is undefined or where the bins are too wide to tell.
    """
    n = counts.sum(-1).to(std.dtype)
    least, greatest = extremes
    # In units of the farthest element no power overflows or underflows.
    unit = torch.maximum(mean - least, greatest - mean)[..., None]
    ends = [((end - mean) / unit[..., 0])[..., None] for end in extremes]
    a, b = (((end - mean[..., None]) / unit).clamp(*ends) for end in (low, high))
    inner = counts.to(std.dtype)
    filled = (counts > 0).to(torch.int64)
    # The outer filled bins: the first, and the first from behind.
    for at in (filled.argmax(-1, keepdim=True), _last(filled)):
        inner = inner.scatter_add(-1, at, -torch.ones_like(inner[..., :1]))
    inner = inner.clamp(min=0)
    centre, half = (a + b) / 2, (b - a) / 2
    squares = (inner * (centre**2 + half**2 / 3)).sum(-1)
    fourths = (inner * (centre**4 + 2 * centre**2 * half**2 + half**4 / 5)).sum(-1)
    outer = torch.cat(ends, -1)
    total = (n - 1) * (std / unit[..., 0]) ** 2
    scale = ((total - (outer**2).sum(-1)).clamp(min=0) / squares).nan_to_num(nan=0.0, posinf=0.0)
    moment = (outer**4).sum(-1) + fourths * scale**2
    result = n * moment / total**2
    return torch.where((n > 3) & (mean.abs() <= _FARTHEST_MEAN * std), result, torch.nan)


def _last(filled: Tensor) -> Tensor:
    return filled.shape[-1] - 1 - filled.flip(-1).argmax(-1, keepdim=True)
