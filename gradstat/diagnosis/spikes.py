"""Spikes of the loss and of the gradients, jumps of single rows, and which row moved first."""

from __future__ import annotations

import math
from operator import itemgetter

import numpy as np

from gradstat.diagnosis import usual
from gradstat.diagnosis.divergence import Leap, find_divergence, find_leap
from gradstat.diagnosis.evidence import Evidence, exp, log, log_losses
from gradstat.diagnosis.findings import Finding, Severity, rounded
from gradstat.diagnosis.usual import WINDOW, Departure, Mover, named, trailing
from gradstat.record import ACTIVATION, GRAD, PARAM, UPDATE
from gradstat.thresholds import Thresholds
from gradstat.util import Array, median, plural

_LASTING = 10  # values after which a spike that is not over is there to stay
_SOON = 10  # records after a rate that rose
_NEWEST, _FALLEN = 5, 1.2  # losses that say where one is now, which has fallen so far
_SMALL = 0.7  # of the median batch
_HIGHER = 4.0  # than any learning rate before
_BEYOND = math.log(1.5)  # anything of one or two windows before
# That a single loss rises where no gradient does, as a factor or in deviations.
_ALONE, _FARTHER = 1.5, 1.5


def find_all_spikes(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Divergence, spikes and jumps of rows: of those that belong together the first."""
    findings = find_divergence(run, thresholds)
    for rule in (find_loss_spikes, find_gradient_spikes, _rate_jumps, _jumps):
        for each in rule(run, thresholds):
            if not any(_reaches(run, other, each) for other in findings):
                findings.append(each)
    return findings


def find_loss_spikes(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    found = [each for name in run.losses for each in _of_loss(run, name, thresholds)]
    if len(run.losses) < 2 or not found:
        return found
    # What one of several losses gains, another may lose, as in adversarial training.
    steps, series = zip(*run.losses.values(), strict=True)
    if any(not np.array_equal(each, steps[0]) for each in steps):
        return found
    floor = math.log(thresholds.spike_loss)
    mean = np.sum(np.array(series) / len(series), 0)  # a sum of large ones would overflow
    total = usual.find_departures(log_losses(mean), floor, thresholds.spike_deviations)
    spans = [(steps[0][each.begin], steps[0][each.end - 1]) for each in total]
    return [f for f in found if any(a <= f.steps[1] and f.steps[0] <= b for a, b in spans)]


def _of_loss(run: Evidence, name: str, thresholds: Thresholds) -> list[Finding]:
    steps, losses = run.losses[name]
    series = log_losses(losses)
    series[np.isin(steps, run.steps[_small_batches(run)])] = math.nan
    deviations = thresholds.spike_deviations
    findings = []
    for spike in _found(run, series, thresholds.spike_loss, thresholds):
        at = int(steps[spike.begin])
        movers = usual.find_movers(run, _record_at(run, at), at, usual.LOSS, deviations)
        # Gradients tell of a batch that is other: what none of them joins is the batches' noise.
        is_joined = GRAD not in run.kinds or any(movers)
        least = min(math.log(_ALONE), _FARTHER * deviations * spike.deviation)
        if not is_joined and _is_single(series, spike) and spike.over(series) < least:
            continue
        earlier = losses[: spike.begin][-WINDOW:, None]
        before = float(median(earlier)[0]) if len(earlier) else math.nan
        newest = float(median(earlier[-_NEWEST:])[0]) if len(earlier) else math.nan
        if 0 < newest * _FALLEN < before:
            before = newest  # of a loss that falls
        subject = "The loss" if name == "loss" else f"The loss {name!r}"
        peak = float(losses[spike.peak])
        numbers = {"before": before} if math.isfinite(before) else {}
        if not math.isfinite(peak):
            was = f", {before:.3g} before," if numbers else ""
            what = f"{subject}{was} is {losses[spike.begin]} at step {at}"
        else:
            numbers["peak"] = peak
            rose = f"rose from {before:.3g} to {peak:.3g}"
            if before > 0:
                numbers["times"] = peak / before
                rose = f"rose {rounded(numbers['times'])}-fold, from {before:.3g} to {peak:.3g},"
            what = f"{subject} {rose} at step {at}"
            if np.isinf(series[spike.begin : spike.end]).any():
                broken = spike.begin + int(np.isinf(series[spike.begin : spike.end]).argmax())
                what += f", was {losses[broken]} at step {steps[broken]}"
        findings.append(_finding("loss spike", what, numbers, run, steps, spike, movers))
    return findings


def find_gradient_spikes(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    if GRAD not in run.kinds:
        return []
    norm = run.norm(GRAD)
    series = log(norm)
    # An overflow is another finding, or a loss scale that is tried.
    gradients = run.of(GRAD)
    overflow = gradients.by_record(lambda part: np.asarray(np.isinf(part.log_rms).any(1)))
    overflow |= np.isinf(norm)
    series[overflow | _small_batches(run)] = math.nan
    deviations = thresholds.spike_deviations
    findings = []
    for spike in _found(run, series, thresholds.spike_gradient, thresholds):
        # Where the trend of some batches ends, it is again as large as it was.
        earlier = np.fmax.reduce(series[: spike.begin][-WINDOW:], initial=-math.inf)
        if series[spike.peak] <= earlier + _BEYOND:
            continue
        before, peak = exp(spike.typical), float(norm[spike.peak])
        numbers, at = {"before": before, "peak": peak, "times": peak / before}, spike.begin
        what = (
            f"The gradient's norm rose {rounded(numbers['times'])}-fold, from {before:.2g} to "
            f"{peak:.2g}, at step {run.steps[at]}"
        )
        movers = usual.find_movers(run, at, int(run.steps[at]), usual.GRADIENT, deviations)
        findings.append(_finding("gradient spike", what, numbers, run, run.steps, spike, movers))
    return findings


def _found(run: Evidence, series: Array, factor: float, thresholds: Thresholds) -> list[Departure]:
    """Spikes of a series that no small batch explains."""
    found = usual.find_departures(series, math.log(factor), thresholds.spike_deviations)
    if ACTIVATION in run.kinds:
        return found
    least = math.log(factor * thresholds.spike_single)
    return [spike for spike in found if not _is_single(series, spike) or spike.over(series) > least]


def _is_single(series: Array, spike: Departure) -> bool:
    """Whether one value makes it, and a finite one."""
    return spike.end - spike.begin == 1 and not math.isinf(series[spike.begin])


def _record_at(run: Evidence, step: int) -> int:
    """The newest record up to a step."""
    return int(np.searchsorted(run.steps, step, "right")) - 1


def _small_batches(run: Evidence) -> Array:
    """Records of batches that are smaller than most, ``(S,)``, where outputs tell their size."""
    if ACTIVATION not in run.kinds:
        return np.zeros(len(run.steps), bool)
    outputs, numel = run.of(ACTIVATION), itemgetter("numel")
    usual = np.array([median(x[:, None].astype(np.float64))[0] for _, x in outputs.by_row(numel)])
    # An expert may have more or fewer inputs.
    return outputs.by_record(lambda part: np.asarray((numel(part) < _SMALL * usual).mean(1) > 0.5))


def _finding(
    kind: str,
    what: str,
    numbers: dict[str, float],
    run: Evidence,
    steps: Array,
    spike: Departure,
    movers: tuple[list[Mover], list[Mover]],
) -> Finding:
    """A spike of a series, over its own steps, with what moved before it and with it."""
    begin, last = int(steps[spike.begin]), int(steps[spike.end - 1])
    length = spike.end - spike.begin
    if spike.is_over:
        what += f", and was back after {plural(length, 'step')}."
    elif length >= _LASTING:
        what += ", and has not come back."
    else:
        what += ", where the record ends." if length == 1 else ", and is not back at the end."
    record, (moved, together) = _record_at(run, begin), movers
    numbers |= {"recovered": float(spike.is_over), "moved": float(len(moved))}
    leap = find_leap(run, record)
    if leap and (leap.record < record - _SOON or (moved and moved[0].at < leap.record)):
        leap = None
    first = leap.record if leap else moved[0].at if moved else None
    first_step = begin if first is None else int(run.steps[first])
    numbers |= {"first_step": float(first_step), "ahead": float(begin - first_step)}
    if leap:
        what += f" {leap.tell(run)}."
        numbers["rate"] = leap.after
    if moved:
        what += f" {usual.tell_movers(run, moved, begin)}"
    elif not leap:
        what += " Nothing had left its usual range before"
        gradients = sum(run.kinds[mover.column] == GRAD for mover in together)
        if gradients:
            what += f"; {gradients} of {run.kinds.count(GRAD)} gradients did with it"
        elif GRAD in run.kinds:
            what += ", nor a gradient with it"
        what += (
            ": look at the batch, or at the loss, not at a layer."
            if {PARAM, ACTIVATION} & set(run.kinds)
            else "; what=('grad', 'update', 'activation') shows whether weights or outputs had."
        )
    severe = not spike.is_over and (length >= _LASTING or "peak" not in numbers)
    severity: Severity = "severe" if severe else "warning"
    worst = moved or sorted(together, key=lambda mover: -mover.times)
    column = worst[0].column if worst else 0
    return Finding(kind, severity, run.layers[column], (begin, last), numbers, what)


def _rate_jumps(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Learning rates that leap above all that they were."""
    findings = []
    times = run.rate[1:] / run.rate[:-1]
    for at in (1 + np.flatnonzero(times >= _HIGHER)).tolist():
        if at >= WINDOW // 2 and run.rate[at] >= _HIGHER * np.fmax.reduce(run.rate[:at]):
            leap = Leap(at, float(run.rate[at - 1]), float(run.rate[at]))
            numbers = {"times": leap.after / leap.before, "first_step": float(run.steps[at])}
            sentence = f"{leap.tell(run)}, above all that it was before."
            steps = int(run.steps[at]), int(run.steps[-1])
            findings.append(Finding("jump", "warning", run.layers[0], steps, numbers, sentence))
    return findings


def _jumps(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Rows that leap out of their usual ranges, or that grow while the loss does not fall."""
    limits = {PARAM: thresholds.jump_weights, UPDATE: thresholds.jump, ACTIVATION: thresholds.jump}
    found: list[tuple[int, Finding]] = []
    columns = np.flatnonzero(run.is_kind(*limits))
    for column, sizes in run.by_row(lambda part: part.sizes, columns):
        kind = run.kinds[column]
        limit = math.log(limits[kind])
        series = np.where(np.isinf(sizes), math.nan, sizes)
        # Most rows never rise so far, and need no second look.
        least = np.fmin.reduce(trailing(series, 2 * WINDOW + 1))
        if not (series - least >= limit / 2).any():
            continue
        around, floor = thresholds.spike_deviations, math.log(usual.FLOORS[kind])
        jumps = usual.find_departures(series, floor, around, limit / 2)
        jumps += [
            each
            for each in usual.find_departures(series, floor, around)
            # What grows little by little while the loss falls is what is learned.
            if each.over(series, WINDOW) >= limit * (3 if _is_learning(run, each.begin) else 1)
        ]
        for each in jumps:
            # An expert or an embedding that is used again does what it did before.
            earlier = series[max(0, each.begin - 2 * WINDOW) : each.begin]
            # What has hardly been used of late says nothing of what is usual now.
            if np.isnan(earlier[-_SOON:]).mean() > 0.5:
                continue
            if series[each.peak] > np.fmax.reduce(earlier) + _BEYOND:
                over = each.over(series, WINDOW)
                found.append((usual.PHASES[kind], _jump(run, column, each, over)))
    found.sort(key=lambda each: (each[1].steps[0], each[0], -each[1].numbers["times"]))
    return [finding for _, finding in found]


def _jump(run: Evidence, column: int, departure: Departure, over: float) -> Finding:
    steps = int(run.steps[departure.begin]), int(run.steps[departure.end - 1])
    numbers = {"times": exp(over), "first_step": float(steps[0])}
    sentence = (
        f"{named(run, column)} left its usual range at step {steps[0]} and reached "
        f"{rounded(numbers['times'])} times its usual size"
    )
    sentence += ", and came back." if departure.is_over else "."
    return Finding("jump", "warning", run.layers[column], steps, numbers, sentence)


def _is_learning(run: Evidence, record: int) -> bool:
    """Whether a loss falls in the window after a record, or none is known."""
    return not run.losses or any(run.falls(name, record, WINDOW) for name in run.losses)


def _reaches(run: Evidence, one: Finding, other: Finding) -> bool:
    """Whether the other begins with the one, before it is over, or soon after."""
    first, begins = np.searchsorted(
        run.steps, [one.numbers["first_step"], other.numbers["first_step"]]
    )
    last = np.searchsorted(run.steps, one.steps[1])
    return bool(first - usual.APART <= begins <= last + WINDOW)
