"""The order of findings: the worst first, and after a cause what followed it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from gradstat.diagnosis.findings import FINDINGS, SEVERITIES, Finding
from gradstat.history import History

# These begin at a step; the others with the window of records that shows them.
_SUDDEN = ("non-finite", "loss spike", "gradient spike", "jump")


def put_in_order(findings: list[Finding], history: History, window: int) -> list[Finding]:
    """Put the worst first; but what began after something sudden comes after it, and says so.

    Args:
        findings: in any order.
        history: whose they are.
        window: records for which something that is over may have consequences.
    """
    sudden = sorted(
        (each for each in findings if each.kind in _SUDDEN),
        key=lambda each: (began(each), FINDINGS.index(each.kind)),
    )
    groups: dict[int, list[Finding]] = {}
    for each in sorted(findings, key=_rank):
        cause = next((one for one in sudden if _follows(each, one, history, window)), None)
        if cause is None:
            groups.setdefault(id(each), []).insert(0, each)
        else:
            # A cause is nobody's consequence: the earliest of a chain is taken.
            after = f"{cause.kind} at step {began(cause):.0f}"
            groups.setdefault(id(cause), []).append(replace(each, after=after))
    ordered = sorted(groups.values(), key=lambda group: min(map(_rank, group)))
    return [finding for group in ordered for finding in group]


def began(finding: Finding) -> float:
    """The step at which something sudden began: where the first row moved."""
    return finding.numbers.get("first_step", float(finding.steps[0]))


def _follows(finding: Finding, cause: Finding, history: History, window: int) -> bool:
    if finding is cause or finding.severity == "note":
        return False
    order = began(finding), FINDINGS.index(finding.kind)
    if finding.kind in _SUDDEN and order < (began(cause), FINDINGS.index(cause.kind)):
        return False
    steps = history.steps
    first, begins = np.searchsorted(steps, [began(cause), finding.steps[0]])
    is_over = cause.numbers.get("recovered", 0.0) or cause.severity == "warning"
    last = np.searchsorted(steps, cause.steps[1]) + window if is_over else math.inf
    # Other findings begin with the window of records around it, but for one at the very start.
    early = 0 if finding.kind in _SUDDEN else window - 1
    return bool(max(first - early, min(first, 1)) <= begins <= last)


def _rank(finding: Finding) -> tuple[int, int]:
    return SEVERITIES.index(finding.severity), FINDINGS.index(finding.kind)
