"""`Records`: what a run recorded, as packed records that are read when their numbers are asked for.

`Scalars` are what it logged beside them, such as its loss.

The rule for whoever interrupts, reads in another thread, or forks: what a reader sees changes in
one step of the interpreter. A record is appended by one ``list.append`` where their number is not
bounded, whatever is replaced is replaced in one assignment, and everything that can fail is done
before. So a reader takes the list once, and has records of one moment; an interrupt loses at most
the record that is being added.
"""

from __future__ import annotations

import math
import struct
import time
from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from numbers import Integral
from operator import attrgetter
from typing import NamedTuple, Self

import numpy as np
import torch

from gradstat.bins import Bins
from gradstat.history.check import check_histograms, check_numbers
from gradstat.history.file import StoredRecord, damage_of
from gradstat.record import Numbers, Placement, Record, RecordLayout, Row, Unpacked, taken
from gradstat.results import SHAPES, as_statistics
from gradstat.util import Array, check_integer, plural, windows_of

AnyRecord = Record | StoredRecord

WINDOW_BYTES = 4 << 20  # of records that are unpacked at a time
_CELLS = 1 << 20  # of histograms that are dense at a time

_VALUE = struct.Struct("=qd")  # that is logged: its step, and itself
_VALUES = np.dtype([("step", "i8"), ("value", "f8")])

_step = attrgetter("step")


