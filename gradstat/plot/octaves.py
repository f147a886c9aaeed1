"""Heatmaps of whole histograms: the share of the elements in each octave, against time."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from gradstat.arrays import OCTAVES
from gradstat.history import History
from gradstat.plot import arguments, data, labels, panels


def counts_heatmap(
    named: dict[str, History],
    titles: dict[str, str],
    steps_per_epoch: int | None,
    log: bool | None,
    figure: Figure | None,
) -> Figure:
    """Draw `plot.heatmap` of ``"counts"``, whose arguments these are.

    Args:
        named: histories over `Log2Bins`, with records.
        titles: title of each layer to draw.
        steps_per_epoch: as for `plot.heatmap`, and so are the others.
        log: logarithmic colour.
        figure: cleared and drawn into.
    """
    drawn = []
    for name, each in named.items():
        size = math.ceil(len(each) / data.MAX_COLUMNS)
        time = data.block_mean(data.times(each, steps_per_epoch), size)
        for layer, title in titles.items():
            drawn.append((labels.heading(name, title), time, data.octave_shares(each, layer, size)))
    everything = np.concatenate([shares for _, _, shares in drawn])
    norm = panels.color_norm(everything, log=bool(log))
    cmap = panels.density_colormap()
    figure, axes = panels.grid_2d(
        figure, len(titles), 4, (2.5, 2.1), groups=len(named), sharex=True, sharey=True
    )
    for ax, (_, time, shares) in zip(axes, drawn, strict=True):
        panels.style_2d(ax)
        image = panels.add_image(ax, time, OCTAVES, shares.T, norm, cmap)
    # Stray elements far below would squeeze the picture: show octaves that ever hold one in 100.
    shown = np.nan_to_num(everything).max(0, keepdims=True) > 0.01
    axes[0].set_ylim(*data.extent([(shown, OCTAVES[None])], symmetric=False))
    labels.powers_of_two(axes[0].yaxis, 6)
    noun = arguments.noun(named, titles)
    labels.label_axes(figure, labels.time_label(steps_per_epoch), f"|{noun}|")
    panels.add_colorbar(figure, image, "share of elements", axes)
    labels.add_titles(axes, [head for head, *_ in drawn])
    return figure
