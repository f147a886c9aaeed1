"""`Journal`: records on their way to a directory, a few seconds of them at a time."""

from __future__ import annotations

import atexit
import inspect
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gradstat.history import History, archive, sections
from gradstat.history.blocks import Link, encode
from gradstat.history.memory import check_next
from gradstat.history.packed_counts import SparseRows
from gradstat.history.records import Records, concatenate
from gradstat.history.scalars import Scalars
from gradstat.record import Data, Record
from gradstat.util import call_after_fork, warn

_INTERVAL_S = 5.0
_PATIENCE_S = 5.0  # with blocks that are written as the process ends
_MOST_BYTES = 64 << 20  # kept for a disk that cannot be written
_MOST_WAITING = 256  # records that wait to be packed together
_MOST_WAITING_BYTES = 32 << 20  # that are left to the timer

_Scalar = tuple[str, int, float]  # name, step, value


class _State(NamedTuple):
    """What is where; it changes in one assignment, so that an interrupt leaves it whole.

    Args:
        waiting: the newest records of the next block.
        packed: those before them.
        nbytes: of memory that these take.
        scalars: of the next block.
        leaving: waiting and packed records, and scalars, that are being written.
        end: bytes of the file that are written.
        link: where its last block ends.
    """

    waiting: list[Record]
    packed: list[Records]
    nbytes: int
    scalars: list[_Scalar]
    leaving: tuple[list[Record], list[Records], list[_Scalar]]
    end: int
    link: Link


