"""`SparseRows`: many histograms, mostly zero, as their non-zero bins."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class SparseRows:
    """Rows of counts as their non-zero entries, appended in blocks.

    Args:
        sizes: entries of each row, int32.
        indices: bin of each entry, uint32 or, where it fits, uint16.
        values: count of each entry, int64 or, where it fits, uint32.
    """

    def __init__(self, sizes: Array, indices: Array, values: Array) -> None:
        self._blocks = [(sizes, indices, values)]
        self._ends = np.cumsum(sizes)

    @classmethod
    def empty(cls) -> SparseRows:
        """No rows."""
        return cls(np.zeros(0, np.int32), np.zeros(0, np.uint16), np.zeros(0, np.uint32))

    def extend(self, rows: Array) -> None:
        """Append dense rows, int64 ``(N, bins)``."""
        at, indices = np.nonzero(rows != 0)
        values = rows[at, indices]
        small = values.size == 0 or values.max() < 1 << 32
        self._blocks.append(
            (
                np.bincount(at, minlength=len(rows)).astype(np.int32),
                indices.astype(np.uint16 if rows.shape[1] <= 1 << 16 else np.uint32),
                values.astype(np.uint32) if small else values,
            )
        )

    def row(self, row: int, bins: int) -> Array:
        """One row, dense: int64 ``(bins,)``."""
        self._join()
        part = slice(self._ends[row - 1] if row else 0, self._ends[row])
        dense = np.zeros(bins, dtype=np.int64)
        dense[self.indices[part]] = self.values[part]
        return dense

    @property
    def sizes(self) -> Array:
        """Entries of each row."""
        return self._join()[0]

    @property
    def indices(self) -> Array:
        """Bin of each entry."""
        return self._join()[1]

    @property
    def values(self) -> Array:
        """Count of each entry."""
        return self._join()[2]

    def _join(self) -> tuple[Array, Array, Array]:
        if len(self._blocks) > 1:
            sizes, indices, values = (np.concatenate(c) for c in zip(*self._blocks, strict=True))
            self._blocks = [(sizes, indices, values)]
            self._ends = np.cumsum(sizes)
        return self._blocks[0]
