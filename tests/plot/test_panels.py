"""Figures in a notebook, which asks an object how it is shown, and in a script."""

import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from histories import make_history
from matplotlib import pyplot

from gradstat import Log2Bins, plot

HISTORY = make_history(Log2Bins())
DRAWN = [
    lambda: plot.ridge(HISTORY),
    lambda: plot.curves(HISTORY),
    lambda: plot.heatmap(HISTORY, "counts"),
]


@pytest.fixture
def displayed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a notebook has been told to display."""
    shown: list[Any] = []
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython, display.display = lambda: SimpleNamespace(), shown.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


@pytest.mark.parametrize("draw", DRAWN, ids=["ridge", "curves", "heatmap"])
def test_figures_show_themselves_in_a_notebook_and_open_no_window(draw: Any) -> None:
    assert draw()._repr_png_().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []


def test_show_displays_in_a_notebook(displayed: list[Any]) -> None:
    figure = plot.curves(HISTORY)
    figure.show()
    assert displayed == [figure]


def test_show_says_in_a_script_what_to_do_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    with pytest.raises(RuntimeError, match=r"no window; savefig\(path\) writes it"):
        plot.curves(HISTORY).show()


def test_figures_can_be_pickled() -> None:
    figure = plot.curves(HISTORY)
    again = pickle.loads(pickle.dumps(figure))
    assert len(again.axes) == len(figure.axes)