class Journal:
    """Appends records to a file in a directory, those of a few seconds in one block.

    A timer's thread writes them, also when no more come. What cannot be written is kept and tried
    again; the first time a warning says so. A forked process writes nothing.

    Args:
        path: the directory; it is made if need be.
        like: a history of the same layers and bins.
        first_step: goes on with the records that are there, those from this step on superseded.

    Raises:
        ValueError: records are there already, and no first step; they are of other layers or bins.
    """

    def __init__(self, path: Path, like: History, first_step: int | None = None) -> None:
        # Where it is now, whatever directory the process changes to.
        self._path = path.absolute()
        self._like = like
        self._state = _State([], [], 0, [], ([], [], []), 0, Link())
        self._newest_step = -1
        self._is_created = False
        self._is_due = False  # to be flushed by the clock
        self._has_warned, self._n_lost, self._n_told = False, 0, 0
        self._is_forked = False
        call_after_fork(self)
        # The first is held for a moment, to take a record or to begin a block, the second while a
        # block is written. A signal's handler may take both again.
        self._lock, self._writing = threading.RLock(), threading.RLock()
        # A block without records shows at once whether the directory can be written, and keeps
        # other runs and ranks away.
        before = archive.segments(self._path)
        if before and first_step is None:
            raise ValueError(
                f"watch() needs a directory without records, or first_step to go on with them; "
                f"path is {path}, which has {len(before)} files of them"
            )
        self._number, self._resumed = len(before), {}
        if first_step is not None:
            if before:
                archive.check_fits(self._path, like.to_records())
            self._resumed = sections.resumed(first_step, [each.stat().st_size for each in before])
        try:
            self._write_block()
        except OSError as error:
            if isinstance(error, FileExistsError) and self._path.is_dir():
                raise ValueError(
                    f"watch() needs a directory of its own; path is {path}, where another one has "
                    f"just begun"
                ) from error
            self._warn_of(error)

    def forget_other_threads(self) -> None:
        """In a forked process: write nothing, which is for the other one to do."""
        self._is_forked = True

    def append(self, step: int, data: Data, *, time_s: float | None = None) -> None:
        """Take a record, as `History.append`; it is written within a few seconds.

        Raises:
            ValueError: a step that is not higher than the last one, bytes of another layout.
        """
        record = Record(step, time.time() if time_s is None else time_s, data)
        check_next(self._like.layout, record, self._newest_step)
        self.add(record)

    def add(self, record: Record) -> None:
        """Take a record, as `History.add`."""
        if self._is_forked:
            return
        with self._lock:
            waiting = self._state.waiting
            waiting.append(record)
        self._newest_step = record.step
        if len(waiting) >= _MOST_WAITING:
            self._pack_waiting()
        if not self._is_due:
            self._start_timer()

    def add_scalar(self, name: str, step: int, value: float) -> None:
        """Take a number, as `History.add_scalar`; it is written within a few seconds."""
        if self._is_forked:
            return
        with self._lock:
            self._state.scalars.append((name, step, value))
        if not self._is_due:
            self._start_timer()

    def flush(self) -> None:
        """Write all records that are waiting; waits for those that are being written.

        For the thread that adds records.
        """
        self._is_due = False
        _CLOCK.forget(self)
        self._flush()

    def _flush(self) -> None:
        if self._is_forked or self._is_writing_here():
            return
        with self._writing:
            self._write_waiting()

    def warn_of_unwritten(self) -> None:
        """Say how many records could not be written, after the last attempt."""
        waiting, packed, *_, leaving, _, _ = self._state
        n = self._n_lost + _n_records(waiting, packed) + _n_records(*leaving[:2])
        if n > self._n_told:
            self._n_told = n
            warn(
                f"watch() could not write {n} record{'s' * (n != 1)} to {self._path}: what the "
                f"history holds of them is in memory alone; History.save() may write it elsewhere"
            )

    def _is_writing_here(self) -> bool:
        """Whether this is called by a signal's handler while its own thread writes.

        A flag could be left set by an interrupt; the stack of calls cannot.
        """
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is Journal._write_waiting.__code__ and frame.f_locals["self"] is self:
                return True
            frame = frame.f_back
        return False

    def _pack_waiting(self) -> None:
        with self._lock:
            state = self._state
            newest = self._pack(state.waiting)
            packed, nbytes = [*state.packed, newest], state.nbytes + newest.nbytes
            self._state = state._replace(waiting=[], packed=packed, nbytes=nbytes)
        if self._state.nbytes >= _MOST_WAITING_BYTES:
            self.flush()

    def _pack(self, records: Sequence[Record]) -> Records:
        like = self._like
        if not records:
            none = History(like.rows, like.bins, formats=like.formats).to_records()
            return replace(none, origins=like.origins.copy())
        unpacked = like.layout.unpack([record.data for record in records])
        sizes = np.diff(unpacked.ends, prepend=0).astype(np.int32)
        counts = unpacked.counts
        counts = counts.astype(np.int64) if counts.itemsize == 8 else counts
        return Records(
            rows=like.rows,
            layers=like.layers,
            bins=like.bins,
            steps=[record.step for record in records],
            times=np.array([record.time_s for record in records], np.float64),
            integers=unpacked.integers,
            floats=unpacked.floats,
            counts=SparseRows(sizes, unpacked.bins, counts),
            origins=like.origins.copy(),
            formats=like.formats,
            quantized=unpacked.formats,
        )

    def _start_timer(self) -> None:
        self._is_due = True
        try:
            _CLOCK.flush_later(self)
        except RuntimeError:  # the process ends, or may have no more threads
            self._is_due = False
            self._flush()
        except BaseException:
            self._is_due = False
            raise

    def on_time(self) -> None:
        """Flush, for the clock."""
        # Before a block is begun: for a record that comes later the clock is asked again.
        self._is_due = False
        self._flush()

    def _write_waiting(self) -> None:
        try:
            while any(self._state.leaving) or self._begin_block():
                self._write_block()
        except OSError as error:
            self._warn_of(error)
            if self._state.nbytes >= _MOST_BYTES:
                with self._lock:
                    self._n_lost += _n_records(*self._state.leaving[:2])
                    self._state = self._state._replace(leaving=([], [], []))

    def _begin_block(self) -> bool:
        """Let what waits leave, if there is anything."""
        with self._lock:
            state = self._state
            leaving = state.waiting, state.packed, state.scalars
            self._state = state._replace(
                waiting=[], packed=[], nbytes=0, scalars=[], leaving=leaving
            )
        return any(leaving)

    def _write_block(self) -> None:
        """Append the records that leave, and the run's own sections to the first block."""
        (waiting, packed, logged), end, link = self._state[-3:]
        records = concatenate([*packed, self._pack(waiting)])
        scalars = Scalars()
        for scalar in logged:
            scalars.add(*scalar)
        like = self._like
        records = replace(
            records,
            scalars=scalars,
            depth=like.depth,
            partial_step=like.partial_step,
            rank=like.rank,
            world=like.world,
            layout=like.placements,
        )
        arrays = sections.head(records) | self._resumed if end == 0 else {}
        arrays |= sections.body(records)
        parts, link = encode(arrays, len(records.steps), link)
        self._path.mkdir(parents=True, exist_ok=True)
        file_path = self._path / archive.segment_name(self._number)
        with file_path.open("r+b" if self._is_created else "xb") as file:
            self._is_created = True
            file.seek(end)
            file.truncate()  # what an earlier attempt has left
            file.writelines(parts)
            end = file.tell()
        with self._lock:
            self._state = self._state._replace(leaving=([], [], []), end=end, link=link)

    def _warn_of(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn(f"watch() cannot write to {self._path} and keeps its records in memory: {error}")


def _n_records(waiting: Sequence[Record], packed: Sequence[Records]) -> int:
    return len(waiting) + sum(len(each.steps) for each in packed)


class _Timer(threading.Timer):
    """Flushes the journals that wait for it, after a while."""


class _Clock:
    """One timer for all journals."""

    def __init__(self) -> None:
        self._due: deque[Journal] = deque()
        self._timer: _Timer | None = None
        call_after_fork(self)

    def flush_later(self, journal: Journal) -> None:
        """Have a journal's ``on_time`` called within the interval.

        Raises:
            RuntimeError: there can be no thread.
        """
        self._due.append(journal)
        if self._timer is None:
            self._start()

    def forget(self, journal: Journal) -> None:
        """Flush a journal no more, and end the timer where it was the last one."""
        with suppress(ValueError):
            self._due.remove(journal)
        if self._due or self._timer is None:
            return
        timer, self._timer = self._timer, None
        timer.cancel()
        if self._due:  # since another thread has asked meanwhile
            self._start()

    def _start(self) -> None:
        timer = _Timer(_INTERVAL_S, self._on_time)
        timer.daemon = True
        try:
            self._timer = timer
            timer.start()
        except BaseException:
            self._timer = None
            raise

    def forget_other_threads(self) -> None:
        """In a forked process: that of the timer is not there."""
        self._timer = None
        self._due.clear()

    def _on_time(self) -> None:
        # First: who is due after the last one that is seen here starts another timer.
        self._timer = None
        try:
            while (journal := self._next()) is not None:
                journal.on_time()
        finally:
            if self._due:  # an error in one journal is none in the others
                self._start()

    def _next(self) -> Journal | None:
        try:
            return self._due.popleft()
        except IndexError:
            return None


_CLOCK = _Clock()


@atexit.register
def _end_timers() -> None:
    """Let no thread outlive the interpreter: as it frees tensors it would abort the process."""
    timers = [thread for thread in threading.enumerate() if isinstance(thread, _Timer)]
    for timer in timers:
        timer.cancel()
    end_s = time.monotonic() + _PATIENCE_S
    for timer in timers:
        timer.join(max(0.0, end_s - time.monotonic()))
