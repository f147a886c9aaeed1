"""Dead units: those of a module that are zero for a whole batch."""

from __future__ import annotations

import math

import numpy as np

from gradstat.diagnosis.findings import Finding, Severity
from gradstat.diagnosis.run import Run
from gradstat.record import ACTIVATION, OF_PARAMETERS
from gradstat.thresholds import Thresholds
from gradstat.util import Array


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
            f"{least_part} of the {units[-1]} units of {run.names[column]} are zero for every "
            f"input of a batch, in each of {len(block)} records: they add nothing and do not learn."
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
        return np.nan_to_num(run.history.dead_units()[:, run.places])
    with np.errstate(divide="ignore", invalid="ignore"):
        places = outputs["numel"] / run["numel"]
        on = 1 - outputs["zeros"] / outputs["numel"]
        reached = -np.expm1(places * np.log1p(-on))
        dead = 1 - (1 - run.history.dead_units()[:, run.places]) / reached
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
