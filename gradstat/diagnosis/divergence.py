"""Divergence: a loss that rises for good since steps are too large, and since when they are."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from gradstat.diagnosis.evidence import Evidence, log_losses, median
from gradstat.diagnosis.findings import Finding, rounded
from gradstat.diagnosis.usual import TO_DEVIATIONS, WINDOW
from gradstat.record import GRAD, PARAM, UPDATE
from gradstat.thresholds import Thresholds
from gradstat.util import Array

USUAL_PACE = 1e-3  # of a step's change to the weights
_SMOOTHED = 5  # losses, of which the median is taken
_LONG = 3 * WINDOW  # records in which a rate shows its consequences
_RISE = math.log(1.3)  # of a loss, at least
_LARGE = math.log(3)  # of one that rises from the start
_ENORMOUS = math.log(1e3)  # of one that needs no other evidence
_SOON = 10  # records after a rate
_LEAP = 2.0  # from one record's rate to the next one's
_SUDDEN = math.log(5)  # of a loss, from one record to the next
FATAL_PACE = 0.1  # change of the weights in a step, as a share of them, that none survives


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
            return [_finding(run, name, last, *cause)]
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
    is_fast = median(usual) >= FATAL_PACE
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


def _finding(
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
            f"{USUAL_PACE:g} is usual."
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
