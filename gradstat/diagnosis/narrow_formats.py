"""What narrow number formats would do to a run: what they lose, the scales and formats that fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from gradstat.diagnosis.evidence import Evidence, around, log2_edges
from gradstat.diagnosis.findings import Finding, for_all
from gradstat.formats import parse_format
from gradstat.record import NOUNS, PARAM, Row
from gradstat.results import is_flushed
from gradstat.thresholds import Thresholds
from gradstat.util import Array, median, plural

NARROW = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
_SPARE = 1.0  # dB, so that what is at the limit is not advised in one run and not in the next
_LEARNED = 6.0  # dB; half of what a weight has learned
_PARTS = 4  # of a run; kurtosis must grow from each to the next
_LEAST = 20.0  # a normal distribution has 3


class FormatFit(NamedTuple):
    """What a format would have done to a layer, at its worst in a run."""

    snr: float  # the smallest signal-to-noise ratio in dB, a median over a window's records
    underflow: float  # the largest share of the non-zero values that becomes zero, likewise
    saturated: float  # the largest share that saturates, likewise
    scales: tuple[float, float]  # exponents of a block's least and greatest; NaN without blocks
    # Signal-to-noise ratio of how far parameters are from their mean, in the newest window: of a
    # norm's weights, near 1, that is what was learned; infinite of others.
    learned: float

    def keeps(self, thresholds: Thresholds, spare: float = _SPARE) -> bool:
        """Whether a format leaves enough: of the sum of squares, and of the small values too."""
        return (
            self.snr >= thresholds.format_snr + spare
            and self.underflow <= thresholds.underflow_share
            and self.learned >= _LEARNED
        )


class LayerFits(NamedTuple):
    """The `FormatFit` of each format to a row of a history."""

    row: Row
    layer: str  # its name, as printed
    fits: dict[str, FormatFit]  # by the format's name

    def narrowest(self, thresholds: Thresholds) -> str | None:
        """The format of the fewest bits that keeps the layer; ``None``: none does."""
        kept = [name for name, fit in self.fits.items() if fit.keeps(thresholds)]
        return min(kept, key=lambda name: parse_format("formats", name).bits, default=None)

    @property
    def worst(self) -> float:
        return min(fit.snr for fit in self.fits.values())


def layer_fits(run: Evidence) -> list[LayerFits]:
    """What each format would have done at its worst to each row with values other than zero."""
    found: list[dict[str, FormatFit]] = [{} for _ in run.layers]
    newest = run.part(run.blocks[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = 20 * np.log10(median(newest["std"]) / median(newest["rms"]))
    is_learned = run.is_kind(PARAM) & np.isfinite(spread)
    spread[~is_learned] = 0.0
    for name, levels in run.format_levels.items():
        snr = _filled(levels["snr"]).min(0).tolist()
        shares = (_filled(levels[each]).max(0).tolist() for each in ("underflow", "saturated"))
        least, most = np.fmin.reduce(levels["scale_min"]), np.fmax.reduce(levels["scale_max"])
        scales = zip(least.tolist(), most.tolist(), strict=True)
        learned = np.where(is_learned, levels["snr"][-1] + spread, math.inf).tolist()
        of_layers = map(FormatFit, snr, *shares, scales, learned)
        for fits, fit in zip(found, of_layers, strict=True):
            if not math.isnan(fit.snr):
                fits[name] = fit
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
    advice = f"To keep {thresholds.format_snr:g} dB of each layer: {'; '.join(parts)}."
    for name in formats:
        fits = [each.fits[name] for each in layers]
        if all(fit.keeps(thresholds, -_SPARE) for fit in fits):
            least = min(fit.snr for fit in fits)
            if least < thresholds.format_snr + _SPARE:
                advice += f" At the limit is {name}, {least:.1f} dB."
    return f"{advice} That is rounding alone, and predicts no convergence."


def _for_kind(layers: Sequence[LayerFits], formats: Sequence[str], thresholds: Thresholds) -> str:
    nouns = f"{NOUNS[layers[0].row.kind]}s"
    by_bits = sorted(formats, key=lambda name: parse_format("formats", name).bits)
    lacking = {
        name: [each for each in layers if not each.fits[name].keeps(thresholds)] for name in by_bits
    }
    # The narrowest one that would do for most of them, and for all.
    most = next((name for name in by_bits if 2 * len(lacking[name]) < len(layers)), None)
    whole = next((name for name in by_bits if not lacking[name]), None)
    if most is None:
        return f"none of the formats for the {nouns}"
    if most == whole:
        return f"{whole} for all {nouns}"
    left = lacking[most]
    worst = min(left, key=lambda each: each.fits[most].snr)
    exceptions = worst.row.name if len(left) == 1 else f"{worst.row.name} and {len(left) - 1} more"
    others = f"{whole} for these" if whole else "no format for these"
    return f"{most} for the {nouns} but {exceptions}, {others}"


def find_format_losses(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Formats that many of a layer's values are too small for, or without blocks too large."""
    said = "would flush {share} of {layer}'s {noun} to zero"
    found = _exceeding(run, "format underflow", "underflow", thresholds.underflow_share, said)
    # The scales of blocks follow the values: a power of two cuts an eighth off at most, which the
    # SNR counts.
    said = "is too narrow for {share} of {layer}'s {noun}, which would saturate"
    limit = thresholds.format_saturation_share
    return found + _exceeding(run, "format saturation", "saturated", limit, said)


