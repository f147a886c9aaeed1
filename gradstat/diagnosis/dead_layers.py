"""Layers whose gradient is all zero, and layers that have none."""

from __future__ import annotations

import numpy as np

from gradstat.diagnosis.findings import Finding, Severity
from gradstat.diagnosis.run import Run
from gradstat.thresholds import Thresholds


def find_dead(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Layers whose whole gradient is zero in a window of records."""
    numel, zeros = run["numel"], run["zeros"]
    zero = (numel > 0) & (zeros == numel)
    by_block = np.stack([zero[block].all(0) for block in run.blocks])
    findings = []
    for column in np.flatnonzero(by_block.any(0)).tolist():
        mask = by_block[:, column]
        at = int(np.flatnonzero(mask)[-1])
        records = int(zero[:, column].sum())
        lasting = at == len(mask) - 1 and len(zero) >= thresholds.window
        sentence = (
            f"All {numel[:, column].max()} elements of {run.layers[column]}'s gradient are "
            f"zero in {records} of {len(zero)} records: it does not learn."
        )
        numbers = {"records": float(records), "zeros": float(zeros[:, column].max())}
        severity: Severity = "severe" if lasting else "warning"
        steps = run.span(mask, at)
        findings.append(Finding("dead", severity, run.layers[column], steps, numbers, sentence))
    return findings


def find_absent(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Layers without a gradient in any record of a window or more: one note for all of them."""
    never = np.flatnonzero((run["numel"] == 0).all(0)).tolist()
    if not never or len(never) == len(run.layers) or len(run.steps) < thresholds.window:
        return []
    first, n = run.layers[never[0]], len(never) - 1
    others = f", nor {'do' if n > 1 else 'does'} {n} other{'s' * (n > 1)}" if n else ""
    sentence = (
        f"{first} has no gradient in any of {len(run.steps)} records{others}: frozen, or the loss "
        f"does not depend on it."
    )
    steps = int(run.steps[0]), int(run.steps[-1])
    return [Finding("no gradient", "note", first, steps, {"layers": n + 1.0}, sentence)]
