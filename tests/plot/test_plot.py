import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from histories import make_history, repeat_record
from legibility import draw_small
from matplotlib import pyplot
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from gradstat import History, LinearBins, Log2Bins, plot
from gradstat.plot import data, panels

LOG2, LINEAR = make_history(Log2Bins()), make_history(LinearBins(30))
SCHEMES = [Log2Bins(), LinearBins(30), LinearBins(30, -2.0, 2.0), LinearBins(30, nice=True)]
FUNCTIONS = [plot.ridge, plot.curves, plot.heatmap]


def counts_heatmap(history: Any, **options: Any) -> Figure:
    return plot.heatmap(history, "counts", **options)


class Ridge(Poly3DCollection):
    """One that keeps what it was made of; matplotlib's own attributes differ by version."""

    def __init__(self, vertices: list[np.ndarray]) -> None:
        super().__init__(vertices)
        (self.vertices,) = vertices


@pytest.fixture(autouse=True)
def _readable_ridges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "Poly3DCollection", Ridge)


def polygons(ax: Any) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """x, y and z of every ridge, in the order in which they are drawn."""
    ridges = sorted(ax.collections, key=lambda ridge: ridge.zorder)
    return [tuple(ridge.vertices.T) for ridge in ridges]


def image(ax: Any) -> np.ma.MaskedArray:
    (mesh,) = ax.collections
    return np.ma.asarray(mesh.get_array())


