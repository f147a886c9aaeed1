"""`fragment`: a run at a glance, as HTML that a notebook shows below a cell."""

from __future__ import annotations

import base64
import html
import io
import math

import numpy as np
from matplotlib import colormaps
from matplotlib.image import imsave

from gradstat.diagnosis import diagnose
from gradstat.diagnosis.findings import COLORS
from gradstat.history import History, first_rows
from gradstat.record import NOUNS
from gradstat.report import thin
from gradstat.util import escaped, plural

_WIDTH, _LINE_HEIGHT = 420, 56  # pixels
_MAX_FINDINGS, _MAX_ROWS = 3, 200
_BROKEN, _ZERO, _ABSENT = (229, 53, 43, 255), (150, 157, 166, 255), (0, 0, 0, 0)
# The notebook's own colours, light or dark.
_STYLE = "font: 13px/1.45 system-ui, sans-serif; color: inherit; max-width: 760px"


def fragment(history: History) -> str:
    """Size, the worst findings, the loss or the norm, and a map of magnitudes."""
    # One element that loads nothing and runs nothing. It takes the colours around it.
    history = history.snapshot()
    parts = [f"<b>{_text(_size(history))}</b>"]
    if len(history) and history.layers:
        columns = thin.columns(history)
        parts += [_findings(history), _line(history, columns), _map(history, columns)]
    return f'<div class="gradstat" style="{_STYLE}">{"".join(parts)}</div>'


def _size(history: History) -> str:
    n, layers = len(history), len(first_rows(history))
    when = f", steps {history.steps[0]} to {history.steps[-1]}" if n else ""
    kinds = ", ".join(f"{NOUNS[kind]}s" for kind in dict.fromkeys(history.kinds))
    return f"{plural(n, 'record')} of {plural(layers, 'layer')}{when}: {kinds}"


def _findings(history: History) -> str:
    found = diagnose(history)
    lines = [
        f'<div><span style="color: {COLORS[each.severity]}; font-weight: 600">'
        f"{each.severity}</span> {_text(each.sentence)}</div>"
        for each in found[:_MAX_FINDINGS]
    ]
    if len(found) > _MAX_FINDINGS:
        lines.append(f"<div>and {len(found) - _MAX_FINDINGS} more: history.diagnose()</div>")
    return "".join(lines) or "<div>Nothing stands out in this run.</div>"


def _line(history: History, columns: thin.Columns) -> str:
    """The first of the run's losses, or the norm, as a line; logarithmic if it spans much."""
    name, line = next(iter(thin.series(history, columns).items()))
    y = line.mean.astype(np.float64)
    known = y[np.isfinite(y)]
    if not len(known):
        return ""
    low, high = float(known.min()), float(known.max())
    ends = f"{low:.3g} to {high:.3g}" if high > low else f"{low:.3g}"
    if low > 0 and high > 30 * low:
        y, low, high = np.log(np.where(y > 0, y, math.nan)), math.log(low), math.log(high)
    span = high - low or 1.0
    x = (np.arange(len(y)) + 0.5) / len(y) * _WIDTH
    height = (1 - (y - low) / span) * (_LINE_HEIGHT - 4) + 2
    # The line begins anew after what has no value.
    letters = np.where(np.append(True, ~np.isfinite(y[:-1])), "M", "L")
    known_at = np.flatnonzero(np.isfinite(y))
    drawn = "".join(f"{letters[i]}{x[i]:.1f} {height[i]:.1f}" for i in known_at)
    label = _text(f"{name}, {ends}")
    return (
        f'<div style="margin-top: 6px">{label}</div><svg role="img" aria-label="{label}" '
        f'width="{_WIDTH}" height="{_LINE_HEIGHT}">'
        f'<path d="{drawn}" fill="none" stroke="currentColor" stroke-width="1.3"/></svg>'
    )


def _map(history: History, columns: thin.Columns) -> str:
    """Rms of each layer and column of records as colour, the layer nearest to the input on top."""
    names = first_rows(history)
    rows = [history.layers.index(name) for name in names]
    level, broken = columns.level[rows], columns.nonfinite[rows] > 0
    known = level[np.isfinite(level)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    share = np.nan_to_num((level - low) / (high - low or 1.0), posinf=1.0, neginf=0.0).clip(0, 1)
    pixels = colormaps["viridis"](share, bytes=True)
    pixels[np.isnan(level)] = _ABSENT
    pixels[level == -math.inf] = _ZERO
    pixels[broken] = _BROKEN
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    png = base64.b64encode(file.getvalue()).decode("ascii")
    height = max(24, min(_MAX_ROWS, 14 * len(names)))
    noun = NOUNS[history.kinds[0]]
    label = _text(f"rms of each layer's {noun} by step, {2**low:.1e} (dark) to {2**high:.1e}")
    ends = dict.fromkeys([names[0], names[-1]])
    first, *last = [f"<span>{_text(name)}</span>" for name in ends]
    return (
        f'<div style="margin-top: 6px">{label}{", red: NaN or infinite" * bool(broken.any())}</div>'
        f'<div style="display: flex; gap: 8px"><img alt="{label}" width="{_WIDTH}" '
        f'height="{height}" style="image-rendering: pixelated" '
        f'src="data:image/png;base64,{png}"><div style="display: flex; flex-direction: column; '
        f'justify-content: space-between">{first}{"".join(last)}</div></div>'
    )


def _text(text: str) -> str:
    return html.escape(escaped(text))
