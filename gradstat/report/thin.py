"""A history of any length in few enough numbers for a page: columns of records, and samples.

Nothing is interpolated. A column is the statistics of all elements of its records together; a
sample is one record as it was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradstat.arrays import Array, divide, evenly_spread, octaves
from gradstat.bins import Log2Bins
from gradstat.diagnosis.run import is_loss
from gradstat.history import History
from gradstat.kinds import NOUNS
from gradstat.results import Statistics

_MAX_COLUMNS, _MAX_CELLS = 600, 120_000
_MAX_SAMPLES, _MAX_HISTOGRAMS = 120, 24_000
_MAX_SERIES = 3  # of a kind
_FLOAT32 = 1e38
_MIN_COLUMNS, _MIN_SAMPLES = 20, 4  # however many layers there are
_MAX_ROWS = 64  # of a histogram over linear bins
_LARGEST = 1e308  # magnitude that the page draws: float64 holds its logarithm's power of two


@dataclass(frozen=True)
class Columns:
    """A history of S records and L layers in T columns of records.

    Args:
        steps: first and last step of each column, int64 ``(T, 2)``.
        records: how many each holds, int64 ``(T,)``.
        level: log2 of the rms of all finite elements of a column, float32 ``(L, T)``; minus
            infinity where they are zero, NaN where there are none.
        least: log2 of the smallest rms of a record in it, float32 ``(L, T)``.
        most: log2 of the largest.
        zeros: share of zeros among the finite elements, float32 ``(L, T)``; NaN where there are
            none.
        nonfinite: NaN and infinite elements, int64 ``(L, T)``.
    """

    steps: Array
    records: Array
    level: Array
    least: Array
    most: Array
    zeros: Array
    nonfinite: Array


@dataclass(frozen=True)
class Samples:
    """Histograms of K of the records, of each layer over the rows that it fills in any of them.

    Over `Log2Bins` a row is an octave of magnitudes: row r holds 2**(r - 127) up to 2**(r - 126),
    row 0 all that is smaller and not zero. Over `LinearBins` a row is a bin or, of more than 64,
    some neighbours.

    Args:
        steps: of each record, int64 ``(K,)``.
        first: first row of each layer, int64 ``(L,)``.
        rows: number of rows of each layer, int64 ``(L,)``.
        counts: int64, layer by layer ``(K, rows)``, one after the other.
        finite: finite elements, int64 ``(L, K)``.
        zeros: of them, int64 ``(L, K)``.
        nonfinite: the others, int64 ``(L, K)``.
        edges: lowest and highest edge of the rows, float64 ``(L, K, 2)``; ``None`` over `Log2Bins`.
    """

    steps: Array
    first: Array
    rows: Array
    counts: Array
    finite: Array
    zeros: Array
    nonfinite: Array
    edges: Array | None


def columns(history: History) -> Columns:
    """Put the records of a history in columns of nearly equal size."""
    n_records, n_layers = len(history), len(history.layers)
    count = min(n_records, _MAX_COLUMNS, max(_MIN_COLUMNS, _MAX_CELLS // n_layers))
    starts = np.arange(count) * n_records // count
    ends = np.append(starts[1:], n_records)
    steps = np.stack([history.steps[starts], history.steps[ends - 1]], 1)
    finite = history["finite"]
    total = np.add.reduceat(finite, starts, axis=0)
    nonfinite = np.add.reduceat(history["numel"] - finite, starts, axis=0)
    zeros = np.add.reduceat(history["zeros"], starts, axis=0)
    l2 = np.where(finite > 0, np.minimum(history["l2"], _LARGEST), 0.0)
    # Scaled by the largest norm of the column, so that no square overflows or underflows.
    scale = np.maximum.reduceat(l2, starts, axis=0)
    scale[scale == 0] = 1.0
    squares = (l2 / np.repeat(scale, ends - starts, axis=0)) ** 2
    rms = scale * np.sqrt(divide(np.add.reduceat(squares, starts, axis=0), total))
    own = np.minimum(history["rms"], _LARGEST)
    return Columns(
        steps,
        ends - starts,
        _log2(rms).T,
        _log2(np.fmin.reduceat(own, starts, axis=0)).T,
        _log2(np.fmax.reduceat(own, starts, axis=0)).T,
        divide(zeros, total).T.astype(np.float32),
        nonfinite.T,
    )


@dataclass(frozen=True)
class Series:
    """One number a step, in the columns of a history; NaN where a column has none.

    Args:
        mean: of the finite values of each column, float32 ``(T,)``.
        least: of them.
        most: of them.
        nonfinite: NaN and infinite values, int64 ``(T,)``.
    """

    mean: Array
    least: Array
    most: Array
    nonfinite: Array


def series(history: History, columns: Columns) -> dict[str, Series]:
    """Losses, the norm of the first kind and learning rates, a few of each, by name."""
    losses = [name for name in history.scalars if is_loss(name)]
    rates = [name for name in history.scalars if name == "lr" or name.startswith("lr/")]
    # Of many groups those that change.
    rates = [name for name in rates if np.ptp(history.scalar(name)[1]) > 0] or rates[:1]
    kind = history.kinds[0]
    named = {name: history.scalar(name) for name in losses[:_MAX_SERIES]}
    named[f"{NOUNS[kind]} norm"] = history.steps, history.norm(kind)
    named |= {name: history.scalar(name) for name in rates[:_MAX_SERIES]}
    return {name: _in_columns(*values, columns.steps[:, 0]) for name, values in named.items()}


def _in_columns(steps: Array, values: Array, first: Array) -> Series:
    at = np.maximum(np.searchsorted(first, steps, "right") - 1, 0)
    finite = np.isfinite(values)
    at, known = at[finite], np.clip(values[finite], -_FLOAT32, _FLOAT32)
    least, most = (np.full(len(first), np.nan) for _ in range(2))
    np.fmin.at(least, at, known)
    np.fmax.at(most, at, known)
    n = np.bincount(at, minlength=len(first))
    mean = divide(np.bincount(at, known, len(first)), n)
    broken = np.maximum(np.searchsorted(first, steps[~finite], "right") - 1, 0)
    mean, least, most = (x.astype(np.float32) for x in (mean, least, most))
    return Series(mean, least, most, np.bincount(broken, minlength=len(first)))


def samples(history: History) -> Samples:
    """Take histograms of some records, evenly spread, the newest among them."""
    n_layers = len(history.layers)
    most = min(_MAX_SAMPLES, max(_MIN_SAMPLES, _MAX_HISTOGRAMS // n_layers))
    at = evenly_spread(len(history), most)
    steps = history.steps[at]
    log2 = isinstance(history.bins, Log2Bins)
    finite, zeros = (history[name][at].T for name in ("finite", "zeros"))
    nonfinite = history["numel"][at].T - finite
    counts = [
        np.concatenate([_rows(part, log2) for _, part in history.parts(step)])
        for step in steps.tolist()
    ]
    stacked = np.stack(counts, 1)
    filled: Array = stacked.max(1) > 0
    if not log2:
        filled[:] = True
    first = filled.argmax(1)
    rows = np.where(filled.any(1), filled.shape[1] - filled[:, ::-1].argmax(1) - first, 0)
    parts = [
        stacked[i, :, a : a + n].ravel() for i, (a, n) in enumerate(zip(first, rows, strict=True))
    ]
    ends = np.stack([history[name][at].T for name in ("low", "high")], -1)
    edges = None if log2 else ends.clip(-_LARGEST / 2, _LARGEST / 2)
    return Samples(steps, first, rows, np.concatenate(parts), finite, zeros, nonfinite, edges)


def _rows(part: Statistics, log2: bool) -> Array:
    """Histograms of some layers over a page's rows: int64 ``(layers, rows)``."""
    counts = part.counts.numpy()
    if log2:
        return octaves(counts, part.zeros.numpy())[:, :255]
    starts = np.arange(0, counts.shape[1], -(-counts.shape[1] // _MAX_ROWS))
    rows: Array = np.add.reduceat(counts, starts, axis=1)
    return rows


def _log2(x: Array) -> Array:
    with np.errstate(divide="ignore"):
        logarithm: Array = np.log2(x).astype(np.float32)
    return logarithm
