"""What the figures of `plot` draw, as arrays: times, means, histograms, outlines."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np

from gradstat.bins import OCTAVES, Log2Bins, octaves
from gradstat.history import History
from gradstat.plot.arguments import DERIVED, Limits
from gradstat.record import UPDATE
from gradstat.util import Array, divide, evenly_spread

MAX_COLUMNS = 200  # of an image against time
_MAX_COLORED, _MAX_MARKED = 8, 4  # lines of a panel
# Matplotlib widens limits before it draws, which must not overflow: on a linear axis and a log one.
_LARGEST, _LOG_LARGEST = 1e300, 1e250


def drawable(x: Array, *, log: bool) -> Array:
    """The values, cut off at the largest and smallest that Matplotlib can draw."""
    x = np.asarray(x, np.float64)  # float32 does not hold the ends
    largest = _LOG_LARGEST if log else _LARGEST
    clipped: Array = np.where(np.isfinite(x), np.clip(x, -largest, largest), x)
    return np.where(clipped > 0, np.maximum(clipped, 1 / largest), clipped) if log else clipped


def times(steps: Array, steps_per_epoch: int | None) -> Array:
    """Time of each step: its number, or the epochs done with it."""
    if steps_per_epoch is None:
        return steps.astype(np.float64)
    done: Array = (steps + 1) / steps_per_epoch
    return done


def select(steps: Array, steps_per_epoch: int | None, most: int) -> Array:
    """Indices of at most so many records, the last of each epoch, evenly spread, the newest too."""
    indices = np.arange(len(steps))
    if steps_per_epoch is not None:
        epoch = steps // steps_per_epoch
        indices = np.flatnonzero(np.append(epoch[1:] != epoch[:-1], True))
    if len(indices) > most:
        indices = indices[evenly_spread(len(indices), most)]
    return indices


def values(history: History, layer: str, field: str) -> Array:
    """A field of one layer, float64 ``(S,)``; NaN where it has no gradient or is unknown."""
    if layer not in history.layers:
        return np.full(len(history), math.nan)
    column = history.layers.index(layer)
    if field in DERIVED:
        kind, _ = history.rows[column]
        ratios = history.update_ratio() if kind == UPDATE else history.dead_units()
        shown: Array = ratios[:, history.kinds[:column].count(kind)]
        return shown
    if field != "mean_abs":
        return history[field][:, column].astype(np.float64)
    total, finite = history["l1"][:, column], history["finite"][:, column].astype(np.float64)
    return divide(total, finite)


def block_mean(x: Array, size: int) -> Array:
    """Mean of the finite values in each run of ``size`` along the first axis; the last is shorter.

    NaN where a run has none.
    """
    starts = np.arange(0, len(x), size)
    finite = np.isfinite(x)
    total: Array = np.add.reduceat(np.where(finite, x, 0.0), starts, axis=0)
    count = np.add.reduceat(finite.astype(np.float64), starts, axis=0)
    return divide(total, count)


def standing_out(panels: Sequence[Sequence[Array]], *, log: bool) -> list[int]:
    """Which of many lines have a colour and a name: the first, the last, and those that stray.

    A line strays when it is once much further from its usual place among the others than most ever
    are. Of those that stray together the one that goes furthest stands for all.

    Args:
        panels: the same lines in each.
        log: whether they are drawn on a logarithmic axis.

    Returns:
        Their numbers, at most six; none where all lines have colours.
    """
    n = len(panels[0])
    if n <= _MAX_COLORED:
        return []
    away = np.concatenate([_deviations(lines, log=log) for lines in panels], axis=1)
    score = abs(away).max(1)
    marked = [0, n - 1]
    for i in np.argsort(-score, kind="stable").tolist():
        if score[i] <= 2 * np.median(score) or len(marked) == _MAX_MARKED + 2:
            break
        if all(abs(away[i] - away[j]).max() > score[i] / 2 for j in marked):
            marked.append(i)
    return sorted(marked)


def _deviations(lines: Sequence[Array], *, log: bool) -> Array:
    """How far each line is from its usual place among the others: ``(N, T)``, 0 if unknown."""
    if len({len(line) for line in lines}) != 1 or not len(lines[0]):
        return np.zeros((len(lines), 1))
    y = np.stack(lines)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        y = np.log(np.where(y > 0, y, np.nan)) if log else y
        y = np.where(np.isfinite(y), y, np.nan)
        y = y - np.nanmedian(y, axis=0)
        y = y - np.nanmedian(y, axis=1, keepdims=True)
    away: Array = np.nan_to_num(y)
    return away


def block_last(x: Array, size: int) -> Array:
    """Last value of each run of ``size``."""
    last = np.minimum(np.arange(size - 1, len(x) + size - 1, size), len(x) - 1)
    return np.asarray(x[last])


def histograms(history: History, layer: str, kept: Array) -> tuple[Array, Array]:
    """Counts ``(K, B)`` and edges ``(K, B + 1)`` of some records; all zero for an unknown layer."""
    if layer not in history.layers:
        return np.zeros((len(kept), 1), np.int64), np.zeros((len(kept), 2))
    # One by one: edges take time to find, and a long run has many more records.
    found = [history.histogram(layer, step) for step in history.steps[kept].tolist()]
    counts = np.stack([each for each, _ in found])
    if isinstance(history.bins, Log2Bins):
        zeros = values(history, layer, "zeros")[kept].astype(np.int64)
        return octaves(counts, zeros), np.broadcast_to(OCTAVES, (len(kept), 257))
    return counts, np.stack([edges for _, edges in found])


def octave_shares(history: History, layer: str, size: int) -> Array:
    """Share of the finite elements in each octave, ``(S / size, 256)``; NaN where there are none.

    Args:
        history: over `Log2Bins`.
        layer: name; an unknown one has no elements.
        size: how many records are taken together.
    """
    if layer not in history.layers:
        return np.full((-(-len(history) // size), 256), math.nan)
    starts = np.arange(0, len(history), size)
    finite, zeros = (history[name][:, history.layers.index(layer)] for name in ("finite", "zeros"))
    counts = np.add.reduceat(octaves(history.histograms(layer)[0], zeros), starts, axis=0)
    return divide(counts, np.add.reduceat(finite, starts)[:, None])


def extent(drawn: Sequence[tuple[Array, Array]], *, symmetric: bool) -> Limits:
    """Smallest interval that holds every bin with a count; -1 to 1 where there is none."""
    low, high = math.inf, -math.inf
    for counts, edges in drawn:
        filled = counts > 0
        low = min(low, edges[:, :-1][filled].min(initial=math.inf))
        high = max(high, edges[:, 1:][filled].max(initial=-math.inf))
    if not low < high:
        return -1.0, 1.0
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    return max(float(low), -_LARGEST), min(float(high), _LARGEST)


def outline(counts: Array, edges: Array, limits: Limits) -> tuple[Array, Array] | None:
    """Polygon of one histogram, cut at the limits and closed at zero; ``None`` for an empty one."""
    low, high = limits
    filled = np.flatnonzero(counts)
    if not len(filled):
        return None
    counts = counts[filled[0] : filled[-1] + 1]
    edges = edges[filled[0] : filled[-1] + 2]
    x = np.concatenate([edges[:1], edges[:-1] / 2 + edges[1:] / 2, edges[-1:]])
    z = np.concatenate([[0], counts, [0]]).astype(np.float64)
    inside = (x > low) & (x < high)
    ends = np.array([max(low, x[0]), min(high, x[-1])])
    heights = np.interp(ends, x, z)
    if x[-1] <= low or x[0] >= high or not max(heights.max(), z[inside].max(initial=0)) > 0:
        return None
    return (
        np.concatenate([ends[:1], ends[:1], x[inside], ends[1:], ends[1:]]),
        np.concatenate([[0], heights[:1], z[inside], heights[1:], [0]]),
    )
