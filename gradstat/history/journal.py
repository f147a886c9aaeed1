"""`Journal`: records on their way to a directory, a few seconds of them at a time.

For interrupts, forks and other threads the rule of records.py holds.
"""

from __future__ import annotations

import atexit
import inspect
import secrets
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from gradstat.history.file import Link, encode
from gradstat.history.reading import as_said, check_fits, head_of, segment_name, segments, state_of
from gradstat.history.records import Records
from gradstat.record import Record
from gradstat.util import call_after_fork, plural, warn

_INTERVAL_S = 5.0
_PATIENCE_S = 5.0  # with blocks that are written as the process ends
_MOST_BYTES = 64 << 20  # kept for a disk that cannot be written
_MOST_WAITING_BYTES = 32 << 20  # that are left to the timer


class _State(NamedTuple):
    """What is where; it changes in one assignment."""

    waiting: list[Record]  # of the next block
    leaving: list[Record]  # that are being written
    told: dict[str, Any]  # what the blocks before have said
    n_logged: dict[str, int]  # values of each scalar that they have
    end: int  # bytes of the file that are written
    link: Link  # of its last block


def new_run() -> str:
    return secrets.token_hex(8)


class Journal:
    """Appends records to a file in a directory, those of a few seconds in one block."""

    # With them goes what is logged in the history meanwhile.
    # A timer's thread writes them, also when no more come. What cannot be written is kept and tried
    # again; the first time a warning says so.
    # With ``first_step`` it goes on with the records that are there, those from this step on
    # superseded. Without it ValueError refuses them, and always those of other layers or bins.

    def __init__(
        self,
        path: Path,  # it is made if need be
        like: Records,  # that the records are of; it learns which run it is of
        first_step: int | None = None,
        run: str | None = None,  # which its ranks have in common; by default a new one
    ) -> None:
        # Where it is now, whatever directory the process changes to.
        self._path = path.absolute()
        self._like = like
        self._state = _State([], [], {}, like.logged.sizes, 0, Link())
        self._waiting_bytes = 0  # about so many
        self._is_created = False
        self._has_warned, self._n_lost, self._n_told = False, 0, 0
        # The first is held for a moment, to take a record or to begin a block, the second while a
        # block is written. A signal's handler may take both again.
        self._lock, self._writing = threading.RLock(), threading.RLock()
        before = segments(self._path)
        if before and first_step is None:
            raise ValueError(
                f"watch() needs a directory without records, or first_step to go on with them; "
                f"path is {path}, which has {len(before)} files of them"
            )
        if before:
            run = check_fits(self._path, like) or run
        # One of a rank's own would say that the ranks are of several runs.
        like.run = run or (new_run() if like.rank is None else None)
        lengths = [each.stat().st_size for each in before]
        self._head = {"number": len(before), "first_step": first_step, "lengths": lengths}
        self._file_path = self._path / segment_name(len(before))
        # A block without records shows at once whether the directory can be written, and keeps
        # other runs and ranks away.
        try:
            self._write_block()
        except OSError as error:
            if isinstance(error, FileExistsError) and self._path.is_dir():
                raise ValueError(
                    f"watch() needs a directory of its own; path is {path}, where another one has "
                    f"just begun"
                ) from error
            self._warn_of(error)

    def add(self, record: Record) -> None:
        """Take a record of a higher step than before; it is written within a few seconds."""
        with self._lock:
            self._state.waiting.append(record)
        self._waiting_bytes += len(record.data)
        if self._waiting_bytes >= _MOST_WAITING_BYTES:
            self.flush()
        _LATER.write_soon(self)

    def write_soon(self) -> None:
        """Write within a few seconds what has been logged."""
        _LATER.write_soon(self)

    def flush(self) -> None:
        """Write all records that wait, after those that another thread is writing."""
        _LATER.cancel(self)
        if not self._is_writing_here():
            with self._writing:
                self._write_waiting()

    def warn_of_unwritten(self) -> None:
        """Say how many records could not be written, after the last attempt."""
        state = self._state
        n = self._n_lost + len(state.waiting) + len(state.leaving)
        if n > self._n_told:
            self._n_told = n
            warn(
                f"watch() could not write {plural(n, 'record')} to {self._path}: what the "
                f"history holds of them is in memory alone; History.save() may write it elsewhere"
            )

    def _is_writing_here(self) -> bool:
        """Whether this is called by a signal's handler while its own thread writes."""
        # A flag could be left set by an interrupt; the stack of calls cannot.
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is Journal._write_waiting.__code__ and frame.f_locals["self"] is self:
                return True
            frame = frame.f_back
        return False

    def _write_waiting(self) -> None:
        try:
            while self._state.leaving or self._begin_block():
                self._write_block()
        except OSError as error:
            self._warn_of(error)
            if sum([len(record.data) for record in self._state.waiting]) >= _MOST_BYTES:
                with self._lock:
                    self._n_lost += len(self._state.leaving)
                    self._state = self._state._replace(leaving=[])

    def _begin_block(self) -> bool:
        """Let what waits leave, if there is anything."""
        with self._lock:
            state = self._state
            self._state = state._replace(waiting=[], leaving=state.waiting)
        self._waiting_bytes = 0
        return bool(state.waiting) or self._like.logged.sizes != state.n_logged

    def _write_block(self) -> None:
        """Append the records that leave, and what the blocks before have not said of them."""
        state, logged = self._state, self._like.logged
        now, scalars = state_of(self._like), logged.after(state.n_logged)
        # A value may be None: what was never said differs from each.
        said = {name: value for name, value in now.items() if state.told.get(name, ()) != value}
        said["scalars"] = as_said(scalars)
        if not state.end:
            said = head_of(self._like) | self._head | said
        parts, link = encode(said, state.leaving, state.link)
        self._path.mkdir(parents=True, exist_ok=True)
        with self._file_path.open("r+b" if self._is_created else "xb") as file:
            self._is_created = True
            file.seek(state.end)
            file.truncate()  # what an earlier attempt has left
            file.writelines(parts)
            end = file.tell()
        new = {name: len(steps) for name, (steps, _) in scalars.items()}
        n_logged = {name: state.n_logged.get(name, 0) + n for name, n in new.items()}
        with self._lock:
            self._state = self._state._replace(
                leaving=[], told=now, n_logged=state.n_logged | n_logged, end=end, link=link
            )

    def _warn_of(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn(f"watch() cannot write to {self._path} and keeps its records in memory: {error}")


class _Timer(threading.Timer):
    """A timer of journals, by which the end of the process knows it."""


class _Later:
    """Has journals write what they have within a few seconds, in one timer's thread for all."""

    def __init__(self) -> None:
        self._timer: _Timer | None = None  # until it begins to write
        self._due: set[Journal] = set()  # that it writes
        call_after_fork(self)

    def forget_other_threads(self) -> None:
        self._timer = None
        self._due.clear()

    def write_soon(self, journal: Journal) -> None:
        self._due.add(journal)
        if self._timer is None:
            self._start()

    def cancel(self, journal: Journal) -> None:
        """End the timer where this journal was the last one."""
        self._due.discard(journal)
        timer = self._timer
        if not self._due and timer is not None:
            self._timer = None
            timer.cancel()
            if self._due:  # since another thread has asked meanwhile
                self._start()

    def _start(self) -> None:
        timer = _Timer(_INTERVAL_S, self._on_time)
        timer.daemon = True
        try:
            self._timer = timer
            timer.start()
        except RuntimeError:  # the process ends, or may have no more threads
            self._on_time()
        except BaseException:
            self._timer = None
            raise

    def _on_time(self) -> None:
        # Before a block is begun: a record that comes later has a timer of its own.
        self._timer = None
        try:
            while self._due:
                self._due.pop().flush()
        except KeyError:  # another thread has taken the last one
            pass
        finally:
            if self._due:  # an error in one journal is none in the others
                self._start()


_LATER = _Later()


@atexit.register
def _end_timers() -> None:
    """Let no thread outlive the interpreter: as it frees tensors it would abort the process."""
    timers = [thread for thread in threading.enumerate() if isinstance(thread, _Timer)]
    for timer in timers:
        timer.cancel()
    end_s = time.monotonic() + _PATIENCE_S
    for timer in timers:
        timer.join(max(0.0, end_s - time.monotonic()))
