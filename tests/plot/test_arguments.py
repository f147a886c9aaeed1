import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from histories import make_history
from legibility import draw_small
from matplotlib import pyplot
from matplotlib.figure import Figure

from gradstat import History, LinearBins, Log2Bins, plot
from gradstat.history import FIELDS
from gradstat.plot.data import DERIVED

LOG2, LINEAR = make_history(Log2Bins()), make_history(LinearBins(30))
EMPTY = History(["0.weight"], Log2Bins())
FUNCTIONS = [plot.ridge, plot.curves, plot.heatmap]


def counts_heatmap(history: Any, **options: Any) -> Figure:
    return plot.heatmap(history, "counts", **options)


def zero(step: int, layer: int) -> torch.Tensor:
    return torch.zeros(20)


ODD = {
    "single record": lambda bins: make_history(bins, steps=1),
    "single layer": lambda bins: make_history(bins, layers=1),
    "all zero": lambda bins: make_history(bins, gradient=zero),
    "single zero record": lambda bins: make_history(bins, steps=1, gradient=zero),
    "half zero": lambda bins: [make_history(bins), make_history(bins, gradient=zero)],
    "step without gradients": lambda bins: make_history(bins, absent=[(1, 0), (1, 1)]),
    "layer without gradients": lambda bins: make_history(bins, absent=[(s, 0) for s in range(3)]),
    "no gradients": lambda bins: make_history(
        bins, absent=[(s, layer) for s in range(3) for layer in range(2)]
    ),
    "no elements": lambda bins: make_history(bins, gradient=lambda *_: torch.empty(0)),
    "one element": lambda bins: make_history(bins, gradient=lambda *_: torch.ones(1)),
    "all NaN": lambda bins: make_history(bins, gradient=lambda *_: torch.full((5,), math.nan)),
    "some infinite": lambda bins: make_history(
        bins, gradient=lambda *_: torch.tensor([1.0, math.inf, -2.0, -math.inf])
    ),
    "subnormal": lambda bins: make_history(bins, gradient=lambda *_: torch.full((9,), 1e-44)),
    "tiny": lambda bins: make_history(bins, gradient=lambda *_: torch.linspace(-1e-30, 1e-30, 9)),
    "huge": lambda bins: make_history(bins, gradient=lambda *_: torch.linspace(-3e38, 3e38, 9)),
    "of different lengths": lambda bins: [make_history(bins, steps=n) for n in (1, 5)],
    "of different layers": lambda bins: [make_history(bins, layers=[n]) for n in ("a", "b")],
}


# Only the ridge asks what the bins are. Curves have a logarithmic axis, which odd values trouble.
DRAWINGS = {
    "ridge": lambda make: plot.ridge(make(LinearBins(30))),
    "ridge of magnitudes": lambda make: plot.ridge(make(Log2Bins())),
    "curves": lambda make: plot.curves(make(Log2Bins())),
    "heatmap": lambda make: plot.heatmap(make(Log2Bins())),
    "heatmap of counts": lambda make: plot.heatmap(make(Log2Bins()), "counts"),
}


@pytest.mark.parametrize("history", ODD)
@pytest.mark.parametrize("drawing", DRAWINGS)
def test_odd_histories_are_drawn_without_a_warning(drawing: str, history: str) -> None:
    draw_small(DRAWINGS[drawing](ODD[history]))


@pytest.mark.parametrize("function", [*FUNCTIONS, counts_heatmap])
def test_given_figure_is_cleared_and_drawn_into(function: Callable[..., Figure]) -> None:
    figure = Figure(figsize=(9, 7))
    figure.add_axes((0, 0, 1, 1)).set_title("old")
    assert function(LOG2, figure=figure) is figure
    again = function(LOG2, figure=figure)
    assert again is figure
    assert len(figure.axes) == len(function(LOG2).axes)
    assert "old" not in [ax.get_title() for ax in figure.axes]
    assert tuple(figure.get_size_inches()) == (9, 7)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_figure_of_pyplot_can_be_drawn_into(function: Callable[..., Figure]) -> None:
    figure = pyplot.figure()
    try:
        function(LOG2, figure=figure)
        figure.canvas.draw()
        assert pyplot.get_fignums() == [figure.number]
    finally:
        pyplot.close(figure)


LOGGED = "what w.log() has logged, as by w.log(loss=loss), or "
NAMES = ", ".join(("mean_abs", *DERIVED, *FIELDS))

