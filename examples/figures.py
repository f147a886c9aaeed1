"""The study's figures, and how they are saved or shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradstat import History, plot
from gradstat.plot import labels, panels
from gradstat.util import replacing

Array = NDArray[Any]

LAYERS = {f"layer{i}.weight": f"layer {i}" for i in (1, 2, 3, 4)}


def figures(
    every_step: dict[str, History], each_epoch: dict[str, History], losses: dict[str, Array]
) -> Iterator[tuple[str, Figure]]:
    """Draw every figure of the study.

    Args:
        every_step: each network's record of every iteration, over `Log2Bins`.
        each_epoch: its record of the last iteration of each epoch, over `LinearBins`.
        losses: its loss in each iteration.

    Yields:
        A name for the file and the figure.
    """
    per_epoch = len(next(iter(every_step.values()))) // len(next(iter(each_epoch.values())))
    yield "1_activations", draw_activations()
    for name, history in each_epoch.items():
        yield f"2_ridge_{name.lower()}", draw_ridge(history)
    yield "2_ridge", draw_ridge(each_epoch)
    yield "3_loss", draw_loss(losses)
    means = plot.curves(every_step, "mean", layers=LAYERS)
    means.supxlabel(
        "iteration\n\nLayer 4's mean is rounding error: the errors of a softmax sum to zero over "
        "the classes. The mean is a poor signal;\nmagnitudes, in the figures that follow, are a "
        "good one.",
        fontsize=9,
        color=labels.INK,
    )
    yield "4_mean", means
    yield (
        "5_magnitude",
        plot.curves(
            every_step, split="history", layers=LAYERS, steps_per_epoch=per_epoch, average=per_epoch
        ),
    )
    yield (
        "5_log2",
        plot.heatmap(every_step, "counts", layers=LAYERS, steps_per_epoch=per_epoch),
    )


def draw_ridge(history: History | dict[str, History], figure: Figure | None = None) -> Figure:
    """Figure 2: a step of these histories is an epoch."""
    return plot.ridge(history, layers=LAYERS, steps_per_epoch=1, limits=(-0.5, 0.5), figure=figure)


def draw_activations() -> Figure:
    """Figure 1: both activations and their derivatives."""
    x = np.linspace(-5, 5, 1001)
    sigmoid = 1 / (1 + np.exp(-x))
    curves = {
        "ReLU": (np.maximum(x, 0), np.where(x > 0, 1.0, 0.0)),
        "sigmoid": (sigmoid, sigmoid * (1 - sigmoid)),
    }
    figure, axes = panels.grid_2d(None, 2, 2, (3.6, 2.6))
    for ax, (value, derivative) in zip(axes, curves.values(), strict=True):
        panels.style_2d(ax)
        ax.plot(x, value, color=panels.HUES[0], linewidth=1.8)
        ax.plot(x, derivative, color=panels.HUES[1], linewidth=1.8)
        ax.set_xlim(-5, 5)
    axes[1].set_ylim(-0.04, 1.04)
    labels.label_axes(figure, "x", "")
    labels.add_key(figure, ["f(x)", "derivative"], panels.HUES[:2])
    labels.add_titles(axes, list(curves))
    return figure


def draw_loss(losses: dict[str, Array]) -> Figure:
    """Figure 3: the loss of each iteration."""
    figure, (ax,) = panels.grid_2d(None, 1, 1, (5.6, 3.0))
    panels.style_2d(ax)
    for color, loss in zip(panels.HUES, losses.values(), strict=False):
        panels.add_line(ax, np.arange(1, len(loss) + 1), loss, color, log=False)
    ax.set_ylim(bottom=0)
    labels.label_axes(figure, "iteration", "cross-entropy")
    labels.add_key(figure, list(losses), panels.HUES[: len(losses)])
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG that appears whole or not at all."""
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150)


class LiveRidge:
    """The ridge in a window, redrawn each epoch; nothing but a message without a display."""

    def __init__(self) -> None:
        # pyplot opens windows and is needed for nothing else.
        from matplotlib import pyplot

        self._pyplot = pyplot
        self._figure = pyplot.figure(figsize=(7, 5.4))
        self._shown = self._figure.canvas.required_interactive_framework is not None
        if not self._shown:
            print("--live needs a display; there is none, so training goes on without a window")

    def __call__(self, name: str, history: History) -> None:
        """Redraw."""
        if self._shown and self._pyplot.fignum_exists(self._figure.number):
            draw_ridge({name: history}, self._figure)
            self._pyplot.pause(0.001)
