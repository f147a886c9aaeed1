"""What the figures of `plot` say: titles, axis labels, ticks and keys."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any, Literal, TypeAlias

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from gradstat.util import escaped

Color: TypeAlias = tuple[float, float, float, float]

INK = "#333333"
_NAME_GAP = "  "  # between a history's name and a layer's
_COLORBAR_LETTERS = 22
_WHOLE_LABELS = {
    "update_ratio": "update / parameter",
    "dead_units": "share of dead units",
    "mean": "mean {}",
    "mean_abs": "mean |{}|",
}
_NAMES = {
    "abs_max": "max magnitude",
    "l1": "l1 norm",
    "l2": "l2 norm",
    "norm": "l2 norm",
    "numel": "elements",
    "nan": "NaN",
    "posinf": "+infinity",
    "neginf": "-infinity",
}
_MEASURED = 200  # letters
KEY_INCHES = 6.0  # of a line's or a row's name, at most
_LINE_POINTS = 12.0  # from one label of a line to the next
_LEADER = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 1}
_OFFSET: dict[str, Any] = {"textcoords": "offset points", "va": "center", "annotation_clip": False}


def literal(name: str) -> str:
    """A name that Matplotlib writes as it is, and does not take dollar signs for mathematics."""
    return escaped(name).replace("$", r"\$")


def heading(name: str, title: str) -> str:
    """Title of a panel: that of its layer, after the name of its history, which may be ""."""
    return f"{literal(name)}{_NAME_GAP}{title}" if name else title


def time_label(steps_per_epoch: int | None) -> str:
    if steps_per_epoch is None:
        return "step"
    return f"epoch of {steps_per_epoch:,} steps" if steps_per_epoch > 1 else "epoch"


def field_label(field: str, noun: str) -> str:
    """Label of a field: what it is, and of what. The noun is what its values are called."""
    if field in _WHOLE_LABELS:
        return _WHOLE_LABELS[field].format(noun)
    name = _NAMES.get(field, field)
    if noun == "value":
        return name
    label = f"{name} of the {noun}"
    return label if len(label) <= _COLORBAR_LETTERS else f"{name} of the\n{noun}"


def value_label(axis: Axis, noun: str, *, log2: bool) -> str:
    """Set the numbers of a ridge's axis, and return its label: in lines, for want of room."""
    words = noun.replace(" ", "\n")
    if log2:
        powers_of_two(axis, 3)
        return f"|{words}|"
    # Where Matplotlib writes the power of ten, the axis of steps has its numbers.
    axis.offsetText.set_visible(False)
    power = ticker.ScalarFormatter(useMathText=True)
    power.set_axis(axis)
    power.set_locs(list(axis.get_majorticklocs()))
    return f"{words}\n{power.get_offset()}".rstrip()


def label_axes(figure: Figure, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9, color=INK)
    figure.supylabel(y, fontsize=9, color=INK)


def add_key(
    figure: Figure, names: list[str], colors: list[Color], marks: dict[str, Color] | None = None
) -> None:
    """Name the lines beside the panels, and the triangles that mark something, by their colours."""
    marks = marks or {}
    lines = [Line2D([], [], color=color, linewidth=2) for color in colors]
    lines += [Line2D([], [], color=color, marker="^", linestyle="") for color in marks.values()]
    look: dict[str, Any] = {"labelcolor": INK, "frameon": False, "handlelength": 1.2}
    figure.legend(lines, [*names, *marks], loc="outside right upper", fontsize=9, **look)


def label_ends(figure: Figure, ax: Axes, names: dict[int, str]) -> None:
    """Name some lines of a panel at their ends, those of neighbours apart from each other."""
    figure.draw_without_rendering()
    ends = []
    for i, name in names.items():
        data = np.asarray(ax.lines[i].get_data(), np.float64)
        known = np.flatnonzero(np.isfinite(data[1]))
        if len(known):
            end = float(data[0, known[-1]]), float(data[1, known[-1]])
            ends.append((float(ax.transData.transform(end)[1]) * 72 / figure.dpi, i, name, end))
    ends.sort()
    points = [end[0] for end in ends]
    # From the lowest up, each at least a line's height over the one before; then all moved down by
    # half of what that took, so that as many are above their line's end as below it.
    for k in range(1, len(points)):
        points[k] = max(points[k], points[k - 1] + _LINE_POINTS)
    middle = np.mean([at - end[0] for at, end in zip(points, ends, strict=True)]) if ends else 0
    for at, (y, i, name, end) in zip(points, ends, strict=True):
        color, place = ax.lines[i].get_color(), (14, at - middle - y)
        ax.lines[i].set_zorder(3)
        ax.annotate("", end, place, arrowprops=_LEADER | {"color": color}, **_OFFSET)
        ax.annotate(name, end, place, color=color, fontsize=9, **_OFFSET)


