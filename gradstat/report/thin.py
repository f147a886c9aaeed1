"""A history of any length in few enough numbers for a page: columns of records, and samples.

Nothing is interpolated. A column is the statistics of all elements of its records together; a
sample is one record as it was measured. A series, such as a loss, has the same columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple, TypeAlias

import numpy as np

from gradstat.bins import Log2Bins, octave_of
from gradstat.diagnosis.evidence import Evidence
from gradstat.history import History
from gradstat.history.records import is_loss, is_rate
from gradstat.record import NOUNS
from gradstat.util import Array, divide, evenly_spread

Numbers: TypeAlias = tuple[Array, Array]  # steps, which do not fall, and a value at each

_MAX_COLUMNS, _MAX_CELLS = 600, 120_000
_MAX_SAMPLES, _MAX_HISTOGRAMS = 120, 24_000
_MIN_COLUMNS, _MIN_SAMPLES = 20, 4  # however many layers there are
_MAX_ROWS = 64  # of a histogram over linear bins
_OCTAVES = 255  # that hold finite values
_MAX_SERIES = 3  # of a kind
_FLOAT32 = 1e38
_LARGEST = 1e308  # magnitude that the page draws: 2 to its logarithm is finite in float64

_log2 = np.errstate(divide="ignore")(np.log2)


class Columns(NamedTuple):
    """A history of S records and L layers in T columns of records, in F formats."""

    steps: Array  # first and last of each column, int64 (T, 2)
    records: Array  # how many each holds, int64 (T,)
    # Log2 of the rms of all its finite elements, and of the smallest and largest rms of a record in
    # it, float32 (L, T): minus infinity where they are zero, NaN where there are none.
    level: Array
    least: Array
    most: Array
    zeros: Array  # share of them among the finite elements, float32 (L, T); NaN where none are
    nonfinite: Array  # elements, int64 (L, T)
    snr: Array  # of each layer in each format, dB, float32 (L F, T); NaN where there is none
    lost: Array  # share of the non-zero values that a format flushes to zero, float32 (L F, T)


class Sums(NamedTuple):
    """What columns add up to, so that some of them can be put together: T columns of L layers."""

    steps: Array  # first and last of each column, int64 (T, 2)
    records: Array  # how many each holds, int64 (T,)
    power: Array  # log2 of the sum of the squares of its finite elements, float64 (T, L)
    least: Array  # log2 of the smallest rms of a record in it, float64 (T, L)
    most: Array  # log2 of the largest
    finite: Array  # elements, int64 (T, L)
    zeros: Array  # of them
    nonfinite: Array  # the other elements
    # Log2 of the sum of the squares of each format's error, float64 (T, L F); NaN if not cast.
    noise: Array
    lost: Array  # values that it flushes to zero, int64 (T, L F)

    @classmethod
    def of(cls, history: History) -> Sums:
        """A column for each record."""
        finite = history["finite"]
        rms = _log2(np.minimum(history["rms"], _LARGEST))
        # In logarithms, so that no square overflows or underflows.
        power = np.where(finite > 0, 2 * rms + _log2(finite), -np.inf)
        steps, ones = np.stack([history.steps] * 2, 1), np.ones(len(history), np.int64)
        nonfinite = history["numel"] - finite
        formats = _formats(history, power)
        return cls(steps, ones, power, rms, rms, finite, history["zeros"], nonfinite, *formats)

    def together(self, starts: Array) -> Sums:
        """Fewer columns: each goes from one start to before the next. Starts rise from 0."""
        last = np.append(starts[1:], len(self.records)) - 1
        steps = np.stack([self.steps[starts, 0], self.steps[last, 1]], 1)
        parts = zip(self._fields[1:], self[1:], strict=True)
        sums = (_TOGETHER.get(name, np.add).reduceat(part, starts) for name, part in parts)
        return Sums(steps, *sums)

    def part(self, part: slice) -> Sums:
        return Sums(*(x[part] for x in self))

    def followed_by(self, other: Sums) -> Sums:
        return Sums(*map(np.concatenate, zip(self, other, strict=True)))

    def columns(self) -> Columns:
        with np.errstate(invalid="ignore"):
            rms = np.where(self.finite > 0, self.power - _log2(self.finite), np.nan) / 2
            n_formats = self.noise.shape[1] // max(1, self.power.shape[1])
            power, nonzero = (
                np.repeat(x, n_formats, axis=1) for x in (self.power, self.finite - self.zeros)
            )
            snr = 10 * np.log10(2) * (power - self.noise)
        zeros, lost = divide(self.zeros, self.finite), divide(self.lost, nonzero)
        numbers = rms, self.least, self.most, zeros, snr, lost
        level, least, most, zeros, snr, lost = (x.T.astype(np.float32) for x in numbers)
        nonfinite = self.nonfinite.T
        return Columns(self.steps, self.records, level, least, most, zeros, nonfinite, snr, lost)


# Other fields of `Sums` are added up.
_TOGETHER = {"power": np.logaddexp2, "noise": np.logaddexp2, "least": np.fmin, "most": np.fmax}


def _formats(history: History, power: Array) -> tuple[Array, Array]:
    """`Sums.noise` and `Sums.lost` of each record, from `Sums.power`."""
    n_records, n_layers = power.shape
    shape = n_records, n_layers, len(history.formats)
    noise, lost = np.empty(shape), np.empty(shape, np.int64)
    for at, name in enumerate(history.formats):
        found = history.quantization(name)
        error = power + 2 * _log2(found["error"])
        # No values or no error: no noise. What is not cast has NaN.
        noise[..., at] = np.where((power == -np.inf) | (found["error"] == 0), -np.inf, error)
        lost[..., at] = np.rint(np.nan_to_num(found["underflow"]) * found["nonzero"])
    flat = n_records, n_layers * len(history.formats)
    return noise.reshape(flat), lost.reshape(flat)


class Sample(NamedTuple):
    """Histograms of one record: for each layer the rows from its first filled one to its last.

    Over `Log2Bins` a row is an octave of magnitudes: row r holds 2**(r - 127) up to 2**(r - 126),
    row 0 all that is smaller and not zero. Over `LinearBins` a row is a bin or, of more than 64,
    some neighbours.
    """

    step: int
    first: Array  # row of each layer, int64 (L,)
    rows: Array  # how many each layer has, int64 (L,)
    counts: Array  # int64, layer by layer, one after the other
    finite: Array  # elements, int64 (L,)
    zeros: Array  # of them
    nonfinite: Array  # the other elements
    edges: Array  # lowest and highest of all rows, float64 (L, 2); none over `Log2Bins`


def columns(history: History) -> Columns:
    n_records, n_layers = len(history), len(history.layers)
    count = min(n_records, most_columns(n_layers))
    blocks = np.split(np.arange(n_records), np.arange(1, count) * n_records // count)
    sums = [
        Sums.of(part.history).together(np.array([block[0] for block in its_blocks]))
        for part, its_blocks in Evidence(history, 1).parts(blocks)
    ]
    return reduce(Sums.followed_by, sums).columns()


def most_columns(n_layers: int) -> int:
    return min(_MAX_COLUMNS, max(_MIN_COLUMNS, _MAX_CELLS // max(1, n_layers)))


def most_samples(n_layers: int) -> int:
    return min(_MAX_SAMPLES, max(_MIN_SAMPLES, _MAX_HISTOGRAMS // max(1, n_layers)))


def samples(history: History, steps: Sequence[int] = ()) -> list[Sample]:
    """Take histograms of some records, evenly spread, the newest among them, and those of steps."""
    at = set(evenly_spread(len(history), most_samples(len(history.layers))).tolist())
    return [sample(history, each) for each in sorted(at.union(positions(history, steps)))]


def positions(history: History, steps: Sequence[int]) -> list[int]:
    """Positions of the records of steps, the most important first, at most as many as samples."""
    wanted = list(dict.fromkeys(steps))[: most_samples(len(history.layers))]
    return [int(at) for at in np.searchsorted(history.steps, wanted)]


def sample(history: History, at: int) -> Sample:
    record = history.at([at]).unpack()
    numel, finite, zeros, *_ = record.integers[0].T
    log2, n_bins = isinstance(history.bins, Log2Bins), history.bins.bins
    width = -(-n_bins // _MAX_ROWS)  # bins of a row
    n_rows = _OCTAVES if log2 else -(-n_bins // width)
    counts = np.zeros((len(numel), n_rows), np.int64)
    layer = np.repeat(np.arange(len(numel)), record.sizes)
    # The outermost bins, beyond what is finite, belong to the last row.
    row = np.minimum(octave_of(record.bins) if log2 else record.bins // width, n_rows - 1)
    np.add.at(counts, (layer, row), record.counts)
    if log2:
        counts[:, 0] -= zeros
    filled: Array = counts > 0 if log2 else np.ones(counts.shape, bool)
    begun, ended = (np.logical_or.accumulate(x, axis=1) for x in (filled, filled[:, ::-1]))
    kept = begun & ended[:, ::-1]
    edges = record.floats[0, :, -2:].clip(-_LARGEST / 2, _LARGEST / 2)
    return Sample(
        int(history.steps[at]),
        kept.argmax(1),
        kept.sum(1),
        counts[kept],
        finite,
        zeros,
        numel - finite,
        edges[:0] if log2 else edges,
    )


class Series(NamedTuple):
    """One number a step, in the columns of a history; NaN where a column has none."""

    mean: Array  # of the finite values of each column, float32 (T,)
    least: Array
    most: Array
    nonfinite: Array  # how many values are not finite, int64 (T,)


def series(history: History, columns: Columns) -> dict[str, Series]:
    """Losses, the norm of the first kind and learning rates, a few of each, by name."""
    named = {name: history.scalar(name) for name in history.scalars}
    kind = history.kinds[0]
    return series_of(named, kind, (history.steps, norm_of(history, kind)), columns.steps[:, 0])


def norm_of(history: History, kind: str) -> Array:
    """The norm at each step; NaN where an element is not finite: `History.norm` leaves it out."""

    def norm(part: Evidence) -> Array:
        broken = (part["finite"] < part["numel"]).any(1)
        return np.where(broken, np.nan, part.history.norm(kind))

    return Evidence(history, 1, kind).by_record(norm)


def series_of(
    scalars: Mapping[str, Numbers], kind: str, norm: Numbers, first: Array
) -> dict[str, Series]:
    """As `series`, of scalars by name, the norm of a kind, and the first step of each column."""
    losses = [name for name in scalars if is_loss(name)]
    rates = list(filter(is_rate, scalars))
    # Of many groups, those whose rate changes.
    rates = [name for name in rates if np.ptp(scalars[name][1]) > 0] or rates[:1]
    named = {name: scalars[name] for name in losses[:_MAX_SERIES]}
    named[f"{NOUNS[kind]} norm"] = norm
    named |= {name: scalars[name] for name in rates[:_MAX_SERIES]}
    return {name: _in_columns(*values, first) for name, values in named.items()}


def _in_columns(steps: Array, values: Array, first: Array) -> Series:
    column = np.maximum(np.searchsorted(first, steps, "right") - 1, 0)
    finite = np.isfinite(values)
    at, known = column[finite], np.clip(values[finite], -_FLOAT32, _FLOAT32)
    least, most = (np.full(len(first), np.nan) for _ in range(2))
    np.fmin.at(least, at, known)
    np.fmax.at(most, at, known)
    n = np.bincount(at, minlength=len(first))
    mean = divide(np.bincount(at, known, len(first)), n)
    mean, least, most = (x.astype(np.float32) for x in (mean, least, most))
    return Series(mean, least, most, np.bincount(column[~finite], minlength=len(first)))
