"""`Snapshot`: all records of a history at one moment, which later records do not change."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from gradstat.arrays import Array, Counts, PackedRows
from gradstat.history.packed_counts import SparseRows
from gradstat.history.records import Records
from gradstat.quantized import PACKED
from gradstat.results import FLOATS, INTEGERS

DENSE_BYTES = 4 << 20  # of histograms that wait to be packed together
_MOST_WAITING = 256  # records of them


class Record(NamedTuple):
    """One record of L layers.

    Args:
        step: its number.
        time_s: when it was recorded, in seconds since 1970.
        integers: int64 ``(L, 8)``.
        floats: float64 ``(L, 8)``.
        counts: int64 ``(L, bins)``, or packed.
        quantized: float64 ``(L, F, 10)``, the fields of `gradstat.quantized.PACKED`.
    """

    step: int
    time_s: float
    integers: Array
    floats: Array
    counts: Counts
    quantized: Array


def check_step(step: int, newest: float) -> None:
    """Refuse a step that is not higher than the newest one."""
    if step <= newest:
        raise ValueError(f"append() needs a step after {newest}; step is {step}")


class Snapshot(NamedTuple):
    """S records: n of them in arrays, and the newest ones as they came.

    Whoever has a snapshot may read it while others follow: what follows is written past the n first
    places of its lists and arrays, where it does not look.

    Args:
        n: records in the arrays.
        steps: their numbers.
        times: when each was recorded, in seconds since 1970.
        integers: int64, ``(n, L, 8)`` or longer.
        floats: float64, as long.
        quantized: float64 ``(n, L, F, 10)``, as long.
        packed: their histograms, row by row of each record.
        waiting: the records after them, which are filed in the arrays together.
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
    waiting: tuple[Record, ...]
    n_appended: int
    stride: int

    @classmethod
    def empty(cls, n_layers: int, n_formats: int) -> Snapshot:
        """No records."""
        integers = np.empty((0, n_layers, len(INTEGERS)), dtype=np.int64)
        floats = np.empty((0, n_layers, len(FLOATS)))
        quantized = np.empty((0, n_layers, n_formats, len(PACKED)))
        return cls(0, [], [], integers, floats, quantized, SparseRows.empty(), (), 0, 1)

    @classmethod
    def of(cls, records: Records) -> Snapshot:
        """The same records in the same arrays."""
        n, steps, times = len(records.steps), list(records.steps), records.times.tolist()
        numbers = records.integers, records.floats, records.quantized
        return cls(n, steps, times, *numbers, records.counts, (), n, 1)

    @property
    def size(self) -> int:
        """Number of records, S."""
        return self.n + len(self.waiting)

    @property
    def all_steps(self) -> list[int]:
        """Their S numbers."""
        return [*self.steps[: self.n], *(each.step for each in self.waiting)]

    @property
    def all_times(self) -> list[float]:
        """When each was recorded."""
        return [*self.times[: self.n], *(each.time_s for each in self.waiting)]

    @property
    def last_step(self) -> float:
        """The number of the newest one; minus infinity without any."""
        if self.waiting:
            return self.waiting[-1].step
        return self.steps[self.n - 1] if self.n else -math.inf

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        filed = self.packed, self.integers, self.floats, self.quantized
        waiting = (array for each in self.waiting for array in each[2:])
        return sum(array.nbytes for array in filed) + sum(array.nbytes for array in waiting)

    def followed_by(self, record: Record, capacity: int | None) -> Snapshot:
        """The snapshot with one more record.

        Only the newest snapshot may be followed: places past its own are written.

        Args:
            record: of a higher step.
            capacity: most records that it holds, for which others go.
        """
        before = self if capacity is None else self._thinned(capacity)
        n_waiting = len(before.waiting) + 1
        if n_waiting > _MOST_WAITING or n_waiting * record.counts.nbytes > DENSE_BYTES:
            before = before._filed()
        return before._replace(
            waiting=(*before.waiting, record),
            n_appended=before.n_appended + (capacity is not None),
        )

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

    def find(self, step: int) -> int:
        """Position of the record of a step, which may be counted back from the newest.

        Raises:
            KeyError: a step that was not recorded.
        """
        if -self.size <= step < 0:
            return self.size + step
        at = bisect_left(self.steps, step, 0, self.n)
        if at < self.n and self.steps[at] == step:
            return at
        among = bisect_left(self.waiting, step, key=attrgetter("step"))
        if among < len(self.waiting) and self.waiting[among].step == step:
            return self.n + among
        steps = self.all_steps
        which = f"of {len(steps)} from {steps[0]} to {steps[-1]}" if steps else "and has none"
        raise KeyError(f"History needs a recorded step, {which}; step is {step}")

    def numbers(self) -> tuple[Array, Array]:
        """Integers and floats of all records, each ``(S, L, 8)``: not to be changed."""
        return (
            _joined(self.integers[: self.n], [each.integers for each in self.waiting]),
            _joined(self.floats[: self.n], [each.floats for each in self.waiting]),
        )

    def all_quantized(self) -> Array:
        """Those of all records, ``(S, L, F, 10)``: not to be changed."""
        return _joined(self.quantized[: self.n], [each.quantized for each in self.waiting])

    def row(self, at: int) -> tuple[Array, Array]:
        """Integers and floats of the record at a position, each ``(L, 8)``: not a copy."""
        if at >= self.n:
            return self.waiting[at - self.n][2:4]
        return self.integers[at], self.floats[at]

    def counts(self, at: int, column: int, bins: int) -> Array:
        """Histogram of a layer, by its column, in the record at a position: a new array."""
        if at < self.n:
            return self.packed.row(at * self.integers.shape[1] + column, bins)
        counts = self.waiting[at - self.n].counts
        if isinstance(counts, PackedRows):
            return counts.row(column)
        histogram: Array = counts[column].copy()
        return histogram

    def all_counts(self) -> SparseRows:
        """All S times L histograms."""
        counts = [each.counts for each in self.waiting]
        return self.packed.followed_by(counts) if counts else self.packed

    def _thinned(self, capacity: int) -> Snapshot:
        """Fewer records, so that there is room for one more."""
        kept = self
        if self.waiting and (self.n_appended - 1) % self.stride:
            # It was kept only because it was the last one.
            kept = self._replace(waiting=self.waiting[:-1])
        if kept.size < capacity:
            return kept
        kept = kept._filed()
        n, rows = kept.n, np.arange(kept.n * kept.integers.shape[1])
        return kept._replace(
            n=-(-n // 2),
            steps=kept.steps[:n:2],
            times=kept.times[:n:2],
            integers=kept.integers[:n:2],
            floats=kept.floats[:n:2],
            quantized=kept.quantized[:n:2],
            packed=kept.packed.keep(rows.reshape(n, -1)[::2].ravel()),
            stride=2 * kept.stride,
        )

    def _filed(self) -> Snapshot:
        """The same with all records in the arrays."""
        if not self.waiting:
            return self
        steps, times, integers, floats, _, quantized = zip(*self.waiting, strict=True)
        n = self.n
        # An interrupt may have left those of a record that did not follow.
        self.steps[n:], self.times[n:] = steps, times
        return self._replace(
            n=self.size,
            integers=_written_at(n, self.integers, integers),
            floats=_written_at(n, self.floats, floats),
            quantized=_written_at(n, self.quantized, quantized),
            packed=self.all_counts(),
            waiting=(),
        )


def _joined(rows: Array, more: Sequence[Array]) -> Array:
    return np.concatenate([rows, np.stack(more)]) if more else rows


def _written_at(n: int, rows: Array, more: Sequence[Array]) -> Array:
    """Rows from the n-th on in place of those there; in new memory for twice as many if need be."""
    end = n + len(more)
    if end > len(rows):
        rows = np.concatenate([rows[:n], np.empty((end, *rows.shape[1:]), rows.dtype)])
    rows[n:end] = more
    return rows
