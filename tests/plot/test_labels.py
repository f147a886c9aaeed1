from collections.abc import Callable

import pytest
import torch
from histories import LONG_NAMES, make_history
from legibility import assert_legible

from gradstat import History, LinearBins, Log2Bins, plot
from gradstat.plot import labels

LOG2 = {name: make_history(Log2Bins(), LONG_NAMES) for name in ("ReLU", "sigmoid")}
LINEAR = {name: make_history(LinearBins(30, nice=True), LONG_NAMES) for name in ("ReLU", "sigmoid")}
# Histories and layers: the least, a row and a bit of another, several rows.
SIZES = [(1, 1), (2, 5), (1, 12)]

FIGURES = {
    "ridge": lambda h, names: plot.ridge(pick(h, LINEAR), layers=names),
    "ridge of magnitudes": lambda h, names: plot.ridge(h, layers=names),
    "ridge by epoch": lambda h, names: plot.ridge(pick(h, LINEAR), layers=names, steps_per_epoch=1),
    "curves": lambda h, names: plot.curves(h, layers=names),
    "curves of the mean": lambda h, names: plot.curves(h, "mean", layers=names),
    "curves by layer": lambda h, names: plot.curves(h, "rms", layers=names, split="layer"),
    "curves by history": lambda h, names: plot.curves(h, "sum", layers=names, split="history"),
    "heatmap": lambda h, names: plot.heatmap(h, layers=names),
    "heatmap of the mean": lambda h, names: plot.heatmap(h, "mean", layers=names),
    "heatmap of counts": lambda h, names: plot.heatmap(h, "counts", layers=names),
}


def pick(like: History | dict[str, History], other: dict[str, History]) -> object:
    """One history of the others where there is one, else all."""
    return other["ReLU"] if isinstance(like, History) else other


@pytest.mark.parametrize(("n_histories", "n_layers"), SIZES)
@pytest.mark.parametrize("name", FIGURES)
def test_figure_of_long_layer_names_is_legible(
    name: str, n_histories: int, n_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = LOG2["ReLU"] if n_histories == 1 else LOG2
    figure = FIGURES[name](history, LONG_NAMES[-n_layers:])
    assert_legible(figure, monkeypatch)


def test_layout_check_finds_overlapping_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plot.curves(LOG2, layers=LONG_NAMES[:4])
    for ax in figure.axes:
        ax.set_title(LONG_NAMES[0], fontsize=14)
    with pytest.raises(AssertionError):
        assert_legible(figure, monkeypatch)


@pytest.mark.parametrize("factor", [1.05, 1.3, 2, 5, 8, 15, 50, 1000, 1e8])
@pytest.mark.parametrize(
    "draw",
    [
        lambda h: plot.curves(h, "l2").axes[0].yaxis,
        lambda h: plot.heatmap(h, "l2").axes[-1].yaxis,
    ],
    ids=["curves", "heatmap"],
)
def test_logarithmic_axis_of_any_span_has_two_numbers_or_more(
    draw: Callable[[History], object], factor: float
) -> None:
    history = make_history(
        Log2Bins(), 1, 2, gradient=lambda step, _: torch.full((3,), 0.7 * factor**-step)
    )
    axis = draw(history)
    axis.get_figure().draw_without_rendering()
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    shown = [label.get_text() for at, label in ticks if low <= at <= high and label.get_text()]
    assert len(set(shown)) >= 2


@pytest.mark.parametrize(
    ("titles", "inches", "expected", "size"),
    [
        (["layer 1"], 2.0, ["layer 1"], 10),
        (["transformer.h.10.mlp.c_proj.weight"], 2.0, ["transformer.h.10.\nmlp.c_proj.weight"], 10),
        (
            ["a.weight", "transformer.wte.weight"],
            1.0,
            ["a.\nweight", "transformer.\nwte.weight"],
            10,
        ),
        (["ReLU  h.0.mlp.weight"], 1.4, ["ReLU\nh.0.mlp.weight"], 10),
        ([""], 1.0, [""], 10),
    ],
)
def test_fit_titles_breaks_all_in_two_if_one_is_too_long(
    titles: list[str], inches: float, expected: list[str], size: float
) -> None:
    assert labels.fit_titles(titles, inches) == (expected, size)


@pytest.mark.parametrize("title", ["x" * 40, "module." * 12 + "weight", "name  " + "x" * 80])
@pytest.mark.parametrize("inches", [0.5, 1.0, 2.5])
def test_fit_titles_makes_any_title_fit(title: str, inches: float) -> None:
    (fitted,), size = labels.fit_titles([title], inches)
    assert 6 <= size <= 10
    for line in fitted.split("\n"):
        assert labels.text_inches(line, size) <= inches * 1.01
    assert fitted.endswith(title[-3:])
