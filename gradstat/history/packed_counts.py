"""`SparseRows`: many histograms, mostly zero, as their non-zero bins."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from gradstat.util import Array

_SUMMED_ROWS = 2048  # that are dense at a time


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
        edges = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=edges[1:])
        # Where the entries of each block's rows begin and end, their bins, their counts.
        self._blocks = [(edges, indices, values)]

    @classmethod
    def empty(cls) -> SparseRows:
        """No rows."""
        return cls(np.zeros(0, np.int32), np.zeros(0, np.uint16), np.zeros(0, np.uint32))

    @classmethod
    def narrowed(cls, sizes: Array, indices: Array, values: Array, bins: int) -> SparseRows:
        """Rows of histograms of so many bins, from int64 arrays as the constructor takes them."""
        if values.size == 0 or values.max() < 1 << 32:
            values = values.astype(np.uint32)
        return cls(sizes, indices.astype(np.uint16 if bins <= 1 << 16 else np.uint32), values)

    def __len__(self) -> int:
        """Number of rows."""
        return self._starts[-1] + len(self._blocks[-1][0]) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of memory; none without rows."""
        return sum(
            edges[1:].nbytes + indices.nbytes + values.nbytes
            for edges, indices, values in self._blocks
        )

    def followed_by(self, records: Sequence[Array]) -> SparseRows:
        """These rows and after them those of one record or more."""
        new = SparseRows.of(np.concatenate(records))
        if before := len(self):
            new._starts = [*self._starts, before]
            new._blocks = [*self._blocks, *new._blocks]
        return new

    @classmethod
    def of(cls, rows: Array) -> SparseRows:
        """Those of dense ones, int64 ``(N, bins)``."""
        # Most columns are zero in all rows, and need not be looked at twice.
        used = np.flatnonzero(np.bitwise_or.reduce(rows, axis=0))
        part = rows.take(used, axis=1)
        # NumPy finds what is not zero several times faster in one dimension and among booleans.
        filled = part != 0
        at = np.flatnonzero(filled.ravel())
        sizes = np.count_nonzero(filled, axis=1)
        indices = used[at % max(1, len(used))]
        return cls.narrowed(sizes, indices, part.ravel()[at], rows.shape[1])

    def row(self, row: int, bins: int) -> Array:
        """One row, dense: int64 ``(bins,)``."""
        block = bisect_right(self._starts, row) - 1
        edges, indices, values = self._blocks[block]
        at = row - self._starts[block]
        part = slice(edges[at], edges[at + 1])
        dense = np.zeros(bins, dtype=np.int64)
        dense[indices[part]] = values[part]
        return dense

    def part(self, start: int, stop: int) -> SparseRows:
        """Rows from one on to before another one: views, if all rows are in one block."""
        if len(self._blocks) > 1:
            return SparseRows(*self.arrays()).part(start, stop)
        edges, indices, values = self._blocks[0]
        part = slice(edges[start], edges[stop])
        return SparseRows(np.diff(edges[start : stop + 1]), indices[part], values[part])

    def keep(self, rows: Array) -> SparseRows:
        """Some of the rows, by their numbers, which rise."""
        sizes, indices, values = self.arrays()
        kept = np.zeros(len(sizes), bool)
        kept[rows] = True
        entries = np.repeat(kept, sizes)
        return SparseRows(sizes[kept], indices[entries], values[entries])

    def rearranged(self, source: Array) -> SparseRows:
        """Other rows, each by its number here, or -1 for one that is empty."""
        if (np.diff(source, prepend=-1) > 0).all():
            return self.keep(source)  # which is faster
        sizes, indices, values = self.arrays()
        starts = np.cumsum(sizes, dtype=np.int64) - sizes
        has = source >= 0
        new = np.zeros(len(source), sizes.dtype)
        new[has] = sizes[source[has]]
        first = np.zeros(len(source), np.int64)
        first[has] = starts[source[has]]
        first -= np.cumsum(new, dtype=np.int64) - new
        at = np.repeat(first, new) + np.arange(int(new.sum(dtype=np.int64)))
        return SparseRows(new, indices[at], values[at])

    @classmethod
    def sum(cls, parts: Sequence[SparseRows], bins: int) -> SparseRows:
        """Rows of counts added up, from as many rows each; in memory for some of them, dense."""
        in_one_block = [cls(*part.arrays()) for part in parts]
        n_rows = len(parts[0])
        summed = []
        for start in range(0, n_rows, _SUMMED_ROWS):
            stop = min(start + _SUMMED_ROWS, n_rows)
            summed.append(_sum([each.part(start, stop).arrays() for each in in_one_block], bins))
        if not summed:
            return cls.empty()
        sizes, indices, values = (np.concatenate(each) for each in zip(*summed, strict=True))
        return cls.narrowed(sizes, indices, values, bins)

    def arrays(self) -> tuple[Array, Array, Array]:
        """Sizes, indices and values of all rows, as the constructor takes them."""
        sizes = [np.diff(edges).astype(np.int32) for edges, _, _ in self._blocks]
        _, indices, values = zip(*self._blocks, strict=True)
        if len(sizes) == 1:
            return sizes[0], indices[0], values[0]
        return np.concatenate(sizes), np.concatenate(indices), np.concatenate(values)


def _sum(parts: Sequence[tuple[Array, Array, Array]], bins: int) -> tuple[Array, Array, Array]:
    """Sizes, bins and counts of some rows added up."""
    used = np.zeros(bins, bool)
    for _, indices, _ in parts:
        used[indices] = True
    # Most bins are empty in all rows, and have no place.
    columns = np.flatnonzero(used)
    place = np.cumsum(used) - 1
    n_rows = len(parts[0][0])
    dense = np.zeros(n_rows * len(columns), np.int64)
    starts = np.arange(n_rows) * len(columns)
    for sizes, indices, values in parts:
        # No bin comes twice in a row.
        dense[place[indices] + np.repeat(starts, sizes)] += values
    filled = dense.reshape(n_rows, len(columns)) != 0
    at = np.flatnonzero(filled)
    sizes = np.count_nonzero(filled, axis=1).astype(np.int32)
    return sizes, columns[at - np.repeat(starts, sizes)], dense[at]
