"""`Finding`: something that a record shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["severe", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("severe", "warning", "note")
FINDINGS = (
    "non-finite",
    "exploding",
    "vanishing",
    "dead",
    "stuck",
    "dead units",
    "saturation",
    "underflow",
    "scale",
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
    """

    kind: str
    severity: Severity
    layer: str
    steps: tuple[int, int]
    numbers: dict[str, float]
    sentence: str

    def __str__(self) -> str:
        """Severity, kind, steps and the sentence, in one line."""
        first, last = self.steps
        when = f"step {first}" if first == last else f"steps {first} to {last}"
        return f"{self.severity}: {self.kind}, {when}: {self.sentence}"
