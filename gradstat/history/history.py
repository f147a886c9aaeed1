"""`History`: the record of a run, steps x layers, with a histogram for each."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed as dist

from gradstat.bins import Bins
from gradstat.formats import Format, asked_formats, parse_format
from gradstat.history import archive, merge, rank_directories
from gradstat.history.alignment import with_columns
from gradstat.history.copies import told_of_replicas
from gradstat.history.memory import Memory
from gradstat.history.packed_counts import SparseRows
from gradstat.history.placements import Placements
from gradstat.history.records import OWN, Records
from gradstat.history.scalars import Scalars
from gradstat.record import (
    FROM_THE_END,
    GRAD,
    PARAM,
    UNIT,
    UPDATE,
    Data,
    Record,
    RecordLayout,
    Row,
    Unpacked,
)
from gradstat.results import (
    DERIVED,
    FLOATS,
    INTEGERS,
    PACKED,
    QUANTIZATION_FIELDS,
    SHAPES,
    Statistics,
    unpacked,
)
from gradstat.util import Array, divide, one_of

if TYPE_CHECKING:
    import pandas

    from gradstat.diagnosis import Finding, Thresholds

_DENSE_BYTES = 4 << 20  # of histograms at a time

FIELDS = (*INTEGERS, *FLOATS, *DERIVED, *SHAPES)


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
        formats: names of narrow formats that are measured; see ``formats`` of `gradstat.watch`.

    Attributes:
        formats: their names.
        depth: int64 ``(L,)``, the place of each layer among those of its kind, from the input on,
            as the first record has shown it; ``None`` where no order was seen, as of compiled
            models: then layers are taken in the order in which they are registered.
        partial_step: the step of the last record if its pass did not end: it lacks what would have
            come later; ``None`` otherwise.
        rank: of the process that recorded it in a distributed run, and ``world``, how many there
            were; ``None`` otherwise.

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
        formats: str | Format | Sequence[str | Format] = (),
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
        self.formats = [each.name for each in asked_formats("History", formats)]
        # Which ranks of a distributed run hold the same values of a layer, as in `Records`.
        self.origins = np.full(len(self.layers), OWN)
        self.placements: Placements | None = None
        self.layout = RecordLayout(len(self.layers), len(self.formats), bins.bins)
        self._memory = Memory(self.layout, bins, capacity)
        self._scalars = Scalars()
        self.depth: Array | None = None
        self.partial_step: int | None = None
        self.rank: int | None = None
        self.world: int | None = None

    @property
    def steps(self) -> Array:
        """Number of each recorded step, from 0: int64 ``(S,)``."""
        return np.array([record.step for record in self._memory.records], dtype=np.int64)

    @property
    def times(self) -> Array:
        """When each step was recorded, in seconds since 1970: float64 ``(S,)``; NaN if unknown."""
        return np.array([record.time_s for record in self._memory.records], dtype=np.float64)

    def __len__(self) -> int:
        """Number of recorded steps, S."""
        return len(self._memory)

    def __repr__(self) -> str:
        """Size and bins."""
        return f"History({len(self)} steps, {len(self.layers)} layers, {self.bins})"

    def _repr_html_(self) -> str:
        """What a notebook shows: size, findings, the loss and a map of magnitudes."""
        from gradstat.report.notebook import fragment

        return fragment(self)

    def append(self, step: int, data: Data, *, time_s: float | None = None) -> None:
        """Add one record.

        Args:
            step: its number, higher than the last one's.
            data: its numbers, as ``layout.pack()`` makes them; kept, not copied.
            time_s: when it was recorded, in seconds since 1970; by default now.

        Raises:
            ValueError: a step that is not higher, bytes of another layout.
        """
        self._memory.append(Record(step, time.time() if time_s is None else time_s, data))

    def add(self, record: Record) -> None:
        """Add a record that `watch` has made: of a higher step, and of this history's layout."""
        self._memory.add(record)

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
        return self._memory.column(field)

    @property
    def order(self) -> list[str]:
        """The layers of the first kind as a step comes to them, as `depth` tells.

        Gradients arrive from the last layer back; parameters and outputs begin with the first.
        """
        first = self.kinds[0] if self.kinds else GRAD
        columns = self.by_depth(self._columns("order", first))
        return [self.layers[at] for at in (columns[::-1] if first in FROM_THE_END else columns)]

    def by_depth(self, columns: Array) -> Array:
        """Columns of rows of one kind, that of the row nearest to the input first."""
        if self.depth is None:
            return columns
        ordered: Array = columns[np.argsort(self.depth[columns], kind="stable")]
        return ordered

    @property
    def scalars(self) -> list[str]:
        """Names of what was logged at the steps beside their records, such as ``"loss"``."""
        return self._scalars.names

    def scalar(self, name: str) -> tuple[Array, Array]:
        """What was logged under a name, at every step, recorded or not.

        Args:
            name: one of `scalars`.

        Returns:
            steps, int64 ``(N,)``, which do not fall, and values, float64 ``(N,)``.

        Raises:
            KeyError: another name.
        """
        if name not in self._scalars.names:
            raise KeyError(
                f"scalar() needs one of {', '.join(self.scalars) or 'none'}; name is {name!r}"
            )
        return self._scalars.get(name)

    def add_scalar(self, name: str, step: int, value: float) -> None:
        """Add a number that belongs to a step; all of them are kept, whatever the capacity.

        Args:
            name: such as ``"loss"``.
            step: no lower than that of the last value of this name.
            value: 16 bytes of memory.

        Raises:
            ValueError: a lower step.
        """
        self._scalars.add(name, step, value)

    def norm(self, kind: str = GRAD) -> Array:
        """L2 norm of all rows of a kind together: of the whole gradient, as clipping sees it.

        Non-finite elements and absent layers are left out.

        Args:
            kind: as for `select`.

        Returns:
            float64 ``(S,)``; NaN for a record without any of them.

        Raises:
            KeyError: a kind that was not recorded.
        """
        l2 = self["l2"][:, self._columns("norm", kind)]
        known = ~np.isnan(l2)
        l2 = np.where(known, l2, 0.0)
        # No square overflows or underflows, unless a norm is itself infinite.
        largest = l2.max(1, keepdims=True, initial=0.0)
        unit = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
        with np.errstate(over="ignore"):
            norm: Array = unit[:, 0] * np.sqrt(((l2 / unit) ** 2).sum(1))
        return np.where(known.any(1), norm, np.nan)

    def record(self, step: int = -1) -> Statistics:
        """Everything measured in one step.

        Args:
            step: a number in `steps`, or negative to count back from the newest.

        Returns:
            Statistics of shape ``(L,)``, on the CPU.

        Raises:
            KeyError: a step that was not recorded.
        """
        return self.layout.statistics(self._memory.find(step).data, self.bins)

    def parts(self, step: int = -1) -> Iterator[tuple[slice, Statistics]]:
        """Everything measured in one step, some layers at a time, in memory for a few histograms.

        Args:
            step: a number in `steps`, or negative to count back from the newest.

        Yields:
            Which of the L layers, and their statistics, on the CPU.

        Raises:
            KeyError: a step that was not recorded.
        """
        data, n_layers = self._memory.find(step).data, len(self.layers)
        size = max(1, _DENSE_BYTES // (8 * self.bins.bins))
        for start in range(0, max(n_layers, 1), size):
            part = slice(start, min(start + size, n_layers))
            yield part, self.layout.statistics(data, self.bins, part)

    def packed(self, step: int = -1) -> Record:
        """One step's record as it is kept, such as to append it elsewhere.

        Args:
            step: a number in `steps`, or negative to count back from the newest.

        Returns:
            Its step, time and bytes, in the order of ``layout``.

        Raises:
            KeyError: a step that was not recorded.
        """
        return self._memory.find(step)

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
        row, data = self._find_layer(layer), self._memory.find(step).data
        return self.layout.histogram(data, row), self._edges(self.layout.floats(data)[row])

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
        row, records = self._find_layer(layer), self._memory.records
        counts = np.empty((len(records), self.bins.bins), dtype=np.int64)
        floats = np.empty((len(records), len(FLOATS)))
        for at, record in enumerate(records):
            counts[at] = self.layout.histogram(record.data, row)
            floats[at] = self.layout.floats(record.data)[row]
        return counts, self._edges(floats)

    def select(self, kind: str) -> History:
        """The rows of one kind, where ``watch(what=...)`` has recorded several.

        Args:
            kind: ``"grad"``, ``"param"``, ``"update"``, ``"activation"``, ``"unit"`` (the largest
                magnitude of each unit of an activation) or ``"grad_output"``.

        Returns:
            A new History of as many records and the same scalars, its layers named by their
            parameters or modules.

        Raises:
            KeyError: a kind that was not recorded.
        """
        columns = self._columns("select", kind)
        records = self.to_records()
        rows = [self.rows[column] for column in columns]
        chosen = with_columns(records, columns, rows, [row.name for row in rows])
        depth = None if self.depth is None else self.depth[columns]
        return History.from_records(replace(chosen, scalars=records.scalars.copy(), depth=depth))

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
        columns, now = self._columns("dead_units", UNIT), self.snapshot()
        return divide(now["zeros"][:, columns], now["numel"][:, columns])

    def quantization(self, name: str) -> dict[str, Array]:
        """What a narrow format would have done to each row, where ``watch(formats=...)`` asked.

        Args:
            name: one of `formats`.

        Returns:
            By the names of `QUANTIZATION_FIELDS`, each ``(S, L)``, as `gradstat.Quantization` has
            them: int64 for counts, 0 where a layer had no gradient; float64 for the others, NaN
            there, and for the peaks of units.

        Raises:
            KeyError: a format that was not measured.

        Example:
            >>> import torch, gradstat
            >>> model = torch.nn.Linear(64, 2)
            >>> with gradstat.watch(model, formats="mxfp4_e2m1") as w:
            ...     model(torch.ones(1, 64)).sum().backward()
            >>> w.history.quantization("mxfp4_e2m1")["error"]
            array([[0.]])
        """
        if name not in self.formats:
            raise KeyError(
                f"quantization() needs a format that was measured, one of "
                f"{', '.join(self.formats) or 'none'}; name is {name!r}"
            )
        at = self.formats.index(name)
        none = np.empty((0, len(self.layers), len(PACKED)))
        fields = np.concatenate([none, *(each.formats[:, :, at] for each in self.unpacked())])
        is_absent = np.isnan(fields[..., -1])
        values = unpacked(parse_format("quantization", name), fields)
        found: dict[str, Array] = {}
        for field in QUANTIZATION_FIELDS:
            found[field] = getattr(values, field).numpy().copy()
            if found[field].dtype == np.float64:
                found[field][is_absent] = np.nan
        return found

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
                records at its end is left out, with a RuntimeWarning. One that several ranks wrote
                is put together as by `merge`; a RuntimeWarning says which ranks it lacks.

        Returns:
            An equal History.

        Raises:
            FileNotFoundError: there is no such file; another OSError: it cannot be opened.
            ValueError: a damaged file, one that neither of them wrote, or a directory that lacks
                one.
        """
        return cls.from_records(rank_directories.read(Path(path)))

    def reduce(
        self, group: dist.ProcessGroup | None = None, *, replicated: bool | None = None
    ) -> History:
        """What all ranks of a distributed run measured, together; each of them must call it.

        Values that several ranks hold count once. A DTensor knows which: shards are put together
        and replicas are not, on one mesh or on several. Other gradients are the same on each rank
        when the optimizer steps, and during backward, as under DistributedDataParallel, each rank's
        own part of the batch; beside tensor parallelism alone they are the same on its mesh.

        Ranks that hold different layers, as pipeline stages do, are put together to all of them.
        Counts, min and max are exact; the variance follows Chan's formula. It takes four
        collectives, however many records there are, and memory for the histograms of all of them.

        Args:
            group: by default all ranks.
            replicated: whether gradients that are no DTensors are the same on each rank; by default
                ``True`` unless they were measured during backward. ``False`` also takes what
                several meshes hold, and what is partial, as each one's own.

        Returns:
            The same new History on each rank.

        Raises:
            ValueError: on each rank: other bins or steps elsewhere, histograms over other ranges,
                a layer that should be the same on several ranks and is not.
        """
        mine = told_of_replicas("reduce()", self.to_records(), replicated)
        return History.from_records(merge.merge(mine, group))

    @classmethod
    def merge(
        cls,
        parts: Sequence[History | str | os.PathLike[str]],
        *,
        replicated: bool | None = None,
    ) -> History:
        """What the ranks of a distributed run measured, together, as `reduce` puts it.

        It needs no process group. Where the ranks hold different layers, as pipeline stages do, it
        has all of them. Where some were ended earlier, it has the steps that all have, with a
        RuntimeWarning that says which are left out; another one says which ranks are lacking.

        Args:
            parts: of each rank its history, the file that `save` wrote, or the directory that
                ``watch(path=...)`` wrote; or one directory of them all. Files are read some records
                at a time.
            replicated: as for `reduce`.

        Returns:
            A new History.

        Raises:
            TypeError: what is none of these.
            ValueError: no parts, one rank or path twice, a merged run beside a rank, other bins,
                histograms over other ranges, a layer that should be the same on several ranks and
                is not; a damaged file.
            OSError: a file that cannot be opened.
        """
        if isinstance(parts, str | os.PathLike | History) or not isinstance(parts, Iterable):
            raise TypeError(
                f"History.merge() needs a list of ranks; parts is {type(parts).__name__}"
            )
        found: list[Records | Path] = []
        for at, part in enumerate(parts):
            if not isinstance(part, History | str | os.PathLike):
                raise TypeError(
                    f"History.merge() needs histories or paths; parts[{at}] is "
                    f"{type(part).__name__}"
                )
            found.append(part.to_records() if isinstance(part, History) else Path(part))
        if not found:
            raise ValueError("History.merge() needs one rank or more; parts is empty")
        return cls.from_records(rank_directories.merge_parts(found, replicated))

    def snapshot(self) -> History:
        """The same records, without those that are added later.

        One call on a history sees all its records as they are at one moment, also while another
        thread trains; several calls that are to see the same ones need this.

        Returns:
            Another History, which takes no copy of the records.
        """
        taken = copy.copy(self)
        taken.origins, taken._memory = self.origins.copy(), self._memory.snapshot()
        taken.placements = None if self.placements is None else self.placements.copy()
        taken._scalars = self._scalars.copy()
        return taken

    def unpacked(self, at: Sequence[int] | None = None) -> Iterator[Unpacked]:
        """Numbers of records as arrays, of some records at a time.

        Args:
            at: their positions; by default all.
        """
        records = self._memory.records
        return self._memory.unpacked(records if at is None else [records[each] for each in at])

    def to_records(self) -> Records:
        """All arrays, which are not to be changed, but for ``origins`` and ``layout``, copies."""
        records = self._memory.records
        integers, floats, formats, ends, bins, counts = self.layout.unpack(
            [record.data for record in records]
        )
        counts = counts.astype(np.int64) if counts.itemsize == 8 else counts
        return Records(
            self.rows,
            self.layers,
            self.bins,
            [record.step for record in records],
            np.array([record.time_s for record in records], dtype=np.float64),
            integers,
            floats,
            formats,
            SparseRows(np.diff(ends, prepend=0).astype(np.int32), bins, counts),
            self.origins.copy(),
            self._scalars,
            self.depth,
            self.partial_step,
            self.rank,
            self.world,
            None if self.placements is None else self.placements.copy(),
            formats=self.formats,
        )

    @classmethod
    def from_records(cls, records: Records) -> History:
        """A History of such arrays."""
        history = cls(records.rows, records.bins, formats=records.formats)
        history.layers = records.layers
        history.origins = records.origins
        sizes, bins, counts = records.counts.arrays()
        ends = np.cumsum(sizes, dtype=np.int64)
        numbers = records.integers, records.floats, records.quantized
        packed = history.layout.pack_all(Unpacked(*numbers, ends, bins, counts))
        kept = list(map(Record, records.steps, records.times.tolist(), packed))
        history._memory = Memory.of(history.layout, history.bins, kept)
        history._scalars, history.depth = records.scalars, records.depth
        history.partial_step = records.partial_step
        history.rank, history.world = records.rank, records.world
        history.placements = records.layout
        return history

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the records take."""
        return self._memory.nbytes + self._scalars.nbytes

    def _edges(self, floats: Array) -> Array:
        """Edges for rows of `FLOATS`."""
        ends = torch.from_numpy(floats[..., -2:].copy())
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
            raise KeyError(
                f"History needs a layer, {one_of(layer, self.layers)}; layer is {layer!r}"
            )
        return self.layers.index(layer)

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
