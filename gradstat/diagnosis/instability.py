"""Instability ahead: weights that grow or that steps change much, while nothing is learned."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from gradstat.diagnosis.divergence import FATAL_PACE, USUAL_PACE
from gradstat.diagnosis.evidence import Evidence, log, log_losses, median
from gradstat.diagnosis.findings import Finding, rounded
from gradstat.diagnosis.usual import TO_DEVIATIONS, WINDOW, named
from gradstat.record import ACTIVATION, PARAM
from gradstat.thresholds import Thresholds
from gradstat.util import Array

REACH = 4 * WINDOW  # records that say what one shows
_NEWEST = 8  # values whose median says how large something is now
_LONG = 2 * WINDOW  # records over which a loss that is being learned falls beyond its noise
_FALLS = 0.5  # deviations of one loss, by which medians of eight differ by chance
_LEAST_NOISE = 0.02  # of a loss, a logarithm: less is no reason to call it falling or not
_WELL = math.log(2)  # above its least value, a loss may still look well
_IN_A_ROW = 4  # records that must show it
_NOTABLE = 1.1  # growth of an output
# Noise alone keeps Adam's steps at a quarter of the first ones, for their rate.
_UNTRIED = math.log(10)  # above all steps so far
_IDLE = math.log(1.2)  # by which a loss falls in a window, at most, that is hardly learned


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
    if PARAM not in run.kinds or not run.losses or len(run.steps) <= _LONG:
        return []
    # A logarithm: how many times larger all weights became in so many steps, by the newest records.
    weights, steps = log(run.norm(PARAM)), run.steps.astype(np.float64)
    size, pace = _newest(weights), _newest(log(run.pace))
    growth = (size - _before(size, WINDOW)) * WINDOW / (steps - _before(steps, WINDOW))
    levels, is_flat, is_idle = _losses_at_records(run)
    shows = growth > math.log(thresholds.weights_growth)
    shows |= pace > math.log(thresholds.weights_pace)
    shows &= is_flat
    # Or what a step would change that were as large for its rate as one before.
    in_rates = weights - run.log_rate
    step = _newest(log(run.pace) + in_rates)
    step[:_NEWEST] = math.nan  # optimizers that divide by an average begin with larger ones
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
    if last < len(shows) - _NEWEST and not now > levels[last] + math.log(thresholds.spike_loss):
        return []
    # From the first record on that shows it, with short breaks.
    breaks = np.flatnonzero(np.diff(at) > WINDOW)
    first = int(at[breaks[-1] + 1 if len(breaks) else 0])
    return [_finding(run, first, last, growth, possible, thresholds)]


def is_untried(possible: Array, pace: Array | float) -> Array:
    """Whether a change of the weights would break training, and is far above all there were."""
    is_it: Array = (possible > math.log(FATAL_PACE)) & (possible > pace + _UNTRIED)
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
        least = np.fmin.reduce(_trailing(level, REACH - WINDOW), axis=0)
        is_falling = _before(level, _LONG) - level > _FALLS * np.maximum(noise, _LEAST_NOISE)
        is_well = (level - least <= _WELL) & ~np.isnan(_before(level, _LONG))
        flat &= ~is_falling & is_well
        idle &= (_before(level, WINDOW) - level <= _IDLE) & is_well
        first = level if first is None else first
    assert first is not None
    return first, flat, idle


def _finding(
    run: Evidence,
    first: int,
    last: int,
    growth: Array,
    possible: Array,
    thresholds: Thresholds,
) -> Finding:
    times = math.exp(float(np.fmax.reduce(growth[first : last + 1])))
    since, until = int(run.steps[first]), int(run.steps[last])
    numbers = {"first_step": float(since), "times": times}
    pace, rate = float(run.pace[last]), float(run.rate[last])
    what = f"the weights grow, up to {rounded(times)}-fold in {WINDOW} steps,"
    if times <= thresholds.weights_growth:
        what = "each step changes the weights much,"
        if not np.nanmax(run.pace[first : last + 1], initial=0.0) > thresholds.weights_pace:
            numbers["possible_pace"] = math.exp(possible[last])
            what = (
                f"steps are small only because gradients are: one as large for its learning rate "
                f"as earlier ones would change the weights by {numbers['possible_pace']:.2g} of "
                f"their size,"
            )
    sentence = f"Training may break soon: from step {since} on {what} while the loss hardly falls."
    now, before = (
        median(run.part(np.arange(max(0, end - _NEWEST), end)).log_rms)
        for end in (last + 1, last + 1 - WINDOW)
    )
    rises = np.where(np.isfinite(now) & np.isfinite(before), now - before, -math.inf)
    column, output = (
        int(np.where(run.is_kind(kind), rises, -math.inf).argmax()) for kind in (PARAM, ACTIVATION)
    )
    helps = "or weight decay"
    if run.kinds[output] == ACTIVATION and rises[output] > math.log(_NOTABLE):
        numbers["output"] = math.exp(rises[output])
        sentence += f" {named(run, output)} grew {rounded(numbers['output'])}-fold meanwhile."
        helps = "weight decay, or a norm there"
    if math.isfinite(pace):
        numbers["pace"] = pace
        sentence += (
            f" A step changes the weights by {pace:.2g} of their size, where {USUAL_PACE:g} is "
            f"usual."
        )
    smaller = "A smaller learning rate"
    if math.isfinite(rate):
        numbers["rate"] = rate
        smaller = f"A learning rate below {rate:.3g}"
    sentence += f" {smaller} usually helps, {helps}."
    layer = run.layers[column]
    return Finding("instability ahead", "warning", layer, (since, until), numbers, sentence)


def _trailing(x: Array, n: int) -> Array:
    """Each value and those before it, ``(n, S)``; NaN before the first one."""
    padded = np.append(np.full(n - 1, math.nan), x)
    return np.lib.stride_tricks.sliding_window_view(padded, n).T


def _newest(x: Array, n: int = _NEWEST) -> Array:
    """Median of the newest values at each place."""
    return median(_trailing(x, n))


def _before(x: Array, n: int) -> Array:
    """Values of so many places before; NaN before the first one."""
    before: Array = _trailing(x, n + 1)[0]
    return before
