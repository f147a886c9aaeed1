"""Rules of `diagnosis.diagnose` about more than gradients: NaN anywhere, updates, units."""

from __future__ import annotations

import math

import numpy as np

from gradstat.diagnosis import Finding, Severity, Thresholds
from gradstat.kinds import ACTIVATION, GRAD, GRAD_OUTPUT, OF_PARAMETERS, PARAM, UNIT, UPDATE
from gradstat.series import Array
from gradstat.windows import Run

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
        findings.append(_origin(run, forward, _FORWARD, thresholds, n_records))
    if earlier < first:
        # What follows NaN in the forward pass is no finding of its own.
        end = n_records if spoilt else first
        findings.append(_origin(run, backward[:end], _BACKWARD, thresholds, end))
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


def _origin(
    run: Run, bad: Array, kinds: tuple[str, ...], thresholds: Thresholds, n_records: int
) -> Finding:
    """The row that was reached first in the first record with any."""
    records = np.flatnonzero(bad.any(1))
    at, column = int(records[0]), 0
    kind = next(each for each in kinds if (bad[records[0]] & np.isin(run.kinds, each)).any())
    columns = np.flatnonzero(bad[at] & np.isin(run.kinds, kind)).tolist()
    column = columns[-1] if kind in (GRAD, GRAD_OUTPUT) else _innermost(run, columns)
    passing = records[-1] < n_records - 1 and len(records) <= thresholds.nonfinite_share * n_records
    numbers = {name: float(run[name][at, column]) for name in ("nan", "posinf", "neginf", "numel")}
    numbers |= {"records": float(len(records)), "layers": float(len(columns))}
    others = len(columns) - 1
    rest = f", before {others} other {_OTHERS.get(kind, 'layer')}{'s' * (others > 1)}"
    sentence = (
        f"{_FIRST_MET[kind].format(run.name(column))}, at step {run.steps[at]}"
        f"{rest * (others > 0)}: {numbers['nan']:.0f} NaN and "
        f"{numbers['posinf'] + numbers['neginf']:.0f} infinite of {numbers['numel']:.0f} elements; "
        f"{len(records)} of {n_records} records have some"
        + ", the newest none" * bool(passing)
        + ", as when a loss scale is tried" * bool(passing and kind in (GRAD, GRAD_OUTPUT))
        + "."
    )
    steps = (int(run.steps[at]), int(run.steps[records[-1]]))
    severity: Severity = "warning" if passing else "severe"
    return Finding("non-finite", severity, run.layers[column], steps, numbers, sentence)


def _innermost(run: Run, columns: list[int]) -> int:
    """The first of some rows, or what is inside it: a module comes before its parts."""
    found, *rest = columns
    for column in rest:
        if run.name(column).startswith(f"{run.name(found)}."):
            found = column
    return found


def find_dead_units(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Modules with many units that were zero for a whole batch, in each record of a window."""
    share = _dead(run)
    if len(share) < run.window:
        return []
    floors = np.stack([share[block].min(0) for block in run.blocks])
    findings = []
    for column in range(_first_with_parameters(run), len(run.layers)):
        mask = floors[:, column] >= thresholds.dead_units_share
        if not mask.any():
            continue
        at = int(np.flatnonzero(mask)[-1])
        block = run.blocks[at]
        zeros, units = run["zeros"][block, column], run["numel"][block, column]
        least = float((zeros / units).min())
        severe = at == len(mask) - 1 and least >= thresholds.dead_units_severe
        least_part = "All" if least == 1 else f"At least {math.floor(least * 100)}%"
        sentence = (
            f"{least_part} of the {units[-1]} units of {run.name(column)} are zero for every input "
            f"of a batch, in each of {len(block)} records: they add nothing and do not learn."
        )
        numbers = {"share": least, "units": float(units[-1])}
        severity: Severity = "severe" if severe else "warning"
        steps = run.span(mask, at)
        findings.append(
            Finding("dead units", severity, run.layers[column], steps, numbers, sentence)
        )
    return sorted(findings, key=lambda finding: -finding.numbers["share"])


def _dead(run: Run) -> Array:
    """Share of dead units among those that a batch should reach: ``(S, L)``; 0 where absent.

    Were all units on equally often, a share of 1 - z of the time, one of them would be zero in all
    of a batch's N places with probability z to the N: almost never in a large batch, but where a
    batch is a single input all of its zeros are that.
    """
    outputs = Run(run.history, run.window, ACTIVATION)
    if not outputs.layers:
        return np.nan_to_num(run.history.dead_units())
    with np.errstate(divide="ignore", invalid="ignore"):
        places = outputs["numel"] / run["numel"]
        on = 1 - outputs["zeros"] / outputs["numel"]
        reached = -np.expm1(places * np.log1p(-on))
        dead = 1 - (1 - run.history.dead_units()) / reached
    dead = np.where((reached == 0) & (run["numel"] > 0), 1.0, dead)
    return np.nan_to_num(dead)


def _first_with_parameters(run: Run) -> int:
    """The first column of a module that has parameters: before it is the input, zero as it may be.

    0 where no module is known to have any.
    """
    owners = set()
    for kind in OF_PARAMETERS:
        parameters = Run(run.history, run.window, kind)
        owners |= {name.rpartition(".")[0] for name in parameters.names}
    return next((at for at, module in enumerate(run.names) if module in owners), 0)