@pytest.mark.parametrize("bins", SCHEMES[:2], ids=str)
@pytest.mark.parametrize(
    ("several", "axes"),
    [
        (lambda h: h, {"ridge": 3, "curves": 1, "heatmap": 2}),
        (lambda h: [h, h, h], {"ridge": 7, "curves": 2, "heatmap": 4}),
        (lambda h: {"ReLU": h, "sigmoid": h}, {"ridge": 5, "curves": 2, "heatmap": 3}),
    ],
    ids=["one", "sequence", "mapping"],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_figure_has_its_panels_and_a_colour_bar(
    function: Callable[..., Figure],
    several: Callable[[History], Any],
    axes: dict[str, int],
    bins: Any,
) -> None:
    figure = function(several(make_history(bins)))
    assert isinstance(figure, Figure)
    assert len(figure.axes) == axes[function.__name__]
    before = pyplot.get_fignums()
    draw_small(figure)
    assert pyplot.get_fignums() == before == []


@pytest.mark.parametrize(
    ("history", "titles"),
    [
        (LOG2, ["0.weight", "1.weight"]),
        (
            [LOG2, LOG2],
            ["run 1  0.weight", "run 1  1.weight", "run 2  0.weight", "run 2  1.weight"],
        ),
        ({"a": LOG2}, ["a  0.weight", "a  1.weight"]),
    ],
)
@pytest.mark.parametrize("function", [plot.ridge, counts_heatmap])
def test_panels_are_named_by_history_and_layer(
    function: Callable[..., Figure], history: Any, titles: list[str]
) -> None:
    assert [ax.get_title() for ax in function(history).axes[:-1]] == titles


@pytest.mark.parametrize("function", [plot.ridge, counts_heatmap])
def test_layers_are_chosen_ordered_and_titled(function: Callable[..., Figure]) -> None:
    history = make_history(Log2Bins(), layers=3)
    figure = function(history, layers={"2.weight": "last", "0.weight": "first"})
    assert [ax.get_title() for ax in figure.axes[:-1]] == ["last", "first"]
    figure = function(history, layers=["1.weight"])
    assert [ax.get_title() for ax in figure.axes[:-1]] == ["1.weight"]


def test_curves_name_the_chosen_layers_in_the_key() -> None:
    history = make_history(Log2Bins(), layers=3)
    figure = plot.curves(history, layers={"2.weight": "last", "0.weight": "first"})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["last", "first"]
    np.testing.assert_array_equal(
        figure.axes[0].lines[0].get_ydata(), data.values(history, "2.weight", "mean_abs")
    )


def test_heatmap_rows_are_the_chosen_layers_from_the_top() -> None:
    history = make_history(Log2Bins(), layers=3)
    ax = plot.heatmap(history, "std", layers={"2.weight": "last", "0.weight": "first"}).axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["last", "first"]
    assert ax.yaxis_inverted()
    np.testing.assert_array_equal(image(ax), history["std"][:, [2, 0]].T)


@pytest.mark.parametrize("bins", SCHEMES[1:], ids=str)
def test_ridge_outlines_the_histogram_of_each_record(bins: LinearBins) -> None:
    history = make_history(bins, layers=2, steps=4)
    figure = plot.ridge(history, limits=(-10, 10))
    for ax, layer in zip(figure.axes, history.layers, strict=False):
        ridges = polygons(ax)
        assert [y[0] for _, y, _ in ridges] == [0, 1, 2, 3]
        for step, (x, _, z) in enumerate(ridges):
            counts, edges = history.histogram(layer, step)
            filled = np.flatnonzero(counts)
            assert (x.min(), x.max()) == (edges[filled[0]], edges[filled[-1] + 1])
            inner = slice(filled[0], filled[-1] + 1)
            middles = ((edges[:-1] + edges[1:]) / 2)[inner]
            assert np.array_equal(np.interp(middles, x[1:-1], z[1:-1]), counts[inner])
            assert z[0] == z[-1] == 0


def test_ridge_of_magnitudes_stands_at_their_octaves() -> None:
    history = make_history(Log2Bins(), 1, 1, lambda *_: torch.tensor([0.0, 0.3, -0.3, 0.4, 6.0]))
    ((x, _, z),) = polygons(plot.ridge(history).axes[0])
    assert (x.min(), x.max()) == (-2, 3)
    assert dict(zip(x, z, strict=True)) == {-2: 0, -1.5: 3, -0.5: 0, 0.5: 0, 1.5: 0, 2.5: 1, 3: 0}


def test_ridge_is_cut_at_the_limits_with_its_height_there() -> None:
    history = make_history(
        LinearBins(4, 0.0, 4.0), 1, 1, lambda *_: torch.tensor([0.5, 1.5, 1.5, 2.5, 2.5, 3.5])
    )
    figure = plot.ridge(history, limits=(1.0, 3.0))
    ((x, _, z),) = polygons(figure.axes[0])
    assert figure.axes[0].get_xlim() == (1.0, 3.0)
    assert list(zip(x, z, strict=True)) == [(1, 0), (1, 1.5), (1.5, 2), (2.5, 2), (3, 1.5), (3, 0)]
    assert polygons(plot.ridge(history, limits=(5.0, 6.0)).axes[0]) == []


@pytest.mark.parametrize(("values", "end"), [([0.5, 3.5], 4), ([-1.5, 0.5], 2)])
def test_ridge_over_linear_bins_has_zero_in_its_middle(values: list[float], end: float) -> None:
    history = make_history(LinearBins(8, -4.0, 4.0), 1, 1, lambda *_: torch.tensor(values))
    assert plot.ridge(history).axes[0].get_xlim() == (-end, end)


def test_ridge_draws_the_last_record_of_each_epoch() -> None:
    history = make_history(LinearBins(30), steps=7)
    ridges = polygons(plot.ridge(history, steps_per_epoch=3).axes[0])
    assert [y[0] for _, y, _ in ridges] == pytest.approx([1, 2, 7 / 3])
    for (_, _, z), step in zip(ridges, (2, 5, 6), strict=True):
        assert z.max() == history.histogram("0.weight", step)[0].max()


@pytest.mark.parametrize("history", [LOG2, LINEAR], ids=["log2", "linear"])
def test_ridge_of_a_long_run_is_60_records_with_the_first_and_newest(history: History) -> None:
    figure = plot.ridge(repeat_record(history, 10_000), layers=["1.weight"])
    times = [y[0] for _, y, _ in polygons(figure.axes[0])]
    assert len(times) == 60
    assert (times[0], times[-1]) == (0, 9999)
    assert np.ptp(np.diff(times)) <= 1


def test_ridge_leaves_out_records_without_a_gradient() -> None:
    history = make_history(LinearBins(30), absent=[(1, 0), (0, 1), (1, 1), (2, 1)])
    axes = plot.ridge(history).axes
    assert [y[0] for _, y, _ in polygons(axes[0])] == [0, 2]
    assert polygons(axes[1]) == []


@pytest.mark.parametrize("field", ["mean_abs", "std", "mean", "nan", "zeros", "max", "high"])
def test_curves_draw_the_field(field: str) -> None:
    history = make_history(LinearBins(30), layers=3, steps=5)
    (ax,) = plot.curves(history, field, log=False).axes
    expected = history["l1"] / history["finite"] if field == "mean_abs" else history[field]
    assert len(ax.lines) == 3
    for i, line in enumerate(ax.lines):
        assert np.array_equal(line.get_xdata(), history.steps)
        assert np.array_equal(line.get_ydata(), expected[:, i])


@pytest.mark.parametrize(
    ("field", "log", "scale"),
    [
        ("mean_abs", None, "log"),
        ("l2", None, "log"),
        ("mean", None, "linear"),
        ("std", False, "linear"),
        ("max", True, "log"),
    ],
)
def test_curves_are_logarithmic_for_magnitudes_or_when_asked(
    field: str, log: bool | None, scale: str
) -> None:
    figure = plot.curves(make_history(Log2Bins()), field, log=log)
    assert figure.axes[0].get_yscale() == scale


@pytest.mark.parametrize(
    ("split", "panels"),
    [("layer", [[0, 1]] * 3), ("history", [[0] * 3, [1] * 3])],
)
def test_curves_split_by_layer_or_history(split: str, panels: list[list[int]]) -> None:
    histories = [make_history(Log2Bins(), 3, steps) for steps in (4, 6)]
    axes = plot.curves(histories, "rms", split=split).axes
    assert [[len(line.get_xdata()) for line in ax.lines] for ax in axes] == [
        [len(histories[i]) for i in panel] for panel in panels
    ]
    assert axes[0].get_title() == ("0.weight" if split == "layer" else "run 1")


def test_curves_average_so_many_records_at_the_time_of_the_last() -> None:
    history = make_history(Log2Bins(), 1, 7, absent=[(1, 0), (6, 0)])
    (line,) = plot.curves(history, "std", average=3, steps_per_epoch=2).axes[0].lines
    std = history["std"][:, 0]
    assert line.get_xdata() == pytest.approx([1.5, 3, 3.5])
    expected = [(std[0] + std[2]) / 2, std[3:6].mean(), math.nan]
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-15)


