"""`Snapshot`: all records of a history at one moment, which later records do not change."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np

from gradstat.arrays import Array
from gradstat.history.packed_counts import SparseRows
from gradstat.quantized import PACKED
from gradstat.results import FLOATS, INTEGERS

DENSE_BYTES = 4 << 20  # of histograms that wait to be packed together
_MOST_DENSE = 256  # records of them


class Record(NamedTuple):
    """One record of L layers.

    Args:
        step: its number.
        time_s: when it was recorded, in seconds since 1970.
        integers: int64 ``(L, 8)``.
        floats: float64 ``(L, 8)``.
        counts: int64 ``(L, bins)``.
        quantized: float64 ``(L, F, 10)``, the fields of `gradstat.quantized.PACKED`.
    """

    step: int
    time_s: float
    integers: Array
    floats: Array
    counts: Array
    quantized: Array


class Snapshot(NamedTuple):
    """S records: n of them in arrays, and the newest by itself if the next one may replace it.

    Whoever has a snapshot may read it while others follow: what follows is written past the n first
    places of its lists and arrays, where it does not look.

    Args:
        n: records in the arrays.
        steps: their numbers.
        times: when each was recorded, in seconds since 1970.
        integers: int64, ``(n, L, 8)`` or longer.
        floats: float64, as long.
        quantized: float64 ``(n, L, F, 10)``, as long.
        packed: histograms of the first of them, row by row of each record.
        dense: those of the others, ``(L, bins)`` each.
        newest: after them; ``None`` if there is none, or if it is one of them.
        n_appended: records that there were at one time or another, where the number is bounded.
        stride: of them, from one that is kept to the next.
    """

    n: int
    steps: list[int]
    times: list[float]
    integers: Array
    floats: Array
    quantized: Array
    packed: SparseRows
    dense: tuple[Array, ...]
    newest: Record | None
    n_appended: int
    stride: int

    @classmethod
    def empty(cls, n_layers: int, n_formats: int) -> Snapshot:
        """No records."""
        integers = np.empty((0, n_layers, len(INTEGERS)), dtype=np.int64)
        floats = np.empty((0, n_layers, len(FLOATS)))
        quantized = np.empty((0, n_layers, n_formats, len(PACKED)))
        return cls.of([], [], integers, floats, quantized, SparseRows.empty())

    @classmethod
    def of(
        cls,
        steps: list[int],
        times: list[float],
        integers: Array,
        floats: Array,
        quantized: Array,
        packed: SparseRows,
    ) -> Snapshot:
        """Records of such lists and arrays, which it keeps."""
        n = len(steps)
        return cls(n, steps, times, integers, floats, quantized, packed, (), None, n, 1)

    @property
    def size(self) -> int:
        """Number of records, S."""
        return self.n + (self.newest is not None)

    @property
    def all_steps(self) -> list[int]:
        """Their S numbers."""
        steps = self.steps[: self.n]
        return steps if self.newest is None else [*steps, self.newest.step]

    @property
    def all_times(self) -> list[float]:
        """When each was recorded."""
        times = self.times[: self.n]
        return times if self.newest is None else [*times, self.newest.time_s]

    @property
    def last_step(self) -> int | None:
        """The number of the newest one, if there is any."""
        if self.newest is not None:
            return self.newest.step
        return self.steps[self.n - 1] if self.n else None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        newest = () if self.newest is None else self.newest[2:]
        numbers = self.integers, self.floats, self.quantized
        arrays: tuple[Array, ...] = (*numbers, *self.dense, *newest)
        return self.packed.nbytes + sum(array.nbytes for array in arrays)

    def followed_by(self, record: Record, capacity: int | None) -> Snapshot:
        """The snapshot with one more record.

        Only the newest snapshot may be followed: places past its own are written.

        Args:
            record: of a higher step.
            capacity: most records that it holds, for which others go.
        """
        if capacity is None:
            return self._filed(record, None)
        before = self._thinned(capacity)
        return before._filed(before.newest, record)

    def alone(self) -> Snapshot:
        """The same, which may be followed by itself."""
        n = self.n
        return self._replace(
            steps=self.steps[:n],
            times=self.times[:n],
            integers=self.integers[:n],
            floats=self.floats[:n],
            quantized=self.quantized[:n],
        )

    def find(self, step: int) -> int | None:
        """Position of the record of a step; ``None`` if there is none."""
        if self.newest is not None and self.newest.step == step:
            return self.n
        at = bisect_left(self.steps, step, 0, self.n)
        return at if at < self.n and self.steps[at] == step else None

    def numbers(self) -> tuple[Array, Array]:
        """Integers and floats of all records, each ``(S, L, 8)``: not to be changed."""
        newest = self.newest
        return (
            _joined_with(self.integers[: self.n], None if newest is None else newest.integers),
            _joined_with(self.floats[: self.n], None if newest is None else newest.floats),
        )

    def all_quantized(self) -> Array:
        """Those of all records, ``(S, L, F, 10)``: not to be changed."""
        newest = self.newest
        return _joined_with(self.quantized[: self.n], None if newest is None else newest.quantized)

    def row(self, at: int) -> tuple[Array, Array]:
        """Integers and floats of the record at a position, each ``(L, 8)``: not a copy."""
        if self.newest is not None and at == self.n:
            return self.newest.integers, self.newest.floats
        return self.integers[at], self.floats[at]

    def counts(self, at: int, column: int, bins: int) -> Array:
        """Histogram of a layer, by its column, in the record at a position: a new array."""
        n_packed = self.n - len(self.dense)
        if at < n_packed:
            return self.packed.row(at * self.integers.shape[1] + column, bins)
        dense: Array
        if self.newest is not None and at == self.n:
            dense = self.newest.counts[column]
        else:
            dense = self.dense[at - n_packed][column]
        return dense.copy()

    def all_counts(self) -> SparseRows:
        """All S times L histograms."""
        waiting = self.dense if self.newest is None else (*self.dense, self.newest.counts)
        return self.packed.followed_by(_joined(waiting)) if waiting else self.packed

    def _thinned(self, capacity: int) -> Snapshot:
        """Fewer records, so that there is room for one more."""
        kept = self
        if self.newest is not None and (self.n_appended - 1) % self.stride:
            # It was kept only because it was the last one.
            kept = self._replace(newest=None)
        if kept.size < capacity:
            return kept
        kept = kept._filed(kept.newest, None)
        n, rows = kept.n, np.arange(kept.n * kept.integers.shape[1])
        return kept._replace(
            n=-(-n // 2),
            steps=kept.steps[:n:2],
            times=kept.times[:n:2],
            integers=kept.integers[:n:2],
            floats=kept.floats[:n:2],
            quantized=kept.quantized[:n:2],
            packed=kept.all_counts().keep(rows.reshape(n, -1)[::2].ravel()),
            dense=(),
            stride=2 * kept.stride,
        )

    def _filed(self, record: Record | None, newest: Record | None) -> Snapshot:
        """The records in the arrays, another one there with them, and the newest by itself."""
        n, steps, times, integers, floats, quantized, packed, dense, _, n_appended, stride = self
        if record is not None:
            if n == len(integers):
                integers, floats = _with_room(integers), _with_room(floats)
                quantized = _with_room(quantized)
            step, time_s, integers[n], floats[n], counts, quantized[n] = record
            # There may be those of a record that an interrupt has kept from following.
            steps[n:], times[n:] = [step], [time_s]
            dense = (*dense, counts)
            if len(dense) >= _MOST_DENSE or (len(dense) + 1) * counts.nbytes > DENSE_BYTES:
                packed, dense = packed.followed_by(_joined(dense)), ()
            n += 1
        n_appended += newest is not None
        return Snapshot(
            n, steps, times, integers, floats, quantized, packed, dense, newest, n_appended, stride
        )


def _joined_with(rows: Array, newest: Array | None) -> Array:
    return rows if newest is None else np.concatenate([rows, newest[None]])


def _joined(dense: tuple[Array, ...]) -> Array:
    return dense[0] if len(dense) == 1 else np.concatenate(dense)


def _with_room(rows: Array) -> Array:
    """The same rows with room for as many again."""
    return np.concatenate([rows, np.empty((max(len(rows), 16), *rows.shape[1:]), rows.dtype)])
