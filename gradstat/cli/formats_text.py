"""What ``gradstat formats`` prints."""

from __future__ import annotations

import math
import textwrap

from gradstat.cli.text import MOST_LAYERS, count, table, width
from gradstat.diagnosis.narrow_formats import Fit, layer_fits, recommendation
from gradstat.diagnosis.run import Run
from gradstat.escaping import escaped
from gradstat.history import History
from gradstat.record import NOUNS, UNIT
from gradstat.thresholds import Thresholds


def formats(
    history: History,
    thresholds: Thresholds,
    *,
    every_layer: bool = False,
    scales: bool = False,
) -> str:
    """What narrow formats would do to each layer, the worst first, and what is recommended.

    Args:
        history: with one record at least, of some formats.
        thresholds: what a format must leave of a layer.
        every_layer: also where a network has more layers than a screen has lines.
        scales: also the exponents of the smallest and the largest scale of a block.

    Returns:
        Text.
    """
    layers = layer_fits(Run(history, thresholds.window, None))
    if not layers:
        return "\nno layer has values"
    lines = []
    for kind in dict.fromkeys(each.row.kind for each in layers):
        of_kind = sorted((x for x in layers if x.row.kind == kind), key=lambda x: x.worst)
        shown = of_kind if every_layer else of_kind[:MOST_LAYERS]
        rows: list[tuple[str, ...]] = [(NOUNS[kind], "narrowest", *history.formats)]
        for each in shown:
            cells = [_fit(fit, scales=scales) for fit in each.fits.values()]
            rows.append((escaped(each.row.name), each.narrowest(thresholds) or "none", *cells))
        lines += ["", *table(rows)]
        if len(of_kind) > len(shown):
            lines.append(f"and {len(of_kind) - len(shown)} better ones (--all shows them)")
    if n_left_out := sum(row.kind != UNIT for row in history.rows) - len(layers):
        lines += ["", f"{count(n_left_out, 'row')} without values other than zero left out"]
    sentence = escaped(recommendation(layers, history.formats, thresholds))
    return "\n".join([*lines, "", textwrap.fill(sentence, width())])


def _fit(fit: Fit, *, scales: bool) -> str:
    """SNR, and what share is lost if any is."""
    text = "exact" if fit.snr == math.inf else f"{round(fit.snr, 1) + 0.0:.1f} dB"
    for share, what in ((fit.underflow, "to 0"), (fit.saturated, "clipped")):
        if share:
            text += f", {_share(share)} {what}"
    least, most = fit.scales
    if scales and not math.isnan(least):
        text += f", 2^{least:.0f}..{most:.0f}"
    return text


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "<1%"
