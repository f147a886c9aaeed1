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
from answers import (
    BINS,
    HIGH,
    LOW,
    SCHEMES,
    TOLERANCES,
    check_composite,
    check_counts,
    check_statistics,
    composite,
)
from torch import Tensor

import gradstat
from gradstat import Statistics

THREADS = torch.get_num_threads()


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
    assert abs(float(result) - float(expected["log2"].sum)) <= TOLERANCES[x.dtype] * l1


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
