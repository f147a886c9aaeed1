"""`diagnose`: what is wrong with a run, in findings, the worst first.

One file for each family of rules has their arithmetic; ``docs/reading.md`` explains the thresholds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from gradstat.diagnosis.evidence import Evidence
from gradstat.diagnosis.findings import FINDINGS, SEVERITIES, Finding, Severity, put_in_order
from gradstat.diagnosis.instability import find_instability
from gradstat.diagnosis.narrow_formats import (
    find_format_saturation,
    find_format_underflow,
    find_narrowest,
    find_outliers,
    find_scale,
    find_underflow,
)
from gradstat.diagnosis.nonfinite import find_nonfinite
from gradstat.diagnosis.not_learning import (
    find_absent,
    find_dead,
    find_dead_units,
    find_saturated_outputs,
    find_saturation,
    find_stuck,
)
from gradstat.diagnosis.spikes import find_all_spikes
from gradstat.diagnosis.vanishing_exploding import find_growth, find_large, find_low, find_trend
from gradstat.history import History
from gradstat.history.history import check_history
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
        find_format_underflow,
        find_format_saturation,
        find_narrowest,
    ),
    GRAD: (
        find_growth,
        find_large,
        find_trend,
        find_low,
        find_dead,
        find_absent,
        find_saturation,
        find_underflow,
        find_scale,
    ),
    UPDATE: (find_stuck,),
    UNIT: (find_dead_units,),
    ACTIVATION: (find_outliers, find_saturated_outputs),
}


def diagnose(history: History, thresholds: Thresholds | None = None) -> list[Finding]:
    """Find what is wrong with a run, by its gradients and whatever else was recorded.

    NaN, infinities and what moved before a spike are looked for in rows of any kind, and so is what
    narrow formats would do. Spikes of the loss need a logged loss, instability ahead parameters
    too, layers that do not move need updates, dead units and outliers need activations. Everything
    else is read off gradients alone. What began after something sudden comes after it and says so.
    Layers are taken in the order of `History.order`, the first one nearest to the input; without
    one, in that of the parameters. Saturation and underflow are read off histograms over
    `Log2Bins`, of at most 64 records evenly spread; over `LinearBins` they are left out.

    Args:
        history: with one record at least; several dozen say more than a few.
        thresholds: by default those that healthy runs stay within.

    Returns:
        Findings: severe ones first, then warnings, then notes. What a finding came after stands
        before it. The list prints as text, a paragraph for each.

    Raises:
        TypeError: something other than a History, other than Thresholds.
        ValueError: a history without records.

    Example:
        >>> import torch, gradstat
        >>> sigmoids = [m for _ in range(9) for m in (torch.nn.Linear(8, 8), torch.nn.Sigmoid())]
        >>> model = torch.nn.Sequential(*sigmoids)
        >>> with gradstat.watch(model) as w:
        ...     model(torch.rand(4, 8)).square().sum().backward()
        >>> [(f.kind, f.layer) for f in w.history.diagnose()][0]
        ('vanishing', '0.weight')
    """
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
