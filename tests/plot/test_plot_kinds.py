"""Figures of histories with several kinds of rows: which are drawn, and what they are called."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from histories import LONG_NAMES, falling, make_history
from legibility import assert_legible
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from gradstat import History, LinearBins, Log2Bins, plot
from gradstat.record import KINDS, NOUNS

ALL = make_history(Log2Bins(), LONG_NAMES, kinds=KINDS)
ALL_LINEAR = make_history(LinearBins(30, nice=True), LONG_NAMES, kinds=KINDS)

FIGURES = {
    "ridge": lambda h, linear, names: plot.ridge(linear, layers=names),
    "ridge of magnitudes": lambda h, linear, names: plot.ridge(h, layers=names),
    "curves": lambda h, linear, names: plot.curves(h, layers=names),
    "curves of std": lambda h, linear, names: plot.curves(h, "std", layers=names),
    "heatmap": lambda h, linear, names: plot.heatmap(h, "abs_max", layers=names),
    "heatmap of the mean": lambda h, linear, names: plot.heatmap(h, "mean", layers=names),
    "heatmap of counts": lambda h, linear, names: plot.heatmap(h, "counts", layers=names),
}


def counts_heatmap(history: Any, **options: Any) -> Figure:
    return plot.heatmap(history, "counts", **options)


@pytest.mark.parametrize("function", [plot.ridge, counts_heatmap])
def test_the_first_kind_is_drawn_unless_layers_names_others(
    function: Callable[..., Figure],
) -> None:
    history = make_history(Log2Bins(), kinds=("grad", "update"))
    titles = [ax.get_title() for ax in function(history).axes[:-1]]
    assert titles == ["0.weight", "1.weight"]
    figure = function(history, layers=["update/1.weight", "0.weight"])
    assert [ax.get_title() for ax in figure.axes[:-1]] == ["update/1.weight", "0.weight"]
    updates = make_history(Log2Bins(), kinds=("update", "activation"))
    titles = [ax.get_title() for ax in function([history, updates]).axes[:-1]]
    assert titles[:2] == ["run 1  0.weight", "run 1  1.weight"]
    assert titles[-2:] == ["run 2  update/0.weight", "run 2  update/1.weight"]


def test_rows_of_another_kind_are_those_of_its_history() -> None:
    history = make_history(Log2Bins(), kinds=("grad", "update"))
    ax = plot.heatmap(history.select("update"), "rms").axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0.weight", "1.weight"]
    np.testing.assert_array_equal(ax.collections[0].get_array(), history["rms"][:, 2:].T)


@pytest.mark.parametrize(
    ("kind", "mean_abs", "mean", "std"),
    [
        ("grad", "mean |gradient|", "mean gradient", "std of the gradient"),
        ("param", "mean |parameter|", "mean parameter", "std of the parameter"),
        ("update", "mean |update|", "mean update", "std of the update"),
        ("activation", "mean |activation|", "mean activation", "std of the activation"),
        ("unit", "mean |unit peak|", "mean unit peak", "std of the unit peak"),
        (
            "grad_output",
            "mean |output gradient|",
            "mean output gradient",
            "std of the\noutput gradient",
        ),
    ],
)
def test_axes_name_what_is_drawn(kind: str, mean_abs: str, mean: str, std: str) -> None:
    history, one = ALL.select(kind), LONG_NAMES[:1]
    assert plot.curves(history, layers=one).get_supylabel() == mean_abs
    assert plot.curves(history, "mean", layers=one).get_supylabel() == mean
    assert plot.heatmap(history, "std", layers=one).axes[-1].get_ylabel() == std
    assert plot.heatmap(history, "counts", layers=one).get_supylabel() == f"|{NOUNS[kind]}|"
    lines = NOUNS[kind].replace(" ", "\n")
    assert plot.ridge(history, layers=one).axes[0].get_xlabel() == f"|{lines}|"
    linear = plot.ridge(ALL_LINEAR.select(kind), layers=one).axes[0].get_xlabel()
    assert linear.startswith(lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ([make_history(Log2Bins()), make_history(Log2Bins(), kinds=["update"])], None),
        (ALL, [LONG_NAMES[0], f"update/{LONG_NAMES[0]}"]),
    ],
)
def test_axes_of_several_kinds_name_none(arguments: tuple[Any, Any]) -> None:
    history, layers = arguments
    assert plot.curves(history, layers=layers).get_supylabel() == "mean |value|"
    assert plot.curves(history, "rms", layers=layers).get_supylabel() == "rms"
    assert plot.ridge(history, layers=layers).axes[0].get_xlabel() == "|value|"


@pytest.mark.parametrize("name", FIGURES)
def test_figure_of_the_kind_of_the_longest_name_is_legible(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = max(NOUNS, key=lambda kind: len(NOUNS[kind]))
    figure = FIGURES[name](ALL.select(kind), ALL_LINEAR.select(kind), LONG_NAMES[-1:])
    assert_legible(figure, monkeypatch)


@pytest.mark.parametrize("name", FIGURES)
def test_figure_of_all_kinds_is_legible(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [layer for layer in ALL.layers if layer.endswith(LONG_NAMES[-1])]
    assert len(rows) == len(KINDS)
    assert_legible(FIGURES[name](ALL, ALL_LINEAR, rows), monkeypatch)


@pytest.mark.parametrize("power", [-9, -5, 9])
def test_ridge_of_small_and_large_values_writes_their_power_of_ten_once(
    power: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    history: History = make_history(
        LinearBins(30), 2, 4, lambda step, layer: falling(step, layer) * 10.0**power
    )
    figure = plot.ridge(history)
    assert_legible(figure, monkeypatch)
    label = figure.axes[0].get_xlabel()
    assert label.startswith("gradient\n$\\times")
    assert str(abs(power)) in label


@pytest.mark.parametrize("spiking", [13, 14, 25])
def test_curves_color_and_name_the_line_that_stands_out_of_many(
    spiking: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient(step: int, layer: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * step + layer)
        return torch.randn(50, generator=generator) * (
            50.0 if (step, layer) == (7, spiking) else 1.0
        )

    history = make_history(Log2Bins(), [f"block.{i}" for i in range(28)], 12, gradient)
    for field in ("mean_abs", "mean"):
        figure = plot.curves(history, field, log=field == "mean_abs")
        (ax,), (key,) = figure.axes, figure.legends
        assert_legible(figure, monkeypatch)
        pairs = zip(key.get_texts(), key.get_lines(), strict=True)
        named = {text.get_text(): line.get_color() for text, line in pairs}
        assert list(named) == ["block.0", f"block.{spiking}", "block.27"]
        others = {to_hex(line.get_color()) for line in ax.lines}
        for name, color in named.items():
            line = ax.lines[int(name[6:])]
            assert to_hex(line.get_color()) == to_hex(color)
            assert max(color[:3]) - min(color[:3]) > 0.3
            others.remove(to_hex(color))
        (other,) = others
        assert len(set(to_rgb(other))) == 1


def test_of_lines_that_stray_together_one_stands_out() -> None:
    def gradient(step: int, layer: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * step + layer)
        strays = {5: 40.0, 6: 50.0, 7: 45.0} if step == 7 else {20: 30.0} if step == 3 else {}
        return torch.randn(50, generator=generator) * strays.get(layer, 1.0)

    history = make_history(Log2Bins(), [f"block.{i}" for i in range(28)], 12, gradient)
    (key,) = plot.curves(history).legends
    named = [text.get_text() for text in key.get_texts()]
    assert named == ["block.0", "block.6", "block.20", "block.27"]


@pytest.mark.parametrize("lines", [8, 9])
def test_curves_of_up_to_eight_lines_name_them_all(lines: int) -> None:
    figure = plot.curves(make_history(Log2Bins(), lines, 3))
    assert len(figure.legends[0].get_texts()) == (8 if lines == 8 else 2)
    assert len({to_hex(line.get_color()) for line in figure.axes[0].lines}) == (
        8 if lines == 8 else 3
    )


DRAWN = {
    "update_ratio": ("update", History.update_ratio),
    "dead_units": ("unit", History.dead_units),
}


@pytest.mark.parametrize("field", DRAWN)
@pytest.mark.parametrize("given", [None, "names", "rows", "titles"])
def test_curves_and_heatmap_draw_what_follows_from_several_kinds(
    field: str, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, of = DRAWN[field]
    history = make_history(Log2Bins(), ["a", "b", "c"], 5, kinds=KINDS)
    shown = ["a", "b", "c"] if given is None else ["c", "a"]
    layers = {
        None: None,
        "names": shown,
        "rows": [f"{kind}/{name}" for name in shown],
        "titles": {name: name.upper() for name in shown},
    }[given]
    expected = of(history)[:, ["abc".index(name) for name in shown]]
    figure = plot.curves(history, field, layers=layers)
    drawn = np.stack([line.get_ydata() for line in figure.axes[0].lines], 1)
    if field == "update_ratio":  # on a logarithmic axis
        expected = np.where(expected > 0, expected, np.nan)
    np.testing.assert_array_equal(drawn, expected)
    titles = [text.get_text() for text in figure.legends[0].get_texts()]
    assert titles == [name.upper() if given == "titles" else name for name in shown]
    figure = plot.heatmap(history, field, layers=layers)
    (mesh,) = figure.axes[0].collections
    np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan), drawn.T)
    assert "dead" in figure.axes[-1].get_ylabel() or "update" in figure.axes[-1].get_ylabel()
    assert_legible(figure, monkeypatch)


def test_curves_says_what_a_field_of_other_kinds_needs() -> None:
    message = (
        "curves() needs a history of watch(what='update') for 'update_ratio'; history has grad"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plot.curves(make_history(Log2Bins()), "update_ratio")
    message = "heatmap() needs a history of watch(what='activation') for 'dead_units'"
    with pytest.raises(ValueError, match=re.escape(message)):
        plot.heatmap(make_history(Log2Bins()), "dead_units")
    history = make_history(Log2Bins(), ["a", "b"], kinds=KINDS)
    with pytest.raises(ValueError, match="layers has 'd'"):
        plot.curves(history, "update_ratio", layers=["a", "d"])
    with pytest.raises(TypeError, match="layers is 3"):
        plot.curves(history, "update_ratio", layers=3)
