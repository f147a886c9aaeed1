"""`Memory`: the records of a history in memory, a list that grows and may be thinned."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch

from gradstat.bins import Bins
from gradstat.record import Record, RecordLayout, Unpacked
from gradstat.results import SHAPES, Statistics
from gradstat.util import Array

WINDOW_BYTES = 4 << 20  # of records that are unpacked at a time
_CELLS = 1 << 20  # of histograms that are dense at a time

_step = attrgetter("step")


class _Kept(NamedTuple):
    """The records, and how they came to be those.

    Args:
        records: in the order of their steps. Whoever has this list sees records added, no others.
        n_appended: records that there were at one time or another, where the number is bounded.
        stride: of them, from one that is kept to the next.
    """

    records: list[Record]
    n_appended: int
    stride: int


class _Column(NamedTuple):
    """A field of the first n records that there were when it was read.

    Args:
        stride: of the records.
        last: the last one of them.
        values: ``(n, L)``, not to be changed.
    """

    stride: int
    last: Record | None
    values: Array


class Memory:
    """S records of L rows: steps, times and packed numbers.

    One thread appends; others, and handlers of signals, may read meanwhile. A record is appended in
    one step of the interpreter. Where the number is bounded a new list takes the place of the one
    before in one assignment. So a reader that takes the list once reads records of one moment.

    Args:
        layout: of each record.
        bins: scheme of the histograms.
        capacity: most records to keep, 2 or more: the first, the last, and between them every so
            many. Whenever it is full every other one is dropped.
    """

    def __init__(self, layout: RecordLayout, bins: Bins, capacity: int | None = None) -> None:
        self.layout, self.bins, self._capacity = layout, bins, capacity
        self._kept = _Kept([], 0, 1)
        # Shared with snapshots, until one of them is appended to.
        self._columns: dict[str, _Column] = {}
        self._is_snapshot = False

    @classmethod
    def of(cls, layout: RecordLayout, bins: Bins, records: list[Record]) -> Memory:
        """These records, as many as they are."""
        memory = cls(layout, bins)
        memory._kept = _Kept(records, len(records), 1)
        return memory

    def snapshot(self) -> Memory:
        """The same records, to which later ones are not added; no copy of them."""
        taken = Memory(self.layout, self.bins, self._capacity)
        kept = self._kept
        taken._kept = kept._replace(records=kept.records.copy())
        taken._columns, taken._is_snapshot = self._columns, True
        return taken

    def append(self, record: Record) -> None:
        """Add a record.

        Raises:
            ValueError: a step that is not higher than the last one's, bytes of another layout.
        """
        check_next(self.layout, record, self.last_step)
        self.add(record)

    def add(self, record: Record) -> None:
        """Add a record of a higher step, which an engine has made for this layout."""
        records = self._kept.records
        if self._is_snapshot:
            self._columns, self._is_snapshot = {}, False
        if self._capacity is None:
            records.append(record)
        else:
            self._kept = self._thinned(self._capacity, record)

    def _thinned(self, capacity: int, record: Record) -> _Kept:
        """One record more, for which others go."""
        records, n_appended, stride = self._kept
        if records and (n_appended - 1) % stride:
            # It was kept only because it was the last one.
            records = records[:-1]
        if len(records) >= capacity:
            records, stride = records[::2], 2 * stride
        return _Kept([*records, record], n_appended + 1, stride)

    @property
    def last_step(self) -> float:
        """The number of the newest one; minus infinity without any."""
        records = self._kept.records
        return records[-1].step if records else -math.inf

    def __len__(self) -> int:
        """Number of records, S."""
        return len(self._kept.records)

    @property
    def records(self) -> list[Record]:
        """All of them: a list of the caller's own."""
        return self._kept.records.copy()

    @property
    def nbytes(self) -> int:
        """Bytes that the records' numbers take."""
        return sum([len(record.data) for record in self._kept.records])

    def find(self, step: int) -> Record:
        """The record of a step, which may be counted back from the newest.

        Raises:
            KeyError: a step that was not recorded.
        """
        records = self._kept.records
        n = len(records)
        if -n <= step < 0:
            return records[n + step]
        at = bisect_left(records, step, key=_step)
        if at < n and records[at].step == step:
            return records[at]
        which = f"of {n} from {records[0].step} to {records[n - 1].step}" if n else "and has none"
        raise KeyError(f"History needs a recorded step, {which}; step is {step}")

    def column(self, field: str) -> Array:
        """A field of `Statistics` of all records: ``(S, L)``, a copy.

        What was read before is kept, and what is new is read.
        """
        records, _, stride = self._kept
        records = records.copy()
        known, n = self._columns.get(field), 0
        if known is not None and known.stride == stride:
            n = min(len(known.values), len(records))
            # The last one of them may have been replaced since.
            if n and (n < len(known.values) or records[n - 1] is not known.last):
                n -= 1
        if known is None or n < len(records):
            before = self._field(field, []) if known is None else known.values[:n]
            new = [self._field(field, part) for part in self._windows(records[n:])]
            last = records[-1] if records else None
            known = _Column(stride, last, np.concatenate([before, *new]))
            self._columns[field] = known
        return known.values[: len(records)].copy()

    def unpacked(self, records: Sequence[Record]) -> Iterator[Unpacked]:
        """Numbers of records, of some records at a time."""
        return map(self._unpack, self._windows(records))

    def _unpack(self, records: Sequence[Record]) -> Unpacked:
        return self.layout.unpack([record.data for record in records])

    def _windows(self, records: Sequence[Record]) -> Iterator[Sequence[Record]]:
        start, n_bytes = 0, 0
        for at, record in enumerate(records):
            n_bytes += len(record.data)
            if n_bytes >= WINDOW_BYTES:
                yield records[start : at + 1]
                start, n_bytes = at + 1, 0
        if start < len(records):
            yield records[start:]

    def _field(self, field: str, records: Sequence[Record]) -> Array:
        unpacked = self._unpack(records)
        if field in SHAPES:
            return kurtosis_of(self.bins, unpacked)
        integers, floats = map(torch.from_numpy, unpacked[:2])
        values: Array = getattr(
            Statistics(self.bins, integers, floats, torch.empty(0)), field
        ).numpy()
        return values.copy()


