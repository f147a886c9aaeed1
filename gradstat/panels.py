"""How the figures of `plot` look: their layout, axes, lines and keys."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from gradstat.series import Array, Limits, outline

Box: TypeAlias = tuple[float, float, float, float]
Color: TypeAlias = tuple[float, ...]

# Okabe and Ito's colours, which colour-blind readers tell apart.
HUES = [
    to_rgba(f"#{code}") for code in ("0072B2", "D55E00", "009E73", "CC79A7", "E69F00", "56B4E9")
]
INK, LINE, GRID = "#333333", "#999999", "#e4e4e4"
_MAX_KEYS = 12


def fresh(figure: Figure | None, width: float, height: float) -> Figure:
    """Return an empty figure: a new one of so many inches, or the one given, cleared."""
    if figure is None:
        return Figure(figsize=(width, height), dpi=150, facecolor="white")
    figure.clear()
    return figure


def grid_2d(
    figure: Figure | None,
    panels: int,
    columns: int,
    size: tuple[float, float],
    *,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Lay out panels of ``size`` inches, row by row; the unused places stay empty."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = fresh(figure, columns * size[0] + 0.9, rows * size[1] + 0.5)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
    axes = list(grid.flat)
    for unused in axes[panels:]:
        unused.remove()
    for lowest in axes[max(0, panels - columns) : panels]:
        lowest.tick_params(labelbottom=True)
    return figure, axes[:panels]


def grid_3d(figure: Figure | None, histories: int, layers: int) -> tuple[Figure, list[Box], Box]:
    """Lay out a box for each layer of each history, and one for the colour bar.

    By hand: constrained layout does not know how far the labels of 3-D axes reach.
    """
    columns = min(layers, 2 if histories == 1 and layers <= 4 else 4)
    rows_each = math.ceil(layers / columns)
    rows = rows_each * histories
    width, height = 3.0 * columns + 0.8, 2.7 * rows
    figure = fresh(figure, width, height)
    figure.set_layout_engine("none")
    cell = 3.0 / width, 1 / rows
    boxes = []
    for panel in range(histories * layers):
        row = panel // layers * rows_each + panel % layers // columns
        column = panel % layers % columns
        boxes.append((column * cell[0], 1 - (row + 1) * cell[1], cell[0], 0.9 * cell[1]))
    bar = min(0.5, 2.4 / height)
    return figure, boxes, (1 - 0.62 / width, (1 - bar) / 2, 0.12 / width, bar)


def style_3d(ax: Axes3D, title: str, x_limits: Limits, y_limits: Limits, top: float) -> None:
    """White panes, a pale grid, few ticks and MATLAB's ``view(-130, 50)``."""
    ax.view_init(elev=50, azim=140)
    ax.set_proj_type("ortho")
    ax.set_box_aspect((1.25, 1.25, 0.85), zoom=0.9)
    ax.computed_zorder = False
    ax.patch.set_alpha(0)
    ax.set_xlim(*x_limits)
    ax.set_ylim(*y_limits)
    ax.set_zlim(0, top)
    ax.set_title(title, fontsize=10, color=INK, y=1.06, pad=0)
    for axis, pad in ((ax.xaxis, -3), (ax.yaxis, -3), (ax.zaxis, 1)):
        axis.pane.set_facecolor("white")
        axis.pane.set_edgecolor(GRID)
        axis._axinfo["grid"].update(color=GRID, linewidth=0.6)
        axis.line.set_color(LINE)
        axis.set_tick_params(labelsize=7, pad=pad, labelcolor=INK, color=LINE)
        axis.label.set(fontsize=8, color=INK)
    # Two axes meet in a corner; only one of them writes there.
    ax.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_locator(whole_numbers(5, prune="upper"))
    ax.zaxis.set_major_locator(MaxNLocator(3, integer=True))


def style_2d(ax: Axes, title: str) -> None:
    """Two spines, a pale grid, small type."""
    ax.set_title(title, fontsize=10, color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(LINE)
    ax.tick_params(which="both", labelsize=8, labelcolor=INK, color=LINE)
    ax.grid(color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.xaxis.set_major_locator(whole_numbers(5))


def whole_numbers(most: int, prune: Literal["upper"] | None = None) -> MaxNLocator:
    """Ticks at multiples of 1, 2 or 5 times a power of ten."""
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=True, prune=prune)


def add_ridges(
    ax: Axes3D, time: Array, counts: Array, edges: Array, limits: Limits, colors: Array
) -> None:
    """Draw a polygon for each record, in front of those before, with light edges.

    One collection each: matplotlib sorts the polygons of a single one wrongly. Where polygons are
    so narrow that their edges are all there is to see, the edges have their colour.
    """
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
    alone = np.count_nonzero(np.isfinite(value)) == 1
    ax.plot(
        time,
        value,
        color=color,
        linewidth=1.6 if len(time) <= 200 else 0.6,
        marker="o" if alone else "",
        markersize=4,
    )
    if log and np.isfinite(value).any() and ax.get_yscale() != "log":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(numticks=7))
        ax.yaxis.set_minor_locator(NullLocator())
    elif not log:
        ax.yaxis.set_major_formatter(ScalarFormatter(useMathText=True))
        ax.ticklabel_format(axis="y", scilimits=(-2, 3))
        ax.yaxis.offsetText.set(fontsize=8, color=INK)
        ax.yaxis.set_major_locator(MaxNLocator(5))


def line_colors(count: int, *, ordered: bool) -> list[Color]:
    """Return a colour for each line: a scale where their order says something, else hues."""
    if ordered:
        return [colormaps["viridis"](0.88 * i / max(1, count - 1)) for i in range(count)]
    return [HUES[i % len(HUES)] for i in range(count)]


def add_key(figure: Figure, names: list[str], colors: list[Color]) -> None:
    """Name the lines, beside the panels; of many, the first, the last and some between."""
    kept = np.unique(np.linspace(0, len(names) - 1, min(len(names), _MAX_KEYS)).round().astype(int))
    lines = [Line2D([], [], color=colors[i], linewidth=2) for i in kept]
    figure.legend(
        lines,
        [names[i] for i in kept],
        loc="outside right upper",
        fontsize=9,
        labelcolor=INK,
        frameon=False,
        handlelength=1.2,
    )


def label_axes(figure: Figure, x: str, y: str) -> None:
    """Label the axes that all panels have in common."""
    figure.supxlabel(x, fontsize=9, color=INK)
    figure.supylabel(y, fontsize=9, color=INK)


def color_norm(x: Array, *, log: bool) -> Normalize:
    """Scale from the smallest to the largest finite value; logarithmic ones leave out zeros."""
    known = x[np.isfinite(x) & (x > 0 if log else True)]
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
    drawn = np.ma.masked_invalid(image)
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
    bar.ax.tick_params(which="both", labelsize=8, labelcolor=INK, color=LINE)
    bar.ax.yaxis.label.set(fontsize=9, color=INK)
    return bar


def density_colormap() -> ListedColormap:
    """Magma from white, so that what is empty looks empty."""
    colors = colormaps["magma_r"](np.linspace(0, 0.95, 256))
    colors[:48] = 1 - (1 - colors[:48]) * np.linspace(0, 1, 48)[:, None]
    return ListedColormap(colors)


def powers_of_two(axis: Axis) -> None:
    """Write tick k as 2^k."""
    axis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda k, _: rf"$2^{{{k:.0f}}}$"))
