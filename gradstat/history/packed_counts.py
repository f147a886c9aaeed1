"""`SparseRows`: many histograms, mostly zero, as their non-zero bins."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class SparseRows:
    """Rows of counts as their non-zero entries, which do not change.

    They are in blocks that are never put together: neither adding rows nor reading one costs more
    for the rows that are there already.

    Args:
        sizes: entries of each row, integers.
        indices: bin of each entry, uint32 or, where it fits, uint16.
        values: count of each entry, int64 or, where it fits, uint32.
    """

    def __init__(self, sizes: Array, indices: Array, values: Array) -> None:
        self._starts = [0]  # first row of each block
        # Of each block: where each row's entries end, their bins, their counts.
        self._blocks = [(np.cumsum(sizes, dtype=np.int64), indices, values)]

    @classmethod
    def empty(cls) -> SparseRows:
        """No rows."""
        return cls(np.zeros(0, np.int32), np.zeros(0, np.uint16), np.zeros(0, np.uint32))

    @classmethod
    def narrowed(cls, sizes: Array, indices: Array, values: Array, bins: int) -> SparseRows:
        """Rows of histograms of so many bins, from int64 arrays as the constructor takes them."""
        return cls(sizes, *_narrow(indices, values, bins))

    def __len__(self) -> int:
        """Number of rows."""
        return self._starts[-1] + len(self._blocks[-1][0])

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(array.nbytes for block in self._blocks for array in block)

    def followed_by(self, rows: Array) -> SparseRows:
        """These rows and after them dense ones, int64 ``(N, bins)``."""
        # Most columns are zero in all rows, and need not be looked at twice.
        used = np.flatnonzero(np.bitwise_or.reduce(rows, axis=0))
        part = rows.take(used, axis=1)
        # NumPy finds what is not zero several times faster in one dimension and among booleans.
        filled = part != 0
        at = np.flatnonzero(filled.ravel())
        indices, values = used[at % max(1, len(used))], part.ravel()[at]
        sizes = np.count_nonzero(filled, axis=1)
        both = SparseRows(sizes, *_narrow(indices, values, rows.shape[1]))
        if before := len(self):
            both._starts = [*self._starts, before]
            both._blocks = [*self._blocks, *both._blocks]
        return both

    def row(self, row: int, bins: int) -> Array:
        """One row, dense: int64 ``(bins,)``."""
        block = bisect_right(self._starts, row) - 1
        ends, indices, values = self._blocks[block]
        at = row - self._starts[block]
        part = slice(ends[at - 1] if at else 0, ends[at])
        dense = np.zeros(bins, dtype=np.int64)
        dense[indices[part]] = values[part]
        return dense

    def keep(self, rows: Array) -> SparseRows:
        """Some of the rows, by their numbers, which rise."""
        sizes, indices, values = self.arrays()
        kept = np.zeros(len(sizes), bool)
        kept[rows] = True
        entries = np.repeat(kept, sizes)
        return SparseRows(sizes[kept], indices[entries], values[entries])

    def arrays(self) -> tuple[Array, Array, Array]:
        """Sizes, indices and values of all rows, as the constructor takes them."""
        sizes = [np.diff(ends, prepend=0).astype(np.int32) for ends, _, _ in self._blocks]
        _, indices, values = zip(*self._blocks, strict=True)
        return np.concatenate(sizes), np.concatenate(indices), np.concatenate(values)


def _narrow(indices: Array, values: Array, bins: int) -> tuple[Array, Array]:
    small = values.size == 0 or values.max() < 1 << 32
    return (
        indices.astype(np.uint16 if bins <= 1 << 16 else np.uint32),
        values.astype(np.uint32) if small else values,
    )