def add_titles(figure: Figure, axes: list[Axes], titles: list[str]) -> None:
    """Write a title over each panel of a constrained layout, no wider than the panel."""
    if not any(titles):
        return
    layout = figure.get_layout_engine()
    assert layout is not None
    layout.execute(figure)
    width = min(ax.get_position().width for ax in axes) * figure.get_figwidth()
    fitted, size = fit_titles(titles, width)
    # An axis writes its power of ten where a title begins.
    powers = any(ax.yaxis.get_offset_text().get_text() for ax in axes)
    longest = max(text_inches(line, size) for title in fitted for line in title.split("\n"))
    pad = 16 if powers and longest > width - 1 else 6
    for ax, title in zip(axes, fitted, strict=True):
        ax.set_title(title, fontsize=size, color=INK, pad=pad)


def fit_titles(titles: list[str], inches: float) -> tuple[list[str], float]:
    """Titles that fit a width, and their size in points."""
    # If one is too long all are broken in two, after a history's name or else a dot; if that is not
    # enough all are smaller, and in what is still too long an ellipsis stands for the beginning.
    fitted = titles
    if any(text_inches(title, 10) > inches for title in titles):
        fitted = ["\n".join(_halves(title)) for title in titles]
    lines = [line for title in fitted for line in title.split("\n")]
    size = 10 * inches / max(inches, *(text_inches(line, 10) for line in lines))
    if size < 6:
        size = 6
        fitted = ["\n".join(shorten(line, inches, 6) for line in t.split("\n")) for t in fitted]
    return fitted, size


def _halves(title: str) -> tuple[str, str] | tuple[str]:
    name, gap, rest = title.partition(_NAME_GAP)
    if gap:
        return name, rest
    breaks = [i + 1 for i, letter in enumerate(title[:-1]) if letter in "./ "]
    if not breaks:
        return (title,)
    at = min(breaks, key=lambda i: max(i, len(title) - i))
    return title[:at].rstrip(), title[at:].lstrip()


def shorten(line: str, inches: float, size: float) -> str:
    """As much of the end of a line as fits after an ellipsis, or all of it."""

    def fits(start: int) -> bool:
        return text_inches("…" + line[start:], size) <= inches

    if text_inches(line, size) <= inches:
        return line
    at = bisect_left(range(2, len(line)), True, key=fits)
    return "…" + line[at + 2 :]


def text_inches(text: str, size: float) -> float:
    """Width of a line of text; 0 for blanks alone, since Matplotlib makes no path of them."""
    # A line longer than any panel is measured by its first letters.
    if not any(letter.isprintable() and not letter.isspace() for letter in text[:_MEASURED]):
        return 0.0
    measured = text[:_MEASURED]
    path = TextPath((0, 0), measured, size=size)
    # By control points: exact for letters, and far quicker than the extents of curves.
    x = np.asarray(path.vertices)[np.asarray(path.codes) != Path.CLOSEPOLY, 0]
    return float(np.ptp(x)) / 72 * len(text) / len(measured)


def longest_inches(texts: list[str], size: float) -> float:
    return text_inches(max(texts, key=len), size)


def whole_numbers(most: int, prune: Literal["upper"] | None = None) -> ticker.MaxNLocator:
    """Ticks at multiples of 1, 2 or 5 times a power of ten."""
    return ticker.MaxNLocator(most, steps=[1, 2, 5, 10], integer=True, prune=prune)


def log_ticks(low: float, high: float) -> tuple[ticker.Locator, ticker.Formatter]:
    """Ticks of a logarithmic axis, at least two: at powers of ten if there are two of these."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    if last - first > 60:
        # Matplotlib's own reach past the ends, where powers of ten overflow.
        powers = range(first, last + 1, math.ceil((last - first) / 6))
        return ticker.FixedLocator([10.0**power for power in powers]), ticker.LogFormatterMathtext()
    if last > first:
        return ticker.LogLocator(numticks=7), ticker.LogFormatterMathtext()
    if high > 10 * low:
        every = (math.inf, math.inf)
        formatter = ticker.LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=every)
        return ticker.LogLocator(subs=(1.0, 2.0, 5.0)), formatter
    return ticker.MaxNLocator(5), powers_apart()


def powers_apart() -> ticker.ScalarFormatter:
    formatter = ticker.ScalarFormatter(useMathText=True)
    formatter.set_powerlimits((-2, 3))
    return formatter


def label_log(ax: Axes) -> None:
    """Ticks of a logarithmic vertical axis whose limits are known."""
    if ax.get_yscale() == "log":
        locator, formatter = log_ticks(*sorted(ax.get_ylim()))
        ax.yaxis.set_major_locator(locator)
        ax.yaxis.set_major_formatter(formatter)
        ax.yaxis.set_minor_locator(ticker.NullLocator())
        ax.yaxis.offsetText.set(fontsize=8, color=INK)


def powers_of_two(axis: Axis, most: int) -> None:
    axis.set_major_locator(ticker.MaxNLocator(most, integer=True))
    axis.set_major_formatter(ticker.FuncFormatter(lambda k, _: rf"$2^{{{k:.0f}}}$"))
