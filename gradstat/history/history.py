"""`History`: the record of a run, steps x layers, with a histogram for each."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed as dist

from gradstat.arrays import Array
from gradstat.bins import Bins
from gradstat.history import archive, merge
from gradstat.history.packed_counts import SparseRows
from gradstat.history.records import OWN, SAME, Records
from gradstat.kinds import GRAD, PARAM, UNIT, UPDATE, Row
from gradstat.results import DERIVED, FLOATS, INTEGERS, Statistics

if TYPE_CHECKING:
    import pandas

    from gradstat.diagnosis import Finding, Thresholds

FIELDS = (*INTEGERS, *FLOATS, *DERIVED)
_DENSE_BYTES = 4 << 20  # dense histograms waiting to be packed together


class History:
    """Statistics of L layers over S recorded steps.

    A layer without a gradient in a step has a row of NaN and of zero counts there. Histograms are
    kept as their non-zero bins alone.

    Args:
        layers: L names.
        bins: scheme of every histogram.
        capacity: most records to keep, 2 or more: the first, the last, and between them every so
            many, evenly. Whenever it is full every other one is dropped.
        kinds: of what each layer is, by default gradients; see ``what`` of `gradstat.watch`.

    Example:
        >>> import torch, gradstat
        >>> model = torch.nn.Linear(3, 2)
        >>> with gradstat.watch(model) as w:
        ...     model(torch.ones(1, 3)).sum().backward()
        >>> w.history.layers, w.history["mean"]
        (['weight'], array([[1.]]))
    """

    def __init__(
        self,
        layers: Sequence[str | Row],
        bins: Bins,
        *,
        capacity: int | None = None,
        kinds: Sequence[str] | None = None,
    ) -> None:
        if kinds is None:
            kinds = [each.kind if isinstance(each, Row) else GRAD for each in layers]
        self.rows = [
            each if isinstance(each, Row) else Row.printed(kind, each)
            for kind, each in zip(kinds, layers, strict=True)
        ]
        self.layers = [str(row) for row in self.rows]
        self.kinds = [row.kind for row in self.rows]
        self.bins = bins
        # Which ranks of a distributed run hold the same values of a layer, as in `Records`.
        self.origins = np.full(len(self.layers), OWN)
        self._capacity = capacity
        self._stride = 1  # appended records from one that is kept to the next
        self._n_appended = 0
        self._steps: list[int] = []
        self._times: list[float] = []
        # With room for more records than there are, so that adding one seldom copies the others.
        self._integers = np.empty((0, len(self.layers), len(INTEGERS)), dtype=np.int64)
        self._floats = np.empty((0, len(self.layers), len(FLOATS)))
        self._dense: list[Array] = []  # histograms of the newest records, not packed yet
        self._packed = SparseRows.empty()

    @property
    def steps(self) -> Array:
        """Number of each recorded step, from 0: int64 ``(S,)``."""
        return np.array(self._steps, dtype=np.int64)

    @property
    def times(self) -> Array:
        """When each step was recorded, in seconds since 1970: float64 ``(S,)``; NaN if unknown."""
        return np.array(self._times, dtype=np.float64)

    def __len__(self) -> int:
        """Number of recorded steps, S."""
        return len(self._steps)

    def __repr__(self) -> str:
        """Size and bins."""
        return f"History({len(self)} steps, {len(self.layers)} layers, {self.bins})"

    def append(
        self,
        step: int,
        integers: Array,
        floats: Array,
        counts: Array,
        *,
        time_s: float | None = None,
    ) -> None:
        """Add one record.

        Args:
            step: its number, higher than the last one's.
            integers: int64 ``(L, 8)``, fields as in `Statistics`.
            floats: float64 ``(L, 8)``.
            counts: int64 ``(L, bins)``, kept for a while, not copied.
            time_s: when it was recorded, in seconds since 1970; by default now.

        Raises:
            ValueError: a step that is not higher.
        """
        if self._steps and step <= self._steps[-1]:
            raise ValueError(f"append() needs a step after {self._steps[-1]}; step is {step}")
        if self._capacity is not None:
            self._make_room(self._capacity)
        at = len(self._steps)
        if at == len(self._integers):
            self._integers = _with_room(self._integers)
            self._floats = _with_room(self._floats)
        self._integers[at], self._floats[at] = integers, floats
        # Before the newest one joins them, which may have to go again.
        if (len(self._dense) + 1) * counts.nbytes > _DENSE_BYTES:
            self._pack()
        self._dense.append(counts)
        self._steps.append(step)
        self._times.append(time.time() if time_s is None else time_s)
        self._n_appended += 1

    def __getitem__(self, field: str) -> Array:
        """One field of `Statistics` at every step and layer.

        Args:
            field: its name, such as ``"mean"``, ``"std"`` or ``"nan"``.

        Returns:
            float64 or int64, shape ``(S, L)``; NaN (0 for a count) where a layer had no gradient.

        Raises:
            KeyError: another name.
        """
        if field not in FIELDS:
            raise KeyError(f"History[] needs one of {', '.join(FIELDS)}; got {field!r}")
        integers, floats = self._integers[: len(self)], self._floats[: len(self)]
        statistics = Statistics(
            self.bins, torch.from_numpy(integers), torch.from_numpy(floats), torch.empty(0)
        )
        values: Array = getattr(statistics, field).numpy().copy()
        return values

    def record(self, step: int = -1) -> Statistics:
        """Everything measured in one step.

        Args:
            step: a number in `steps`, or negative to count back from the newest.

        Returns:
            Statistics of shape ``(L,)``, on the CPU.

        Raises:
            KeyError: a step that was not recorded.
        """
        return self._record(self._find_step(step), slice(len(self.layers)))

    def parts(self, step: int = -1) -> Iterator[tuple[slice, Statistics]]:
        """Everything measured in one step, some layers at a time, in memory for a few histograms.

        Args:
            step: a number in `steps`, or negative to count back from the newest.

        Yields:
            Which of the L layers, and their statistics, on the CPU.

        Raises:
            KeyError: a step that was not recorded.
        """
        at, n_layers = self._find_step(step), len(self.layers)
        size = max(1, _DENSE_BYTES // (8 * self.bins.bins))
        for start in range(0, max(n_layers, 1), size):
            part = slice(start, min(start + size, n_layers))
            yield part, self._record(at, part)

    def histogram(self, layer: str, step: int = -1) -> tuple[Array, Array]:
        """Histogram of one layer in one step.

        Args:
            layer: a name in `layers`.
            step: a number in `steps`, or negative to count back from the newest.

        Returns:
            counts, int64 ``(bins,)``, and edges, float64 ``(bins + 1,)``.

        Raises:
            KeyError: an unknown layer, or a step that was not recorded.
        """
        column, at = self._find_layer(layer), self._find_step(step)
        return self._counts(at, column), self._edges(self._floats[at, column])

    def histograms(self, layer: str) -> tuple[Array, Array]:
        """Histogram of one layer in every recorded step.

        Args:
            layer: a name in `layers`.

        Returns:
            counts, int64 ``(S, bins)``, and edges, float64, ``(bins + 1,)`` for `Log2Bins` and
            ``(S, bins + 1)`` for `LinearBins`.

        Raises:
            KeyError: an unknown layer.
        """
        column = self._find_layer(layer)
        counts = np.empty((len(self), self.bins.bins), dtype=np.int64)
        for at in range(len(self)):
            counts[at] = self._counts(at, column)
        return counts, self._edges(self._floats[: len(self), column])

    def select(self, kind: str) -> History:
        """The rows of one kind, where ``watch(what=...)`` has recorded several.

        Args:
            kind: ``"grad"``, ``"param"``, ``"update"``, ``"activation"``, ``"unit"`` (the largest
                magnitude of each unit of an activation) or ``"grad_output"``.

        Returns:
            A new History of as many records, its layers named by their parameters or modules.

        Raises:
            KeyError: a kind that was not recorded.
        """
        columns = self._columns("select", kind)
        records = self.to_records()
        at = np.arange(len(self))[:, None] * len(self.layers) + columns
        chosen = Records(
            [self.rows[column] for column in columns],
            [self.rows[column].name for column in columns],
            self.bins,
            list(self._steps),
            records.times,
            records.integers[:, columns],
            records.floats[:, columns],
            self._packed.keep(at.ravel()),
            records.origins[columns],
        )
        return History.from_records(chosen)

    def update_ratio(self) -> Array:
        """How large a step's change of the weights was, as a share of them.

        Returns:
            The rms of ``update`` over that of ``param``: float64 ``(S, L)``, for the layers of
            ``select("update")``; infinite for weights of zero that changed.

        Raises:
            KeyError: updates were not recorded.
        """
        update, weight = (self._columns("update_ratio", kind) for kind in (UPDATE, PARAM))
        rms = self["rms"]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio: Array = rms[:, update] / rms[:, weight]
        return ratio

    def dead_units(self) -> Array:
        """The share of each module's units whose output was zero all through a record.

        Returns:
            float64 ``(S, L)``, for the layers of ``select("unit")``, which are those of
            ``select("activation")``.

        Raises:
            KeyError: activations were not recorded.
        """
        columns = self._columns("dead_units", UNIT)
        zeros, numel = self["zeros"][:, columns], self["numel"][:, columns]
        with np.errstate(invalid="ignore"):
            share: Array = zeros / numel
        return share

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole record to a NumPy ``.npz`` file, which appears whole or not at all.

        Args:
            path: the file; one that is there is replaced.

        Raises:
            OSError: it cannot be written.
        """
        archive.write(Path(path), self.to_records())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what `save` wrote, or what ``watch(path=...)`` has written so far.

        Args:
            path: the file or the directory. Of a directory whose last file is cut off, the block of
                records at its end is left out, with a RuntimeWarning.

        Returns:
            An equal History.

        Raises:
            FileNotFoundError: there is no such file; another OSError: it cannot be opened.
            ValueError: a damaged file, one that neither of them wrote, or a directory that lacks
                one.
        """
        return cls.from_records(archive.read(Path(path)))

    def reduce(
        self, group: dist.ProcessGroup | None = None, *, replicated: bool | None = None
    ) -> History:
        """What all ranks of a distributed run measured, together; each of them must call it.

        Values that several ranks hold count once. A DTensor knows which: shards are put together
        and replicas are not. Other gradients are the same on each rank when the optimizer steps,
        and during backward, as under DistributedDataParallel, each rank's own part of the batch.

        Counts, min and max are exact; the variance follows Chan's formula. It takes four
        collectives, however many records there are, and memory for the histograms of all of them.

        Args:
            group: by default all ranks.
            replicated: whether gradients that are no DTensors are the same on each rank; by default
                ``True`` unless they were measured during backward.

        Returns:
            The same new History on each rank.

        Raises:
            ValueError: on each rank: other layers, bins or steps elsewhere, histograms over other
                ranges, a layer that should be the same on each rank and is not.
        """
        mine = self.to_records()
        if replicated is not None:
            plain = (mine.origins < 0) & (np.array(self.kinds) == GRAD)
            mine.origins[plain] = SAME if replicated else OWN
        return History.from_records(merge.merge(mine, group))

    def to_records(self) -> Records:
        """All arrays, of which only ``origins`` is a copy."""
        self._pack()
        integers, floats = self._integers[: len(self)], self._floats[: len(self)]
        return Records(
            self.rows,
            self.layers,
            self.bins,
            self._steps,
            self.times,
            integers,
            floats,
            self._packed,
            self.origins.copy(),
        )

    @classmethod
    def from_records(cls, records: Records) -> History:
        """A History of such arrays, which it keeps."""
        history = cls(records.rows, records.bins)
        history.layers = records.layers
        history.origins = records.origins
        history._steps, history._times = list(records.steps), records.times.tolist()
        history._integers, history._floats = records.integers, records.floats
        history._packed = records.counts
        history._n_appended = len(records.steps)
        return history

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the records take."""
        dense = sum(counts.nbytes for counts in self._dense)
        return self._integers.nbytes + self._floats.nbytes + self._packed.nbytes + dense

    def _make_room(self, capacity: int) -> None:
        """Drop records as one more comes."""
        if self._steps and (self._n_appended - 1) % self._stride:
            # The last one was kept only because it was the last one.
            self._keep(slice(len(self) - 1))
        if len(self) >= capacity:
            self._keep(slice(None, None, 2))
            self._stride *= 2

    def _keep(self, kept: slice) -> None:
        n = len(self)
        newest_goes = kept == slice(n - 1) and self._dense
        if newest_goes:
            self._dense.pop()
        else:
            self._pack()
            at = np.arange(n * len(self.layers)).reshape(n, -1)[kept]
            self._packed = self._packed.keep(at.ravel())
            self._integers, self._floats = self._integers[:n][kept], self._floats[:n][kept]
        self._steps, self._times = self._steps[kept], self._times[kept]

    def _pack(self) -> None:
        if self._dense:
            self._packed.extend(np.concatenate(self._dense))
            self._dense.clear()

    def _record(self, at: int, part: slice) -> Statistics:
        """Statistics of some layers in the record at a position."""
        columns = range(*part.indices(len(self.layers)))
        counts = np.empty((len(columns), self.bins.bins), dtype=np.int64)
        for row, column in enumerate(columns):
            counts[row] = self._counts(at, column)
        return Statistics(
            self.bins,
            torch.from_numpy(self._integers[at, part].copy()),
            torch.from_numpy(self._floats[at, part].copy()),
            torch.from_numpy(counts),
        )

    def _counts(self, at: int, column: int) -> Array:
        """Histogram of a layer, by its column, in the record at a position: a new array."""
        n_packed = len(self) - len(self._dense)
        if at >= n_packed:
            dense: Array = self._dense[at - n_packed][column].copy()
            return dense
        return self._packed.row(at * len(self.layers) + column, self.bins.bins)

    def _edges(self, floats: Array) -> Array:
        """Edges for rows of `FLOATS`."""
        ends = torch.from_numpy(np.ascontiguousarray(floats[..., 6:]))
        edges: Array = self.bins.edges(ends[..., 0], ends[..., 1]).numpy()
        return edges

    def _columns(self, function: str, kind: str) -> Array:
        """Where the rows of a kind are."""
        columns = np.flatnonzero(np.array(self.kinds) == kind)
        if not len(columns):
            raise KeyError(
                f"{function}() needs a history with {kind!r}; it has "
                f"{', '.join(dict.fromkeys(self.kinds))}"
            )
        return columns

    def _find_layer(self, layer: str) -> int:
        if layer not in self.layers:
            raise KeyError(f"History needs a layer of {self.layers}; layer is {layer!r}")
        return self.layers.index(layer)

    def _find_step(self, step: int) -> int:
        if step < 0 and -step <= len(self):
            return len(self) + step
        at = bisect_left(self._steps, step)
        if at == len(self) or self._steps[at] != step:
            raise KeyError(f"History needs a recorded step; step is {step} of {len(self)} records")
        return at

    def diagnose(self, thresholds: Thresholds | None = None) -> list[Finding]:
        """Find what is wrong with the gradients and the rest of a run, the worst first.

        Args:
            thresholds: by default those that healthy runs stay within.

        Returns:
            Findings, as `gradstat.diagnosis.diagnose` describes them.

        Raises:
            ValueError: there are no records.
        """
        from gradstat.diagnosis import diagnose

        return diagnose(self, thresholds)

    def to_pandas(self) -> pandas.DataFrame:
        """Make a table: a row for each step, kind and layer, with every field and the histogram.

        Returns:
            DataFrame, its columns those of `gradstat.tables`.

        Raises:
            ImportError: pandas is not installed.
        """
        from gradstat.tables import to_pandas

        return to_pandas(self)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write that table to a Parquet file.

        Args:
            path: the file; one that is there is replaced.

        Raises:
            ImportError: pyarrow is not installed.
            OSError: the file cannot be written.
        """
        from gradstat.tables import to_parquet

        to_parquet(self, path)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write that table to a CSV file, lists as JSON.

        Args:
            path: the file; one that is there is replaced.

        Raises:
            OSError: the file cannot be written.
        """
        from gradstat.tables import to_csv

        to_csv(self, path)

    def report(self, path: str | os.PathLike[str], *, title: str = "Gradients") -> None:
        """Write a page to look around in: findings, a map, every layer's distribution over time.

        One file of HTML, which needs neither a network nor a server.

        Args:
            path: the file; one that is there is replaced.
            title: heading of the page.

        Raises:
            TypeError: a title that is no text.
            ValueError: there are no records.
            OSError: the file cannot be written.
        """
        from gradstat.report import write

        write(self, path, title=title)


def _with_room(rows: Array) -> Array:
    """The same rows with room for as many again."""
    return np.concatenate([rows, np.empty((max(len(rows), 16), *rows.shape[1:]), rows.dtype)])
