"""Arrays as several rooms use them."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradstat.bins import LOG2_MAGNITUDES

Array: TypeAlias = NDArray[Any]

# Each float32 exponent is an octave; the first holds subnormals, the last nothing finite.
OCTAVES = np.arange(-127.0, 130.0)


def divide(total: Array, count: Array) -> Array:
    """Quotient; NaN where there is nothing to divide by."""
    quotient = np.full(np.broadcast_shapes(total.shape, count.shape), math.nan)
    np.divide(total, count, out=quotient, where=count > 0)
    return quotient


def evenly_spread(n: int, most: int) -> Array:
    """Positions of at most so many of n things, the first and the last among them."""
    return np.linspace(0, n - 1, min(most, n)).round().astype(np.int64)


def octaves(counts: Array, zeros: Array) -> Array:
    """Histograms of magnitudes over `OCTAVES`, without zeros.

    Args:
        counts: histograms over `Log2Bins`, ``(N, 2048)``.
        zeros: how many zeros are in each, ``(N,)``.

    Returns:
        int64 ``(N, 256)``.
    """
    magnitudes = counts[:, LOG2_MAGNITUDES:] + counts[:, LOG2_MAGNITUDES - 1 :: -1]
    summed: Array = magnitudes.reshape(len(counts), 256, 4).sum(2)
    summed[:, 0] -= zeros
    return summed
