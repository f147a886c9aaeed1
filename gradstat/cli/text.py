"""What several commands of `cli` print: headings, findings, tables of text that fit a screen."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from gradstat.arrays import Array, evenly_spread
from gradstat.diagnosis import Finding
from gradstat.diagnosis.run import median
from gradstat.escaping import escaped
from gradstat.history import History
from gradstat.history.arguments import first_rows
from gradstat.record import GRAD, NOUNS

Item = TypeVar("Item")

MOST_LAYERS = 24
_BAR = 12  # characters
_LATE = 20  # values whose median says where a series is now


def heading(name: str, history: History) -> str:
    """A run in one line: its layers are those of its first kind."""
    steps = history.steps
    kinds = ", ".join(dict.fromkeys(history.kinds))
    layers = count(len(first_rows(history)), "layer")
    layers += f" ({escaped(kinds)})" if kinds != GRAD else ""
    return (
        f"{escaped(name)}: {count(len(history), 'record')} of {layers}, "
        f"steps {steps[0]} to {steps[-1]}, {history.bins}"
    )


def scalars(history: History) -> str:
    """What was logged, and the norm of the whole gradient: a line for each."""
    rows: list[tuple[str, ...]] = [("", "values", "first", "lately", "least", "most")]
    for name, values in series_of(history).items():
        numbers = (values[0], late(values), *_extremes(values))
        rows.append((escaped(name), str(len(values)), *map(plain, numbers)))
    return "\n".join(table(rows))


def series_of(history: History) -> dict[str, Array]:
    """Values of each scalar, and the norm of the records' first kind."""
    series = {name: history.scalar(name)[1] for name in history.scalars}
    kind = history.kinds[0]
    return series | {f"{NOUNS[kind]} norm": history.norm(kind)}


def late(values: Array) -> float:
    """Median of the newest values, which says where a series is now."""
    return float(median(values[-_LATE:]))


def _extremes(values: Array) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if len(known) else (math.nan, math.nan)


def plain(value: float) -> str:
    """A number of any kind, four digits."""
    return f"{value:.4g}"


def findings(found: Sequence[Finding], most: int | None = 3, indent: str = "") -> str:
    """Findings, a paragraph each.

    Args:
        found: the worst first.
        most: paragraphs for each kind and severity; ``None`` for all.
        indent: before each line.

    Returns:
        Text; says so where there are none.
    """
    lines = []
    shown: Counter[tuple[str, str]] = Counter()
    total = Counter((each.severity, each.kind) for each in found)
    for each in found:
        group = each.severity, each.kind
        shown[group] += 1
        if most is None or shown[group] <= most:
            lines.append(textwrap.fill(escaped(each), width(), subsequent_indent="  "))
        elif shown[group] == total[group]:
            lines.append(f"  and {total[group] - most} more like it (--all shows them)")
    lines = textwrap.indent("\n".join(lines), indent).splitlines()
    return "\n".join(lines) if lines else f"{indent}nothing found"


def some(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many items, evenly spread, the first and the last among them."""
    return [items[i] for i in evenly_spread(len(items), most)]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side; the first one and bars are aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {0} | {i for i in range(len(widths)) if any(row[i].startswith("#") for row in rows)}
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def ends_of(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest of the values that a bar shows."""
    known = [x for x in values if x > 0 and math.isfinite(x)]
    return (min(known), max(known)) if known else (1.0, 1.0)


def bar(value: float, low: float, high: float) -> str:
    """A bar on a log scale from the smallest value, one character long, to the largest."""
    if not (value > 0 and math.isfinite(value)):
        return ""
    # Differences, since a quotient of float64 may overflow.
    span = math.log(high) - math.log(low)
    share = (math.log(value) - math.log(low)) / span if span else 1.0
    return "#" * (1 + round(share * (_BAR - 1)))


def number(value: float) -> str:
    """A magnitude: two digits and its exponent; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.1e}" if value else "0"


def ratio(value: float, by: float) -> str:
    """A quotient; a dash where there is none."""
    return f"{value / by:.2g}" if by > 0 and not math.isnan(value) else "-"


def percent(value: float) -> str:
    """A share; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.0%}"


def count(number: int, what: str) -> str:
    """So many of something."""
    return f"{number} {what}{'s' * (number != 1)}"


def width() -> int:
    """Characters of a line."""
    return max(60, min(shutil.get_terminal_size().columns, 100))
