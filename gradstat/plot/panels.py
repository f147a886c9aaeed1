"""How the figures of `plot` look: layout, axes, lines, colours, titles, labels, ticks and keys."""

from __future__ import annotations

import io
import math
import sys
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from gradstat.plot.data import Limits, drawable, literal, outline
from gradstat.util import Array, median

Color: TypeAlias = tuple[float, float, float, float]
Box: TypeAlias = tuple[float, float, float, float]

# Okabe and Ito's colours, which colour-blind readers tell apart.
HUES = [to_rgba(x) for x in ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")]
LINE, GRID = "#999999", "#e4e4e4"
GREY = to_rgba("#c4c4c4")  # of lines without a name
CELL = 3.0  # inches, width of a 3-D panel
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
_MAX_COLORED, _MAX_MARKED = 8, 4  # lines of a panel
KEY_INCHES = 6.0  # of a line's or a row's name, at most


class ShownFigure(Figure):
    """A figure that a notebook shows when it is the last line of a cell; it opens no window."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()

    def show(self, warn: bool = True) -> None:
        """Show the figure in a notebook; RuntimeError elsewhere. `warn` is of `Figure.show`."""
        ipython = sys.modules.get("IPython")
        if ipython is None or ipython.get_ipython() is None:
            raise RuntimeError(
                "show() needs a notebook: the figure belongs to no window; savefig(path) writes it"
            )
        sys.modules["IPython.display"].display(self)


def _fresh(figure: Figure | None, width: float, height: float) -> Figure:
    if figure is None:
        return ShownFigure(figsize=(width, height), dpi=150, facecolor="white")
    figure.clear()
    return figure


def grid_2d(
    figure: Figure | None,
    panels: int,
    columns: int,
    size: tuple[float, float],
    *,
    groups: int = 1,
    margin: float = 0.9,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Lay out groups of panels of ``size`` inches, row by row; the unused places stay empty."""
    # Each group starts a row of at most so many columns. The margin, for labels, keys and colour
    # bars, is inches beside the panels.
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = _fresh(figure, columns * size[0] + margin, groups * rows * size[1] + 0.5)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(groups * rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    by_group = grid.reshape(groups, rows * columns)
    for unused in by_group[:, panels:].flat:
        unused.remove()
    axes: list[Axes] = list(by_group[:, :panels].flat)
    for lowest in axes[-columns:]:
        lowest.tick_params(labelbottom=True)
    return figure, axes


def grid_3d(
    figure: Figure | None, histories: int, layers: int, title_lines: int
) -> tuple[Figure, list[Box], Box]:
    """Lay out a box for each layer of each history, and one for the colour bar."""
    # By hand: constrained layout does not know how far the labels of 3-D axes reach.
    columns = min(layers, 2 if histories == 1 and layers <= 4 else 4)
    rows_each = math.ceil(layers / columns)
    rows = rows_each * histories
    row_height = 2.65 + 0.17 * title_lines
    width, height = CELL * columns + 0.8, row_height * rows
    figure = _fresh(figure, width, height)
    figure.set_layout_engine("none")
    boxes = []
    for panel in range(histories * layers):
        row = panel // layers * rows_each + panel % layers // columns
        bottom = 1 - (row + 1) / rows + 0.13 / height
        column = panel % layers % columns
        boxes.append((column * CELL / width, bottom, CELL / width, 2.43 / height))
    bar = min(0.5, 2.4 / height)
    return figure, boxes, (1 - 0.62 / width, (1 - bar) / 2, 0.12 / width, bar)


def style_3d(ax: Axes3D, x_limits: Limits, y_limits: Limits, top: float) -> None:
    """White panes, a pale grid, few ticks and MATLAB's ``view(-130, 50)``."""
    ax.view_init(elev=50, azim=140)
    ax.set_proj_type("ortho")
    ax.set_box_aspect((1.25, 1.25, 0.85), zoom=0.9)
    ax.computed_zorder = False
    ax.patch.set_alpha(0)
    ax.set_xlim(*x_limits)
    ax.set_ylim(*y_limits)
    ax.set_zlim(0, top)
    for axis, pad in ((ax.xaxis, -3), (ax.yaxis, -3), (ax.zaxis, 1)):
        axis.pane.set_facecolor("white")
        axis.pane.set_edgecolor(GRID)
        axis._axinfo["grid"].update(color=GRID, linewidth=0.6)
        axis.line.set_color(LINE)
        axis.set_tick_params(labelsize=7, pad=pad, labelcolor=INK, color=LINE)
        axis.label.set(fontsize=8, color=INK)
    for axis, side in ((ax.xaxis, "right"), (ax.yaxis, "left")):
        axis.set_rotate_label(False)
        axis._axinfo["label"]["ha"] = side
    # Two axes meet in a corner, where only one of them may write.
    ax.xaxis.set_major_locator(ticker.MaxNLocator(3, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_locator(whole_numbers(5, prune="upper"))
    ax.zaxis.set_major_locator(ticker.MaxNLocator(3, integer=True))


def style_2d(ax: Axes) -> None:
    style_frame(ax, 8)
    ax.xaxis.set_major_locator(whole_numbers(5))


def style_frame(ax: Axes, size: int) -> None:
    """Two spines, a pale grid, numbers of a size in points."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(LINE)
    ax.tick_params(which="both", labelsize=size, labelcolor=INK, color=LINE)
    ax.grid(color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)


def add_ridges(
    ax: Axes3D, time: Array, counts: Array, edges: Array, limits: Limits, colors: Array
) -> None:
    """Draw a polygon for each record, in front of those before, with light edges."""
    # One collection each: matplotlib sorts the polygons of a single one wrongly. Where polygons are
    # so narrow that their edges are all there is to see, the edges have their colour.
    outlines = [outline(counts[i], edges[i], limits) for i in range(len(time))]
    shapes = [(t, color, *o) for t, color, o in zip(time, colors, outlines, strict=True) if o]
    widths = [np.ptp(x[z > 0.1 * z.max()]) for _, _, x, z in shapes]
    narrow = bool(shapes) and np.median(widths) < 0.08 * (limits[1] - limits[0])
    for order, (t, color, x, z) in enumerate(shapes):
        polygon = Poly3DCollection([np.column_stack([x, np.full_like(x, t), z])])
        polygon.set(facecolor=color, edgecolor=color if narrow else 1 - 0.45 * (1 - color))
        polygon.set(linewidth=0.6 if narrow else 0.4, zorder=10 + order)
        ax.add_collection3d(polygon)


def add_line(ax: Axes, time: Array, value: Array, color: Color, *, log: bool) -> None:
    """Draw a line through finite values, on a log axis positive ones; a dot for a single one."""
    value = np.where(np.isfinite(value) & (value > 0 if log else True), value, math.nan)
    value = drawable(value, log=log)
    marker = "o" if np.count_nonzero(np.isfinite(value)) == 1 else ""
    width = 0.6 if len(time) > 200 else 0.8 if color == GREY else 1.6
    (line,) = ax.plot(time, value, color=color, linewidth=width, marker=marker, markersize=4)
    line.set_zorder(2 if color == GREY else 3)
    if log and np.isfinite(value).any() and ax.get_yscale() != "log":
        ax.set_yscale("log")
    elif not log:
        ax.yaxis.set_major_formatter(powers_apart())
        ax.yaxis.offsetText.set(fontsize=8, color=INK)
        ax.yaxis.set_major_locator(ticker.MaxNLocator(5))


def standing_out(panels: Sequence[Sequence[Array]], *, log: bool) -> list[int]:
    """Which of many lines have a colour and a name: the first, the last, and those that stray."""
    # A line strays when it is once much further from its usual place among the others than most
    # ever are. Of those that stray together the one that goes furthest stands for all: at most six
    # are left, and none where all lines have colours.
    n = len(panels[0])
    if n <= _MAX_COLORED:
        return []
    away = np.concatenate([_deviations(lines, log=log) for lines in panels], axis=1)
    score = abs(away).max(1)
    marked = [0, n - 1]
    for i in np.argsort(-score, kind="stable").tolist():
        if score[i] <= 2 * np.median(score) or len(marked) == _MAX_MARKED + 2:
            break
        if all(abs(away[i] - away[j]).max() > score[i] / 2 for j in marked):
            marked.append(i)
    return sorted(marked)


def _deviations(lines: Sequence[Array], *, log: bool) -> Array:
    """How far each line is from its usual place among the others: ``(N, T)``, 0 if unknown."""
    if len({len(line) for line in lines}) != 1 or not len(lines[0]):
        return np.zeros((len(lines), 1))
    y = np.stack(lines)
    with np.errstate(all="ignore"):
        y = np.log(np.where(y > 0, y, np.nan)) if log else y
        y = np.where(np.isfinite(y), y, np.nan)
        y = y - median(y)
        y = y - median(y.T)[:, None]
    return np.asarray(np.nan_to_num(y))


def line_colors(count: int, marked: list[int] | None = None, *, ordered: bool) -> list[Color]:
    """Return a colour for each line: a scale where their order says something, else hues."""
    # Where some are marked these have hues, and the others are grey.
    if marked:
        hues = dict(zip(marked, HUES, strict=False))
        return [hues.get(i, GREY) for i in range(count)]
    if ordered:
        return [colormaps["viridis"](0.88 * i / max(1, count - 1)) for i in range(count)]
    return [HUES[i % len(HUES)] for i in range(count)]


def color_norm(x: Array, *, log: bool) -> Normalize:
    """Scale from the smallest to the largest finite value; logarithmic ones leave out zeros."""
    known = drawable(x[np.isfinite(x) & (x > 0 if log else True)], log=log)
    if not len(known):
        return Normalize(0, 1)
    low, high = float(known.min()), float(known.max())
    if log:
        return LogNorm(low, high if high > low else 2 * low)
    return Normalize(low, high if high > low else low + 1)


def add_image(
    ax: Axes, time: Array, rows: Array, image: Array, norm: Normalize, cmap: Colormap
) -> ScalarMappable:
    """Draw ``image``, ``(len(rows) - 1, len(time))``, each column around its time."""
    half = (time[1] - time[0]) / 2 if len(time) > 1 else 0.5
    columns = np.concatenate([[time[0] - half], (time[1:] + time[:-1]) / 2, [time[-1] + half]])
    drawn = np.ma.masked_invalid(drawable(image, log=isinstance(norm, LogNorm)))
    ax.grid(visible=False)
    return ax.pcolormesh(columns, rows, drawn, norm=norm, cmap=cmap, rasterized=True)


def add_colorbar(
    figure: Figure, source: ScalarMappable, label: str, where: Axes | list[Axes]
) -> Colorbar:
    """Draw a colour bar without outline, in an axes, or beside several."""
    if isinstance(where, Axes):
        bar = figure.colorbar(source, cax=where, label=label)
    else:
        bar = figure.colorbar(source, ax=where, label=label, pad=0.02)
    bar.outline.set_visible(False)
    norm = source.norm
    if isinstance(norm, LogNorm) and norm.vmin and norm.vmax:
        bar.locator, bar.formatter = log_ticks(norm.vmin, norm.vmax)
        bar.minorlocator = ticker.NullLocator()
    bar.ax.tick_params(which="both", labelsize=8, labelcolor=INK, color=LINE)
    bar.ax.yaxis.label.set(fontsize=9, color=INK)
    bar.ax.yaxis.offsetText.set(fontsize=8, color=INK)
    return bar


def density_colormap() -> ListedColormap:
    """Magma from white, so that what is empty looks empty."""
    colors = colormaps["magma_r"](np.linspace(0, 0.95, 256))
    colors[:48] = 1 - (1 - colors[:48]) * np.linspace(0, 1, 48)[:, None]
    return ListedColormap(colors)


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
    if last > first:
        # Matplotlib's own reach past the ends, where powers of ten may overflow.
        stride = math.ceil((last - first) / 6)
        powers = [10.0**power for power in range(first, last + 1) if power % stride == 0]
        return ticker.FixedLocator(powers), ticker.LogFormatterMathtext()
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
