"""`Growing`: a run thinned as it comes, and what a page that has seen some of it lacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gradstat.bins import Log2Bins
from gradstat.history import History
from gradstat.history.scalars import Scalars
from gradstat.report import page, thin
from gradstat.report.thin import Series, norm_of, series_of
from gradstat.util import Array


class Growing:
    """A run in a bounded number of columns and samples, however long it becomes.

    Each column holds the same number of records, the last one perhaps fewer. Whenever there are too
    many columns, pairs of them are put together. Samples are every n-th record, and the newest.

    Args:
        first: its first records.
        version: a number that rises with each change.
    """

    def __init__(self, first: History, version: int) -> None:
        n_layers = len(first.layers)
        self.layers = first.layers
        self.n_records = 0
        self._head = page.head(first)
        self._newest: dict[str, Array] = {}
        self._most_columns = thin.most_columns(n_layers)
        self._most_samples = thin.most_samples(n_layers)
        self._log2, self._kind = isinstance(first.bins, Log2Bins), first.kinds[0]
        self._sums = thin.Sums.of(first).part(slice(0))
        self._stride = self._sample_stride = 1
        self._samples: list[tuple[int, int, thin.Sample]] = []  # with its version and position
        self._named: dict[int, tuple[int, thin.Sample]] = {}  # by step, with its version
        self._scalars, self._norm = Scalars(), Scalars()
        self._series: dict[str, Series] = {}
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
        kept = [each for each in self._samples if each[1] % self._sample_stride == 0]
        last = self.n_records + len(part) - 1
        for at in range(self.n_records, last + 1):
            if at % self._sample_stride and at != last:
                continue
            kept.append((self._version, at, thin.sample(part, at - self.n_records)))
            while len(kept) > self._most_samples:
                self._sample_stride *= 2
                kept = [
                    each for each in kept if each[1] % self._sample_stride == 0 or each[1] == last
                ]
        self._samples = kept

    def _add_series(self, part: History) -> None:
        for name in part.scalars:
            for step, value in zip(*(x.tolist() for x in part.scalar(name)), strict=True):
                self._scalars.add(name, step, value)
        if len(part):
            norms = norm_of(part, self._kind).tolist()
            for step, norm in zip(part.steps.tolist(), norms, strict=True):
                self._norm.add("norm", step, norm)
        if not len(self._changed):
            return
        named = {name: self._scalars.get(name) for name in self._scalars.names}
        norm = self._norm.get("norm")
        series = series_of(named, self._kind, norm, self._sums.steps[:, 0])
        if list(series) != list(self._series):
            self._whole_since = self._version
        else:
            for name, now in series.items():
                self._changed[_differing(self._series[name], now)] = self._version
        self._series = series

    def name(self, history: History, at: list[int], version: int) -> None:
        """Keep the samples of records that findings name, and no more of those that they named.

        Args:
            history: these records and more.
            at: their positions.
            version: as for `add`.
        """
        steps = history.steps[at].tolist()
        self._named = {
            step: self._named.get(step) or (version, thin.sample(history, each))
            for step, each in zip(steps, at, strict=True)
        }
        self._version = version

    def since(self, version: int) -> dict[str, Any]:
        """What a page lacks that has seen everything up to a version.

        Args:
            version: one that it was told before; 0 gets everything.

        Returns:
            As `page.contents` and more, ready for JSON.
        """
        is_whole = version < self._whole_since
        changed = np.flatnonzero(self._changed > version)
        start = 0 if is_whole else int(changed[0]) if len(changed) else len(self._changed)
        has_new = is_whole or start < len(self._changed)
        cut = slice(start, None)
        samples = self._named | {each.step: (at, each) for at, _, each in self._samples}
        samples = dict(sorted(samples.items()))
        found = page.contents(
            self._sums.part(cut).columns(),
            {name: _part(each, cut) for name, each in self._series.items()},
            [sample for at, sample in samples.values() if is_whole or at > version],
            self._newest if has_new else {},
            log2=self._log2,
        )
        found |= {
            "from": start,
            "records": self.n_records,
            "capacity": self._most_columns,
            "kept": list(samples),
        }
        return found | ({"head": self._head} if is_whole else {})


def _part(series: Series, part: slice) -> Series:
    return replace(
        series, **{name: getattr(series, name)[part] for name in series.__dataclass_fields__}
    )


def _differing(before: Series, now: Series) -> Array:
    """Which columns have changed, of those that were there before."""
    n = min(len(before.mean), len(now.mean))
    differing = np.zeros(n, bool)
    for name in before.__dataclass_fields__:
        a, b = getattr(before, name)[:n], getattr(now, name)[:n]
        differing |= (a != b) & ~((a != a) & (b != b))
    return np.flatnonzero(differing)
