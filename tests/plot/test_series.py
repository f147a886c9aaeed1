"""Curves of scalars and of the norm, with findings on the time axis."""

import math

import matplotlib
import numpy as np
import pytest
import torch
from findings import noise
from histories import make_history
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import gradstat.plot
from gradstat import History, Log2Bins

STEPS, AT = 60, 40


def spiked(at: int = AT) -> History:
    def gradient(step: int, row: int) -> torch.Tensor:
        return noise(step, row, 1.0 if step in (at, at + 1) else 1e-2)

    history = make_history(Log2Bins(), 2, STEPS, gradient)
    for step in range(2 * STEPS):
        history.add_scalar("loss", step // 2, 2.0 if step // 2 in (at, at + 1) else 1.0)
    return history


def lines(figure: Figure) -> list[tuple[list[float], list[float]]]:
    """Curves, without the marks."""
    drawn = [line for line in figure.axes[0].lines if line.get_marker() != "^"]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn]  # type: ignore[arg-type]


def marks(figure: Figure) -> list[tuple[float, str]]:
    drawn = [line for line in figure.axes[0].lines if line.get_marker() == "^"]
    return [(float(line.get_xdata()[0]), to_hex(line.get_color())) for line in drawn]  # type: ignore[index, arg-type]


def test_curves_draws_every_value_of_a_scalar() -> None:
    history = spiked()
    ((x, y),) = lines(gradstat.plot.curves(history, "loss"))
    steps, values = history.scalar("loss")
    assert x == steps.tolist()
    assert y == values.tolist()


def test_curves_draws_the_norm_of_all_layers() -> None:
    history = spiked()
    figure = gradstat.plot.curves(history, "norm")
    ((x, y),) = lines(figure)
    assert x == history.steps.tolist()
    np.testing.assert_allclose(y, history.norm())
    assert figure.axes[0].get_yscale() == "log"
    figure = gradstat.plot.curves(history, "norm", log=False, steps_per_epoch=10, average=2)
    ((x, y),) = lines(figure)
    assert x[:2] == [0.2, 0.4]
    np.testing.assert_allclose(y, history.norm().reshape(-1, 2).mean(1))


def test_curves_marks_findings_on_the_time_axis() -> None:
    assert marks(gradstat.plot.curves(spiked(), "loss")) == [(AT, "#b87700")]
    in_epochs = gradstat.plot.curves(spiked(), "loss", steps_per_epoch=10)
    assert marks(in_epochs) == [((AT + 1) / 10, "#b87700")]
    quiet = make_history(Log2Bins(), 2, 40, noise)
    assert marks(gradstat.plot.curves(quiet, "norm")) == []


def test_curves_explains_the_marks_that_it_has() -> None:
    (key,) = gradstat.plot.curves(spiked(), "loss").legends
    assert [text.get_text() for text in key.get_texts()] == ["a warning begins"]
    (mark,) = key.legend_handles
    assert (mark.get_marker(), to_hex(mark.get_color())) == ("^", "#b87700")
    assert gradstat.plot.curves(make_history(Log2Bins(), 2, 40, noise), "norm").legends == []


def test_curves_draws_a_line_for_each_history_that_has_the_scalar() -> None:
    other = spiked(50)
    without = make_history(Log2Bins(), 2, 40, noise)
    figure = gradstat.plot.curves({"one": spiked(), "other": other, "none": without}, "loss")
    assert len(lines(figure)) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "one", "other", "none", "a warning begins",
    ]  # fmt: skip
    assert [time for time, _ in marks(figure)] == [AT, 50]


def test_curves_survives_a_scalar_that_is_not_finite() -> None:
    history = make_history(Log2Bins(), 2, 3, noise)
    for step in range(3):
        history.add_scalar("loss", step, math.nan if step else 1.0)
    with matplotlib.rc_context({"figure.max_open_warning": 0}):
        gradstat.plot.curves(history, "loss").draw_without_rendering()


def test_curves_still_refuses_an_unknown_field() -> None:
    with pytest.raises(ValueError, match="field is 'accuracy'"):
        gradstat.plot.curves(spiked(), "accuracy")
