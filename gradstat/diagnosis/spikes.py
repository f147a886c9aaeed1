"""Spikes of the loss and of the gradients, sudden jumps of rows, and which row moved first."""

from __future__ import annotations

import math

import numpy as np

from gradstat.diagnosis.bands import WINDOW, Spike, find_spikes, log
from gradstat.diagnosis.findings import Finding, Severity, rounded
from gradstat.diagnosis.movers import (
    APART,
    FLOORS,
    GRADIENT,
    LOSS,
    find_movers,
    named,
    rows_of,
    tell,
)
from gradstat.diagnosis.run import Run, is_loss, median
from gradstat.record import ACTIVATION, GRAD, PARAM, UPDATE
from gradstat.thresholds import Thresholds
from gradstat.util import Array

_LASTING = 10  # values after which a spike that is not over is there to stay
_SMALL = 0.7  # of the median batch
_SOFT = 1e-3  # share of the loss at the start below which its logarithm says little


def find_all_spikes(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Spikes of the loss, of the gradient where the loss has none, and jumps of rows by the way."""
    findings = find_loss_spikes(run, thresholds)
    findings += _apart(run, find_gradient_spikes(run, thresholds), findings)
    return findings + _apart(run, _jumps(run, rows_of(run), thresholds), findings)


def find_loss_spikes(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Spikes of each scalar that is a loss."""
    losses = [name for name in run.history.scalars if is_loss(name)]
    x = rows_of(run) if losses else np.empty(0)
    return [each for name in losses for each in _of_loss(run, x, name, thresholds)]


def logarithms(losses: Array) -> Array:
    """Logarithms of losses, made so that losses near zero or below it say little."""
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return np.full(len(losses), math.inf)
    scale = float(np.median(abs(finite[:WINDOW]))) or 1.0
    with np.errstate(invalid="ignore"):
        positive = finite.min() > 0
        x = np.log(losses + _SOFT * scale) if positive else np.arcsinh(losses / scale)
    return np.where(np.isfinite(losses), x, math.inf)


def _of_loss(run: Run, x: Array, name: str, thresholds: Thresholds) -> list[Finding]:
    steps, values = run.history.scalar(name)
    steps, first = np.unique(steps, return_index=True)
    # The loss of a step is the mean over its passes.
    losses = np.add.reduceat(values, first) / np.diff(np.append(first, len(values)))
    series = logarithms(losses)
    series[np.isin(steps, run.steps[_small_batches(run)])] = math.nan
    deviations = thresholds.spike_deviations
    findings = []
    for spike in _found(run, series, thresholds.spike_loss, thresholds):
        earlier = losses[: spike.begin][-WINDOW:, None]
        before = float(median(earlier)[0]) if len(earlier) else math.nan
        at = int(steps[spike.begin])
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
        findings.append(
            _finding("loss spike", what, numbers, run, x, steps, spike, LOSS, deviations)
        )
    return findings


def find_gradient_spikes(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Spikes of the norm of all gradients."""
    if GRAD not in run.kinds:
        return []
    x = rows_of(run)
    norm = run.history.norm(GRAD)
    gradients = np.array(run.kinds) == GRAD
    series = log(norm)
    # An overflow is another finding, or a loss scale that is tried.
    series[np.isinf(x[:, gradients]).any(1) | _small_batches(run)] = math.nan
    deviations = thresholds.spike_deviations
    findings = []
    for spike in _found(run, series, thresholds.spike_gradient, thresholds):
        before, peak = math.exp(spike.typical), float(norm[spike.peak])
        numbers = {"before": before, "peak": peak, "times": peak / before}
        what = (
            f"The gradient's norm rose {rounded(numbers['times'])}-fold, from {before:.2g} to "
            f"{peak:.2g}, at step {run.steps[spike.begin]}"
        )
        findings.append(
            _finding(
                "gradient spike", what, numbers, run, x, run.steps, spike, GRADIENT, deviations
            )
        )
    return findings


def _found(run: Run, series: Array, factor: float, thresholds: Thresholds) -> list[Spike]:
    """Spikes of a series that no small batch explains."""
    found = find_spikes(series, math.log(factor), thresholds.spike_deviations)
    if ACTIVATION in run.kinds:
        return found
    least = math.log(factor * thresholds.spike_single)
    return [
        spike
        for spike in found
        if spike.end - spike.begin > 1
        or math.isinf(series[spike.begin])
        or series[spike.peak] - spike.typical > least
    ]


def _small_batches(run: Run) -> Array:
    """Records of batches that are smaller than most, ``(S,)``, where outputs tell their size."""
    outputs = run["numel"][:, np.array(run.kinds) == ACTIVATION]
    if not outputs.size:
        return np.zeros(len(run.steps), bool)
    usual = median(outputs.astype(np.float64))
    return np.asarray((outputs < _SMALL * usual).any(1))


def _finding(
    kind: str,
    what: str,
    numbers: dict[str, float],
    run: Run,
    x: Array,
    steps: Array,
    spike: Spike,
    phase: int,
    deviations: float,
) -> Finding:
    """A spike of a series, over its own steps, with what moved before it."""
    begin, last = int(steps[spike.begin]), int(steps[spike.end - 1])
    length = spike.end - spike.begin
    if spike.is_over:
        what += f", and was back after {length} step{'s' * (length > 1)}."
    elif length >= _LASTING:
        what += ", and has not come back."
    else:
        what += ", where the record ends." if length == 1 else ", and is not back at the end."
    record = int(np.searchsorted(run.steps, begin, "right")) - 1
    moved, together = find_movers(run, x, record, begin, phase, deviations)
    numbers |= {"recovered": float(spike.is_over), "moved": float(len(moved))}
    gradients = sum(run.kinds[mover.column] == GRAD for mover in together)
    if moved:
        first = moved[0]
        numbers |= {
            "first_step": float(run.steps[first.at]),
            "ahead": float(begin - run.steps[first.at]),
        }
        what += f" {tell(run, moved, begin)}"
    else:
        numbers |= {"first_step": float(begin), "ahead": 0.0}
        what += (
            f" No row had left its band before; {gradients} of {run.kinds.count(GRAD)} gradients "
            f"did with it"
        )
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


def _jumps(run: Run, x: Array, thresholds: Thresholds) -> list[Finding]:
    """Rows that leap out of their bands."""
    limits = {PARAM: thresholds.jump_weights, UPDATE: thresholds.jump, ACTIVATION: thresholds.jump}
    findings = []
    for column, kind in enumerate(run.kinds):
        if kind not in limits:
            continue
        limit = math.log(limits[kind])
        series = np.where(np.isinf(x[:, column]), math.nan, x[:, column])
        # Most rows never rise so far, and need no second look.
        if not (series - _least_before(series) >= limit).any():
            continue
        for spike in find_spikes(series, math.log(FLOORS[kind]), thresholds.spike_deviations):
            reached = series[spike.begin : min(spike.end, spike.begin + WINDOW)]
            over = float(np.nanmax(reached)) - spike.typical
            if over < limit:
                continue
            steps = int(run.steps[spike.begin]), int(run.steps[spike.end - 1])
            numbers = {"times": math.exp(over), "first_step": float(steps[0])}
            sentence = (
                f"{named(run, column)} left its band at step {steps[0]} and reached "
                f"{rounded(numbers['times'])} times its usual size"
            )
            sentence += ", and came back." if spike.is_over else "."
            layer = run.layers[column]
            findings.append(Finding("jump", "warning", layer, steps, numbers, sentence))
    return sorted(findings, key=lambda each: (each.steps[0], -each.numbers["times"]))


def _least_before(x: Array) -> Array:
    """Least of two windows of values before each one; infinite where there are none."""
    least: Array = np.fmin(_shifted(x, 1), _shifted(x, 2))
    size = 2
    while size < 2 * WINDOW:
        least = np.fmin(least, _shifted(least, size))
        size *= 2
    least[np.isnan(least)] = math.inf
    return least


def _shifted(x: Array, by: int) -> Array:
    return np.concatenate([np.full(min(by, len(x)), math.nan), x[:-by]])


def _apart(run: Run, found: list[Finding], others: list[Finding]) -> list[Finding]:
    """Findings that belong to none of the others, nor to one before them."""
    kept: list[Finding] = []
    for each in found:
        told = [*others, *kept]
        if not any(_reaches(run, other, each) for other in told):
            kept.append(each)
    return kept


def _reaches(run: Run, one: Finding, other: Finding) -> bool:
    """Whether the other begins with the one, before it is over, or soon after."""
    first, begins = np.searchsorted(
        run.steps, [one.numbers["first_step"], other.numbers["first_step"]]
    )
    last = np.searchsorted(run.steps, one.steps[1])
    return bool(first - APART <= begins <= last + WINDOW)
