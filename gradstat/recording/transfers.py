"""From the device to whoever is to have it: transfers, records that have arrived, `RunWriter`.

A pass leaves parts of a record: on a CPU the record itself as a rule, on a GPU launches, whose
results are sent to the host. When all of them have arrived they become the bytes of one record, see
`gradstat.record`, which goes to the history, the journal, the alerts and the sink. No memory of a
transfer is kept after that.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradstat.diagnosis.alerts import Alerts
from gradstat.history import History
from gradstat.history.journal import Journal
from gradstat.ops import import_engine
from gradstat.record import OF_OUTPUTS, Record
from gradstat.recording.cuda import Computed, Launch, Schedule, take_over
from gradstat.recording.torch_internals import SparingCaptures
from gradstat.results import PACKED, Statistics, as_arrays, as_statistics
from gradstat.util import call_after_fork, warn


class _Nothing:
    """A context that does nothing, by methods that are written in C, unlike `nullcontext`'s."""

    # It goes with each lock. Where an interrupt comes as a ``with`` block ends, the ``__exit__`` of
    # the last context may be left out: so that is not the lock's.

    __enter__ = __exit__ = staticmethod("".format)


_NOTHING = _Nothing()

Sink = Callable[[int, Statistics], object]

_FORKED = (
    "watch() keeps the records of a forked process in memory alone: path and sink belong to the "
    "process that it was forked from"
)

MANY_BYTES = 1 << 30  # of records in memory, from which on a warning is given
_LOOK = 64  # records from one look at the memory to the next


