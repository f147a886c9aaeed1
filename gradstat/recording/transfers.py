"""From the device to whoever is to have it: transfers to the host, records that have arrived.

A pass leaves launches, whose results are sent to the host: parts of a record. When all of them have
arrived they become the bytes of one record, see `gradstat.record`, which goes to the history, the
journal and the sink. No memory of a transfer is kept after that.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from gradstat.bins import LinearBins
from gradstat.diagnosis.alerts import Alerts
from gradstat.engines import NUMBERS
from gradstat.history import History
from gradstat.history.journal import Journal
from gradstat.ops import import_engine
from gradstat.record import OF_OUTPUTS, Record, RecordLayout
from gradstat.recording.cuda import Computed, Launch, Schedule, Transfer, take_over
from gradstat.recording.sinks import RunWriter
from gradstat.results import PACKED, Statistics, as_arrays, as_statistics, union_packed
from gradstat.util import Array, warn


class _Nothing:
    """A context that does nothing; unlike `nullcontext` it is written in C.

    It goes with each lock: an interrupt just before the end of a single context would leave that
    locked.
    """

    __enter__ = __exit__ = staticmethod("".format)


_NOTHING = _Nothing()

Sink = Callable[[int, Statistics], object]

_FORKED = (
    "watch() keeps the records of a forked process in memory alone: path and sink belong to the "
    "process that it was forked from"
)


MANY_BYTES = 1 << 30  # of records in memory, from which on a warning is given
_LOOK = 64  # records from one look at the memory to the next

# Integers, floats, histograms and formats of some rows, dense.
_Dense: TypeAlias = tuple[Array, ...]


class Part(NamedTuple):
    """Some rows of a record on their way from one device, or on the host.

    Args:
        rows: which, in order.
        data: their bytes; ``None`` while they are on their way.
        arriving: what holds them then, for several parts together.
        start: where they begin in it.
        scales: what the values of a kind are still to be divided by.
    """

    rows: tuple[int, ...]
    data: bytes | None
    arriving: Transfer | None
    start: int
    scales: dict[str, Transfer]

    def has_arrived(self, wait: bool) -> bool:
        """Whether it is there, which it is after waiting."""
        if self.scales and not all(x.has_arrived(wait) for x in self.scales.values()):
            return False
        return self.arriving is None or self.arriving.has_arrived(wait)


class ArrivingRecord(NamedTuple):
    """What one pass measured.

    Args:
        step: its number, as the host counts.
        parts: its rows.
        n_told: passes before it that the host knew of.
        stamp: of a replay, how many there were in truth, for `Schedule.take_stamp`.
    """

    step: int
    parts: list[Part]
    n_told: int
    stamp: Transfer | None

    def has_arrived(self, wait: bool) -> bool:
        """Whether it is there, which it is after waiting."""
        if self.stamp is not None and not self.stamp.has_arrived(wait):
            return False
        for part in self.parts:
            if (part.arriving is not None or part.scales) and not part.has_arrived(wait):
                return False
        return True


def send(launches: Sequence[Launch]) -> list[Part]:
    """Start the results of launches on their way to the host, those of a device in one transfer."""
    parts: list[Part] = []
    together: dict[object, list[Launch]] = {}
    for launch in launches:
        together.setdefault((launch.result.device, id(launch.scales)), []).append(launch)
    for group in together.values():
        for launch in group:
            take_over([launch.result], launch.stream)
        results = [launch.result for launch in group]
        arriving = Transfer(results[0] if len(results) == 1 else torch.cat(results))
        scales, start = sent(group[0].scales), 0
        for launch in group:
            parts.append(Part(launch.rows, None, arriving, start, scales))
            start += launch.result.numel()
    return parts


def sent(scales: Mapping[str, Computed]) -> dict[str, Transfer]:
    """Scales on their way to the host."""
    return {kind: Transfer(scale.get()) for kind, scale in scales.items()} if scales else {}


class Assembly:
    """Makes the bytes of a record of parts that have arrived.

    Args:
        history: whose records they are.
    """

    def __init__(self, history: History) -> None:
        self._bins, self._kinds = history.bins, history.kinds
        self.layout = history.layout
        self._is_linear = isinstance(history.bins, LinearBins)

    def record(self, parts: Sequence[Part]) -> bytes:
        """The whole record; rows that no part has are without values."""
        n = self.layout.n_rows
        if len(parts) == 1 and len(parts[0].rows) == n and not self._is_scaled(parts[0]):
            return self._data(parts[0])
        seen = Counter(row for part in parts for row in part.rows)
        joins = any(n > 1 and self._kinds[row] in OF_OUTPUTS for row, n in seen.items())
        if joins or not parts or any(map(self._is_scaled, parts)):
            return self._joined(parts, range(n))
        return self.layout.assemble([(part.rows, self._data(part)) for part in parts])

    def combined(self, parts: list[Part]) -> list[Part]:
        """Parts in their order, the first of them that have arrived as one."""
        arrived = list(takewhile(lambda part: part.has_arrived(wait=False), parts))
        if len(arrived) < 2:
            return parts
        rows = tuple(sorted({row for part in arrived for row in part.rows}))
        whole = Part(rows, self._joined(arrived, rows), None, 0, {})
        return [whole, *parts[len(arrived) :]]

    def _joined(self, parts: Sequence[Part], rows: Sequence[int]) -> bytes:
        """Parts as one, without scales, that has the rows in that order.

        Several rows of a module's outputs are counted together; of others the last one counts.
        """
        whole = self._absent(len(rows))
        place = {row: at for at, row in enumerate(rows)}
        seen: Counter[int] = Counter()
        for part in parts:
            dense = self._unscaled(part)
            for joins, at in _turns(part.rows, seen, self._kinds):
                to = [place[part.rows[i]] for i in at]
                new = tuple(each[at] for each in dense)
                if joins:
                    new = self._counted_together(tuple(each[to] for each in whole), new)
                for each, values in zip(whole, new, strict=True):
                    each[to] = values
        return self._of(rows).pack(whole[0], whole[1], whole[3], whole[2])

    def _counted_together(self, before: _Dense, new: _Dense) -> _Dense:
        """The same rows, counted together."""
        a, b = (as_statistics(self._bins, each[:3]) for each in (before, new))
        formats = union_packed(torch.from_numpy(np.stack([before[3], new[3]])))
        return *as_arrays(a.merge(b)), formats.numpy()

    def _unscaled(self, part: Part) -> _Dense:
        layout, data = self._of(part.rows), self._data(part)
        dense: _Dense = (layout.integers(data), layout.floats(data), layout.dense(data))
        dense = (*dense, layout.formats(data))
        if not self._is_scaled(part):
            return dense
        dense = tuple(each.copy() for each in dense)
        for kind, scale in part.scales.items():
            at = [i for i, row in enumerate(part.rows) if self._kinds[row] == kind]
            if at:
                scaled = as_statistics(self._bins, tuple(each[at] for each in dense[:3]))
                unscaled = scaled.unscale(scale.host().double())
                for each, new in zip(dense, as_arrays(unscaled), strict=False):
                    each[at] = new
        return dense

    def _is_scaled(self, part: Part) -> bool:
        return bool(part.scales) and not self._is_linear

    def _data(self, part: Part) -> bytes:
        if part.data is not None:
            return part.data
        layout, arriving, n = self.layout, part.arriving, len(part.rows)
        assert arriving is not None
        n_formats = n * layout.n_formats * len(PACKED)
        # Compiled, and so not imported before it is needed.
        pack = import_engine("cpu").pack
        packed: bytes = pack(arriving.host(), part.start, n, layout.n_bins, n_formats)
        return packed

    def _of(self, rows: Sequence[int]) -> RecordLayout:
        return replace(self.layout, n_rows=len(rows))

    def _absent(self, n: int) -> _Dense:
        """Rows without values."""
        layout = self.layout
        numbers = NUMBERS // 2
        return (
            np.zeros((n, numbers), np.int64),
            np.full((n, numbers), np.nan),
            np.zeros((n, layout.n_bins), np.int64),
            np.full((n, layout.n_formats, len(PACKED)), np.nan),
        )


def _turns(
    rows: Sequence[int], seen: Counter[int], kinds: list[str]
) -> Iterable[tuple[bool, list[int]]]:
    """Positions in turns, in each of which no row comes twice.

    Returns:
        For each turn whether its rows join those before, and where they are.
    """
    turns: dict[tuple[int, bool], list[int]] = {}
    for at, row in enumerate(rows):
        joins = seen[row] > 0 and kinds[row] in OF_OUTPUTS
        turns.setdefault((seen[row], joins), []).append(at)
        seen[row] += 1
    return [(joins, at) for (_, joins), at in turns.items()]


class Delivery:
    """Records on their way to whoever is to have them, oldest first.

    A record is taken off before it is handed on, so that an interrupt loses one at most. One thread
    at a time calls the methods, but a signal's handler or a sink may call them within a call.

    Args:
        history: is given each record.
        schedule: tells the steps of captured passes.
        sink: is given each record too.
        journal: so is it.
        alerts: look at each record, too.
    """

    def __init__(
        self,
        history: History,
        schedule: Schedule,
        sink: Sink | None,
        journal: Journal | None,
        alerts: Alerts | None,
    ) -> None:
        self._history, self._schedule = history, schedule
        self._sink, self._journal, self._alerts = sink, journal, alerts
        self._assembly, self._n_rows = Assembly(history), len(history.rows)
        self.pending: deque[ArrivingRecord] = deque()
        self._newest_step, self._n_filed = -1, 0
        self._arrived: deque[Record] = deque()  # for the sink
        # Held while records are moved, and handed on, by whoever does so further out in the thread.
        self._moving, self._handing_on = threading.Lock(), threading.Lock()
        self._is_to_warn = self._has_told_bytes = False

    def add(self, step: int, parts: list[Part], n_told: int, stamp: Transfer | None = None) -> None:
        """Take a record that may still be on its way from its device; arguments as of that."""
        # A whole record that is on the host, as of the CPU, waits for nothing, nor for others.
        part = parts[0] if len(parts) == 1 else None
        if (
            part is None
            or part.data is None
            or part.scales
            or len(part.rows) != self._n_rows
            or self.pending
            or self._moving.locked()
        ):
            self.pending.append(ArrivingRecord(step, parts, n_told, stamp))
            return
        with self._moving, _NOTHING:
            self._file(step, part.data)
        if self._sink is not None or self._alerts is not None:
            self.collect(wait=False)

    def combine_arrived(self, parts: list[Part]) -> list[Part]:
        """Parts of a record in their order, the first of them that have arrived as one."""
        return self._assembly.combined(parts)

    def collect(self, wait: bool) -> None:
        """Hand on records: those that have arrived, or all."""
        if self.pending and not self._moving.locked():
            with self._moving, _NOTHING:
                self._move(wait)
        sink = self._sink
        # A sink that reads the history may find another record, which is then the next one here.
        if sink is not None and self._arrived and not self._handing_on.locked():
            with self._handing_on, _NOTHING:
                while self._arrived:
                    record, layout = self._arrived.popleft(), self._assembly.layout
                    sink(record.step, layout.statistics(record.data, self._history.bins))
        if self._alerts is not None:
            self._alerts.tell()

    def finish(self) -> None:
        """Wait for all records if anybody else is to have them, and hand them on."""
        if any(each is not None for each in (self._sink, self._journal, self._alerts)):
            self.collect(wait=True)
        if self._journal is not None:
            self._journal.flush()
            self._journal.warn_of_unwritten()
        if isinstance(self._sink, RunWriter):
            self._sink.finish()

    def forget_other_threads(self) -> None:
        """In a forked process: keep later records in the history alone."""
        self._moving, self._handing_on = threading.Lock(), threading.Lock()
        # These records are the other process's.
        self.pending.clear()
        self._arrived.clear()
        self._is_to_warn |= self._sink is not None or self._journal is not None
        self._sink = self._journal = self._alerts = None

    def _move(self, wait: bool) -> None:
        while self.pending and self.pending[0].has_arrived(wait):
            record = self.pending.popleft()
            step: int | None = record.step
            if record.stamp is not None:
                step = self._schedule.take_stamp(record.stamp, record.n_told)
            if step is not None:
                self._file(step, self._assembly.record(record.parts))

    def _file(self, step: int, data: bytes) -> None:
        """Hand on the bytes of a record."""
        if step <= self._newest_step:
            return  # replayed() was not called once for each replay
        self._newest_step = step
        filed = Record(step, time.time(), data)
        self._history.add(filed)
        self._n_filed += 1
        if self._n_filed % _LOOK == 0 and not self._has_told_bytes:
            self._watch_memory()
        if self._journal is not None:
            self._journal.add(filed)
        if self._alerts is not None:
            layout = self._assembly.layout
            self._alerts.see_record(layout.integers(data), layout.floats(data))
        if self._sink is not None:
            self._arrived.append(filed)
        if self._is_to_warn:
            self._is_to_warn = False
            warn(_FORKED)

    def _watch_memory(self) -> None:
        """Say once that the records take a lot of memory."""
        history = self._history
        if history.nbytes < MANY_BYTES:
            return
        self._has_told_bytes = True
        warn(
            f"watch() holds {history.nbytes / (1 << 30):.1f} GB of records in memory, "
            f"{len(history)} of {len(history.layers)} rows: watch(capacity=) bounds them, every= "
            f"makes fewer, and path= writes them all to disk"
        )
