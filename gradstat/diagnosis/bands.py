"""The band that a series stays within: around its trailing median, in the logarithm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.run import median
from gradstat.util import Array

WINDOW, _LEAST = 32, 10  # values before one that say where it should be
_CELLS = 1 << 16  # looked at together
_TO_DEVIATIONS = (
    1.4826  # times the median absolute deviation is the standard deviation of a normal distribution
)
_SHIFTED = 3 * WINDOW  # values outside it that make a new level


@dataclass(frozen=True)
class Spike:
    """Values above their band.

    Args:
        begin: position of the first one.
        end: position after the last one.
        peak: position of the greatest.
        typical: logarithm of the median before it.
        is_over: whether the values came back into the band.
    """

    begin: int
    end: int
    peak: int
    typical: float
    is_over: bool


def log(x: Array) -> Array:
    """Natural logarithm; NaN for zero, as for what is not known: it compares with nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithm: Array = np.log(x)
    logarithm[x == 0] = math.nan
    return logarithm


def trailing(x: Array, at: Array, columns: Array) -> tuple[Array, Array]:
    """Median and deviation of the values before some places.

    Args:
        x: logarithms, ``(T, R)``; NaN where there is no value, infinity where it is not finite.
        at: rows of x, ``(N,)``.
        columns: of x, ``(N,)``.

    Returns:
        Medians, ``(N,)``, NaN where too few values come before, and robust deviations, ``(N,)``.
    """
    typical, deviation = np.empty(len(at)), np.empty(len(at))
    offsets = np.arange(-WINDOW, 0)[:, None]
    for start in range(0, len(at), _CELLS):
        part = slice(start, start + _CELLS)
        rows = at[part] + offsets
        before = np.where(rows >= 0, x[rows.clip(0), columns[part]], math.nan)
        before[np.isinf(before)] = math.nan
        middle = median(before)
        middle[np.count_nonzero(~np.isnan(before), axis=0) < _LEAST] = math.nan
        typical[part] = middle
        deviation[part] = _TO_DEVIATIONS * median(abs(before - middle))
    return typical, deviation


def outside(
    x: Array, at: Array, columns: Array, floor: Array | float, deviations: float
) -> tuple[Array, Array, Array]:
    """Which values are above their bands.

    Args:
        x: as for `trailing`, and so are the places.
        at: rows of x, ``(N,)``.
        columns: of x, ``(N,)``.
        floor: least half-width of a band, a logarithm; broadcasts to ``(N,)``.
        deviations: half-width of a band that is wider.

    Returns:
        Whether they are, as all infinite ones are, ``(N,)``; the medians; the tops of the bands.
    """
    typical, deviation = trailing(x, at, columns)
    top = typical + np.maximum(deviations * deviation, floor)
    values = x[at, columns]
    return (values > top) | np.isinf(values), typical, top


def find_spikes(x: Array, floor: float, deviations: float) -> list[Spike]:
    """Spikes of one series, each measured by the band in which it began.

    Args:
        x: logarithms, ``(T,)``, as for `trailing`.
        floor: least half-width of the band, a logarithm.
        deviations: half-width of a wider one.
    """
    everywhere = np.arange(len(x))
    is_out, typical, top = outside(
        x[:, None], everywhere, np.zeros_like(everywhere), floor, deviations
    )
    spikes: list[Spike] = []
    end = 0
    for begin in np.flatnonzero(is_out).tolist():
        if begin < end:
            continue
        after = x[begin:]
        # Where too little comes before to have a band, every finite value is inside.
        inside = ~np.isinf(after) if np.isnan(top[begin]) else after <= top[begin]
        # Two in a row, of which the second may be unknown.
        settled = np.flatnonzero(inside & np.append(inside | np.isnan(after), True)[1:])
        length = int(settled[0]) if len(settled) else len(after)
        end = begin + min(length, _SHIFTED)
        peak = begin + int(np.nanargmax(np.where(np.isinf(x[begin:end]), -math.inf, x[begin:end])))
        is_over = len(settled) > 0 and length <= _SHIFTED
        spikes.append(Spike(begin, end, peak, float(typical[begin]), is_over))
    return spikes
