"""Layers that do not move: how far a step changes the weights."""

from __future__ import annotations

import math

import numpy as np

from gradstat.diagnosis.findings import Finding, Severity
from gradstat.diagnosis.run import Run, median
from gradstat.record import GRAD, PARAM
from gradstat.thresholds import Thresholds
from gradstat.util import Array

_PERSISTENT = 3  # windows in a row, at least, in which a layer stands still
_STEADY = 2.0  # a line from zero or to zero changes threefold between its halves
_ROUNDED = 0.9  # share of elements that do not change at all


def find_stuck(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Layers that do not move: most of them from the start, or some while the others do."""
    if len(run.history) < run.window or PARAM not in run.history.kinds:
        return []
    ratio = _ratio(run)
    # The largest step of each block: what moves now and then is not stuck.
    steps = np.stack([np.fmax.reduce(ratio[block]) for block in run.blocks])
    pace = median(np.where(np.isinf(steps), math.nan, steps).T)
    early, late = _speeds(ratio)
    if late > _STEADY * early:
        return []  # a learning rate that warms up
    if (pace < thresholds.stuck_ratio).all():
        is_ending = early > _STEADY * late
        return [] if is_ending else [_all_stuck(run, steps, pace, thresholds)]
    if rounded := _most_rounded(run):
        return [rounded]
    # Where a schedule has slowed down all layers, none is stuck.
    usual = max(median(pace[:, None])[0] / 2, np.fmax.reduce(pace) / 10)
    going = np.flatnonzero(pace >= usual)
    limit = np.minimum(thresholds.stuck_ratio, thresholds.stuck_pace * pace)
    return _stuck_alone(run, steps, pace, going, steps < limit[:, None])


def _ratio(run: Run) -> Array:
    """`History.update_ratio`, 0 for weights of zero that stay so: ``(S, L)``."""
    ratio = run.history.update_ratio()[:, run.places]
    return np.where((run["numel"] > 0) & (run["zeros"] == run["numel"]), 0.0, ratio)


def _speeds(ratio: Array) -> tuple[float, float]:
    """The median layer's steps in the first half of the records, and in the second."""
    by_record = median(ratio.T)[:, None]
    half = len(by_record) // 2
    return float(median(by_record[:half])[0]), float(median(by_record[half:])[0])


def _all_stuck(run: Run, steps: Array, pace: Array, thresholds: Thresholds) -> Finding:
    """Most layers, where the median layer has not moved from the start."""
    stuck = np.flatnonzero(np.fmax.reduce(steps) < thresholds.stuck_ratio)
    zeros = _unchanged(run, slice(None), stuck)
    ratio, layer = float(pace.max()), run.names[int(stuck[0])]
    numbers = {"ratio": ratio, "zeros": zeros, "layers": float(len(stuck))}
    more = f" and {len(stuck) - 1} more of {len(run.layers)} layers" if len(stuck) > 1 else ""
    have = "has" if len(stuck) == 1 else "have"
    size = f"by {ratio:.1e} of its size at most" if ratio else "by nothing"
    rounded = zeros >= _ROUNDED
    why = _why(zeros) if rounded else "the learning rate is far too small"
    sentence = (
        f"{layer}{more} {have} not moved from the first record on: a step changes the median layer "
        f"{size}; {why}."
    )
    severe = rounded and len(run.blocks) >= _PERSISTENT
    severity: Severity = "severe" if severe else "warning"
    span = run.steps_of(0, len(run.blocks) - 1)
    return Finding("stuck", severity, run.layers[stuck[0]], span, numbers, sentence)


def _most_rounded(run: Run) -> Finding | None:
    """Most layers, where nearly all elements that have a gradient stay as they are all the time."""
    gradients = Run(run.history, run.window, GRAD)
    if len(run.blocks) < _PERSISTENT or gradients.layers != run.names:
        return None
    free = gradients["numel"] - gradients["zeros"]
    kept = (run["zeros"] - (run["numel"] - free)).clip(0)
    shares = np.where(free > 0, kept / np.maximum(free, 1), math.nan)
    least = np.stack([median(shares[block]) for block in run.blocks]).min(0)
    rounded = np.flatnonzero(least >= _ROUNDED)
    if 2 * len(rounded) <= len(run.layers):
        return None
    layer = int(rounded[least[rounded].argmax()])
    numbers = {"zeros": float(least[layer]), "layers": float(len(rounded))}
    sentence = (
        f"Most layers hardly learn, {run.names[layer]} and {len(rounded) - 1} more of "
        f"{len(run.layers)}: at least {_percent(least[rounded].min())} of their "
        f"elements that have a gradient stay as they are; the changes round to nothing in the type "
        f"of the weights."
    )
    span = run.steps_of(0, len(run.blocks) - 1)
    return Finding("stuck", "warning", run.layers[layer], span, numbers, sentence)


def _stuck_alone(run: Run, steps: Array, pace: Array, going: Array, still: Array) -> list[Finding]:
    """Layers that stand still in the last of the blocks in which others go on."""
    if not len(going):
        return []
    least = max(min(_PERSISTENT, len(going)), math.ceil(len(going) / 4))
    gradients = Run(run.history, run.window, GRAD)
    findings = []
    for column in np.flatnonzero(still[going[-least:]].all(0)).tolist():
        moved = np.flatnonzero(~still[going, column])
        blocks = going[moved[-1] + 1 if len(moved) else 0 :]
        records = np.concatenate([run.blocks[block] for block in blocks])
        if _is_zero(gradients, run.names[column], records):
            continue
        numbers = {
            "ratio": float(steps[blocks, column].max()),
            "pace": float(np.median(pace[blocks])),
            "zeros": _unchanged(run, records, column),
        }
        ratio = numbers["ratio"]
        size = f"by {ratio:.1e} of its size at most" if ratio else "by nothing"
        sentence = (
            f"{run.names[column]} stands still while others move: a step changes it {size}, the "
            f"median layer by {numbers['pace']:.1e} of its size"
        )
        if numbers["zeros"] >= _ROUNDED:
            sentence += f"; {_why(numbers['zeros'])}"
        span = run.steps_of(int(blocks[0]), int(blocks[-1]))
        findings.append(
            Finding("stuck", "warning", run.layers[column], span, numbers, sentence + ".")
        )
    return sorted(findings, key=lambda finding: finding.numbers["ratio"])


def _is_zero(gradients: Run, name: str, records: Array) -> bool:
    """Whether a layer's gradient is known to be all zeros, which `find_dead` says."""
    if name not in gradients.layers:
        return False
    at = gradients.layers.index(name)
    return bool((gradients["zeros"][records, at] == gradients["numel"][records, at]).all())


def _unchanged(run: Run, records: Array | slice, columns: Array | int) -> float:
    """Share of some layers' elements that a step leaves as they are."""
    zeros, numel = (run[name][records][:, columns].sum() for name in ("zeros", "numel"))
    return float(zeros / max(numel, 1))


def _why(zeros: float) -> str:
    share = "all" if zeros == 1 else _percent(zeros)
    return (
        f"{share} of the elements do not change at all: the changes round to nothing in the type "
        f"of the weights, or the learning rate is 0"
    )


def _percent(share: float) -> str:
    # Rounded down: almost all is not 100%.
    return f"{math.floor(share * 1000) / 10:g}%"
