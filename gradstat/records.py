"""`Record`: what one pass measured, on its way to a `History`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat.bins import Bins, LinearBins, widen
from gradstat.history import History
from gradstat.statistics import FLOATS, INTEGERS, Statistics
from gradstat.transfers import Transfer

Rows = tuple[NDArray[Any], ...]  # integers, floats and counts of some layers


class Part(NamedTuple):
    """The result of one launch: the layer of each row, and integers, floats and counts."""

    indices: tuple[int, ...]
    result: Transfer


class Record(NamedTuple):
    """What one pass measured; what is over `Log2Bins` is still to be divided by the scales."""

    step: int
    history: History
    parts: list[Part]
    scales: dict[str, Transfer]

    def has_arrived(self, wait: bool) -> bool:
        """Whether it is there, which it is after waiting."""
        for part in self.parts:
            if not part.result.has_arrived(wait):
                return False
        return all(scale.has_arrived(wait) for scale in self.scales.values())

    def rows(self, outputs: frozenset[int]) -> Rows:
        """Integers ``(L, 8)``, floats ``(L, 8)``, counts ``(L, bins)`` of all layers in order.

        Args:
            outputs: layers whose parts are put together; of others the last one counts.
        """
        n_layers, bins = len(self.history.layers), self.history.bins
        if len(self.parts) == 1 and len(self.parts[0].indices) == n_layers:
            integers, floats, counts = self.parts[0].result.arrays()
        else:
            integers = np.zeros((n_layers, len(INTEGERS)), dtype=np.int64)
            floats = np.full((n_layers, len(FLOATS)), np.nan)
            counts = np.zeros((n_layers, bins.bins), dtype=np.int64)
            for part in self.parts:
                rows = list(part.indices)
                arrays = part.result.arrays()
                if rows[0] in outputs and (integers[rows, 0] > 0).any():
                    before = integers[rows], floats[rows], counts[rows]
                    arrays = _arrays(as_statistics(bins, before).merge(as_statistics(bins, arrays)))
                integers[rows], floats[rows], counts[rows] = arrays
        for kind, scale in self.scales.items():
            rows = [i for i, each in enumerate(self.history.kinds) if each == kind]
            if isinstance(bins, LinearBins) or not rows:
                continue
            scaled = as_statistics(bins, (integers[rows], floats[rows], counts[rows]))
            unscaled = scaled.unscale(torch.from_numpy(scale.arrays()[0]).double())
            integers[rows], floats[rows], counts[rows] = _arrays(unscaled)
        return integers, floats, counts


def as_statistics(bins: Bins, rows: Rows) -> Statistics:
    """The same without a copy."""
    return Statistics(bins, *(torch.from_numpy(each) for each in rows))


def _arrays(statistics: Statistics) -> Rows:
    return statistics.integers.numpy(), statistics.floats.numpy(), statistics.counts.numpy()


def divide(gradients: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Unscaled copies, by the arithmetic of `torch.amp.GradScaler`; in float32 at least."""
    wide = [x.float() if x.itemsize < 4 else x for x in gradients]
    inverse = widen(scale.to(wide[0].device, non_blocking=True)).reciprocal().float()
    return list(torch._foreach_mul(wide, inverse))


def unit_peaks(x: Tensor) -> Tensor | None:
    """Largest magnitude of each unit: of each channel of images, of each feature otherwise.

    Args:
        x: ``(N, C, ...)`` of four dimensions or more, or ``(..., C)``.

    Returns:
        ``(C,)``, NaN for a unit with a NaN; ``None`` where there is no batch of units.
    """
    if x.dim() < 2 or x.numel() == 0:
        return None
    unit = 1 if x.dim() >= 4 else x.dim() - 1
    others = [dim for dim in range(x.dim()) if dim != unit]
    peaks: Tensor = torch.linalg.vector_norm(x, math.inf, others)
    return peaks
