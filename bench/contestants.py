"""What is timed: gradstat, what one would write instead, and a plain read. Each checks its answer.

All count 64 bins over [-1, 1], but for `log2`. The peers know no bfloat16 and seldom float16: they
are given ``x.float()``, inside the time, as their users would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import boost_histogram
import fast_histogram
import numpy as np
import torch
from torch import Tensor

import gradstat
from gradstat import LinearBins, Log2Bins, Statistics
from gradstat.bins import Bins
from gradstat.engines import reference
from gradstat.ops import known_range

BINS, LOW, HIGH = 64, -1.0, 1.0
LINEAR = LinearBins(BINS, LOW, HIGH)
SCHEMES: dict[str, Bins] = {"log2": Log2Bins(), "linear": LINEAR}
THREADS = torch.get_num_threads()

_PART = 1 << 23  # elements: what the reference measures at a time, for want of memory
# Of a value in float64, by dtype, since torch's results are rounded to it.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
# torch sums squares in float32: the norm of 16 M values of 0.3 is 1.2 % off.
_NORM_TOLERANCE = 2e-2


def truth(x: Tensor, bins: Bins) -> Statistics:
    """The reference's answer for one tensor."""
    parts = x.detach().reshape(-1).split(_PART)
    low, high = known_range(bins, x.device, 1)
    result = reference.measure(parts[:1], bins, low, high)[0]
    for part in parts[1:]:
        result = result.merge(reference.measure([part], bins, low, high)[0])
    return result


def check_statistics(result: Statistics, expected: Statistics) -> None:
    """Every integer equal, every float within 1e-5; sums, which cancel, of the magnitudes."""
    assert torch.equal(result.integers, expected.integers)
    assert torch.equal(result.counts, expected.counts)
    torch.testing.assert_close(result.min, expected.min, rtol=0, atol=0)
    torch.testing.assert_close(result.max, expected.max, rtol=0, atol=0)
    for name in ("std", "l1", "l2"):
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=1e-5, atol=0
        )
    assert ((result.sum - expected.sum).abs() <= 1e-6 * expected.l1).all()


def composite(x: Tensor) -> tuple[Any, ...]:
    """The same numbers from torch's own operators."""
    low, high = torch.aminmax(x)
    return (
        low,
        high,
        x.mean(),
        x.std(),
        torch.linalg.vector_norm(x),
        torch.histc(x if x.dtype == torch.float32 else x.float(), BINS, LOW, HIGH),
        torch.count_nonzero(x),
        torch.isfinite(x).sum(),
    )


def check_composite(result: tuple[Any, ...], expected: Statistics, dtype: torch.dtype) -> None:
    low, high, mean, std, norm, counts, nonzero, finite = result
    tolerance = _TOLERANCES[dtype]
    assert low == expected.min
    assert high == expected.max
    rms = float(expected.l2) / max(int(expected.finite), 1) ** 0.5
    assert abs(float(mean) - float(expected.mean)) <= tolerance * rms
    assert abs(float(std) - float(expected.std)) <= tolerance * rms
    assert abs(float(norm) - float(expected.l2)) <= _NORM_TOLERANCE * float(expected.l2)
    assert nonzero == expected.finite - expected.zeros
    assert finite == expected.finite
    check_counts(counts, expected)


def check_counts(counts: Any, expected: Statistics) -> None:
    """Counts of one who rounds its own way: values at the edges may be in the next bin."""
    difference = np.abs(np.asarray(counts, np.float64) - expected.counts.numpy()).sum()
    assert difference <= 1e-3 * int(expected.numel)


def _boost(x: Tensor) -> np.ndarray:
    histogram = boost_histogram.Histogram(boost_histogram.axis.Regular(BINS, LOW, HIGH))
    histogram.fill(x.numpy(), threads=THREADS)
    counts: np.ndarray = histogram.values()
    return counts


@dataclass(frozen=True)
class Contestant:
    """A name, what it does with a tensor, and how to judge the answer."""

    name: str
    call: Callable[[Tensor], Any]
    check: Callable[[Any, Tensor, dict[str, Statistics]], None]


def _gradstat(name: str) -> Contestant:
    bins = SCHEMES[name]
    return Contestant(
        f"gradstat {name}",
        lambda x: gradstat.statistics(x, bins),
        lambda result, _, expected: check_statistics(result, expected[name]),
    )


def _counter(name: str, count: Callable[[Tensor], Any]) -> Contestant:
    return Contestant(
        name,
        lambda x: count(x if x.dtype == torch.float32 else x.float()),
        lambda result, _, expected: check_counts(result, expected["linear"]),
    )


def _check_read(result: Tensor, x: Tensor, expected: dict[str, Statistics]) -> None:
    l1 = float(expected["log2"].l1)
    assert abs(float(result) - float(expected["log2"].sum)) <= _TOLERANCES[x.dtype] * l1


GRADSTAT = [_gradstat("log2"), _gradstat("linear")]
PEERS = [
    Contestant(
        "torch composite",
        composite,
        lambda result, x, expected: check_composite(result, expected["linear"], x.dtype),
    ),
    _counter("torch.histc", lambda x: torch.histc(x, BINS, LOW, HIGH)),
    _counter("torch.histogram", lambda x: torch.histogram(x, BINS, range=(LOW, HIGH)).hist),
    _counter("numpy.histogram", lambda x: np.histogram(x.numpy(), BINS, (LOW, HIGH))[0]),
    _counter("fast-histogram", lambda x: fast_histogram.histogram1d(x.numpy(), BINS, (LOW, HIGH))),
    _counter("boost-histogram", _boost),
]
READ = Contestant("plain read (torch.sum)", lambda x: x.sum(), _check_read)