class Scalars:
    """Values by name, each with its step: 16 bytes a value."""

    # One thread adds; others, and handlers of signals, may read meanwhile: they see a value and its
    # step, or neither.

    def __init__(self) -> None:
        # To look into the bytes would keep them from growing: whoever reads has a copy.
        self._series: dict[str, bytearray] = {}

    def add(self, name: str, step: int, value: float) -> None:
        """Append a value; ValueError for a step below that of the value of this name before."""
        self._append(name, step, _VALUE.pack(step, value))

    def add_all(self, name: str, steps: Iterable[int], values: Iterable[float]) -> None:
        for step, value in zip(steps, values, strict=True):
            self.add(name, step, value)

    def extend(self, other: Scalars, prefix: str = "") -> None:
        """Append the values of another run, or of a later part of this one."""
        for name, series in other._series.items():
            if series:
                self._append(prefix + name, _VALUE.unpack_from(series)[0], series)

    def between(self, start: float = -math.inf, end: float = math.inf) -> Scalars:
        """Those of the steps from a first one on and before an end; a copy."""
        kept = Scalars()
        for name in self.names:
            values = self._after(name)
            first, last = (bisect_left(values["step"], step) for step in (start, end))
            if first < last:
                kept._series[name] = bytearray(values[first:last].tobytes())
        return kept

    @property
    def names(self) -> list[str]:
        """In the order in which they were first logged."""
        return list(self._series)

    @property
    def sizes(self) -> dict[str, int]:
        """How many values each name has that has any."""
        named = list(self._series.items())
        return {name: len(series) // _VALUE.size for name, series in named if series}

    def after(self, sizes: Mapping[str, int]) -> dict[str, tuple[list[int], list[float]]]:
        """Steps and values of each name that has more than so many, from there on."""
        found = {name: self._after(name, sizes.get(name, 0)) for name in self.names}
        return {
            name: (values["step"].tolist(), values["value"].tolist())
            for name, values in found.items()
            if len(values)
        }

    def get(self, name: str) -> tuple[Array, Array]:
        """Steps, int64 ``(N,)``, and values, float64 ``(N,)``: copies."""
        values = self._after(name)
        return values["step"].copy(), values["value"].copy()

    def _append(self, name: str, step: int, data: bytes | bytearray) -> None:
        series = self._series.setdefault(name, bytearray())
        last = _VALUE.unpack_from(series, len(series) - _VALUE.size)[0] if series else step
        if step < last:
            raise ValueError(f"add_scalar() needs steps from {last} on; step is {step}")
        series += data

    def _after(self, name: str, n: int = 0) -> Array:
        return np.frombuffer(self._series[name][n * _VALUE.size :], _VALUES)


def is_loss(name: str) -> bool:
    """Whether logged values of a name are training losses."""
    return name.lower().endswith("loss") and not name.lower().startswith(("eval", "val", "test"))


def is_rate(name: str) -> bool:
    """Whether they are learning rates, as `watch` logs them."""
    return name == "lr" or name.startswith("lr/")


class _Kept(NamedTuple):
    """The records, and how they came to be those."""

    records: list[AnyRecord]  # by step; records are added to this list, and none is taken out
    fields: dict[str, Array]  # that were read, of the first n records: (n, L), not to be changed
    # Where the number of records is bounded:
    n_appended: int  # records so far, with those that are no longer kept
    stride: int = 1  # every so many of them are kept


class Resumption(NamedTuple):
    """How a run was begun again."""

    first_step: int  # from which on it supersedes what was recorded before
    n_before: int  # times that it had been begun


class Records:
    """S packed records of L rows, and what holds for all of them, as `History` says."""

    # A run has an identifier as well, if it is written, and how it was resumed, if it was.

    def __init__(
        self,
        rows: Sequence[Row],
        bins: Bins,
        formats: Sequence[str] = (),
        capacity: int | None = None,
    ) -> None:
        self.rows, self.bins, self.formats = list(rows), bins, list(formats)
        self.layers = [str(row) for row in self.rows]  # as printed
        self.layout = RecordLayout(len(self.rows), len(self.formats), bins.bins)
        # Which shard of each row this rank holds, and who holds the same.
        self.placements = [Placement()] * len(self.rows)
        self.modules: dict[str, str] = {}
        self.logged = Scalars()
        self.depth: Array | None = None
        self.partial_step: int | None = None
        self.rank: int | None = None
        self.world: int | None = None
        self.run: str | None = None
        self.resumption: Resumption | None = None
        self._capacity = capacity
        self._kept = _Kept([], {}, 0)
        # The layout and rows of the records as they are kept, and which of these rows are read.
        self._whole: tuple[RecordLayout, list[Row]] = self.layout, self.rows
        self._taken: Array | None = None
        self._is_snapshot = False  # which shares fields until it is appended to

    def __getstate__(self) -> dict[str, object]:
        """What is pickled: records of a file are read."""
        records: list[AnyRecord] = [
            Record(each.step, each.time_s, each.data) for each in self.records
        ]
        return self.__dict__ | {"_kept": self._kept._replace(records=records, fields={})}

    def __len__(self) -> int:
        """Number of records, S."""
        return len(self._kept.records)

    @property
    def steps(self) -> Array:
        """Number of each recorded step, from 0: int64 ``(S,)``."""
        return np.array([record.step for record in self._kept.records.copy()], dtype=np.int64)

    @property
    def times(self) -> Array:
        """When each step was recorded, in seconds since 1970: float64 ``(S,)``; NaN if unknown."""
        return np.array([record.time_s for record in self._kept.records.copy()], dtype=np.float64)

    @property
    def nbytes(self) -> int:
        """Bytes that the records take, in memory or in their file."""
        n_values = sum(self.logged.sizes.values())
        return sum([record.n_bytes for record in self._kept.records]) + 16 * n_values

    def append(self, step: int, data: bytes, *, time_s: float | None = None) -> None:
        """Add one record: its step, and its numbers as ``layout.pack()`` makes them, not copied.

        It was recorded at a time in seconds since 1970, by default now. TypeError for a step that
        is no integer, ValueError for one that is not higher than the last, or for other bytes.
        """
        layout, step = self.layout, check_integer("append", "step", step, 0)
        if step <= self.last_step:
            raise ValueError(f"append() needs a step after {self.last_step}; step is {step}")
        if not layout.fits(data):
            raise ValueError(
                f"append() needs the bytes of a record of {layout.n_rows} rows, {layout.n_formats} "
                f"formats and {layout.n_bins} bins; data are {len(data)} of another one"
            )
        self.add(Record(step, time.time() if time_s is None else time_s, data))

    def add(self, record: Record) -> None:
        """Add a record that `watch` has made: of a higher step, and of this layout."""
        if self._taken is not None:
            self._kept = self._kept._replace(records=[*map(self.packed, self._kept.records)])
            self._whole, self._taken = (self.layout, self.rows), None
        if self._is_snapshot:
            self._kept, self._is_snapshot = self._kept._replace(fields={}), False
        records, fields, n_appended, stride = self._kept
        if self._capacity is None:
            records.append(record)
            return
        if records and (n_appended - 1) % stride:
            # It was kept only because it was the last one.
            records = records[:-1]
        known = {name: values[: len(records)] for name, values in list(fields.items())}
        if len(records) >= self._capacity:
            records, stride = records[::2], 2 * stride
            known = {name: values[::2] for name, values in known.items()}
        self._kept = _Kept([*records, record], known, n_appended + 1, stride)

    @property
    def records(self) -> list[AnyRecord]:
        """All of them, a list of the caller's own."""
        return self._kept.records.copy()

    @property
    def first_step(self) -> int:
        """Of the oldest record, which there must be."""
        return self._kept.records[0].step

    @property
    def last_step(self) -> int:
        """Of the newest record; -1 without any."""
        return self._kept.records[-1].step if self._kept.records else -1

    def set_records(self, records: Sequence[AnyRecord]) -> None:
        """Put others in their place."""
        self._kept = _Kept([*records], {}, len(records))

    def extend(self, part: Records) -> None:
        """Add the records of the same rows that follow; what holds for all is as the last say."""
        if len(part) or not len(self):
            self.placements, self.partial_step = part.placements, part.partial_step
            self.rank, self.world, self.run = part.rank, part.world, part.run
            self.resumption = part.resumption
        self.depth = self.depth if part.depth is None else part.depth
        self.logged.extend(part.logged)
        self._kept.records.extend(part.records)

    def snapshot(self) -> Self:
        """Another History of the same records, not copied, without those that are added later.

        One call on a history sees all its records as they are at one moment, also while another
        thread trains; several calls that are to see the same ones need this.
        """
        taken = self._copy()
        kept = self._kept
        taken._kept = kept._replace(records=kept.records.copy())
        taken._is_snapshot = True
        taken.placements, taken.logged = self.placements.copy(), self.logged.between()
        return taken

    def find(self, step: int) -> AnyRecord:
        """The record of a step, which may be counted back from the newest; else KeyError."""
        if not isinstance(step, Integral):
            raise TypeError(f"History needs the number of a step; step is {step!r}")
        records = self._kept.records
        n = len(records)
        if -n <= step < 0:
            return records[n + step]
        at = bisect_left(records, step, key=_step)
        if at < n and records[at].step == step:
            return records[at]
        which = "it has none yet"
        if n:
            last = f" to {records[n - 1].step}" * (n > 1)
            which = f"it has {plural(n, 'record')}, of step {records[0].step}{last}"
        raise KeyError(f"History has no record of step {step}: {which}")

    def packed(self, record: AnyRecord) -> Record:
        """A record with its bytes, in the order of ``layout``."""
        (data,) = self._read([record])
        if self._taken is not None:
            unpacked = self._whole[0].unpack([data]).take(self._taken)
            (data,) = self.layout.pack_all(unpacked)
        return Record(record.step, record.time_s, data)

    def between(self, start: float = -math.inf, end: float = math.inf) -> Self:
        """The records, and what was logged, of the steps from one on and before another one."""
        records = self._kept.records
        first, last = (bisect_left(records, step, key=_step) for step in (start, end))
        return self._with(records[first:last], self.logged.between(start, end))

    def at(self, places: Iterable[int]) -> Self:
        """The records at some places among all, which rise, without what was logged."""
        records = self._kept.records
        return self._with([records[place] for place in places], Scalars())

    def newest(self, n: int) -> Self:
        """The newest records, at most so many, without what was logged."""
        return self.at(range(max(0, len(self) - n), len(self)))

    def of_steps(self, steps: Container[int]) -> Self:
        """The records of some steps, without what was logged."""
        return self.at([at for at, each in enumerate(self._kept.records) if each.step in steps])

    def reach(self, n_bytes: int) -> int:
        """The last step of the first records of so many bytes, or of one record."""
        return next(_windows(self._kept.records, n_bytes))[-1].step

    def take(self, columns: Array, rows: Sequence[Row], layers: Sequence[str]) -> Self:
        """The same records of other rows, read when their numbers are; without what was logged."""
        # ``columns`` are the numbers of these rows here; -1 stands for one without values.
        part = self._with(self._kept.records.copy(), Scalars())
        part.rows, part.layers = list(rows), list(layers)
        part.layout = RecordLayout(len(part.rows), len(self.formats), self.bins.bins)
        part._taken = columns
        if self._taken is not None:
            part._taken = np.where(columns < 0, -1, self._taken[columns])
        part.depth = None
        part.placements = [self.placements[at] if at >= 0 else Placement() for at in columns]
        return part

    def unpacked(self) -> Iterator[Unpacked]:
        """Numbers of all records, of some records at a time."""
        return map(self._unpack, _windows(self._kept.records.copy()))

    def unpack(self) -> Unpacked:
        """Numbers of all records."""
        return self._unpack(self._kept.records.copy())

    def numbers(self) -> Iterator[Numbers]:
        """Integers, floats and formats of all records, of some records at a time."""
        return map(self._numbers, _windows(self._kept.records.copy()))

    def verify(self) -> None:
        """Read what has not been read of a file yet; ValueError if it is damaged."""
        for window in _windows(self._kept.records.copy()):
            self._read(window)

    def column(self, field: str) -> Array:
        """A field of `Statistics` of all records, ``(S, L)``, a copy; reads what is new."""
        kept = self._kept
        records, known = kept.records.copy(), kept.fields.get(field)
        if known is None:
            known = self._field(field, [])
        if len(known) < len(records):
            new = [self._field(field, window) for window in _windows(records[len(known) :])]
            known = kept.fields[field] = np.concatenate([known, *new])
        return known[: len(records)].copy()

    def _copy(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def _with(self, records: list[AnyRecord], logged: Scalars) -> Self:
        part = self._copy()
        part.logged = logged
        part._kept = _Kept(records, {}, len(records))
        part._capacity, part._is_snapshot = None, False
        if self.partial_step not in [record.step for record in records]:
            part.partial_step = None
        return part

    def _read(self, records: Sequence[AnyRecord], *, whole: bool = True) -> list[bytes]:
        """Bytes of records, checked at first reading: numbers, or the whole with histograms."""
        data = [record.data for record in records]
        layout, rows = self._whole
        new = [
            (record, its_data)
            for record, its_data in zip(records, data, strict=True)
            if isinstance(record, StoredRecord) and record.checked < 1 + whole
        ]
        for path, pairs in groupby(new, key=lambda each: each[0].path):
            stored, all_data = zip(*pairs, strict=True)
            with damage_of(path):
                for record, its_data in zip(stored, all_data, strict=True):
                    if not layout.fits(its_data):
                        raise ValueError(f"its record of step {record.step} has another length")
                steps = [record.step for record in stored]
                check_numbers(rows, self.formats, steps, layout.numbers(all_data))
                if whole:
                    check_histograms(rows, self.bins, steps, layout.unpack(all_data))
            for record in stored:
                record.set_checked(whole=whole)
        return data

    def _unpack(self, records: Sequence[AnyRecord]) -> Unpacked:
        unpacked = self._whole[0].unpack(self._read(records))
        return unpacked if self._taken is None else unpacked.take(self._taken)

    def _field(self, field: str, records: Sequence[AnyRecord]) -> Array:
        if field in SHAPES:
            return _kurtosis_of(self.bins, self._unpack(records))
        integers, floats, _ = self._numbers(records)
        statistics = as_statistics(self.bins, (integers, floats, np.empty(0)))
        values: Array = getattr(statistics, field).numpy()
        return values.copy()

    def _numbers(self, records: Sequence[AnyRecord]) -> Numbers:
        """Integers, floats and formats, for which a record that was checked is read in part."""
        # Bytes of a file are not kept: a long run's would fill the memory.
        layout = self._whole[0]
        if any(isinstance(each, StoredRecord) and not each.checked for each in records):
            data = self._read(records, whole=False)
        else:
            size = layout.fixed.itemsize
            data = [x.head(size) if isinstance(x, StoredRecord) else x.data for x in records]
        numbers = layout.numbers(data)
        return numbers if self._taken is None else taken(numbers, self._taken)


def joined(parts: Sequence[Records]) -> Records:
    """Records of the same rows one after the other, one part at least."""
    whole = parts[0].at([])
    for part in parts:
        whole.extend(part)
    return whole


def _windows(
    records: Sequence[AnyRecord], n_bytes: int | None = None
) -> Iterator[Sequence[AnyRecord]]:
    spans = windows_of([record.n_bytes for record in records], n_bytes or WINDOW_BYTES)
    return (records[span] for span in spans)


def _kurtosis_of(bins: Bins, records: Unpacked) -> Array:
    """`Statistics.kurtosis` of each row of each record, from its filled bins alone: ``(S, L)``."""
    integers, floats = (each.reshape(-1, each.shape[-1]) for each in records[:2])
    n_filled = records.sizes
    # A row has places for a power of two of bins, so that its sums are rounded alike whatever is
    # read beside it.
    widths = np.exp2(np.ceil(np.log2(np.maximum(n_filled, 1)))).astype(np.int64)
    order, start = np.argsort(-widths, kind="stable"), 0
    found = np.empty(len(order))
    while start < len(order):
        most = int(widths[order[start]])
        rows = order[start : start + max(1, _CELLS // most)]
        rows = rows[widths[rows] == most]
        start += len(rows)
        sizes, indices, values = records.histograms(rows)
        row = np.repeat(np.arange(len(rows)), sizes)
        place = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        counts, at = np.zeros((2, len(rows), most), np.int64)
        counts[row, place], at[row, place] = values, indices
        statistics = as_statistics(bins, (integers[rows], floats[rows], counts))
        found[rows] = statistics.kurtosis_over(torch.from_numpy(at)).numpy()
    return found.reshape(records.integers.shape[:2])
