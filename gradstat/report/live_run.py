"""`LiveRun`: a run that is read as it is written, for any number of pages that look at it."""

from __future__ import annotations

import math
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gradstat.bins import Log2Bins
from gradstat.diagnosis import diagnose
from gradstat.history import History
from gradstat.history.file import Spool
from gradstat.history.follow import Follower
from gradstat.history.records import Records, Scalars
from gradstat.report import page, thin
from gradstat.util import Array, escaped

_LOOK_S = 0.5  # between two looks at the files
_READ_S = 0.5  # for which a look may read; a long run takes several
# Findings read all records again, after so long and in at most such a share of the time.
_FINDINGS_S, _FINDINGS_SHARE = 2.0, 1 / 20

# One thread for all runs: each new one would keep some of a long run's memory to itself.
_WORKER = ThreadPoolExecutor(1, "gradstat findings")


class LiveRun:
    """What pages are told of a run, there or to come, which is read only when one of them asks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._follower = Follower(path)
        self._lock = threading.Lock()
        self._growing: Growing | None = None
        self._records, self._spool = Records([], Log2Bins()), Spool()
        self._looked_s = -_LOOK_S
        # Rises with each change, and is above that of any earlier server.
        self._version = time.time_ns() // 1_000_000
        self._state, self._is_behind = "waiting", False
        self._written_s = time.time()
        self._findings_due_s = 0.0
        self._is_diagnosing = False

    def since(self, version: int) -> dict[str, Any]:
        """What a page lacks that has seen everything up to a version, 0 for a new one; for JSON."""
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
            why: object = error
            if isinstance(error, OSError) and error.filename:
                why = f"{error.strerror}: {error.filename}"
            self._is_behind, self._state = False, f"cannot be read: {escaped(why)}"
        self._looked_s = time.monotonic()

    def _take(self, records: Records, *, is_anew: bool) -> None:
        part = History.from_records(records)
        if not part.layers:
            return  # there is nothing to show
        self._rise()
        if self._growing is None or is_anew:
            self._growing, self._findings_due_s = Growing(part, self._version), 0.0
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
        if growing.n_records != growing.findings_of and time.monotonic() >= self._findings_due_s:
            self._is_diagnosing = True
            history = History.from_records(self._records.snapshot())
            _WORKER.submit(self._diagnose, history, growing)

    def _diagnose(self, history: History, growing: Growing) -> None:
        began_s = time.monotonic()
        found = None
        try:
            found = page.findings(diagnose(history), history.layers)
        except (OSError, ValueError):
            pass  # the next look says so
        except Exception:
            traceback.print_exc()  # nobody asks this job for its result
        finally:
            with self._lock:
                self._is_diagnosing = False
                took_s = time.monotonic() - began_s
                wait_s = max(_FINDINGS_S, took_s / _FINDINGS_SHARE)
                self._findings_due_s = time.monotonic() + wait_s
                if found is not None and growing is self._growing:
                    self._rise()
                    growing.take_findings(history, found, self._version)


class Growing:
    """A run in a bounded number of columns and samples, however long it becomes."""

    # Each column holds the same number of records, the last one perhaps fewer. Whenever there are
    # too many columns, pairs of them are put together. Samples are every n-th record, and the
    # newest. Its version is a number that rises with each change.

    def __init__(self, first: History, version: int) -> None:
        n_layers = len(first.layers)
        self.layers = first.layers
        self.n_records = 0
        self._head = page.head(first)
        self._newest: dict[str, Array] = {}
        self._most_columns = thin.most_columns(n_layers)
        self._most_samples = thin.most_samples(n_layers)
        self._kind = first.kinds[0]
        self._sums = thin.Sums.of(first).part(slice(0))
        self._stride = self._sample_stride = 1
        self._samples: list[tuple[int, int, thin.Sample]] = []  # with its version and position
        self._named: dict[int, tuple[int, thin.Sample]] = {}  # by step, with its version
        self._findings: list[dict[str, Any]] | None = None
        self._findings_version, self.findings_of = 0, 0  # and how many records they are of
        self._scalars, self._norm = Scalars(), Scalars()
        self._series: dict[str, thin.Series] = {}
        # When each column was changed last, and when everything was.
        self._changed = np.zeros(0, np.int64)
        self._version = self._whole_since = version
        self.add(first, version)

    def add(self, part: History, version: int) -> None:
        """Take the records that follow, and what was logged beside them."""
        self._version = version
        if len(part):
            self._add_columns(part)
            self._add_samples(part)
            head, self._newest = page.head(part), page.newest(part)
            self.n_records += len(part)
            if head != self._head:
                self._head, self._whole_since = head, version
        self._add_series(part)

    def _add_columns(self, part: History) -> None:
        n = len(self._changed)
        is_open = n > 0 and self._sums.records[-1] < self._stride
        before = n - is_open
        sums = thin.Sums.of(part)
        if is_open:
            sums = self._sums.part(slice(before, None)).followed_by(sums)
        column = (np.cumsum(sums.records) - 1) // self._stride
        starts = np.flatnonzero(np.diff(column, prepend=-1))
        self._sums = self._sums.part(slice(before)).followed_by(sums.together(starts))
        self._changed = np.append(self._changed[:before], np.full(len(starts), self._version))
        while len(self._changed) > self._most_columns:
            self._stride *= 2
            self._sums = self._sums.together(np.arange(0, len(self._changed), 2))
            self._changed = self._changed[::2]
            self._whole_since = self._version

    def _add_samples(self, part: History) -> None:
        first, last = self.n_records, self.n_records + len(part) - 1
        while math.ceil(last / self._sample_stride) + 1 > self._most_samples:
            self._sample_stride *= 2
        self._samples = [each for each in self._samples if each[1] % self._sample_stride == 0]
        for at in range(first, last + 1):
            if at % self._sample_stride == 0 or at == last:
                self._samples.append((self._version, at, thin.sample(part, at - first)))

    def _add_series(self, part: History) -> None:
        self._scalars.extend(part.logged)
        if len(part):
            self._norm.add_all("norm", part.steps.tolist(), thin.norm_of(part, self._kind).tolist())
        if not len(self._changed):
            return
        named = {name: self._scalars.get(name) for name in self._scalars.names}
        norm = self._norm.get("norm")
        series = thin.series_of(named, self._kind, norm, self._sums.steps[:, 0])
        if list(series) != list(self._series):
            self._whole_since = self._version
        else:
            for before, now in zip(self._series.values(), series.values(), strict=True):
                for a, b in zip(before, now, strict=True):
                    n = min(len(a), len(b))
                    is_same = np.isclose(a[:n], b[:n], rtol=0, atol=0, equal_nan=True)
                    self._changed[:n][~is_same] = self._version
        self._series = series

    def take_findings(self, history: History, found: list[dict[str, Any]], version: int) -> None:
        """Keep samples of the records that findings name, in place of those that others named."""
        self._findings, self._findings_version, self.findings_of = found, version, len(history)
        at = thin.positions(history, [finding["at"] for finding in found])
        steps = history.steps[at].tolist()
        self._named = {
            step: self._named.get(step) or (version, thin.sample(history, each))
            for step, each in zip(steps, at, strict=True)
        }
        self._version = version

    def since(self, version: int) -> dict[str, Any]:
        """As `LiveRun.since`: `page.contents` and more."""
        is_whole = version < self._whole_since
        changed = np.flatnonzero(self._changed > version)
        start = 0 if is_whole else int(changed[0]) if len(changed) else len(self._changed)
        has_new = is_whole or start < len(self._changed)
        cut = slice(start, None)
        samples = self._named | {each.step: (at, each) for at, _, each in self._samples}
        samples = dict(sorted(samples.items()))
        found = page.contents(
            self._sums.part(cut).columns(),
            {name: thin.Series(*(x[cut] for x in each)) for name, each in self._series.items()},
            [sample for at, sample in samples.values() if is_whole or at > version],
            self._newest if has_new else {},
        )
        found |= {
            "from": start,
            "records": self.n_records,
            "capacity": self._most_columns,
            "kept": list(samples),
        }
        if is_whole or self._findings_version > version:
            found |= {"findings": self._findings, "findingsOf": self.findings_of}
        return found | ({"head": self._head} if is_whole else {})