def find_narrowest(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    history = run.history
    layers = layer_fits(run) if history.formats else []
    if not layers:
        return []
    worst = min(layers, key=lambda each: each.worst)
    # A format that keeps everything has an infinite SNR, which is left out.
    numbers = {name: fit.snr for name, fit in worst.fits.items() if math.isfinite(fit.snr)}
    sentence = recommendation(layers, history.formats, thresholds)
    return [Finding("narrowest format", "note", worst.layer, run.all_steps, numbers, sentence)]


def find_underflow(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Layers much of which float16 would flush to zero; else a note on all narrow types."""
    if not run.samples:
        return []
    flushed = {name: _flushed(run, dtype) for name, dtype in NARROW.items()}
    # (types, layers)
    worst = np.stack([shares.max(0) for shares in flushed.values()])
    findings = []
    for share, column, steps in run.lasting(flushed["float16"], thresholds.underflow_share):
        layer, numbers = (
            run.layers[column],
            dict(zip(NARROW, worst[:, column].tolist(), strict=True)),
        )
        sentence = (
            f"float16 without a loss scale would flush {share:.0%} of {layer}'s gradient to zero, "
            f"bfloat16 {numbers['bfloat16']:.0%}."
        )
        findings.append(Finding("underflow", "warning", layer, steps, numbers, sentence))
    if findings:
        return for_all(findings)
    by_layer = worst.T.tolist()
    column = max(range(len(by_layer)), key=by_layer.__getitem__)
    layer, numbers = run.layers[column], dict(zip(NARROW, by_layer[column], strict=True))
    listed = ", ".join(f"{name} {_percent(share)}" for name, share in numbers.items())
    sentence = (
        f"Largest share of {layer}'s gradient that a narrow type would flush to zero, with no loss "
        f"scale: {listed}."
    )
    return [Finding("underflow", "note", layer, run.all_steps, numbers, sentence)]


def find_scale(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Largest magnitudes against float16's range, and the loss scales that would fit."""
    by_record = run.by_record(lambda part: _peaks(part).max(1))
    at = int(by_record.argmax())
    largest = float(by_record[at])
    if largest == 0 or (run.levels > thresholds.exploding_level).any():
        return []  # nor would a scale help where it explodes
    layer = run.layers[int(_peaks(run.part([at])).argmax())]
    fits = torch.finfo(torch.float16).max / thresholds.float16_headroom
    highest = math.floor(math.log2(min(fits / largest, 2.0**1023)))
    numbers = {"abs_max": largest, "log2_highest_scale": float(highest)}
    if largest > fits:
        first, last = around(by_record > fits, at)
        steps = int(run.steps[first]), int(run.steps[last])
        sentence = (
            f"{layer}'s gradient reaches {largest:.3g}, and float16 ends at 65504: in float16 the "
            f"loss scale is 2^{-highest} times too high."
        )
        return [Finding("scale", "warning", layer, steps, numbers, sentence)]
    by_block = np.array([by_record[block].max() for block in run.blocks])
    mask = (by_block > 0) & (by_block < thresholds.float16_floor)
    if mask.any():
        low = int(np.argmin(np.where(mask, by_block, math.inf)))
        numbers["abs_max"] = float(by_block[low])
        layer = run.layers[int(_peaks(run.part(run.blocks[low])).max(0).argmax())]
        sentence = (
            f"The largest gradient is {by_block[low]:.1e}, in {layer}, where float16 has lost "
            f"digits already: in float16 the loss needs a scale, at most 2^{highest}."
        )
        return [Finding("scale", "warning", layer, run.span(mask, low), numbers, sentence)]
    sentence = (
        f"The largest gradient is {largest:.3g}, in {layer}: for float16 a loss scale of up to "
        f"2^{highest} fits."
    )
    return [Finding("scale", "note", layer, run.all_steps, numbers, sentence)]


def find_outliers(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Outputs whose kurtosis grows steadily over the run."""
    if len(run.history) < _PARTS * 2:
        return []
    parts = np.stack([median(x) for x in np.array_split(run.sampled["kurtosis"], _PARTS)])
    grew = (np.diff(parts, axis=0) > 0).all(0) & (parts[-1] >= _LEAST)
    grew &= parts[-1] >= thresholds.outliers_growth * parts[0]
    found = []
    for column in np.flatnonzero(grew).tolist():
        before, now = float(parts[0, column]), float(parts[-1, column])
        numbers, layer = {"kurtosis": now, "before": before}, run.layers[column]
        sentence = (
            f"The kurtosis of {run.printed[column]}'s output grew steadily, from {before:.3g} to "
            f"{now:.3g}, where a normal distribution has 3: a few features become far larger than "
            f"the others, which narrow types round away."
        )
        found.append(Finding("outliers", "note", layer, run.all_steps, numbers, sentence))
    return for_all(sorted(found, key=lambda each: -each.numbers["kurtosis"]))


def _exceeding(run: Evidence, kind: str, field: str, limit: float, said: str) -> list[Finding]:
    """A finding for each format that does something to more than a share of a layer's values."""
    findings = []
    for name, levels in run.format_levels.items():
        if field == "saturated" and parse_format("diagnose", name).block:
            continue
        by_block = np.nan_to_num(_filled(levels[field]))
        worst = by_block.max(0, initial=0.0)
        above = np.flatnonzero(worst > limit)
        if not len(above):
            continue
        column = int(worst.argmax())
        of_layer, layer, noun = by_block[:, column], run.layers[column], NOUNS[run.kinds[column]]
        words = said.format(share=_percent(worst[column]), layer=run.printed[column], noun=noun)
        sentence = f"{name} {words}"
        if len(above) > 1:
            others = plural(len(above) - 1, "other layer")
            sentence += f", and over {_percent(limit)} in {others}"
        steps = run.span(of_layer > limit, int(of_layer.argmax()))
        numbers = {"share": float(worst[column]), "layers": float(len(above))}
        findings.append(Finding(kind, "warning", layer, steps, numbers, f"{sentence}."))
    return findings


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _filled(levels: Array) -> Array:
    """What blocks have, ``(B, L)``; the least of the others where there is none."""
    return np.where(np.isnan(levels), np.fmin.reduce(levels), levels)


def _peaks(run: Evidence) -> Array:
    return np.nan_to_num(run["abs_max"])


def _flushed(run: Evidence, dtype: torch.dtype) -> Array:
    """`Statistics.underflow` of each sample: ``(samples, L)``."""
    lost = is_flushed(torch.from_numpy(log2_edges()), dtype).numpy()
    return run.shares(lambda at, layers, bins: lost[bins], run.sampled["zeros"])
