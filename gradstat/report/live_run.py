"""`LiveRun`: a run that is read as it is written, for any number of pages that look at it."""

from __future__ import annotations

import functools
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from gradstat.bins import Log2Bins
from gradstat.diagnosis import diagnose
from gradstat.history import History
from gradstat.history.file import Spool
from gradstat.history.follow import Follower
from gradstat.history.records import Records
from gradstat.report import page, thin
from gradstat.report.growing import Growing
from gradstat.util import escaped

_LOOK_S = 0.5  # between two looks at the files
_READ_S = 0.5  # for which a look may read; a long run takes several
# Findings read all records again, after so long and in at most such a share of the
# time.
_FINDINGS_S, _FINDINGS_SHARE = 2.0, 1 / 20

# One thread for all runs: each new one would keep some of a long run's memory to itself.
_WORKER = "gradstat findings"
_jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
_starting = threading.Lock()


class LiveRun:
    """What pages are told of a run, which is read only when one of them asks.

    Args:
        path: file or directory, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._follower = Follower(path)
        self._lock = threading.Lock()
        self._growing: Growing | None = None
        self._records, self._spool = Records([], Log2Bins()), Spool()
        self._looked_s = -_LOOK_S
        # Rises with each change, and is above that of any earlier server.
        self._version = self._began = time.time_ns() // 1_000_000
        self._state, self._is_behind = "waiting", False
        self._written_s = time.time()
        self._findings: list[dict[str, Any]] | None = None
        self._findings_version, self._findings_of = 0, 0  # and how many records they are of
        self._findings_due_s = 0.0
        self._is_diagnosing = False

    def since(self, version: int) -> dict[str, Any]:
        """What a page lacks that has seen everything up to a version.

        Args:
            version: what the page was told last; 0 for a new one.

        Returns:
            For JSON: the version, what state the run is in, seconds since it was written to; and
            what is new, if anything is.
        """
        with self._lock:
            if time.monotonic() - self._looked_s >= _LOOK_S or self._is_behind:
                self._look()
            told: dict[str, Any] = {
                "version": self._version,
                "state": self._state,
                "behind": self._is_behind,
                "quiet": max(0.0, round(time.time() - self._written_s, 1)),
            }
            growing = self._growing
            if growing is not None and version != self._version:
                # A page may have a later version, from another server.
                told |= growing.since(version if version < self._version else 0)
                if "head" in told or self._findings_version > version:
                    told |= {"findings": self._findings, "findingsOf": self._findings_of}
            self._diagnose_soon()
            return told

    def _look(self) -> None:
        began_s = time.monotonic()
        self._is_behind = True
        try:
            while self._is_behind and time.monotonic() - began_s < _READ_S:
                look = self._follower.look()
                if look is None:
                    self._state = "waiting" if self._growing is None else "gone"
                    self._is_behind = False
                    break
                if look.records is not None or self._growing is not None or not look.is_all:
                    self._state = "there"
                self._is_behind = not look.is_all
                if look.records is not None:
                    self._take(look.records, is_anew=look.is_anew)
        except (OSError, ValueError) as error:
            self._is_behind = False
            self._state = f"cannot be read: {escaped(_said(error))}"
        self._looked_s = time.monotonic()

    def _take(self, records: Records, *, is_anew: bool) -> None:
        part = History.from_records(records)
        if not part.layers:
            return  # there is nothing to show
        self._rise()
        if self._growing is None or is_anew:
            self._growing, self._began = Growing(part, self._version), self._version
            self._findings, self._findings_of, self._findings_due_s = None, 0, 0.0
            self._records, self._spool = records.at([]), Spool()
        else:
            self._growing.add(part, self._version)
        records.set_records(self._spool.keep(records.records))
        self._records.extend(records)
        self._written_s = self._follower.written_s

    def _rise(self) -> None:
        self._version = max(self._version + 1, time.time_ns() // 1_000_000)

    def _diagnose_soon(self) -> None:
        """Begin to look for findings if there are other records than the last time."""
        growing = self._growing
        if growing is None or self._is_behind or self._is_diagnosing or not growing.n_records:
            return
        is_new = growing.n_records != self._findings_of
        if is_new and time.monotonic() >= self._findings_due_s:
            self._is_diagnosing = True
            history = History.from_records(self._records.snapshot())
            _do(functools.partial(self._diagnose, history, self._began))

    def _diagnose(self, history: History, began: int) -> None:
        began_s = time.monotonic()
        found = None
        try:
            found = page.findings(diagnose(history), history.layers)
            named = thin.positions(history, [finding["at"] for finding in found])
        except (OSError, ValueError):
            pass  # the next look says so
        finally:
            with self._lock:
                self._is_diagnosing = False
                took_s = time.monotonic() - began_s
                wait_s = max(_FINDINGS_S, took_s / _FINDINGS_SHARE)
                self._findings_due_s = time.monotonic() + wait_s
                if found is not None and began == self._began and self._growing is not None:
                    self._rise()
                    self._growing.name(history, named, self._version)
                    self._findings, self._findings_of = found, len(history)
                    self._findings_version = self._version


def _do(job: Callable[[], None]) -> None:
    """Do a job that takes its time, after the jobs before it."""
    _jobs.put(job)
    with _starting:
        if not any(thread.name == _WORKER for thread in threading.enumerate()):
            threading.Thread(target=_work, name=_WORKER, daemon=True).start()


def _work() -> None:
    while True:
        try:
            _jobs.get()()
        except Exception:
            traceback.print_exc()


def _said(error: OSError | ValueError) -> object:
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return error
