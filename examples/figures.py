"""The study's figures, and how they are saved or shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gradstat import History, plot
from gradstat.bins import OCTAVES
from gradstat.plot import data, panels
from gradstat.util import evenly_spread, replacing

Array = NDArray[Any]

_FLAT_RIDGES = 10
_LEAST_SHARE = 0.005  # of a layer's elements, for an octave to be on the axis
LAYERS = {f"layer{i}.weight": f"layer {i}" for i in (1, 2, 3, 4)}


def figures(
    every_step: dict[str, History], each_epoch: dict[str, History], losses: dict[str, Array]
) -> Iterator[tuple[str, Figure]]:
    """Draw every figure of the study.

    Args:
        every_step: each network's record of every step, over `Log2Bins`.
        each_epoch: its record of the last step of each epoch, over `LinearBins`.
        losses: its loss in each step.

    Yields:
        A name for the file and the figure.
    """
    per_epoch = len(next(iter(every_step.values()))) // len(next(iter(each_epoch.values())))
    yield "1_activations", draw_activations()
    yield "2_octaves", draw_octaves(every_step, per_epoch)
    for name, history in each_epoch.items():
        yield f"2_ridge_{name.lower()}", draw_ridge(history)
    yield "2_ridge", draw_ridge(each_epoch)
    yield "3_loss", draw_loss(losses, per_epoch)
    yield "4_mean", draw_mean(every_step, per_epoch)
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


def draw_octaves(every_step: dict[str, History], per_epoch: int) -> Figure:
    """Figure 2, flat: a ridge for each of ten epochs over log2 |gradient|, and the zeros beside it.

    In the 3-D ridge over values the zeros of layer 1 hide what is not zero.
    """
    figure, axes = panels.grid_2d(None, 4, 4, (2.6, 2.6), groups=len(every_step), sharey=True)
    drawn = []
    for name, history in every_step.items():
        for layer, title in LAYERS.items():
            shares = np.nan_to_num(data.octave_shares(history, layer, per_epoch))
            drawn.append((panels.heading(name, title), shares))
    filled = np.flatnonzero(np.max([shares.max(0) for _, shares in drawn], axis=0) > _LEAST_SHARE)
    low, high = OCTAVES[filled[0]], OCTAVES[filled[-1] + 1]
    strip = (high - low) / 5  # where the zeros are
    epochs = len(drawn[0][1])
    kept = evenly_spread(epochs, _FLAT_RIDGES).tolist()
    color = ScalarMappable(Normalize(1, max(2, epochs)), "viridis")
    height = 1.8 * max(1, epochs / len(kept))
    middle = OCTAVES[filled[0] : filled[-1] + 1] + 0.5
    for ax, (_, shares) in zip(axes, drawn, strict=True):
        panels.style_2d(ax)
        top = shares[kept].max()
        for k in kept:
            face, y = color.to_rgba(k + 1), k + 1
            ridge = y - height * shares[k, filled[0] : filled[-1] + 1] / top
            ax.fill_between(middle, y, ridge, color=face, edgecolor="white", linewidth=0.5)
            ax.fill_between(
                [low - strip, low - strip + 0.8 * strip * (1 - shares[k].sum())],
                y,
                y - height / 3,
                color=face,
            )
        ax.set_xlim(low - strip, high)
        ax.axvline(low - 0.2 * strip, color=panels.LINE, linewidth=0.6)
        powers = range(int(low) + 2, int(high), max(1, round((high - low) / 32) * 8))
        zeros = f"{1 - shares[-1].sum():.0%}\nzeros"
        ax.set_xticks(
            [low - 0.6 * strip, *powers], [zeros, *(rf"$2^{{{power}}}$" for power in powers)]
        )
        ax.grid(visible=False, axis="x")
    axes[0].set_ylim(epochs + 1, 1 - 1.05 * height)
    axes[0].set_yticks([kept[at] + 1 for at in evenly_spread(len(kept), 5).tolist()])
    panels.label_axes(figure, "|gradient|", "epoch")
    panels.add_titles(figure, axes, [head for head, _ in drawn])
    return figure


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
    panels.label_axes(figure, "x", "")
    panels.add_key(figure, ["f(x)", "derivative"], panels.HUES[:2])
    panels.add_titles(figure, axes, list(curves))
    return figure


def draw_loss(losses: dict[str, Array], per_epoch: int) -> Figure:
    """Figure 3: the loss of each step, and its mean over each epoch."""
    figure, (ax,) = panels.grid_2d(None, 1, 1, (5.6, 3.2))
    panels.style_2d(ax)
    for color, loss in zip(panels.HUES, losses.values(), strict=False):
        steps = np.arange(1, len(loss) + 1) / per_epoch
        ax.plot(steps, loss, color=color, linewidth=0.5, alpha=0.45)
        mean = loss.reshape(-1, per_epoch).mean(1)
        panels.add_line(ax, np.arange(len(mean)) + 0.5, mean, color, log=False)
    ax.set_ylim(bottom=0)
    note = (
        "Bold: mean of an epoch. Pale: each step. The last batch of an epoch\n"
        "is small (8 images, of 5,000 in batches of 128): its loss scatters."
    )
    panels.label_axes(figure, f"epoch of {per_epoch} steps\n\n{note}", "cross-entropy")
    panels.add_key(figure, list(losses), panels.HUES[: len(losses)])
    return figure


def draw_mean(every_step: dict[str, History], per_epoch: int) -> Figure:
    """Figure 4: the mean gradient of each layer, where eight of ten steps of an epoch have it."""
    figure, axes = panels.grid_2d(None, 4, 4, (2.7, 2.4), sharex=True)
    for ax, layer in zip(axes, LAYERS, strict=True):
        panels.style_2d(ax)
        for color, history in zip(panels.HUES, every_step.values(), strict=False):
            means = data.values(history, layer, "mean").reshape(-1, per_epoch)
            low, median, high = np.quantile(means, [0.1, 0.5, 0.9], axis=1)
            epoch = np.arange(len(median)) + 1
            ax.fill_between(epoch, low, high, color=color, alpha=0.3, linewidth=0)
            panels.add_line(ax, epoch, median, color, log=False)
    note = (
        "Line: median of an epoch's steps; band: eight of ten of them. Layer 4's mean is rounding "
        "error: the errors of a softmax\nsum to zero over the classes. The mean is a poor signal; "
        "magnitudes, in the figures that follow, are a good one."
    )
    panels.label_axes(figure, f"epoch of {per_epoch} steps\n\n{note}", "mean gradient")
    panels.add_key(figure, list(every_step), panels.HUES[: len(every_step)])
    panels.add_titles(figure, axes, list(LAYERS.values()))
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
