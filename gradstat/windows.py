"""What the rules of `diagnose` read: a history in windows of records, trends, shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gradstat.bins import Log2Bins
from gradstat.history import History
from gradstat.series import Array
from gradstat.statistics import Statistics

_MAX_BLOCKS = 200
_MAX_SAMPLES = 64
_PERSISTENT = 3  # sampled records in a row that must show something


class Run:
    """What the rules read: a history in blocks of a window's records, 200 at most.

    Args:
        history: S records of L layers.
        window: records in a block, at least; fewer where there are no more.
    """

    def __init__(self, history: History, window: int) -> None:
        self.history, self.layers, self.window = history, history.layers, window
        self.steps = history.steps
        n_blocks = max(1, min(len(history) // window, _MAX_BLOCKS))
        self.blocks = np.array_split(np.arange(len(history)), n_blocks)
        nonzero = history["finite"] - history["zeros"]
        l2 = history["l2"]
        self.rms = np.full(l2.shape, math.nan)
        np.divide(l2, np.sqrt(nonzero), out=self.rms, where=nonzero > 0)

    @cached_property
    def levels(self) -> Array:
        """Median rms of the elements that are not zero, by block: ``(B, L)``; NaN without any."""
        return np.stack([median(self.rms[block]) for block in self.blocks])

    @cached_property
    def samples(self) -> list[tuple[int, Statistics]]:
        """Position and statistics of at most 64 records, the newest too; none over linear bins."""
        if not isinstance(self.history.bins, Log2Bins):
            return []
        count = min(len(self.history), _MAX_SAMPLES)
        at = np.linspace(len(self.history) - 1, 0, count).round().astype(int)[::-1]
        return [(int(i), self.history.record(int(self.steps[i]))) for i in at]

    def span(self, mask: Array, at: int) -> tuple[int, int]:
        """First and last step of the blocks around one that a mask, ``(B,)``, holds together."""
        first, last = around(mask, at)
        return int(self.steps[self.blocks[first][0]]), int(self.steps[self.blocks[last][-1]])

    def lasting(self, shares: Sequence[Array], limit: float) -> list[Lasting]:
        """Layers whose share stays at a limit or above it in three samples in a row, or in all.

        Args:
            shares: of each sample, ``(L,)``.
            limit: 0 to 1.

        Returns:
            Layer, first and last step, and the largest share meanwhile; the largest first.
        """
        if not shares:
            return []
        by_layer = np.stack(shares).T
        found = []
        for layer, share in zip(self.layers, by_layer, strict=True):
            mask = share >= limit
            kept = np.zeros_like(mask)
            for at in np.flatnonzero(mask).tolist():
                first, last = around(mask, at)
                kept[at] = last - first + 1 >= min(_PERSISTENT, len(mask))
            if kept.any():
                at = int(np.where(kept, share, -1.0).argmax())
                first, last = around(kept, at)
                steps = (self.sampled_step(first), self.sampled_step(last))
                found.append(Lasting(layer, steps, float(share[at])))
        return sorted(found, key=lambda each: -each.share)

    def sampled_step(self, sample: int) -> int:
        """Step of a sample."""
        return int(self.steps[self.samples[sample][0]])


@dataclass(frozen=True)
class Lasting:
    """A layer with a large share of something, in the records from one step to another."""

    layer: str
    steps: tuple[int, int]
    share: float


@dataclass(frozen=True)
class Fit:
    """A straight line through log10 rms over depth.

    Args:
        first: column of the first layer that has an rms.
        last: column of the last one.
        slope: decades from one layer to the next.
        fall: decades from the last layer back to the first, along the line.
        r2: share of the variance that the line explains.
    """

    first: int
    last: int
    slope: float
    fall: float
    r2: float


def fit_depth(levels: Array) -> Fit | None:
    """Least squares over the layers that have an rms; ``None`` for fewer than three of them.

    Args:
        levels: rms of each layer, ``(L,)``; NaN where there is none.
    """
    present = np.flatnonzero(levels > 0)
    if len(present) < 3:
        return None
    depth, log_rms = np.arange(len(present)), np.log10(levels[present])
    centred, spread = depth - depth.mean(), log_rms - log_rms.mean()
    slope = float(centred @ spread / (centred @ centred))
    total = float(spread @ spread)
    r2 = slope**2 * float(centred @ centred) / total if total > 0 else 0.0
    fall = slope * (len(present) - 1)
    return Fit(int(present[0]), int(present[-1]), slope, fall, r2)


def median(x: Array) -> Array:
    """Median over the first axis of what is not NaN, the lower of two; NaN where there is none."""
    ordered = np.sort(x, axis=0)
    count = np.count_nonzero(~np.isnan(x), axis=0)
    middle: Array = np.take_along_axis(ordered, np.maximum(count - 1, 0)[None] // 2, axis=0)[0]
    return middle


def around(mask: Array, at: int) -> tuple[int, int]:
    """First and last position of the run of true ones that a position is in."""
    gaps = np.flatnonzero(~mask)
    before, after = gaps[gaps < at], gaps[gaps > at]
    return int(before[-1] + 1 if len(before) else 0), int(after[0] if len(after) else len(mask)) - 1