def test_curves_break_where_there_is_no_gradient() -> None:
    history = make_history(Log2Bins(), 1, 5, absent=[(2, 0)])
    (line,) = plot.curves(history).axes[0].lines
    assert np.isnan(line.get_ydata()).tolist() == [False, False, True, False, False]


def test_curves_draw_a_single_value_as_a_dot() -> None:
    alone = make_history(Log2Bins(), 1, 3, absent=[(0, 0), (2, 0)])
    assert plot.curves(alone).axes[0].lines[0].get_marker() == "o"
    assert plot.curves(make_history(Log2Bins(), 1, 2)).axes[0].lines[0].get_marker() == ""


def test_curves_draw_a_layer_that_one_history_lacks_as_nothing() -> None:
    axes = plot.curves([make_history(Log2Bins(), 1), make_history(Log2Bins(), 2)]).axes
    assert np.isnan(axes[1].lines[0].get_ydata()).all()
    assert np.isfinite(axes[1].lines[1].get_ydata()).all()


@pytest.mark.parametrize("field", ["std", "mean", "zeros", "mean_abs"])
def test_heatmap_colours_are_the_field_without_what_is_absent(field: str) -> None:
    history = make_history(Log2Bins(), 3, 4, absent=[(1, 2)])
    shown = image(plot.heatmap(history, field).axes[0])
    expected = np.stack([data.values(history, layer, field) for layer in history.layers])
    assert np.array_equal(shown.mask, np.isnan(expected))
    assert np.array_equal(shown.compressed(), expected[~np.isnan(expected)])


def test_heatmap_columns_stand_at_the_steps() -> None:
    history = make_history(Log2Bins(), 1, 4)
    (mesh,) = plot.heatmap(history, steps_per_epoch=2).axes[0].collections
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0.25, 0.75, 1.25, 1.75, 2.25]


@pytest.mark.parametrize("function", [plot.heatmap, counts_heatmap])
def test_heatmap_of_a_long_run_has_200_columns(function: Callable[..., Figure]) -> None:
    history = repeat_record(make_history(Log2Bins(), layers=1), 10_000)
    shown = image(function(history).axes[0])
    assert shown.shape[1] == 200
    np.testing.assert_allclose(shown, shown[:, :1].repeat(200, axis=1), rtol=1e-12)


def test_heatmap_of_counts_is_the_share_of_each_octave() -> None:
    gradient = torch.tensor([0.0, 0.3, -0.3, 0.4, 6.0, math.nan, -math.inf, 1e-40])
    history = make_history(Log2Bins(), 1, 2, lambda *_: gradient)
    ax = plot.heatmap(history, "counts").axes[0]
    (mesh,) = ax.collections
    octaves = mesh.get_coordinates()[:, 0, 1]
    for column in image(ax).T:
        shares = {octaves[i]: column[i] for i in np.flatnonzero(column)}
        # Subnormals have the lowest octave; zeros have none.
        assert shares == {-127: 1 / 6, -2: 3 / 6, 2: 1 / 6}
    assert ax.get_ylim() == (-127, 3)


@pytest.mark.parametrize(
    ("field", "log", "kind"),
    [
        ("std", None, LogNorm),
        ("std", False, Normalize),
        ("mean", None, Normalize),
        ("max", True, LogNorm),
        ("counts", None, Normalize),
        ("counts", True, LogNorm),
    ],
)
def test_heatmap_colour_is_logarithmic_for_magnitudes_or_when_asked(
    field: str, log: bool | None, kind: type[Normalize]
) -> None:
    figure = plot.heatmap([LOG2, make_history(Log2Bins(), steps=6)], field, log=log)
    norms = {id(ax.collections[0].norm): ax.collections[0].norm for ax in figure.axes[:-1]}
    (norm,) = norms.values()
    assert type(norm) is kind
