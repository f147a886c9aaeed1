"""Divergence, a loss that rises for good since steps are too large, and instability ahead of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from gradstat.bins import FLOAT64_MAX
from gradstat.diagnosis.evidence import Evidence, exp, log, log_losses
from gradstat.diagnosis.findings import Finding, rounded
from gradstat.diagnosis.usual import TO_DEVIATIONS, WINDOW, named, trailing
from gradstat.record import ACTIVATION, GRAD, PARAM, UPDATE
from gradstat.thresholds import Thresholds
from gradstat.util import Array, median

_USUAL_PACE = 1e-3  # of a step's change to the weights, as a share of them
_FATAL_PACE = 0.1  # that none survives

# Of divergence.
_SMOOTHED = 5  # losses, of which the median is taken
_LONG = 3 * WINDOW  # records in which a rate shows its consequences
_RISE = math.log(1.3)  # of a loss, at least
_LARGE = math.log(3)  # of one that rises from the start
_ENORMOUS = math.log(1e3)  # of one that needs no other evidence
_SOON = 10  # records after a rate
_LEAP = 2.0  # from one record's rate to the next one's
_SUDDEN = math.log(5)  # of a loss, from one record to the next
# Of instability ahead.
REACH = 4 * WINDOW  # records that say what one shows
_RECENT = 8  # values whose median says how large something is now
_LEARNED = 2 * WINDOW  # records over which a loss that is being learned falls beyond its noise
_FALLS = 0.5  # deviations of one loss, by which medians of eight differ by chance
_LEAST_NOISE = 0.02  # of a loss, a logarithm: less is no reason to call it falling or not
_WELL = math.log(2)  # above its least value, a loss may still look well
_IN_A_ROW = 4  # records that must show it
_NOTABLE = 1.1  # growth of an output
# Noise alone keeps Adam's steps at a quarter of the first ones, for their rate.
_UNTRIED = math.log(10)  # above all steps so far
_IDLE = math.log(1.2)  # by which a loss falls in a window, at most, that is hardly learned


class Leap(NamedTuple):
    """A learning rate that rises from one record to the next: the position of that, and both."""

    record: int
    before: float
    after: float

    def tell(self, run: Evidence) -> str:
        times = rounded(self.after / self.before)
        step = run.steps[self.record]
        return (
            f"The learning rate rose {times}-fold at step {step}, from {self.before:.3g} to "
            f"{self.after:.3g}"
        )


def find_leap(run: Evidence, last: int) -> Leap | None:
    """What rise of the learning rate something after a record may come of."""
    # That is one of a few records before; or an earlier one above all that it was until then, which
    # a schedule that begins anew is not.
    first = max(1, last - _LONG)
    before, after = run.rate[first - 1 : last], run.rate[first : last + 1]
    highest = np.fmax.accumulate(run.rate)[first - 1 : last]
    times = np.where(np.arange(first, last + 1) < last - _SOON, after / highest, after / before)
    if not len(times) or not np.fmax.reduce(times) >= _LEAP:
        return None
    at = int(np.nanargmax(times))
    return Leap(first + at, float(before[at]), float(after[at]))


def find_divergence(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """A loss that rises for good after steps became too large, or from the start as they are."""
    for name, (steps, losses) in run.losses.items():
        x = log_losses(losses)
        last = _last_good(x)
        if last is None:
            continue
        # A loss that is NaN at once, and not large before, has not risen.
        risen = x[last + 1 :][np.isfinite(x[last + 1 :])][-_SMOOTHED:]
        rise = float(np.median(risen) - x[last]) if len(risen) else 0.0
        record = max(0, int(np.searchsorted(run.steps, steps[last], "right")) - 1)
        cause = _cause(run, record, rise, float(x[last + 1] - x[last]) if len(risen) else 0.0)
        if cause is not None:
            return [_tell_divergence(run, name, last, *cause)]
    return []


def _last_good(x: Array) -> int | None:
    """Place of the last loss before it rises and does not come back; ``None`` if it does not."""
    size = min(_SMOOTHED, max(1, len(x) // 4))
    smooth = np.array([np.median(x[max(0, t - size + 1) : t + 1]) for t in range(len(x))])
    best = int(smooth.argmin())
    if not math.isfinite(smooth[best]):
        return None
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(smooth))
    known = known[known < max(best, WINDOW)]
    noise = TO_DEVIATIONS * float(np.median(abs(x[known] - smooth[known])))
    if not smooth[-1] - smooth[best] > max(_RISE, 4 * noise):
        return None
    good = smooth[best] + max(4 * noise, _RISE / 2)
    last = int(np.flatnonzero(smooth <= good)[-1])
    return int(np.flatnonzero(x[: last + 1] <= good)[-1])


def _cause(
    run: Evidence, record: int, rise: float, at_once: float
) -> tuple[int, dict[str, float], str] | None:
    """Since which record steps are too large, numbers and words about it, if anything says so."""
    # After `record` the loss rises, in all and at once by so much: logarithms.
    rates, pace = run.rate, run.pace
    if rise >= _RISE and (leap := find_leap(run, record)):
        times = {"rate": leap.after, "times": leap.after / leap.before}
        return leap.record, times, f"{leap.tell(run)}."
    begin = max(0, record - _LONG)
    rate, earlier = float(rates[record]), float(rates[begin])
    # Steps that have become large at once have a cause of their own.
    usual = pace[record - _SOON : record + 1] if record > _SOON else pace[: record + 3]
    is_fast = median(usual) >= _FATAL_PACE
    if (
        rise >= _RISE
        and rate >= _LEAP * earlier
        and rate >= 0.99 * np.fmax.reduce(rates[: record + 1])
    ):
        words = f"The learning rate had risen to {rate:.3g} by then, from {earlier:.3g}"
        words += f" at step {run.steps[begin]}."
        return record, {"rate": rate, "times": rate / earlier}, words
    if is_fast or (rise >= _ENORMOUS and not (at_once > _SUDDEN and _is_calm(run, record))):
        since = 0 if record < WINDOW else record
        words = "" if math.isnan(rate) else f"The learning rate, {rate:.3g}, is too high."
        return since, {} if math.isnan(rate) else {"rate": rate}, words
    # No healthy run gets worse and worse from its first steps on.
    if record < _SOON and rise >= _LARGE and len(run.losses) == 1 and np.isnan(pace).all():
        words = "Most likely steps are too large: what='update' with an optimizer tells."
        return 0, {} if math.isnan(rate) else {"rate": rate}, words
    return None


def _is_calm(run: Evidence, record: int) -> bool:
    """Whether a step was as large as those before: what comes at once is then not of its making."""
    size = run.norm(GRAD) if np.isnan(run.pace).all() and GRAD in run.kinds else run.pace
    before = size[max(0, record - _SOON) : record]
    return len(before) == _SOON and bool(size[record] <= _LEAP * median(before))


def _tell_divergence(
    run: Evidence, name: str, last: int, since: int, numbers: dict[str, float], words: str
) -> Finding:
    steps, losses = run.losses[name]
    begin = int(steps[min(last + 1, len(steps) - 1)])
    end = losses[np.isfinite(losses)][-_SMOOTHED:]
    after, before = float(np.median(end)), float(losses[last])
    numbers = {"first_step": float(run.steps[since]), "rises": float(begin), **numbers}
    subject = "the loss" if name == "loss" else f"the loss {name!r}"
    how = f"from {before:.3g} to {losses[-1]}"
    if np.isfinite(losses[-1]):
        how = f"from {before:.3g} to {after:.3g}"
        numbers |= {"before": before, "loss": after}
    pace = run.pace[since : since + 3]
    known = pace[np.isfinite(pace)]
    sentence = f"Training diverges: {subject} rises for good from step {begin} on, {how}."
    sentence += f" {words}" * bool(words)
    if len(known):
        numbers["pace"] = float(known.max())
        sentence += (
            f" A step then changed the weights by {numbers['pace']:.2g} of their size, where "
            f"{_USUAL_PACE:g} is usual."
        )
    layer = run.layers[_largest_step(run, since)]
    span = int(run.steps[since]), int(run.steps[-1])
    return Finding("divergence", "severe", layer, span, numbers, sentence)


def _largest_step(run: Evidence, record: int) -> int:
    """The row whose weights a step changed most, as a share of them; the first row if unknown."""
    if not {UPDATE, PARAM} <= set(run.kinds):
        return 0
    ratio = run.part(np.arange(len(run.steps))[record : record + 2]).history.update_ratio()
    ratio = np.fmax.reduce(np.where(np.isfinite(ratio), ratio, -1.0))
    updates = np.flatnonzero(np.array(run.history.kinds) == UPDATE)
    return int(np.flatnonzero(run.columns == updates[int(ratio.argmax())])[0])


class Reached(NamedTuple):
    """How large steps have been so far, at most: logarithms."""

    step: float = -math.inf  # norm of the change of all weights, for its learning rate
    pace: float = -math.inf  # as a share of the weights' norm


_NOTHING = Reached()


def find_instability(
    run: Evidence, thresholds: Thresholds, reached: Reached = _NOTHING
) -> list[Finding]:
    """Weights that grow or leap while the loss no longer falls, up to now or until it has risen."""
    # The newest records are enough, with what steps before them have reached.
    if PARAM not in run.kinds or not run.losses or len(run.steps) <= _LEARNED:
        return []
    # A logarithm: how many times larger all weights became in so many steps, by the newest records.
    weights, steps = log(np.minimum(run.norm(PARAM), FLOAT64_MAX)), run.steps.astype(np.float64)
    size, pace = _newest(weights), _newest(log(run.pace))
    growth = (size - _before(size, WINDOW)) * WINDOW / (steps - _before(steps, WINDOW))
    levels, is_flat, is_idle = _losses_at_records(run)
    shows = growth > math.log(thresholds.weights_growth)
    shows |= pace > math.log(thresholds.weights_pace)
    shows &= is_flat
    # Or what a step would change that were as large for its rate as one before.
    in_rates = weights - run.log_rate
    step = _newest(log(run.pace) + in_rates)
    step[:_RECENT] = math.nan  # optimizers that divide by an average begin with larger ones
    possible = np.fmax(np.fmax.accumulate(step), reached.step) - in_rates
    most = np.fmax(np.fmax.accumulate(pace), reached.pace)
    shows |= is_untried(possible, most) & is_idle
    several = np.lib.stride_tricks.sliding_window_view(shows, _IN_A_ROW).all(1)
    at = np.flatnonzero(several) + _IN_A_ROW - 1
    if not len(at):
        return []
    last = int(at[-1])
    # What it told of has come, or may come. Otherwise it is over. A loss wavers, and so does this.
    now = np.nan_to_num(levels[-1], nan=math.inf)
    if last < len(shows) - _RECENT and not now > levels[last] + math.log(thresholds.spike_loss):
        return []
    # From the first record on that shows it, with short breaks.
    breaks = np.flatnonzero(np.diff(at) > WINDOW)
    first = int(at[breaks[-1] + 1 if len(breaks) else 0])
    return [_tell_ahead(run, first, last, growth, possible, thresholds)]


def is_untried(possible: Array, pace: Array | float) -> Array:
    """Whether a change of the weights would break training, and is far above all there were."""
    is_it: Array = (possible > math.log(_FATAL_PACE)) & (possible > pace + _UNTRIED)
    return is_it


def _losses_at_records(run: Evidence) -> tuple[Array, Array, Array]:
    """How large the first loss is at each record, a logarithm; where no loss falls, or hardly."""
    first, flat, idle = None, *np.ones((2, len(run.steps)), bool)
    for steps, losses in run.losses.values():
        x = log_losses(losses)
        at = np.searchsorted(steps, run.steps, "right") - 1
        x = np.where((at >= 0) & np.isfinite(x[at.clip(0)]), x[at.clip(0)], math.nan)
        level = _newest(x)
        noise = TO_DEVIATIONS * _newest(abs(x - _before(level, 1)), WINDOW)
        least = np.fmin.reduce(trailing(level, REACH - WINDOW), axis=0)
        is_falling = _before(level, _LEARNED) - level > _FALLS * np.maximum(noise, _LEAST_NOISE)
        is_well = (level - least <= _WELL) & ~np.isnan(_before(level, _LEARNED))
        flat &= ~is_falling & is_well
        idle &= (_before(level, WINDOW) - level <= _IDLE) & is_well
        first = level if first is None else first
    assert first is not None
    return first, flat, idle


def _tell_ahead(
    run: Evidence,
    first: int,
    last: int,
    growth: Array,
    possible: Array,
    thresholds: Thresholds,
) -> Finding:
    times = exp(float(np.fmax.reduce(growth[first : last + 1])))
    since, until = int(run.steps[first]), int(run.steps[last])
    numbers = {"first_step": float(since), "times": times}
    pace, rate = float(run.pace[last]), float(run.rate[last])
    what = f"the weights grow, up to {rounded(times)}-fold in {WINDOW} steps,"
    if times <= thresholds.weights_growth:
        what = "each step changes the weights much,"
        if not np.nanmax(run.pace[first : last + 1], initial=0.0) > thresholds.weights_pace:
            numbers["possible_pace"] = exp(possible[last])
            what = (
                f"steps are small only because gradients are: one as large for its learning rate "
                f"as earlier ones would change the weights by {numbers['possible_pace']:.2g} of "
                f"their size,"
            )
    sentence = f"Training may break soon: from step {since} on {what} while the loss hardly falls."
    now, before = (
        median(run.part(np.arange(max(0, end - _RECENT), end)).log_rms)
        for end in (last + 1, last + 1 - WINDOW)
    )
    rises = np.where(np.isfinite(now) & np.isfinite(before), now - before, -math.inf)
    column, output = (
        int(np.where(run.is_kind(kind), rises, -math.inf).argmax()) for kind in (PARAM, ACTIVATION)
    )
    helps = "or weight decay"
    if run.kinds[output] == ACTIVATION and rises[output] > math.log(_NOTABLE):
        numbers["output"] = exp(rises[output])
        sentence += f" {named(run, output)} grew {rounded(numbers['output'])}-fold meanwhile."
        helps = "weight decay, or a norm there"
    if math.isfinite(pace):
        numbers["pace"] = pace
        sentence += (
            f" A step changes the weights by {pace:.2g} of their size, where {_USUAL_PACE:g} is "
            f"usual."
        )
    smaller = "A smaller learning rate"
    if math.isfinite(rate):
        numbers["rate"] = rate
        smaller = f"A learning rate below {rate:.3g}"
    sentence += f" {smaller} usually helps, {helps}."
    layer = run.layers[column]
    return Finding("instability ahead", "warning", layer, (since, until), numbers, sentence)


def _newest(x: Array, n: int = _RECENT) -> Array:
    """Median of the newest values at each place."""
    return median(trailing(x, n))


def _before(x: Array, n: int) -> Array:
    """Values of so many places before; NaN before the first one."""
    return np.append(np.full(n, math.nan), x)[: len(x)]
