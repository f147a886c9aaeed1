"""Histogram ranges whose edges are round numbers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def nice_range(lo: Tensor, hi: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Bin range as MATLAB's ``histcounts(x, n)`` picks it; float64 in and out.

    Powers of ten come from a table, not from ``log10``, whose last digit differs by device.
    """
    table = powers_of_ten(lo.device)

    def power_of_ten(x: Tensor) -> Tensor:
        at = torch.searchsorted(table, x.contiguous(), right=True) - 1
        return table.take(at.clamp(min=0))

    size = torch.maximum(lo.abs(), hi.abs())
    constant = hi - lo <= 2.0**-26 * size
    raw = (hi - lo) / n
    power = power_of_ten(raw)
    width = power * torch.floor(raw / power).clamp(min=1.0)
    left = torch.minimum(width * torch.floor(lo / width), lo)
    narrow = (hi - left) / n
    spread = (hi - left) / (n - 1) - narrow if n > 1 else narrow
    power = power_of_ten(spread)
    width = power * torch.ceil(narrow / power)
    right = torch.maximum(left + n * width, hi)
    # A constant is a range of 1 around it, or of as many float32 as there are bins if that is more.
    spacing = size * 2.0**-23
    room = torch.ceil(max(n, 16) * spacing).clamp(min=1.0) / 4
    left = torch.where(constant, torch.floor(2 * (lo - room)) / 2, left)
    right = torch.where(constant, torch.ceil(2 * (hi + room)) / 2, right)
    # A range so wide that float64 cannot hold its width stays as it is.
    is_held = (hi - lo).isfinite() & left.isfinite() & right.isfinite()
    return torch.where(is_held, left, lo), torch.where(is_held, right, hi)


@functools.cache
def powers_of_ten(device: torch.device) -> Tensor:
    """Powers of ten from 1e-80 to 1e308 in order, float64 ``(389,)``."""
    return torch.tensor([float(f"1e{k}") for k in range(-80, 309)], dtype=torch.float64).to(device)
