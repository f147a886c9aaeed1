"""What narrow formats would have done to the layers of a run, and the rules about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.findings import Finding
from gradstat.diagnosis.run import Run, median
from gradstat.formats import parse_format
from gradstat.record import NOUNS, Row
from gradstat.thresholds import Thresholds
from gradstat.util import Array


@dataclass(frozen=True)
class Fit:
    """What a format would have done to a layer, at its worst in a run.

    Args:
        snr: smallest signal-to-noise ratio in dB, a median over a window's records.
        underflow: largest share of the non-zero values that becomes zero, likewise.
        saturated: largest share that saturates, likewise.
        scales: exponents of the smallest and the largest scale of a block; NaN without blocks.
    """

    snr: float
    underflow: float
    saturated: float
    scales: tuple[float, float]

    def keeps(self, thresholds: Thresholds) -> bool:
        """Whether a format leaves enough: of the sum of squares, and of the small values too."""
        return self.snr >= thresholds.format_snr and self.underflow <= thresholds.underflow_share


@dataclass(frozen=True)
class LayerFits:
    """The `Fit` of each format to a row of a history.

    Args:
        row: the row.
        layer: its name, as printed.
        fits: by the format's name.
    """

    row: Row
    layer: str
    fits: dict[str, Fit]

    def narrowest(self, thresholds: Thresholds) -> str | None:
        """The format of the fewest bits that keeps the layer; ``None``: none does."""
        kept = [name for name, fit in self.fits.items() if fit.keeps(thresholds)]
        return min(kept, key=lambda name: parse_format("formats", name).bits, default=None)

    @property
    def worst(self) -> float:
        """The smallest SNR of all formats."""
        return min(fit.snr for fit in self.fits.values())


def layer_fits(run: Run) -> list[LayerFits]:
    """What each format would have done at its worst to each row with values other than zero.

    Args:
        run: all rows of a history with one record at least.

    Returns:
        Those rows, kind by kind, the one nearest to the input first.
    """
    found: list[dict[str, Fit]] = [{} for _ in run.layers]
    for name in run.history.formats:
        fields = run.of_format(name)
        snr = _over_blocks(fields["snr"], run.blocks).min(0)
        underflow, saturated = (
            _over_blocks(fields[each], run.blocks).max(0) for each in ("underflow", "saturated")
        )
        least = np.fmin.reduce(fields["scale_min"])
        most = np.fmax.reduce(fields["scale_max"])
        for at, fits in enumerate(found):
            if not math.isnan(snr[at]):
                scales = float(least[at]), float(most[at])
                fits[name] = Fit(float(snr[at]), float(underflow[at]), float(saturated[at]), scales)
    return [
        LayerFits(Row(kind, name), layer, fits)
        for kind, name, layer, fits in zip(run.kinds, run.names, run.layers, found, strict=True)
        if fits
    ]


def recommendation(
    layers: Sequence[LayerFits], formats: Sequence[str], thresholds: Thresholds
) -> str:
    """One sentence: the narrowest format for the layers of each kind, and which layers it fails."""
    parts = []
    for kind in dict.fromkeys(each.row.kind for each in layers):
        of_kind = [each for each in layers if each.row.kind == kind]
        parts.append(_for_kind(of_kind, formats, thresholds))
    return f"To keep {thresholds.format_snr:g} dB of each layer: {'; '.join(parts)}."


def _for_kind(layers: Sequence[LayerFits], formats: Sequence[str], thresholds: Thresholds) -> str:
    nouns = f"{NOUNS[layers[0].row.kind]}s"
    by_bits = sorted(formats, key=lambda name: parse_format("formats", name).bits)
    lacking = {
        name: [each for each in layers if not each.fits[name].keeps(thresholds)] for name in by_bits
    }
    whole = next((name for name in by_bits if not lacking[name]), None)
    # Narrower ones that would do for most of them.
    narrower = by_bits[: by_bits.index(whole)] if whole else by_bits
    most = next((name for name in narrower if 2 * len(lacking[name]) < len(layers)), None)
    if whole is not None and most is None:
        return f"{whole} for all {nouns}"
    if most is None:
        return f"none of the formats for the {nouns}"
    left = lacking[most]
    worst = min(left, key=lambda each: each.fits[most].snr)
    exceptions = worst.row.name if len(left) == 1 else f"{worst.row.name} and {len(left) - 1} more"
    others = f"{whole} for these" if whole else "no format for these"
    return f"{most} for the {nouns} but {exceptions}, {others}"


def find_starved(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Formats that would flush much of a layer to zero."""
    said = "would flush {share} of {layer}'s {noun} to zero"
    return _exceeding(run, "starved", "underflow", thresholds.underflow_share, said)


def find_clipped(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Formats without scales of blocks that many of a layer's values are too large for.

    The scales of blocks follow the values. A power of two clips an eighth
    at most, which the SNR counts.
    """
    said = "is too narrow for {share} of {layer}'s {noun}, which would be clipped"
    return _exceeding(run, "clipped", "saturated", thresholds.clipped_share, said)


def find_narrowest(run: Run, thresholds: Thresholds) -> list[Finding]:
    """A note on which of the formats would do."""
    history = run.history
    layers = layer_fits(run) if history.formats else []
    if not layers:
        return []
    worst = min(layers, key=lambda each: each.worst)
    # A format that keeps everything has an infinite SNR, which is left out.
    numbers = {name: fit.snr for name, fit in worst.fits.items() if math.isfinite(fit.snr)}
    steps = int(run.steps[0]), int(run.steps[-1])
    sentence = recommendation(layers, history.formats, thresholds)
    return [Finding("narrowest format", "note", worst.layer, steps, numbers, sentence)]


def _exceeding(run: Run, kind: str, field: str, limit: float, said: str) -> list[Finding]:
    """A finding for each format that does something to more than a share of a layer's values."""
    history, findings = run.history, []
    for name in history.formats:
        if field == "saturated" and parse_format("diagnose", name).block:
            continue
        by_block = np.nan_to_num(_over_blocks(run.of_format(name)[field], run.blocks))
        worst = by_block.max(0, initial=0.0)
        above = np.flatnonzero(worst > limit)
        if not len(above):
            continue
        column = int(worst.argmax())
        sentence = said.format(
            share=_percent(worst[column]), layer=run.names[column], noun=NOUNS[run.kinds[column]]
        )
        if len(above) > 1:
            others = f"{len(above) - 1} other row{'s' * (len(above) > 2)}"
            sentence += f", and over {_percent(limit)} in {others}"
        findings.append(
            Finding(
                kind,
                "warning",
                run.layers[column],
                run.span(by_block[:, column] > limit, int(by_block[:, column].argmax())),
                {"share": float(worst[column]), "layers": float(len(above))},
                f"{name} {sentence}.",
            )
        )
    return findings


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _over_blocks(values: Array, blocks: Sequence[Array]) -> Array:
    """Medians of each block's records, ``(B, L)``; the least of the others where there are none."""
    medians = np.stack([median(values[block]) for block in blocks])
    known = np.fmin.reduce(medians)
    return np.where(np.isnan(medians), known, medians)
