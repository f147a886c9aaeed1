"""The rules behind `diagnosis.diagnose`: each reads a `Run` and returns findings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from gradstat.diagnosis import Finding, Severity, Thresholds
from gradstat.series import Array
from gradstat.statistics import Statistics
from gradstat.windows import Run, around, fit_depth, median

FLOAT16_MAX = 65504.0
NARROW = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


def find_nonfinite(run: Run, thresholds: Thresholds) -> list[Finding]:
    """NaN or infinities: the layer that backward reached first in the first step with any."""
    h = run.history
    bad = h["numel"] - h["finite"] > 0
    records = np.flatnonzero(bad.any(1))
    if not len(records):
        return []
    at, layer = records[0], int(np.flatnonzero(bad[records[0]])[-1])
    passing = records[-1] < len(h) - 1 and len(records) <= thresholds.nonfinite_share * len(h)
    numbers = {name: float(h[name][at, layer]) for name in ("nan", "posinf", "neginf", "numel")}
    numbers |= {"records": float(len(records)), "layers": float(bad[at].sum())}
    others = int(bad[at].sum()) - 1
    rest = f", before {others} other layer{'s' * (others > 1)}" if others else ""
    sentence = (
        f"{run.layers[layer]} is where backward first met NaN or infinity, at step "
        f"{run.steps[at]}{rest}: {numbers['nan']:.0f} NaN and "
        f"{numbers['posinf'] + numbers['neginf']:.0f} infinite of {numbers['numel']:.0f} elements; "
        f"{len(records)} of {len(h)} records have some"
        + (", the newest none, as when a loss scale is tried." if passing else ".")
    )
    steps = (int(run.steps[at]), int(run.steps[records[-1]]))
    severity: Severity = "warning" if passing else "severe"
    return [Finding("non-finite", severity, run.layers[layer], steps, numbers, sentence)]


def find_trend(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Vanishing or exploding over depth: a straight line through log rms against the layer."""
    fits = [fit_depth(levels) for levels in run.levels]
    fall = np.array([fit.fall if fit else math.nan for fit in fits])
    straight = np.array([fit is not None and fit.r2 >= thresholds.depth_fit for fit in fits])
    findings = []
    for kind, limit, sign in (
        ("vanishing", -math.log10(thresholds.vanishing_ratio), 1.0),
        ("exploding", math.log10(thresholds.exploding_ratio), -1.0),
    ):
        mask = straight & (sign * fall >= limit)
        if not mask.any():
            continue
        at = int(np.argmax(np.where(mask, sign * fall, -math.inf)))
        fit = fits[at]
        assert fit is not None
        ratio = 10.0**-fit.fall
        first, last = run.layers[fit.first], run.layers[fit.last]
        numbers = {
            "ratio": ratio,
            "slope": fit.slope,
            "fit": fit.r2,
            "rms": float(run.levels[at, fit.first]),
            "rms_last": float(run.levels[at, fit.last]),
        }
        times = 10 ** abs(fit.fall)
        change = "shrinks" if kind == "vanishing" else "grows"
        sentence = (
            f"From {last} back to {first} the gradient {change} {_round(times)}-fold, by a factor "
            f"of {10 ** abs(fit.slope):.2g} at each layer."
        )
        severe = kind == "vanishing" and ratio <= thresholds.vanishing_severe
        severity: Severity = "severe" if severe else "warning"
        findings.append(Finding(kind, severity, first, run.span(mask, at), numbers, sentence))
    return findings


def find_low(run: Run, thresholds: Thresholds) -> list[Finding]:
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
    return sorted(findings, key=lambda finding: finding.numbers["rms"])


