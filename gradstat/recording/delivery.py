"""`Delivery`: hands records that have arrived to the history, the journal and the sink."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext

from gradstat.diagnosis.alerts import Alerts
from gradstat.history import History
from gradstat.history.journal import Journal
from gradstat.recording.arrivals import Record, Rows, dense, packed
from gradstat.recording.cuda_graphs import Cadence
from gradstat.recording.run_writer import RunWriter
from gradstat.results import Statistics, as_statistics
from gradstat.warning import warn

_NOTHING = nullcontext()

Sink = Callable[[int, Statistics], object]

_FORKED = (
    "watch() keeps the records of a forked process in memory alone: path and sink belong to the "
    "process that it was forked from"
)


MANY_BYTES = 1 << 30  # of records in memory, from which on a warning is given
_LOOK = 64  # records from one look at the memory to the next


class Delivery:
    """Records on their way to whoever is to have them, oldest first.

    A record is taken off before it is handed on, so that an interrupt loses one at most. One thread
    at a time calls the methods, but a signal's handler or a sink may call them within a call.

    Args:
        history: is given each record.
        cadence: tells the steps of captured passes.
        sink: is given each record too.
        journal: so is it.
        alerts: look at each record, too.
    """

    def __init__(
        self,
        history: History,
        cadence: Cadence,
        sink: Sink | None,
        journal: Journal | None,
        alerts: Alerts | None,
    ) -> None:
        self._history, self._cadence = history, cadence
        self._sink, self._journal, self._alerts = sink, journal, alerts
        self._pending: deque[Record] = deque()
        self._newest_step = -1
        self._arrived: deque[tuple[int, Rows]] = deque()
        # Held while records are moved, and handed on, by whoever does so further out in the thread.
        # `_NOTHING` goes with each: an interrupt just before the end of a single context would
        # leave it locked.
        self._moving, self._handing_on = threading.Lock(), threading.Lock()
        self._is_to_warn = self._has_told_bytes = False

    def add(self, record: Record) -> None:
        """Take a record that may still be on its way from its device."""
        self._pending.append(record)

    def collect(self, wait: bool) -> None:
        """Hand on records: those that have arrived, or all."""
        if self._pending and not self._moving.locked():
            with self._moving, _NOTHING:
                self._move(wait)
        sink = self._sink
        # A sink that reads the history may find another record, which is then the next one here.
        if sink is not None and self._arrived and not self._handing_on.locked():
            with self._handing_on, _NOTHING:
                while self._arrived:
                    step, rows = self._arrived.popleft()
                    sink(step, as_statistics(self._history.bins, dense(rows)[:3]))
        self.tell_alerts()

    @property
    def is_pending(self) -> bool:
        """Whether there are records that have not been handed on."""
        return bool(self._pending or self._arrived)

    def tell_alerts(self) -> None:
        """Tell of what is new and severe, if anybody is to be told."""
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
        self._pending.clear()
        self._arrived.clear()
        self._is_to_warn |= self._sink is not None or self._journal is not None
        self._sink = self._journal = self._alerts = None

    def _move(self, wait: bool) -> None:
        while self._pending and self._pending[0].has_arrived(wait):
            record = self._pending.popleft()
            step: int | None = record.step
            if record.stamp is not None:
                step = self._cadence.take_stamp(record.stamp, record.n_told)
            if step is None or step <= self._newest_step:
                continue  # replayed() was not called once for each replay
            self._newest_step = step
            rows = record.rows()
            data = packed(self._history.layout, rows)
            self._history.append(step, data)
            self._watch_memory()
            if self._journal is not None:
                self._journal.append(step, data)
            if self._alerts is not None:
                self._alerts.see_record(*rows[:2])
            if self._sink is not None:
                self._arrived.append((step, rows))
            if self._is_to_warn:
                self._is_to_warn = False
                warn(_FORKED)

    def _watch_memory(self) -> None:
        """Say once that the records take a lot of memory."""
        history = self._history
        if self._has_told_bytes or len(history) % _LOOK or history.nbytes < MANY_BYTES:
            return
        self._has_told_bytes = True
        warn(
            f"watch() holds {history.nbytes / (1 << 30):.1f} GB of records in memory, "
            f"{len(history)} of {len(history.layers)} rows: watch(capacity=) bounds them, every= "
            f"makes fewer, and path= writes them all to disk"
        )
