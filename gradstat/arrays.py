"""Arrays as several rooms use them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradstat.bins import LOG2_MAGNITUDES

Array: TypeAlias = NDArray[Any]

# Each float32 exponent is an octave; the first holds subnormals, the last nothing finite.
OCTAVES = np.arange(-127.0, 130.0)


class PackedRows(NamedTuple):
    """Histograms of several tensors as their non-zero counts.

    Args:
        numbers: int64, how many of them each row has, then bin and count of each.
        n: rows.
        bins: of each row.
    """

    numbers: Array
    n: int
    bins: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the dense rows."""
        return self.n, self.bins

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.numbers.nbytes

    @property
    def sizes(self) -> Array:
        """Entries of each row: int64 ``(N,)``."""
        return self.numbers[: self.n]

    @property
    def entries(self) -> Array:
        """Bin and count of each: int64 ``(E, 2)``."""
        return self.numbers[self.n :].reshape(-1, 2)

    def row(self, at: int) -> Array:
        """One row, dense: int64 ``(bins,)``."""
        start = self.sizes[:at].sum()
        indices, values = self.entries[start : start + self.sizes[at]].T
        dense = np.zeros(self.bins, np.int64)
        dense[indices] = values
        return dense

    def dense(self) -> Array:
        """All rows: int64 ``(N, bins)``."""
        dense, (indices, values) = np.zeros(self.shape, np.int64), self.entries.T
        dense[np.repeat(np.arange(self.n), self.sizes), indices] = values
        return dense


# Histograms of several tensors: int64 ``(L, bins)``, or packed.
Counts: TypeAlias = Array | PackedRows


def divide(total: Array, count: Array) -> Array:
    """Quotient; NaN where there is nothing to divide by."""
    quotient = np.full(np.broadcast_shapes(total.shape, count.shape), math.nan)
    np.divide(total, count, out=quotient, where=count > 0)
    return quotient


def evenly_spread(n: int, most: int) -> Array:
    """Positions of at most so many of n things, the first and the last among them."""
    return np.linspace(0, n - 1, min(most, n)).round().astype(np.int64)


def octave_of(bins: Array) -> Array:
    """Octave of each of some bins of `Log2Bins`, whatever its sign: 0 to 255."""
    bins = bins.astype(np.int64)
    return np.where(bins < LOG2_MAGNITUDES, LOG2_MAGNITUDES - 1 - bins, bins - LOG2_MAGNITUDES) >> 2


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
