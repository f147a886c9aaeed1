"""`Finding`: something that a record shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["severe", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("severe", "warning", "note")
COLORS: dict[Severity, str] = {"severe": "#d8392f", "warning": "#b87700", "note": "#7a8594"}
FINDINGS = (
    "non-finite",
    "loss spike",
    "gradient spike",
    "jump",
    "exploding",
    "vanishing",
    "dead",
    "no gradient",
    "stuck",
    "dead units",
    "saturation",
    "underflow",
    "scale",
    "outliers",
    "starved",
    "clipped",
    "narrowest format",
)


@dataclass(frozen=True)
class Finding:
    """Something that a record shows.

    Args:
        kind: one of `FINDINGS`.
        severity: ``"severe"``: training does not work; ``"warning"``: part of it does not, or will
            not; ``"note"``: good to know.
        layer: the row of the history that it is about, the worst or the first of several.
        steps: first and last step of the records that show it.
        numbers: what it rests on, by name; each kind has its own, listed in ``docs/reading.md``.
        sentence: it all in plain words.
        after: the sudden finding that it began after, as ``"loss spike at step 252"``, or "": a
            symptom, most likely.
    """

    kind: str
    severity: Severity
    layer: str
    steps: tuple[int, int]
    numbers: dict[str, float]
    sentence: str
    after: str = ""

    def __str__(self) -> str:
        """Severity, kind, steps, what it came after and the sentence, in one line."""
        first, last = self.steps
        when = f"step {first}" if first == last else f"steps {first} to {last}"
        after = f", after the {self.after}" if self.after else ""
        return f"{self.severity}: {self.kind}, {when}{after}: {self.sentence}"


def rounded(times: float) -> str:
    """A multiple: three digits, and no exponent up to a million."""
    number = float(f"{times:.3g}")
    return f"{number:,.0f}" if 100 <= number < 1e6 else f"{number:.3g}"