BAD_FOR_ALL = [
    (lambda f: f(3), TypeError, "a History, or several in a mapping or sequence; history is int"),
    (lambda f: f("a"), TypeError, "a History, or several in a mapping or sequence; history is str"),
    (lambda f: f([]), ValueError, "at least one History; history is empty"),
    (lambda f: f({}), ValueError, "at least one History; history is empty"),
    (lambda f: f([LOG2, 3]), TypeError, "a History; history['run 2'] is int"),
    (lambda f: f({"a": None}), TypeError, "a History; history['a'] is NoneType"),
    (
        lambda f: f(EMPTY),
        ValueError,
        "a History with records; history is History(0 steps, 1 layers, Log2Bins())",
    ),
    (
        lambda f: f({"a": LOG2, "b": EMPTY}),
        ValueError,
        "a History with records; history['b'] is History(0 steps, 1 layers, Log2Bins())",
    ),
    (
        lambda f: f(LOG2, layers="0.weight"),
        TypeError,
        "a sequence of layer names; layers is '0.weight'",
    ),
    (lambda f: f(LOG2, layers=3), TypeError, "a sequence of layer names; layers is 3"),
    (lambda f: f(LOG2, layers=[0]), TypeError, "a sequence of layer names; layers is [0]"),
    (lambda f: f(LOG2, layers=[["a"]]), TypeError, "a sequence of layer names; layers is [['a']]"),
    (lambda f: f(LOG2, layers=[]), ValueError, "at least one layer; layers is empty"),
    (
        lambda f: f(LOG2, layers=["0.weight", "2.weight"]),
        ValueError,
        "layers, each one of '0.weight', '1.weight' (did you mean '1.weight' or '0.weight'?); "
        "layers has '2.weight'",
    ),
    (
        lambda f: f(LOG2, steps_per_epoch=2.0),
        TypeError,
        "an integer; steps_per_epoch is 2.0",
    ),
    (
        lambda f: f(LOG2, steps_per_epoch=True),
        TypeError,
        "an integer; steps_per_epoch is True",
    ),
    (
        lambda f: f(LOG2, steps_per_epoch=0),
        ValueError,
        "a number of 1 or more; steps_per_epoch is 0",
    ),
    (lambda f: f(LOG2, figure="a.png"), TypeError, "a matplotlib Figure; figure is str"),
    (lambda f: f(LOG2, figure=pyplot.Axes), TypeError, "a matplotlib Figure; figure is type"),
]

BAD_FOR_ONE = [
    (
        lambda: plot.ridge([LOG2, LINEAR]),
        ValueError,
        "ridge() needs histories over one kind of bins; history has Log2Bins and LinearBins",
    ),
    (
        lambda: plot.ridge(LOG2, limits=3),
        TypeError,
        "ridge() needs limits of two numbers; limits is 3",
    ),
    (
        lambda: plot.ridge(LOG2, limits=(0, 1, 2)),
        TypeError,
        "ridge() needs limits of two numbers; limits is (0, 1, 2)",
    ),
    (
        lambda: plot.ridge(LOG2, limits=("a", "b")),
        TypeError,
        "ridge() needs limits of two numbers; limits is ('a', 'b')",
    ),
    (
        lambda: plot.ridge(LOG2, limits=(1, 1)),
        ValueError,
        "ridge() needs finite limits, low < high; limits is (1, 1)",
    ),
    (
        lambda: plot.ridge(LOG2, limits=(0, math.inf)),
        ValueError,
        "ridge() needs finite limits, low < high; limits is (0, inf)",
    ),
    (
        lambda: plot.curves(LOG2, "median"),
        ValueError,
        f"curves() needs {LOGGED}one of {NAMES}; field is 'median'",
    ),
    (
        lambda: plot.curves(LOG2, "counts"),
        ValueError,
        f"curves() needs {LOGGED}one of {NAMES}; field is 'counts'",
    ),
    (
        lambda: plot.curves(LOG2, split="epoch"),
        ValueError,
        "curves() needs split 'layer' or 'history'; split is 'epoch'",
    ),
    (
        lambda: plot.curves(LOG2, average=0),
        ValueError,
        "curves() needs a number of 1 or more; average is 0",
    ),
    (
        lambda: plot.curves(LOG2, average=None),
        TypeError,
        "curves() needs an integer; average is None",
    ),
    (
        lambda: plot.heatmap(LOG2, "median"),
        ValueError,
        f"heatmap() needs one of counts, {NAMES}; field is 'median'",
    ),
    (
        lambda: plot.heatmap(LINEAR, "counts"),
        ValueError,
        "heatmap() needs Log2Bins for 'counts'; history is over LinearBins",
    ),
    (
        lambda: plot.heatmap([LOG2, LINEAR], "counts"),
        ValueError,
        "heatmap() needs histories over one kind of bins; history has Log2Bins and LinearBins",
    ),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("call", "error", "message"), BAD_FOR_ALL)
def test_functions_refuse_by_argument(
    function: Callable[..., Figure],
    call: Callable[..., Any],
    error: type[Exception],
    message: str,
) -> None:
    message = f"{function.__name__}() needs {message}"
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(function)


@pytest.mark.parametrize(("call", "error", "message"), BAD_FOR_ONE)
def test_function_refuses_its_own_argument(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_refused_call_leaves_the_given_figure_as_it_was(function: Callable[..., Figure]) -> None:
    figure = Figure()
    figure.add_axes((0, 0, 1, 1)).set_title("old")
    with pytest.raises(ValueError, match="layers, each one of"):
        function(LOG2, layers=["unknown"], figure=figure)
    assert [ax.get_title() for ax in figure.axes] == ["old"]
