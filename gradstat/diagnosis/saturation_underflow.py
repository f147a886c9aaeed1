"""What magnitudes say: saturation, underflow in narrow types, loss scales."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from gradstat.bins import Log2Bins
from gradstat.diagnosis.findings import Finding
from gradstat.diagnosis.run import Run, around
from gradstat.results import FLOATS, INTEGERS, Statistics
from gradstat.thresholds import Thresholds
from gradstat.util import Array

FLOAT16_MAX = 65504.0
NARROW = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


def find_saturation(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Layers in which most elements that are not zero lie many octaves below the layer's rms."""
    shares = _stopped(run, thresholds.saturation_octaves)
    times = 2.0**thresholds.saturation_octaves
    return [
        Finding(
            "saturation",
            "warning",
            run.layers[each.column],
            each.steps,
            {"share": each.share},
            f"{each.share:.0%} of the non-zero elements of {run.layers[each.column]}'s gradient "
            f"are more than {times:.0f} times smaller than its rms: the units they belong to "
            f"hardly learn.",
        )
        for each in run.lasting(shares, thresholds.saturation_share)
    ]


def find_underflow(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Layers much of which float16 would flush to zero; else a note on all narrow types."""
    if not run.samples:
        return []
    flushed = {name: _flushed(run, dtype) for name, dtype in NARROW.items()}
    # (types, layers)
    worst = np.stack([shares.max(0) for shares in flushed.values()])
    findings = []
    for each in run.lasting(flushed["float16"], thresholds.underflow_share):
        layer = run.layers[each.column]
        numbers = dict(zip(NARROW, worst[:, each.column].tolist(), strict=True))
        sentence = (
            f"float16 without a loss scale would flush {each.share:.0%} of {layer}'s gradient to "
            f"zero, bfloat16 {numbers['bfloat16']:.0%}."
        )
        findings.append(Finding("underflow", "warning", layer, each.steps, numbers, sentence))
    if findings:
        return findings
    by_layer = worst.T.tolist()
    column = max(range(len(by_layer)), key=by_layer.__getitem__)
    numbers = dict(zip(NARROW, by_layer[column], strict=True))
    listed = ", ".join(f"{name} {share:.2g}" for name, share in numbers.items())
    return [
        Finding(
            "underflow",
            "note",
            run.layers[column],
            (int(run.steps[0]), int(run.steps[-1])),
            numbers,
            f"Largest share of {run.layers[column]}'s gradient that a narrow type would flush to "
            f"zero, with no loss scale: {listed}.",
        )
    ]


def find_scale(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Largest magnitudes against float16's range, and the loss scales that would fit."""
    sizes = np.nan_to_num(run["abs_max"])
    by_record = sizes.max(1)
    at = int(by_record.argmax())
    largest = float(by_record[at])
    if largest == 0:
        return []
    layer = run.layers[int(sizes[at].argmax())]
    fits = FLOAT16_MAX / thresholds.float16_headroom
    highest = math.floor(math.log2(min(fits / largest, 2.0**1023)))
    numbers = {"abs_max": largest, "log2_highest_scale": float(highest)}
    if largest > fits:
        mask = by_record > fits
        steps = tuple(int(run.steps[i]) for i in around(mask, at))
        sentence = (
            f"{layer}'s gradient reaches {largest:.3g}, and float16 ends at 65504: in float16 the "
            f"loss scale is 2**{-highest} too high."
        )
        return [Finding("scale", "warning", layer, (steps[0], steps[1]), numbers, sentence)]
    by_block = np.array([by_record[block].max() for block in run.blocks])
    mask = (by_block > 0) & (by_block < thresholds.float16_floor)
    if mask.any():
        low = int(np.argmin(np.where(mask, by_block, math.inf)))
        top = float(by_block[low])
        numbers["abs_max"] = top
        column = int(sizes[run.blocks[low]].max(0).argmax())
        sentence = (
            f"The largest gradient is {top:.1e}, in {run.layers[column]}, where float16 has lost "
            f"digits already: in float16 the loss needs a scale, at most 2**{highest}."
        )
        span = run.span(mask, low)
        return [Finding("scale", "warning", run.layers[column], span, numbers, sentence)]
    sentence = (
        f"The largest gradient is {largest:.3g}, in {layer}: for float16 a loss scale of up to "
        f"2**{highest} fits."
    )
    steps = (int(run.steps[0]), int(run.steps[-1]))
    return [Finding("scale", "note", layer, (steps[0], steps[1]), numbers, sentence)]


def _stopped(run: Run, octaves: float) -> Array:
    """Share of the non-zero elements whose bin is so far below the rms: ``(samples, L)``.

    Zeros share a bin with the smallest numbers. They are taken away where that bin is counted.
    """
    if not run.samples:
        return np.empty((0, len(run.layers)))
    edges = _edges()
    outer = np.maximum(np.abs(edges[1:]), np.abs(edges[:-1]))
    limits = np.nan_to_num(run["rms"]) * 2.0**-octaves
    zeros = run["zeros"] * (limits >= outer[len(outer) // 2])
    below = []
    for sample in run.samples:
        limit = np.repeat(limits[sample.at], sample.sizes)
        below.append(sample.total(outer[sample.bins] <= limit) - zeros[sample.at])
    return _shares(run, below)


def _flushed(run: Run, dtype: torch.dtype) -> Array:
    """`Statistics.underflow` of each sample: ``(samples, L)``."""
    lost, zeros = _lost_bins(dtype), run["zeros"]
    return _shares(
        run, [sample.total(lost[sample.bins]) - zeros[sample.at] for sample in run.samples]
    )


def _shares(run: Run, counts: list[Array]) -> Array:
    """Counts of each sample, ``(L,)``, as shares of the elements that are not zero."""
    nonzero = run.nonzero[[sample.at for sample in run.samples]]
    shares: Array = np.stack(counts) / np.maximum(nonzero, 1)
    return shares


@functools.cache
def _edges() -> Array:
    ends = torch.zeros((), device="cpu")
    edges: Array = Log2Bins().edges(ends, ends).numpy()
    return edges


@functools.cache
def _lost_bins(dtype: torch.dtype) -> Array:
    """Whether a type flushes a bin, bool ``(bins,)``: asked of one value in each."""
    bins = Log2Bins()
    integers = torch.zeros(bins.bins, len(INTEGERS), dtype=torch.int64, device="cpu")
    integers[:, INTEGERS.index("finite")] = 1
    floats = torch.zeros(bins.bins, len(FLOATS), dtype=torch.float64, device="cpu")
    each = Statistics(bins, integers, floats, torch.eye(bins.bins, dtype=torch.bool, device="cpu"))
    lost: Array = each.underflow(dtype).numpy() > 0
    return lost
