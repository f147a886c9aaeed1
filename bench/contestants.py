"""What is timed: gradstat, what one would write instead, and a plain read. Each checks its answer.

All count 64 bins over [-1, 1], but for `log2`. The peers know no bfloat16 and seldom float16: they
are given ``x.float()``, inside the time, as their users would.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
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
from gradstat import LinearBins, Statistics

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


def _load_prototype() -> ModuleType | None:
    """The pass that shows what is possible, if it is there; its cache goes beside it."""
    path = Path(__file__).parents[2] / "shared" / "prototypes" / "cpu_numba.py"
    if not path.exists():
        return None
    copy = Path(tempfile.mkdtemp()) / path.name
    shutil.copy(path, copy)
    spec = importlib.util.spec_from_file_location("cpu_numba", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.NTHREADS = THREADS
    return module


def _prototype(module: ModuleType, name: str) -> Contestant:
    scheme = ("log2",) if name == "log2" else ("lin", LOW, HIGH, BINS)

    def check(result: Any, _: Tensor, expected: dict[str, Statistics]) -> None:
        _, (counts,), (histogram,) = result
        right = expected[name]
        assert counts[4] == right.finite
        if name == "linear":
            assert np.array_equal(histogram[:BINS], right.counts)
        else:  # in the order of patterns, -0.0 beside the negative values
            ordered = np.concatenate([histogram[:1023:-1], histogram[:1024]])
            assert np.array_equal(ordered[1025:], right.counts[1025:])

    return Contestant(
        f"prototype {name}", lambda x: module.summarize([x.reshape(-1)], *scheme), check
    )


_module = _load_prototype()
PROTOTYPES = [_prototype(_module, name) for name in SCHEMES] if _module else []
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

HISTOGRAMS = [
    Contestant(
        "gradstat.histogram(x)",
        lambda x: gradstat.histogram(x, BINS),
        lambda result, x, _: _check_histogram(result, x),
    ),
    Contestant(
        "gradstat.histogram(x, 64, (-1, 1))",
        lambda x: gradstat.histogram(x, BINS, (LOW, HIGH)),
        lambda result, x, _: _check_histogram(result, x),
    ),
    Contestant(
        "gradstat.statistics(x, LinearBins(64))",
        lambda x: gradstat.statistics(x, LinearBins(BINS)),
        lambda result, x, _: _check_histogram((result.counts, result.edges), x),
    ),
]


def _check_histogram(result: tuple[Tensor, Tensor], x: Tensor) -> None:
    counts, edges = result
    assert np.array_equal(counts, np.histogram(x.double().numpy(), edges.numpy())[0])