def check_next(layout: RecordLayout, record: Record, newest: float) -> None:
    """Refuse a step that is not higher than the newest one, and bytes of another layout."""
    if record.step <= newest:
        raise ValueError(f"append() needs a step after {newest}; step is {record.step}")
    if not layout.fits(record.data):
        raise ValueError(
            f"append() needs the bytes of a record of {layout.n_rows} rows, {layout.n_formats} "
            f"formats and {layout.n_bins} bins; data has {len(record.data)} other ones"
        )


def kurtosis_of(bins: Bins, records: Unpacked) -> Array:
    """`Statistics.kurtosis` of each row of each record, from its filled bins alone.

    Returns:
        float64 ``(S, L)``.
    """
    integers, floats = (each.reshape(-1, each.shape[-1]) for each in records[:2])
    n_filled = np.diff(records.ends, prepend=0)
    # Those with the most filled bins first: a row has as many places as the first beside it.
    order, start = np.argsort(-n_filled, kind="stable"), 0
    found = np.empty(len(order))
    while start < len(order):
        most = max(1, int(n_filled[order[start]]))
        rows = order[start : start + max(1, _CELLS // most)]
        start += len(rows)
        sizes, indices, values = records.histograms(rows)
        row = np.repeat(np.arange(len(rows)), sizes)
        place = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        counts, at = np.zeros((2, len(rows), most), np.int64)
        counts[row, place], at[row, place] = values, indices
        numbers = map(torch.from_numpy, (integers[rows], floats[rows], counts))
        found[rows] = Statistics(bins, *numbers).kurtosis_over(torch.from_numpy(at)).numpy()
    return found.reshape(records.integers.shape[:2])
