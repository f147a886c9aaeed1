"""Gradients that vanish or explode: over depth, over steps, or below a level."""

from __future__ import annotations

import math

import numpy as np

from gradstat.diagnosis.evidence import Evidence, around
from gradstat.diagnosis.findings import Finding, Severity, for_all, rounded
from gradstat.thresholds import Thresholds
from gradstat.util import Array, median

_LASTING = 3  # windows, at least, in which what is severe holds, or all of them
_START = 5  # windows in which a network that has just begun may find its way out


def _fit_depth(levels: Array) -> tuple[float, float, float]:
    """Slope and fall of a straight line through log10 rms over depth, and its R²."""
    # Decades from one layer to the next, and from the last one back to the first. Least squares
    # over the layers that have an rms, not NaN; NaN for fewer than three.
    present = np.flatnonzero(levels > 0)
    if len(present) < 3:
        return math.nan, math.nan, math.nan
    depth, log_rms = np.arange(len(present)), np.log10(levels[present])
    (spread, joint), (_, total) = np.cov(depth, log_rms).tolist()
    slope = joint / spread
    r2 = slope * joint / total if total > 0 else 0.0
    return slope, slope * (len(present) - 1), r2


def find_trend(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Vanishing or exploding over depth: a straight line through log rms against the layer."""
    slopes, falls, fits = np.array([_fit_depth(levels) for levels in run.levels]).T
    findings = []
    for kind, limit, sign in (
        ("vanishing", -math.log10(thresholds.vanishing_ratio), 1.0),
        ("exploding", math.log10(thresholds.exploding_ratio), -1.0),
    ):
        mask = (fits >= thresholds.depth_fit) & (sign * falls >= limit)
        # Few blocks from the first one on, and soon over, are how a network begins.
        start = int(np.append(mask, False).argmin())
        n_records = sum(len(block) for block in run.blocks[:start])
        if 2 * start <= len(mask) and n_records <= _START * thresholds.window:
            mask[:start] = False
        if not mask.any():
            continue
        at = int(np.argmax(np.where(mask, sign * falls, -math.inf)))
        slope, fall, levels = float(slopes[at]), float(falls[at]), run.levels[at]
        first, last = np.flatnonzero(levels > 0)[[0, -1]].tolist()
        ratio, times = _power_of_ten(-fall), _power_of_ten(abs(fall))
        numbers = {"ratio": ratio, "slope": slope, "fit": float(fits[at])}
        numbers |= {"rms": float(levels[first]), "rms_last": float(levels[last])}
        change = "shrinks" if kind == "vanishing" else "grows"
        sentence = (
            f"From {run.layers[last]} back to {run.layers[first]} the gradient {change} "
            f"{rounded(times)}-fold, by a factor of {_power_of_ten(abs(slope)):.2g} at each layer."
        )
        begin, end = around(mask, at)
        lasts = end - begin + 1 >= min(_LASTING, len(mask))
        severe = kind == "vanishing" and ratio <= thresholds.vanishing_severe and lasts
        severity: Severity = "severe" if severe else "warning"
        steps, layer = run.span(mask, at), run.layers[first]
        findings.append(Finding(kind, severity, layer, steps, numbers, sentence))
    return findings


def find_low(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Vanishing by level: layers whose rms is below Adam's epsilon."""
    findings = []
    for column, layer in enumerate(run.layers):
        levels = np.nan_to_num(run.levels[:, column], nan=math.inf)
        mask = levels < thresholds.vanishing_level
        if mask.any():
            at = int(levels.argmin())
            rms, steps = float(levels[at]), run.span(mask, at)
            sentence = (
                f"{layer}'s gradient has an rms of {rms:.1e}, below {thresholds.vanishing_level:g}:"
                f" Adam's epsilon outweighs it, and plain SGD hardly moves."
            )
            findings.append(Finding("vanishing", "severe", layer, steps, {"rms": rms}, sentence))
    return for_all(sorted(findings, key=lambda finding: finding.numbers["rms"]))


def find_large(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Exploding by level: layers whose rms no loss scale explains, from the start to the end."""
    findings = []
    start = median(run.part(np.arange(len(run.steps))[:3]).rms)
    for column, layer in enumerate(run.layers):
        levels = np.append(start[column], run.levels[:, column])
        if (np.nan_to_num(levels) > thresholds.exploding_level).all():
            rms = float(np.nanmax(run.levels[:, column]))
            sentence = (
                f"{layer}'s gradient has an rms of {rms:.1e}, above {thresholds.exploding_level:g}:"
                f" it explodes on its way back, as in a recurrent network over many steps; Adam "
                f"hides that, and clipping bounds it."
            )
            steps, numbers = run.all_steps, {"rms": rms}
            findings.append(Finding("exploding", "warning", layer, steps, numbers, sentence))
    return for_all(sorted(findings, key=lambda finding: -finding.numbers["rms"]))


def find_growth(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Exploding over steps: rms against its median so far, so that a slow start does not count."""
    n_records = len(run.steps)
    blocks = np.array_split(np.arange(n_records), min(n_records, 256))
    single = run.by_block(lambda part: part.rms, median, blocks)
    so_far = np.stack([median(single[: max(1, t)]) for t in range(len(single))])
    rms = single
    if len(single) == n_records:
        rms = np.stack([median(single[max(0, t - 2) : t + 1]) for t in range(len(single))])
    with np.errstate(over="ignore"):  # of float64; the largest number takes the place of infinity
        growth = np.nan_to_num(rms / so_far)
    growth[:3] = 0  # too few to compare with
    growth[np.isnan(single)] = 0  # a record without an rms would show those before it
    findings = []
    for column, layer in enumerate(run.layers):
        at = int(growth[:, column].argmax())
        times = float(growth[at, column])
        if times < thresholds.exploding_growth:
            continue
        first, last = around(growth[:, column] >= thresholds.exploding_growth, at)
        steps = (int(run.steps[blocks[first][0]]), int(run.steps[blocks[last][-1]]))
        before, now = float(so_far[at, column]), float(rms[at, column])
        numbers = {"growth": times, "rms": now, "rms_before": before}
        sentence = (
            f"{layer}'s gradient grew {rounded(times)}-fold, from an rms of {before:.1e} to "
            f"{now:.1e} at step {run.steps[blocks[at][-1]]}."
        )
        severity: Severity = "severe" if times >= thresholds.exploding_severe else "warning"
        findings.append(Finding("exploding", severity, layer, steps, numbers, sentence))
    return for_all(sorted(findings, key=lambda finding: -finding.numbers["growth"]))


def _power_of_ten(exponent: float) -> float:
    """10 to that power, or the nearest to it that float64 holds."""
    return float(10.0 ** min(max(exponent, -323.0), 308.0))
