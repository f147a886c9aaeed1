"""`diagnose`: what is wrong with a run, in findings, the worst first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from gradstat.diagnosis import narrow_formats, not_learning, vanishing_exploding
from gradstat.diagnosis.divergence import find_instability
from gradstat.diagnosis.evidence import Evidence
from gradstat.diagnosis.findings import FINDINGS, SEVERITIES, Finding, Severity, put_in_order
from gradstat.diagnosis.nonfinite import find_nonfinite
from gradstat.diagnosis.spikes import find_all_spikes
from gradstat.history import History, check_history
from gradstat.record import ACTIVATION, GRAD, UNIT, UPDATE
from gradstat.thresholds import Thresholds

__all__ = ["FINDINGS", "SEVERITIES", "Finding", "Severity", "Thresholds", "diagnose"]

_Rule: TypeAlias = Callable[[Evidence, Thresholds], list[Finding]]
# By the kind of the rows that a rule reads; ``None``: all rows.
_RULES: dict[str | None, tuple[_Rule, ...]] = {
    None: (
        find_nonfinite,
        find_all_spikes,
        find_instability,
        narrow_formats.find_format_losses,
        narrow_formats.find_narrowest,
    ),
    GRAD: (
        vanishing_exploding.find_growth,
        vanishing_exploding.find_large,
        vanishing_exploding.find_trend,
        vanishing_exploding.find_low,
        not_learning.find_dead,
        not_learning.find_absent,
        not_learning.find_saturation,
        narrow_formats.find_underflow,
        narrow_formats.find_scale,
    ),
    UPDATE: (not_learning.find_stuck,),
    UNIT: (not_learning.find_dead_units,),
    ACTIVATION: (narrow_formats.find_outliers, not_learning.find_saturated_outputs),
}


def diagnose(history: History, thresholds: Thresholds | None = None) -> list[Finding]:
    """Findings, the worst first, by default by thresholds that healthy runs stay within."""
    # What a finding came after stands before it; docs/reading.md says what each of them needs.
    thresholds = Thresholds() if thresholds is None else thresholds
    if not isinstance(thresholds, Thresholds):
        raise TypeError(f"diagnose() needs Thresholds; thresholds is {type(thresholds).__name__}")
    history = check_history("diagnose", history)
    findings, whole = [], Evidence(history, thresholds.window)
    for kind, rules in _RULES.items():
        if kind is None or kind in history.kinds:
            run = whole if kind is None else whole.of(kind)
            findings += [finding for rule in rules for finding in rule(run, thresholds)]
    return put_in_order(findings, history, thresholds.window)
