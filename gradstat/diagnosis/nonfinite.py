"""NaN and infinities in rows of any kind: where a step first met them, and what made them."""

from __future__ import annotations

import numpy as np

from gradstat.diagnosis.findings import Finding, Severity
from gradstat.diagnosis.run import Run, is_loss
from gradstat.record import ACTIVATION, FROM_THE_END, GRAD, GRAD_OUTPUT, PARAM, UNIT, UPDATE
from gradstat.thresholds import Thresholds
from gradstat.util import Array

# In the order in which a step computes them; the peaks of units are those of activations.
_FORWARD, _BACKWARD = (PARAM, ACTIVATION), (GRAD_OUTPUT, GRAD, UPDATE)
_FIRST_MET = {
    PARAM: "{} is the first parameter with NaN or infinity in it",
    ACTIVATION: "{}'s output is the first, in the order of the modules, with NaN or infinity",
    GRAD_OUTPUT: "The gradient of {}'s output is the first, from the last module back, with NaN or "
    "infinity",
    GRAD: "{} is where backward first met NaN or infinity",
    UPDATE: "{} is the first parameter whose change has NaN or infinity in it",
}
_OTHERS = {PARAM: "parameter", ACTIVATION: "module", GRAD_OUTPUT: "module", UPDATE: "parameter"}


def find_nonfinite(run: Run, thresholds: Thresholds) -> list[Finding]:
    """NaN or infinities: where they come from, before the gradients if there are earlier ones."""
    bad = _broken(run)
    n_records = len(bad)
    forward, backward = (bad & np.isin(run.kinds, kinds) for kinds in (_FORWARD, _BACKWARD))
    broken = [np.flatnonzero(each.any(1)) for each in (forward, backward)]
    first, earlier = (int(each[0]) if len(each) else n_records for each in broken)
    if first == earlier == n_records:
        return []
    findings = []
    spoilt = 0 < first < n_records and backward[first - 1].any()
    if first < n_records and not spoilt:
        findings.append(_where_met(run, forward, _FORWARD, thresholds, n_records))
    if earlier < first:
        # What follows NaN in the forward pass is no finding of its own.
        end = n_records if spoilt else first
        findings.append(_where_met(run, backward[:end], _BACKWARD, thresholds, end))
    return findings


def _broken(run: Run) -> Array:
    """Whether a row has NaN, or infinities that mean something: ``(S, L)``."""
    bad: Array = run["numel"] - run["finite"] > 0
    bad &= ~np.isin(run.kinds, UNIT)
    # Masks of attention hold infinities while all is well.
    harmless = bad & np.isin(run.kinds, _FORWARD) & (run["nan"] == 0)
    well = ~(bad & ~harmless).any(1)
    bad &= ~(harmless & harmless[well].any(0))
    return bad


def _where_met(
    run: Run, bad: Array, kinds: tuple[str, ...], thresholds: Thresholds, n_records: int
) -> Finding:
    """The row that was reached first in the first record with any."""
    records = np.flatnonzero(bad.any(1))
    at, column = int(records[0]), 0
    kind = next(each for each in kinds if (bad[records[0]] & np.isin(run.kinds, each)).any())
    columns = np.flatnonzero(bad[at] & np.isin(run.kinds, kind)).tolist()
    column = _first(run, kind, columns)
    passing = records[-1] < n_records - 1 and len(records) <= thresholds.nonfinite_share * n_records
    numbers = {name: float(run[name][at, column]) for name in ("nan", "posinf", "neginf", "numel")}
    numbers |= {"records": float(len(records)), "layers": float(len(columns))}
    others = len(columns) - 1
    rest = f", before {others} other {_OTHERS.get(kind, 'layer')}{'s' * (others > 1)}"
    sentence = (
        f"{_FIRST_MET[kind].format(run.names[column])}, at step {run.steps[at]}"
        f"{rest * (others > 0)}: {numbers['nan']:.0f} NaN and "
        f"{numbers['posinf'] + numbers['neginf']:.0f} infinite of {numbers['numel']:.0f} elements; "
        f"{len(records)} of {n_records} records have some"
        + ", the newest none" * bool(passing)
        + ", as when a loss scale is tried" * bool(passing and kind in (GRAD, GRAD_OUTPUT))
        + "."
    )
    if kind in (GRAD, GRAD_OUTPUT) and not passing:
        sentence += _what_made_it(run, at, column)
    steps = (int(run.steps[at]), int(run.steps[records[-1]]))
    severity: Severity = "warning" if passing else "severe"
    return Finding("non-finite", severity, run.layers[column], steps, numbers, sentence)


def _first(run: Run, kind: str, columns: list[int]) -> int:
    """The row that is computed first, of some rows of a kind in the order of their depth."""
    if kind in FROM_THE_END:
        return columns[-1]
    # A module is seen after its parts, but registered before them.
    return columns[0] if run.history.depth is not None else _innermost(run, columns)


def _what_made_it(run: Run, at: int, column: int) -> str:
    """What made NaN that backward met at once, in the last row of its kind; else ""."""
    kinds, present = np.array(run.kinds), run["numel"][at] > 0
    if column != np.flatnonzero((kinds == run.kinds[column]) & present)[-1]:
        return ""
    lost = _lost(run, at)
    if (present & (kinds == ACTIVATION)).any():
        return f" All outputs are finite in that step{lost}: the loss made it, not a layer."
    return (
        f" Backward computes that gradient first{lost}: the forward pass or the loss made it, not "
        f"this layer; what=('grad', 'activation') shows where."
    )


def _lost(run: Run, at: int) -> str:
    """The loss in a record's step, in words, if it was not finite; else ""."""
    for name in filter(is_loss, run.history.scalars):
        steps, values = run.history.scalar(name)
        here = values[steps == run.steps[at]]
        if len(here) and not np.isfinite(here).all():
            return f" and {name} is {here[~np.isfinite(here)][0]}"
    return ""


def _innermost(run: Run, columns: list[int]) -> int:
    """The first of some rows, or what is inside it: a module comes before its parts."""
    found, *rest = columns
    for column in rest:
        if run.names[column].startswith(f"{run.names[found]}."):
            found = column
    return found