class Transfer:
    """A tensor on its way from a device to the host."""

    __slots__ = ("__weakref__", "_event", "host")

    def __init__(self, x: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self.host = x  # the same, once it is there; as long as this object is
        if x.is_cuda:
            memory = _pinned_memory(x.nbytes)
            self.host = memory[: x.nbytes].view(x.dtype).view(x.shape).copy_(x, non_blocking=True)
            # The tensor's device need not be the current one.
            self._event = torch.cuda.current_stream(x.device).record_event()
            _BLOCKS[memory.nbytes].append((memory, self._event, weakref.ref(self)))
        elif not x.is_cpu:
            self.host = x.cpu()

    def has_arrived(self, wait: bool) -> bool:
        """Whether it is there, which it is after waiting."""
        if self._event is None:
            return True
        with SparingCaptures():
            if self._event.query():  # type: ignore[no-untyped-call]
                return True
            if wait:
                self._event.synchronize()
        return wait


# All pinned memory, by its bytes. It is used again and never freed: to free it, PyTorch records an
# event on the streams that have copied into it, and where one of them is being captured, that event
# fails all who ask for pinned memory later. So no record may keep it either.
# With each piece the event after the last copy into it, and whom that was for.
_BLOCKS: defaultdict[int, deque[tuple[Tensor, torch.cuda.Event, weakref.ref[Transfer]]]]
_BLOCKS = defaultdict(deque)
_LEAST_BYTES = 1 << 9


def _pinned_memory(n_bytes: int) -> Tensor:
    size = max(_LEAST_BYTES, 1 << (n_bytes - 1).bit_length())
    blocks = _BLOCKS[size]
    with suppress(IndexError), SparingCaptures():
        memory, copied, owner = blocks.popleft()
        # Nobody reads it, and nothing is copied into it any more.
        if owner() is None and copied.query():  # type: ignore[no-untyped-call]
            return memory
        blocks.append((memory, copied, owner))
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


class Part(NamedTuple):
    """Some rows of a record."""

    rows: tuple[int, ...]  # which, in order
    data: bytes | Transfer  # the bytes, or what brings them, and those of other parts
    start: int  # where they begin in that
    scales: dict[str, Transfer]  # what the values of a kind are still to be divided by

    def has_arrived(self, wait: bool) -> bool:
        transfers = [x for x in (*self.scales.values(), self.data) if not isinstance(x, bytes)]
        return all(x.has_arrived(wait) for x in transfers)


class ArrivingRecord(NamedTuple):
    """What one pass measured."""

    step: int  # its number, as the host counts
    parts: list[Part]
    n_told: int  # passes before it that the host knew of
    stamp: Transfer | None  # of a replay, how many there were in truth, for `Schedule.take_stamp`

    def has_arrived(self, wait: bool) -> bool:
        if self.stamp is not None and not self.stamp.has_arrived(wait):
            return False
        return all(part.has_arrived(wait) for part in self.parts)


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
            parts.append(Part(launch.rows, arriving, start, scales))
            start += launch.result.numel()
    return parts


def sent(scales: Mapping[str, Computed]) -> dict[str, Transfer]:
    return {kind: Transfer(scale.get()) for kind, scale in scales.items()} if scales else {}


class Delivery:
    """Records on their way to whoever is to have them, oldest first."""

    # A record is taken off before it is handed on, so that an interrupt loses one at most. One
    # thread at a time calls the methods, but a signal's handler or a sink may call them within a
    # call.

    def __init__(
        self,
        history: History,
        schedule: Schedule,  # tells the steps of captured passes
        sink: Sink | None,
        journal: Journal | None,
        alerts: Alerts | None,
    ) -> None:
        self._history, self._layout, self._kinds = history, history.layout, history.kinds
        self._schedule, self._sink, self._journal, self._alerts = schedule, sink, journal, alerts
        self.pending: deque[ArrivingRecord] = deque()
        self._newest_step, self._n_filed = -1, 0
        self._arrived: deque[Record] = deque()  # for the sink
        # Held by who moves records, or hands them on, further out in the thread.
        self._moving, self._handing_on = threading.Lock(), threading.Lock()
        self._is_to_warn = self._has_told_bytes = False

    def add(self, step: int, parts: list[Part], n_told: int, stamp: Transfer | None = None) -> None:
        """Take a record that may still be on its way; arguments as of `ArrivingRecord`."""
        if len(parts) == 1 and not self.pending and not self._moving.locked():
            rows, data, _, scales = parts[0]
            # A whole record on the host, as of the CPU, is handed on at once if none waits.
            if isinstance(data, bytes) and not scales and len(rows) == self._layout.n_rows:
                with self._moving, _NOTHING:
                    self._hand_over(step, data)
                if self._sink is not None or self._alerts is not None:
                    self.collect(wait=False)
                return
        self.pending.append(ArrivingRecord(step, parts, n_told, stamp))

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
                    record = self._arrived.popleft()
                    sink(record.step, self._layout.statistics(record.data, self._history.bins))
        self.tell()

    def keep(self, name: str, step: int, value: float) -> None:
        """Hand on a value that was logged."""
        self._history.logged.add(name, step, value)
        if isinstance(self._sink, RunWriter):
            self._sink.add_scalar(name, step, value)
        if self._alerts is not None:
            self._alerts.see_scalar(name, value)
        if self._journal is not None:
            self._journal.write_soon()

    def tell(self) -> None:
        """Call the function of an alert that is due."""
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

    def combined(self, parts: list[Part]) -> list[Part]:
        """Parts of a record in their order, the first of them that have arrived as one."""
        arrived = list(takewhile(lambda part: part.has_arrived(wait=False), parts))
        if len(arrived) < 2:
            return parts
        rows = tuple(range(self._layout.n_rows))
        return [Part(rows, self._assembled(arrived), 0, {}), *parts[len(arrived) :]]

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
                step = self._schedule.take_stamp(record.stamp.host, record.n_told)
            if step is not None:
                self._hand_over(step, self._assembled(record.parts))

    def _assembled(self, parts: Sequence[Part]) -> bytes:
        """A record of parts that have arrived; rows that no part has are without values."""
        if len(parts) == 1 and len(parts[0].rows) == self._layout.n_rows:
            return self._data(parts[0])
        # Several rows of a module's outputs are counted together; of others the last one counts.
        seen = Counter(row for part in parts for row in part.rows)
        joins = [row for row, n in seen.items() if n > 1 and self._kinds[row] in OF_OUTPUTS]
        held = [(part.rows, self._data(part)) for part in parts]
        return self._layout.assemble(held or [((), b"")], joins)

    def _data(self, part: Part) -> bytes:
        """The bytes of a part, unscaled."""
        data, n, layout = part.data, len(part.rows), self._layout
        if not isinstance(data, bytes):
            # Compiled, and so not imported before it is needed.
            pack: Callable[..., bytes] = import_engine("cpu").pack
            n_formats = n * layout.n_formats * len(PACKED)
            data = pack(data.host, part.start, n, layout.n_bins, n_formats)
        if not part.scales:
            return data
        layout = replace(layout, n_rows=n)
        (integers, floats, formats), counts = layout.views(data), layout.dense(data)
        floats, kinds = floats.copy(), np.array([self._kinds[row] for row in part.rows])
        for kind, scale in part.scales.items():
            at = kinds == kind
            numbers = integers[at], floats[at], counts[at]
            scaled = as_statistics(self._history.bins, numbers).unscale(scale.host.double())
            _, floats[at], counts[at] = as_arrays(scaled)
        return layout.pack(integers, floats, formats, counts)

    def _hand_over(self, step: int, data: bytes) -> None:
        if step <= self._newest_step:
            return  # replayed() was not called once for each replay
        self._newest_step = step
        filed = Record(step, time.time(), data)
        self._history.add(filed)
        self._n_filed += 1
        is_to_look = self._n_filed % _LOOK == 0 and not self._has_told_bytes
        if is_to_look and (n_bytes := self._history.nbytes) >= MANY_BYTES:
            self._has_told_bytes = True
            warn(
                f"watch() holds {n_bytes / (1 << 30):.1f} GB of records in memory, "
                f"{len(self._history)} of {self._layout.n_rows} rows: watch(capacity=) bounds "
                f"them, every= makes fewer, and path= writes them all to disk"
            )
        if self._journal is not None:
            self._journal.add(filed)
        if self._alerts is not None:
            self._alerts.see_record(*self._layout.views(data)[:2])
        if self._sink is not None:
            self._arrived.append(filed)
        if self._is_to_warn:
            self._is_to_warn = False
            warn(_FORKED)


class RunWriter:
    """A sink that takes what a watch records and what is logged in it; never stops a training."""

    # The first exception becomes a RuntimeWarning, and nothing more is written. A forked process
    # writes nothing. When one run has ended, the writer takes another one. Messages name the
    # function that made it.

    def __init__(self, name: str) -> None:
        self._name = name
        self._history: History | None = None
        self._is_writing = False
        call_after_fork(self)

    def check_new(self) -> None:
        """Raise ValueError if it writes another run, which has not ended."""
        if self._is_writing:
            raise ValueError(
                f"watch() needs a sink of its own; sink is a {self._name} that writes another run"
            )

    def begin(self, history: History, first_step: int | None, collect: Callable[[], None]) -> None:
        """Take the run that is to be written."""
        # Of a run that is resumed, what is there from its first step on is superseded. ``collect``
        # waits for all of its records and ends it, for viewers that end before it.
        self._history, self._collect, self._is_writing = history, collect, True
        self._try(lambda: self.start(history, first_step))

    def __call__(self, step: int, statistics: Statistics) -> None:
        """Write a record: statistics of shape ``(L,)``, on the CPU."""
        history = self._history
        if history is None:
            raise RuntimeError(f"{self._name} needs a watch, as in watch(model, sink=...)")
        if not self._is_writing:
            return
        record = History(history.rows, history.bins)
        integers, floats, counts = as_arrays(statistics)
        record.append(step, record.layout.pack(integers, floats, None, counts))
        self._try(lambda: self.write_record(record, step))

    def add_scalar(self, name: str, step: int, value: float) -> None:
        self._try(lambda: self.write_scalar(name, step, value))

    def finish(self) -> None:
        """Write what is left; the run has ended."""
        history = self._history
        if history is not None:
            self._try(lambda: self.end(history))
        self._is_writing = False

    def forget_other_threads(self) -> None:
        self._is_writing = False

    def end_run(self) -> None:
        """End the run that is written, before its watch does."""
        if self._is_writing:
            self._collect()

    def start(self, history: History, first_step: int | None) -> None:
        """Open what is written to; of each viewer."""

    def write_record(self, record: History, step: int) -> None:
        """Write the one record of a history; of each viewer."""

    def write_scalar(self, name: str, step: int, value: float) -> None:
        """Write a logged value; of each viewer."""

    def end(self, history: History) -> None:
        """Write what is left, and close; of each viewer."""

    def _try(self, write: Callable[[], object]) -> None:
        if not self._is_writing:
            return
        try:
            write()
        except Exception as error:
            self._is_writing = False
            warn(
                f"{self._name} has stopped writing, the training and its record go on: "
                f"{type(error).__name__}: {error}"
            )