def find_growth(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Exploding over steps: rms against its median so far, so that a slow start does not count."""
    blocks = np.array_split(np.arange(len(run.rms)), min(len(run.rms), 256))
    single = np.stack([median(run.rms[block]) for block in blocks])
    so_far = np.stack([median(single[: max(1, t)]) for t in range(len(single))])
    rms = single
    if len(single) == len(run.rms):
        rms = np.stack([median(single[max(0, t - 2) : t + 1]) for t in range(len(single))])
    growth = np.nan_to_num(rms / so_far)
    growth[:3] = 0  # too few to compare with
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
            f"{layer}'s gradient grew {_round(times)}-fold, from an rms of {before:.1e} to "
            f"{now:.1e} at step {run.steps[blocks[at][-1]]}."
        )
        severity: Severity = "severe" if times >= thresholds.exploding_severe else "warning"
        findings.append(Finding("exploding", severity, layer, steps, numbers, sentence))
    return sorted(findings, key=lambda finding: -finding.numbers["growth"])


def find_dead(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Layers whose whole gradient is zero in a window of records."""
    h = run.history
    zero = (h["numel"] > 0) & (h["zeros"] == h["numel"])
    by_block = np.stack([zero[block].all(0) for block in run.blocks])
    findings = []
    for column in np.flatnonzero(by_block.any(0)).tolist():
        mask = by_block[:, column]
        at = int(np.flatnonzero(mask)[-1])
        records = int(zero[:, column].sum())
        lasting = at == len(mask) - 1 and len(h) >= thresholds.window
        sentence = (
            f"All {h['numel'][:, column].max()} elements of {run.layers[column]}'s gradient are "
            f"zero in {records} of {len(h)} records: it does not learn."
        )
        numbers = {"records": float(records), "zeros": float(h["zeros"][:, column].max())}
        severity: Severity = "severe" if lasting else "warning"
        steps = run.span(mask, at)
        findings.append(Finding("dead", severity, run.layers[column], steps, numbers, sentence))
    return findings


def find_saturation(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Layers in which most elements that are not zero lie many octaves below the layer's rms."""
    shares = [_stopped(record, thresholds.saturation_octaves) for _, record in run.samples]
    times = 2.0**thresholds.saturation_octaves
    return [
        Finding(
            "saturation",
            "warning",
            each.layer,
            each.steps,
            {"share": each.share},
            f"{each.share:.0%} of the non-zero elements of {each.layer}'s gradient are more than "
            f"{times:.0f} times smaller than its rms: the units they belong to hardly learn.",
        )
        for each in run.lasting(shares, thresholds.saturation_share)
    ]


def find_underflow(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Layers of which float16 would flush much; a note on all narrow types where it would not."""
    if not run.samples:
        return []
    flushed = {
        name: np.stack([record.underflow(dtype).numpy() for _, record in run.samples])
        for name, dtype in NARROW.items()
    }
    findings = []
    for each in run.lasting(list(flushed["float16"]), thresholds.underflow_share):
        numbers = _worst(flushed, run.layers.index(each.layer))
        sentence = (
            f"float16 without a loss scale would flush {each.share:.0%} of {each.layer}'s gradient "
            f"to zero, bfloat16 {numbers['bfloat16']:.0%}."
        )
        findings.append(Finding("underflow", "warning", each.layer, each.steps, numbers, sentence))
    if findings:
        return findings
    by_layer = [_worst(flushed, column) for column in range(len(run.layers))]
    column = max(range(len(by_layer)), key=lambda c: tuple(by_layer[c].values()))
    numbers = by_layer[column]
    listed = ", ".join(f"{name} {share:.2g}" for name, share in numbers.items())
    return [
        Finding(
            "underflow",
            "note",
            run.layers[column],
            (int(run.steps[0]), int(run.steps[-1])),
            numbers,
            f"Largest share of {run.layers[column]}'s gradient that a narrow type would flush to "
            f"zero, with no loss scale: {listed}.",
        )
    ]


def find_scale(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Largest magnitudes against float16's range, and the loss scales that would fit."""
    sizes = np.nan_to_num(run.history["abs_max"])
    by_record = sizes.max(1)
    at = int(by_record.argmax())
    largest = float(by_record[at])
    if largest == 0:
        return []
    layer = run.layers[int(sizes[at].argmax())]
    highest = math.floor(math.log2(FLOAT16_MAX / thresholds.float16_headroom / largest))
    numbers = {"abs_max": largest, "log2_highest_scale": float(highest)}
    if largest * thresholds.float16_headroom > FLOAT16_MAX:
        mask = by_record * thresholds.float16_headroom > FLOAT16_MAX
        steps = tuple(int(run.steps[i]) for i in around(mask, at))
        sentence = (
            f"{layer}'s gradient reaches {largest:.3g}, and float16 ends at 65504: in float16 the "
            f"loss scale is 2**{-highest} too high."
        )
        return [Finding("scale", "warning", layer, (steps[0], steps[1]), numbers, sentence)]
    by_block = np.array([by_record[block].max() for block in run.blocks])
    mask = (by_block > 0) & (by_block < thresholds.float16_floor)
    if mask.any():
        low = int(np.argmin(np.where(mask, by_block, math.inf)))
        top = float(by_block[low])
        numbers["abs_max"] = top
        column = int(sizes[run.blocks[low]].max(0).argmax())
        sentence = (
            f"The largest gradient is {top:.1e}, in {run.layers[column]}, where float16 has lost "
            f"digits already: in float16 the loss needs a scale, at most 2**{highest}."
        )
        span = run.span(mask, low)
        return [Finding("scale", "warning", run.layers[column], span, numbers, sentence)]
    sentence = (
        f"The largest gradient is {largest:.3g}, in {layer}: for float16 a loss scale of up to "
        f"2**{highest} fits."
    )
    steps = (int(run.steps[0]), int(run.steps[-1]))
    return [Finding("scale", "note", layer, (steps[0], steps[1]), numbers, sentence)]


def _stopped(record: Statistics, octaves: float) -> Array:
    """Share, ``(L,)``, of the elements that are not zero whose bin is so far below the rms."""
    edges = record.edges.numpy()
    outer = np.maximum(np.abs(edges[1:]), np.abs(edges[:-1]))
    limit = np.nan_to_num(record.rms.numpy()) * 2.0**-octaves
    zeros, finite = record.zeros.numpy(), record.finite.numpy()
    below = np.where(outer <= limit[:, None], record.counts.numpy(), 0).sum(1)
    # Zeros are in a bin with the smallest numbers, which is counted only where it is so far below.
    smallest = limit >= outer[len(outer) // 2]
    share: Array = (below - zeros * smallest) / np.maximum(finite - zeros, 1)
    return share


def _round(times: float) -> str:
    """Three digits, and no exponent up to a million."""
    rounded = float(f"{times:.3g}")
    return f"{rounded:,.0f}" if 100 <= rounded < 1e6 else f"{rounded:.3g}"


def _worst(flushed: dict[str, Array], column: int) -> dict[str, float]:
    return {name: float(shares[:, column].max()) for name, shares in flushed.items()}


Rule: TypeAlias = Callable[[Run, Thresholds], list[Finding]]
RULES: tuple[Rule, ...] = (
    find_nonfinite,
    find_growth,
    find_trend,
    find_low,
    find_dead,
    find_saturation,
    find_underflow,
    find_scale,
)
