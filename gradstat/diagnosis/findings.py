"""`Finding`: something that a record shows; and the order of findings, a cause first."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from gradstat.history import History
from gradstat.util import escaped, plural

Severity: TypeAlias = Literal["severe", "warning", "note"]

COLORS: dict[Severity, str] = {"severe": "#d8392f", "warning": "#b87700", "note": "#7a8594"}
SEVERITIES = tuple(COLORS)
FINDINGS = (
    "divergence",
    "non-finite",
    "loss spike",
    "gradient spike",
    "jump",
    "instability ahead",
    "dead units",
    "saturation",
    "exploding",
    "vanishing",
    "no gradient",
    "dead",
    "stuck",
    "underflow",
    "scale",
    "outliers",
    "format underflow",
    "format saturation",
    "narrowest format",
)

# What units that are dead for good bring about, in the layers before and after them.
_OF_DEAD_UNITS = ("vanishing", "dead", "stuck", "saturation", "underflow")
_WIDTH = 88  # characters of a line of findings
# These begin at a step; the others with the window of records that shows them.
_SUDDEN = ("divergence", "non-finite", "loss spike", "gradient spike", "jump")


@dataclass(frozen=True)
class Finding:
    """Something that a record shows.

    It is ``"severe"``: training does not work; a ``"warning"``: part of it does not, or will not;
    or a ``"note"``, good to know. ``docs/reading.md`` lists the kinds, and the numbers of each.
    """

    kind: str  #: one of `FINDINGS`
    severity: Severity
    layer: str  #: the row of the history that it is about, the worst or the first of several
    steps: tuple[int, int]  #: first and last step of the records that show it
    numbers: dict[str, float]  #: what it rests on, by name
    sentence: str  #: it all in plain words
    after: str = ""  #: the finding that it began after, as ``"loss spike at step 252"``, or ""
    others: tuple[str, ...] = ()  #: further rows of which the same holds

    def __str__(self) -> str:
        first, last = self.steps
        when = f"step {first}" if first == last else f"steps {first} to {last}"
        after = f", after the {self.after}" if self.after else ""
        return f"{self.severity}: {self.kind}, {when}{after}: {self.sentence}"


class Findings(list[Finding]):
    """A list of findings that prints as text, a paragraph each."""

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 (an index, or a slice)
        found = super().__getitem__(index)
        return Findings(found) if isinstance(found, list) else found

    def __repr__(self) -> str:
        return "\n".join(paragraph(str(each), _WIDTH) for each in self) or "nothing found"


def paragraph(text: str, width: int) -> str:
    return textwrap.fill(escaped(text), width, subsequent_indent="  ", break_long_words=False)


def for_all(findings: list[Finding]) -> list[Finding]:
    """One finding for all layers of which the same is found: about the worst of them."""
    if len(findings) < 2:
        return findings
    worst, *rest = sorted(findings, key=lambda each: SEVERITIES.index(each.severity))
    others = tuple(each.layer for each in rest)
    sentence = f"{worst.sentence} The same holds for {plural(len(rest), 'other layer')}."
    numbers = worst.numbers | {"layers": float(len(findings))}
    return [replace(worst, numbers=numbers, sentence=sentence, others=others)]


def rounded(times: float) -> str:
    """A multiple: three digits, and no exponent up to a million."""
    number = float(f"{times:.3g}")
    return f"{number:,.0f}" if 100 <= number < 1e6 else f"{number:.3g}"


def put_in_order(findings: list[Finding], history: History, window: int) -> Findings:
    """Put the worst first; but what began after a cause comes after it, and says so."""
    causes = sorted(
        (each for each in findings if each.kind in _SUDDEN or _is_lasting(each)),
        key=lambda each: (began(each), FINDINGS.index(each.kind)),
    )
    groups: dict[int, list[Finding]] = {}
    for each in sorted(findings, key=_rank):
        cause = next((one for one in causes if _follows(each, one, history, window)), None)
        if cause is None:
            groups.setdefault(id(each), []).insert(0, each)
        else:
            # A cause is nobody's consequence: the earliest of a chain is taken.
            after = f"{cause.kind} at step {began(cause):.0f}"
            groups.setdefault(id(cause), []).append(replace(each, after=after))
    ordered = sorted(groups.values(), key=lambda group: min(map(_rank, group)))
    return Findings(finding for group in ordered for finding in group)


def began(finding: Finding) -> float:
    """The step at which something sudden began: where the first row moved."""
    return finding.numbers.get("first_step", float(finding.steps[0]))


def _follows(finding: Finding, cause: Finding, history: History, window: int) -> bool:
    if finding is cause or finding.severity == "note":
        return False
    if _is_lasting(cause):
        return finding.kind in _OF_DEAD_UNITS and began(cause) <= began(finding)
    order = began(finding), FINDINGS.index(finding.kind)
    if finding.kind in _SUDDEN and order < (began(cause), FINDINGS.index(cause.kind)):
        return False
    steps = history.steps
    first, begins = np.searchsorted(steps, [began(cause), finding.steps[0]])
    is_over = cause.numbers.get("recovered", 0.0) or cause.severity == "warning"
    # What is over may have consequences for a window's records.
    last = np.searchsorted(steps, cause.steps[1]) + window if is_over else math.inf
    # Other findings begin with the window of records around it, but for one at the very start.
    early = 0 if finding.kind in (*_SUDDEN, "instability ahead") else window - 1
    return bool(max(first - early, min(first, 1)) <= begins <= last)


def _is_lasting(finding: Finding) -> bool:
    return finding.kind == "dead units" and finding.severity == "severe"


def _rank(finding: Finding) -> tuple[int, int]:
    return SEVERITIES.index(finding.severity), FINDINGS.index(finding.kind)
