"""What ``gradstat tail`` prints: the newest record of a run, and again when there is another."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from gradstat.cli.runs import read_newest, state
from gradstat.cli.text import MOST_LAYERS, bar, ends_of, findings, number, percent, some, table
from gradstat.escaping import escaped
from gradstat.history import History
from gradstat.history.arguments import first_rows
from gradstat.record import NOUNS

_NEWEST = ("rms", "abs_max", "numel", "finite", "zeros")  # fields that are shown


def newest(name: str, history: History) -> str:
    """The newest record as a table of the layers of the first kind, and the worst findings."""
    numbers = {name: history[name][-1].tolist() for name in _NEWEST}
    rms = numbers["rms"]
    shown = [history.layers.index(row) for row in first_rows(history)]
    ends = ends_of([rms[at] for at in shown])
    rows = [("layer", "rms", "", "largest", "zeros", "NaN, infinite")]
    for at in shown:
        numel, finite, zeros = (numbers[name][at] for name in ("numel", "finite", "zeros"))
        rows.append(
            (
                escaped(history.layers[at]),
                number(rms[at]),
                bar(rms[at], *ends),
                number(numbers["abs_max"][at]),
                percent(zeros / finite if finite else math.nan),
                str(numel - finite) if numel else f"no {NOUNS[history.kinds[0]]}",
            )
        )
    found = [each for each in history.diagnose() if each.severity != "note"]
    lines = [f"{escaped(name)}: step {history.steps[-1]}", ""]
    lines += table([rows[0], *some(rows[1:], MOST_LAYERS)])
    return "\n".join([*lines, "", findings(found, most=2)])


def tail(path: Path, interval_s: float, updates: int | None = None) -> None:
    """Print the newest record of a run whenever there is another one.

    Waits for a run that is not there yet. Reads only what was written last to a directory, however
    long the run is.

    Args:
        path: file or directory.
        interval_s: seconds from one look to the next.
        updates: tables to print; by default until interrupted.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged or another kind of file.
    """
    seen: object = ()  # nothing has been looked at
    printed = 0
    while updates is None or printed < updates:
        found = state(path)
        if found != seen:
            seen = found
            history = None if found is None else read_newest(path)
            if history:
                clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else "\n" if printed else ""
                print(clear + newest(str(path), history), flush=True)
                printed += 1
                continue
            if not printed:
                what = "is not there yet" if found is None else "has no records yet"
                print(f"{escaped(path)} {what}", flush=True)
        time.sleep(interval_s)
