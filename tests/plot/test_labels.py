import re
from collections.abc import Callable

import pytest
import torch
from histories import LONG_NAMES, append_rows, make_history
from legibility import assert_legible, draw_small
from matplotlib.figure import Figure
from matplotlib.text import Text

from gradstat import History, LinearBins, Log2Bins, plot
from gradstat.plot import panels

LOG2 = {name: make_history(Log2Bins(), LONG_NAMES) for name in ("ReLU", "sigmoid")}
LINEAR = {name: make_history(LinearBins(30, nice=True), LONG_NAMES) for name in ("ReLU", "sigmoid")}
# Histories and layers: the least, and for each history a row of panels and a bit of another.
SIZES = [(1, 1), (2, 5)]

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
    assert panels.fit_titles(titles, inches) == (expected, size)


@pytest.mark.parametrize("title", ["x" * 40, "module." * 12 + "weight", "name  " + "x" * 80])
@pytest.mark.parametrize("inches", [0.5, 1.0, 2.5])
def test_fit_titles_makes_any_title_fit(title: str, inches: float) -> None:
    (fitted,), size = panels.fit_titles([title], inches)
    assert 6 <= size <= 10
    for line in fitted.split("\n"):
        assert panels.text_inches(line, size) <= inches * 1.01
    assert fitted.endswith(title[-3:])


NAMES = ["a$b$c", "$\\sqrt{", "cost in $", " ", "\t", "\u200b", "a\\$b", "$$", "x^2_i"]


@pytest.mark.parametrize(
    "draw",
    [
        plot.ridge,
        lambda h: plot.curves(h, layers=NAMES[:8]),
        plot.heatmap,
        lambda h: plot.curves(h, split="layer"),
        lambda h: plot.heatmap(h, "counts"),
        lambda h: plot.ridge(h, layers=NAMES),
    ],
)
def test_figure_shows_names_of_layers_as_they_are(draw: Callable[[History], Figure]) -> None:
    figure = draw(make_history(Log2Bins(), NAMES))
    draw_small(figure)
    shown = [text.get_text() for text in figure.findobj(Text)]
    for layer in ("a$b$c", "$\\sqrt{", "a\\$b"):
        # What Matplotlib makes of it: no mathematics.
        drawn = [Text(0, 0, text)._preprocess_math(text) for text in shown]
        assert (layer, False) in drawn


@pytest.mark.parametrize(
    "draw",
    [
        plot.ridge,
        plot.curves,
        plot.heatmap,
        lambda h: plot.curves(h, split="history"),
        lambda h: plot.heatmap(h, "counts"),
        lambda h: plot.curves(h, "norm"),
        lambda h: plot.curves(h, "$\\sqrt{$"),
    ],
)
def test_figure_shows_names_of_histories_and_scalars_as_they_are(
    draw: Callable[[dict[str, History]], Figure],
) -> None:
    history = make_history(Log2Bins(), ["weight"])
    history.add_scalar("$\\sqrt{$", 0, 1.0)
    figure = draw({"$\\nosuch{$": history, "a$b$\x1b": history})
    draw_small(figure)
    drawn = [
        Text(0, 0, text.get_text())._preprocess_math(text.get_text())
        for text in figure.findobj(Text)
    ]
    for name in ("$\\nosuch{$", "a$b$\\x1b"):
        assert any(text.startswith(name) and not is_math for text, is_math in drawn)


def test_title_of_a_layer_may_be_mathematics() -> None:
    history = make_history(Log2Bins(), ["weight"])
    figure = plot.heatmap(history, "counts", layers={"weight": r"$\sigma_1$"})
    assert figure.axes[0].get_title() == r"$\sigma_1$"


@pytest.mark.parametrize(
    ("draw", "function"),
    [
        (plot.ridge, "ridge"),
        (lambda h: plot.heatmap(h, "counts"), "heatmap"),
        (lambda h: plot.curves(h, split="layer"), "curves"),
    ],
)
def test_more_panels_than_can_be_seen_are_refused(
    draw: Callable[[History], Figure], function: str
) -> None:
    many = History([f"{i}" for i in range(2000)], Log2Bins())
    row = make_history(Log2Bins(), 1).record()
    parts = [part.numpy().repeat(2000, 0) for part in (row.integers, row.floats, row.counts)]
    append_rows(many, 0, *parts)
    message = (
        f"{function}() needs layers for at most 100 panels: choose some, as in "
        "layers=history.layers[:8]; layers are 2000, of 1 history"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        draw(many)


def test_fit_titles_measures_a_long_title_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def text_inches(text: str, size: float) -> float:
        measured.append(text)
        return len(text) * size / 100

    monkeypatch.setattr(panels, "text_inches", text_inches)
    title = "".join(chr(ord("a") + i % 26) for i in range(5000))
    fitted, size = panels.fit_titles([title], 3.0)
    assert size == 6
    assert fitted == ["…" + title[-49:]]
    assert len(measured) < 30


@pytest.mark.parametrize("line", ["ab", "abcdefgh", "a"])
@pytest.mark.parametrize("inches", [0.01, 0.1, 0.2, 0.3, 5.0])
def test_shorten_leaves_what_fits(line: str, inches: float) -> None:
    shown = panels.shorten(line, inches, 6)
    assert panels.text_inches(shown, 6) <= inches or shown == "…" or shown == line == "a"
    assert shown == line or (shown[0] == "…" and line.endswith(shown[1:]))


def test_figures_of_names_of_720_letters_are_as_wide_as_others() -> None:
    history = make_history(Log2Bins(), ["a" * 720, "b." * 360])
    for draw in (plot.curves, plot.heatmap):
        figure = draw(history)
        assert figure.get_figwidth() < 12
        # Warnings are errors.
        draw_small(figure)
