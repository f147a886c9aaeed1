"""What is usual for a series, and what leaves its usual range: when, how far and in which order."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from gradstat.diagnosis.evidence import Evidence, around, exp
from gradstat.diagnosis.findings import rounded
from gradstat.record import ACTIVATION, GRAD, GRAD_OUTPUT, NOUNS, PARAM, UNIT, UPDATE
from gradstat.util import Array, median, plural

WINDOW, _LEAST = 32, 10  # values before one that say where it should be
_NEWEST = 5  # of them, that say where a falling series is now
_PAIRS = 10, 4  # places between the values of a pair, whose slopes say how it goes on
APART = 2  # records between what belongs together
_CELLS = 1 << 13  # looked at together, each with the values before it
# Times the median absolute deviation it is the standard deviation of a normal distribution.
TO_DEVIATIONS = 1.4826
_MOST, _MOST_DEVIATIONS = 0.9, 1.645  # nine of ten of its values are within so many deviations
_WIDER = 1.5  # that is, than by the median, at most
_SEVERAL, _NEARER = 4, 0.6  # values in a row, and the share of the half-width they must exceed
_EARLY = 0.25  # of the half-width, from which on what leaves the range has begun to
_PART = 1 / 40  # of what it reaches
_SHIFTED = 3 * WINDOW  # values outside it that make a new level

# In the order in which a step computes them; the loss comes after the forward pass.
PHASES = {PARAM: 0, ACTIVATION: 1, GRAD_OUTPUT: 3, GRAD: 4, UPDATE: 5}
LOSS, GRADIENT = 2, 3
# Half-widths of a usual range, at least, as factors: weights move little, gradients much.
FLOORS = {PARAM: 1.1, ACTIVATION: 2.0, GRAD_OUTPUT: 3.0, GRAD: 3.0, UPDATE: 3.0}


class Departure(NamedTuple):
    """Values above their usual range."""

    begin: int  # position of the first one
    end: int  # after the last one
    peak: int  # of the greatest
    typical: float  # logarithm of what was usual where it began
    deviation: float  # of the values before it from that
    slope: float  # of the trend there, if it rose; what is usual goes on with it
    is_over: bool  # the values came back

    def over(self, x: Array, most: int | None = None) -> float:
        """How far the series was above what was usual, at most, in so many values."""
        values = x[self.begin : self.end][:most]
        return float(np.nanmax(values - self.slope * np.arange(len(values)))) - self.typical


class Mover(NamedTuple):
    """A row that has left its usual range."""

    column: int
    at: int  # position of the record in which it did
    times: float  # its greatest multiple of what was usual there


def find_departures(
    x: Array, floor: float, deviations: float, leap: float = 0.0
) -> list[Departure]:
    """Values of one series above their usual range, as it was when the first of them left it."""
    # Of logarithms, ``(T,)``: NaN where there is no value, infinity where it is not finite. The
    # floor is the least half-width of the range, the deviations that of a wider one. By the leap
    # values must rise at once, beyond where their newest rise leads, as weights that speed up in a
    # warm-up do not; by 0 they may leave the range little by little.
    at = np.arange(len(x))
    typical, deviation, slope = _expected(x[:, None], at, np.zeros_like(at))
    wide = deviations * deviation
    top = typical + np.maximum(wide, floor)
    early = typical + np.maximum(wide, floor * _EARLY)
    is_out = (x > top) | np.isinf(x)
    # Several in a row need not be as far out as one alone.
    near = typical + np.maximum(_NEARER * wide, floor)
    ahead = trailing(x[::-1], _SEVERAL)[:, ::-1]  # of each value those after it, and itself
    several = ahead.min(0)
    top = np.where((several > near) & ~(x > top), near, top)
    is_out |= several > near
    if leap:
        earlier, newest = trailing(x, APART + 3)[[0, -2]]
        before = np.fmax(newest, typical) + np.fmax(newest - earlier, 0.0)
        is_out &= np.fmax.reduce(ahead[-APART - 1 :]) - before >= leap
    departures: list[Departure] = []
    end = 0
    for first in np.flatnonzero(is_out).tolist():
        if first < end:
            continue
        begin = first
        most = np.fmax.reduce(x[first:][:WINDOW]) - typical[first]
        # It began below the floor, but beyond the noise.
        while begin > end and not leap and x[begin - 1] > early[begin - 1]:
            if x[begin - 1] - typical[begin - 1] < _PART * most:
                break
            begin -= 1
        # What rose before may go on.
        rise = max(slope[begin], 0.0)
        after = x[begin:] - rise * np.arange(len(x) - begin)
        # Where too little comes before to say what is usual, every finite value is.
        limit = typical[begin] + top[first] - typical[first]
        inside = ~np.isinf(after) if np.isnan(limit) else after <= limit
        inside[: first - begin] = False
        # Two in a row, of which the second may be unknown.
        settled = np.flatnonzero(inside & np.append(inside | np.isnan(after), True)[1:])
        length = int(settled[0]) if len(settled) else len(after)
        end = begin + min(length, _SHIFTED)
        peak = begin + int(np.nanargmax(np.where(np.isinf(x[begin:end]), -math.inf, x[begin:end])))
        is_over = len(settled) > 0 and length <= _SHIFTED
        expected = float(typical[begin]), float(deviation[begin])
        departures.append(Departure(begin, end, peak, *expected, rise, is_over))
    return departures


def trailing(x: Array, n: int) -> Array:
    """Each value, the last, and those before it, ``(n, T)``; NaN before the first one."""
    padded = np.append(np.full(n - 1, math.nan), x)
    return np.lib.stride_tricks.sliding_window_view(padded, n).T


def find_movers(
    run: Evidence, record: int, step: int, phase: int, deviations: float
) -> tuple[list[Mover], list[Mover]]:
    """Rows that left their usual ranges before something began, and with it or after it."""
    # It began in a phase of a step, and ``record`` is the newest one up to then.
    if record < 0:
        return [], []
    first = max(0, record - WINDOW)
    before_it = max(0, first - WINDOW)  # what says what is usual
    x = run.part(np.arange(before_it, record + 1)).sizes
    at, columns = np.mgrid[first - before_it : len(x), : x.shape[1]]
    typical, deviation, _ = (
        each.reshape(at.shape) for each in _expected(x, at.ravel(), columns.ravel())
    )
    over = x[first - before_it :] - typical
    floors = np.log([FLOORS.get(kind, 1.0) for kind in run.kinds])
    is_far = (over > np.maximum(deviations * deviation, _EARLY * floors)) | np.isinf(over)
    # The peaks of units are those of activations.
    is_out = is_far & (over > floors) & ~run.is_kind(UNIT)
    is_same = int(run.steps[record]) == step
    before: list[Mover] = []
    together: list[Mover] = []
    for column in np.flatnonzero(is_out[-APART:].any(0)).tolist():
        newest = int(np.flatnonzero(is_out[:, column])[-1])
        most = float(over[is_out[:, column], column].max())
        left, _ = around(is_far[:, column] & (over[:, column] > _PART * most), newest)
        farthest = float(over[left : newest + 1, column].max())
        mover = Mover(column, first + left, exp(farthest))
        earlier = mover.at < record or not is_same or PHASES[run.kinds[column]] < phase
        (before if earlier else together).append(mover)
    before.sort(key=lambda mover: _order(run, mover))
    if _is_batch(run, before, record):
        return [], before + together
    return before, together


def tell_movers(run: Evidence, moved: list[Mover], begin: int) -> str:
    """A sentence about rows that moved before something began at a step, the first one first."""
    first = moved[0]
    ahead = begin - int(run.steps[first.at])
    when = f"{plural(ahead, 'step')} before" if ahead else "in the same step"
    size = f"{rounded(first.times)} times its usual size"
    if math.isinf(first.times):
        size = "not finite"
    others = [named(run, mover.column) for mover in moved[1:3]]
    then = f"; then {', '.join(others)}" if others else ""
    if len(moved) > 3:
        then += f" and {len(moved) - 3} more"
    return f"First to leave its usual range was {named(run, first.column)}, {size}, {when}{then}."


def named(run: Evidence, column: int) -> str:
    return f"{run.printed[column]}'s {NOUNS[run.kinds[column]]}"


def _expected(x: Array, at: Array, columns: Array) -> tuple[Array, Array, Array]:
    """Typical values, deviations and slopes at N places, by the values before; NaN of too few."""
    # A line follows the trend. Its slope is the median of those between values some places apart
    # (Theil's incomplete method), so that a third of the values may be anything. That a series
    # falls does not say that it goes on falling: it is expected no lower than its newest values.
    typical, deviation, trend = (np.empty(len(at)) for _ in range(3))
    offsets = np.arange(-WINDOW, 0)[:, None]
    for start in range(0, len(at), _CELLS):
        part = slice(start, start + _CELLS)
        places = at[part] + offsets
        before = np.where(places >= 0, x[places.clip(0), columns[part]], math.nan)
        before[np.isinf(before)] = math.nan
        known = np.count_nonzero(~np.isnan(before), axis=0)
        before[:, known < _LEAST] = math.nan
        level = median(before)
        far, near = (median(before[d:] - before[:-d]) / d for d in _PAIRS)
        slope = np.where(known < 2 * _PAIRS[0], near, far)
        along = before - slope * offsets
        line = median(along)
        close, wide = (_deviation(abs(y)) for y in (along - line, before - level))
        # A trend that is lost in the noise is none.
        is_trend = abs(slope) * WINDOW / 2 > close
        newest = np.fmin(median(before[-_NEWEST:]), level)
        typical[part] = np.where(is_trend, np.maximum(line, newest), level)
        deviation[part] = np.where(is_trend, close, wide)
        trend[part] = np.where(is_trend, slope, 0.0)
    return typical, deviation, trend


def _deviation(distances: Array) -> Array:
    """Standard deviation by the median distance, and by the largest but a tenth: ``(N,)``."""
    # Thirty values may lie close together by chance, so that the median says too little; but it
    # alone bears more than a few values that are far out.
    by_median = TO_DEVIATIONS * median(distances)
    ordered = np.sort(distances, axis=0)  # NaN last
    known = np.count_nonzero(~np.isnan(distances), axis=0)
    at = (_MOST * (known - 1).clip(0)).astype(np.int64)
    by_most = np.take_along_axis(ordered, at[None], axis=0)[0] / _MOST_DEVIATIONS
    deviation: Array = np.clip(by_most, by_median, _WIDER * by_median)
    return deviation


def _order(run: Evidence, mover: Mover) -> tuple[float, ...]:
    kind = run.kinds[mover.column]
    # Modules one after the other; of others the one that is farthest out.
    within = mover.column if kind == ACTIVATION else -mover.times
    return mover.at, PHASES[kind], within


def _is_batch(run: Evidence, moved: list[Mover], record: int) -> bool:
    """Whether outputs alone moved, in that very step, from the first module on."""
    if not moved or any(run.kinds[m.column] != ACTIVATION or m.at != record for m in moved):
        return False
    outputs = np.flatnonzero(run.is_kind(ACTIVATION) & (run.part([record])["numel"][0] > 0))
    return bool(moved[0].column == outputs[0])
