"""`History`: the record of a run, steps x layers, with a histogram for each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed as dist

from gradstat.bins import Bins
from gradstat.formats import Format, asked_formats, parse_format
from gradstat.history import ranks, reading
from gradstat.history.records import Records
from gradstat.ops import check_bins
from gradstat.record import FROM_THE_END, GRAD, KINDS, OF_OUTPUTS, PARAM, UNIT, UPDATE, Row
from gradstat.results import (
    DERIVED,
    FLOATS,
    INTEGERS,
    PACKED,
    QUANTIZATION_FIELDS,
    SHAPES,
    Statistics,
    union_norms,
    unpacked,
)
from gradstat.util import Array, as_path, check_integer, divide, one_of

if TYPE_CHECKING:
    import pandas

    from gradstat.diagnosis import Finding, Thresholds

_DENSE_BYTES = 4 << 20  # of histograms at a time

FIELDS = (*INTEGERS, *FLOATS, *DERIVED, *SHAPES)


class History(Records):
    """Statistics of L layers over S recorded steps.

    A layer without a gradient in a step has a row of NaN and of zero counts there. What was not
    recorded, be it a step, a layer, a kind, a format or a scalar, is a KeyError. Records are kept
    packed, histograms as their filled bins alone; numbers are made when they are read, and kept.

    Args:
        layers: L names.
        bins: scheme of every histogram.
        capacity: most records to keep, 2 or more: the first, the last, and between them every so
            many, evenly. Whenever it is full every other one is dropped.
        kinds: of what each layer is, by default gradients; see ``what`` of `gradstat.watch`.
        formats: names of narrow formats that are measured; see ``formats`` of `gradstat.watch`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a layer that is there twice, an unknown kind, a capacity below 2.

    Attributes:
        formats: their names.
        modules: type of each module whose output has a row, by its name.
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
        if not all(isinstance(each, str | Row) for each in layers):
            raise TypeError(f"History() needs the names of layers; layers is {layers!r:.80}")
        if kinds is None:
            kinds = [each.kind if isinstance(each, Row) else GRAD for each in layers]
        if len(kinds) != len(layers) or not set(KINDS).issuperset(kinds):
            raise ValueError(
                f"History() needs for each of {len(layers)} layers one of the kinds "
                f"{', '.join(KINDS)}; kinds is {kinds!r:.80}"
            )
        rows = [
            each if isinstance(each, Row) else Row.printed(kind, each)
            for kind, each in zip(kinds, layers, strict=True)
        ]
        if len(set(rows)) < len(rows):
            raise ValueError(f"History() needs each layer once; layers is {layers!r:.80}")
        if capacity is not None:
            capacity = check_integer("History", "capacity", capacity, 2)
        names = [each.name for each in asked_formats("History", formats)]
        super().__init__(rows, check_bins("History", bins), names, capacity)

    @classmethod
    def from_records(cls, records: Records) -> History:
        """A History of records as files have them, which it takes over."""
        history = cls.__new__(cls)
        history.__dict__.update(records.__dict__)
        return history

    @property
    def kinds(self) -> list[str]:
        """The kind of each layer."""
        return [row.kind for row in self.rows]

    def type_of(self, row: Row) -> str:
        """What is printed behind the name of a module: `` (ReLU)``; nothing of a parameter."""
        known = row.kind in OF_OUTPUTS and row.name in self.modules
        return f" ({self.modules[row.name]})" if known else ""

    def __repr__(self) -> str:
        """Size and bins."""
        return f"History({len(self)} steps, {len(self.layers)} layers, {self.bins})"

    def _repr_html_(self) -> str:
        """What a notebook shows: size, findings, the loss and a map of magnitudes."""
        from gradstat.report.notebook import fragment

        return fragment(self)

    def __getitem__(self, field: str) -> Array:
        """One field of `Statistics`, such as ``"mean"`` or ``"nan"``, at every step and layer.

        Returns:
            float64 or int64, shape ``(S, L)``; NaN (0 for a count) where a layer had no gradient.
        """
        if field not in FIELDS:
            raise KeyError(
                f"History[] needs one of {', '.join(FIELDS)}; got {field!r}: scalar() has what "
                f"w.log() has logged"
            )
        return self.column(field)

    @property
    def order(self) -> list[str]:
        """The layers of the first kind as a step comes to them, as `depth` tells.

        Gradients arrive from the last layer back; parameters and outputs begin with the first.
        """
        rows = first_rows(self)
        return rows[::-1] if self.kinds and self.kinds[0] in FROM_THE_END else rows

    def by_depth(self, columns: Array) -> Array:
        """Columns of rows of one kind, that of the row nearest to the input first."""
        if self.depth is None:
            return columns
        ordered: Array = columns[np.argsort(self.depth[columns], kind="stable")]
        return ordered

    @property
    def scalars(self) -> list[str]:
        """Names of what was logged at the steps beside their records, such as ``"loss"``."""
        return self.logged.names

    def scalar(self, name: str) -> tuple[Array, Array]:
        """What was logged under a name, one of `scalars`, at every step, recorded or not.

        Returns:
            steps, int64 ``(N,)``, which do not fall, and values, float64 ``(N,)``.
        """
        if name not in self.logged.names:
            raise KeyError(
                f"scalar() needs the name of what w.log() has logged, one of "
                f"{', '.join(self.scalars) or 'none'}; name is {name!r}"
            )
        return self.logged.get(name)

    def add_scalar(self, name: str, step: int, value: float) -> None:
        """Add a number that belongs to a step; all are kept, 16 bytes each, whatever the capacity.

        TypeError for what is no name, step or number, ValueError for a step below 0, or below that
        of the last value of this name.
        """
        if not isinstance(name, str) or not isinstance(value, Real):
            raise TypeError(f"add_scalar() needs a name and a number; they are {name!r}, {value!r}")
        self.logged.add(name, check_integer("add_scalar", "step", step, 0), float(value))

    def norm(self, kind: str = GRAD) -> Array:
        """L2 norm of all rows of a kind together: of the whole gradient, as clipping sees it.

        Non-finite elements and absent layers are left out.

        Returns:
            float64 ``(S,)``; NaN for a record without any of them.
        """
        l2 = self["l2"][:, self._columns("norm", kind)]
        known = ~np.isnan(l2)
        norm = union_norms(torch.from_numpy(np.where(known, l2, 0.0).T)).numpy()
        return np.where(known.any(1), norm, np.nan)

    def record(self, step: int = -1) -> Statistics:
        """Everything measured in one step.

        Args:
            step: a number in `steps`, or negative to count back from the newest.

        Returns:
            Statistics of shape ``(L,)``, on the CPU; it prints as a table of the rows.
        """
        found = self.layout.statistics(self.packed(self.find(step)).data, self.bins)
        names = [
            layer + self.type_of(row) for layer, row in zip(self.layers, self.rows, strict=True)
        ]
        return replace(found, names=tuple(names))

    def parts(self, step: int = -1) -> Iterator[tuple[slice, Statistics]]:
        """As `record`, some layers at a time, in memory for a few histograms; which, and theirs."""
        data, n_layers = self.packed(self.find(step)).data, len(self.layers)
        size = max(1, _DENSE_BYTES // (8 * self.bins.bins))
        for start in range(0, max(n_layers, 1), size):
            part = slice(start, min(start + size, n_layers))
            yield part, self.layout.statistics(data, self.bins, part)

    def histogram(self, layer: str, step: int = -1) -> tuple[Array, Array]:
        """Histogram of one layer, a name in `layers`, in one step, as for `record`.

        Returns:
            counts, int64 ``(bins,)``, and edges, float64 ``(bins + 1,)``.
        """
        row, data = self._find_layer(layer), self.packed(self.find(step)).data
        (found,) = self.layout.statistics(data, self.bins, slice(row, row + 1))
        return found.counts.numpy(), found.edges.numpy()

    def histograms(self, layer: str) -> tuple[Array, Array]:
        """Histogram of one layer, a name in `layers`, in every recorded step.

        Returns:
            counts, int64 ``(S, bins)``, and edges, float64, ``(bins + 1,)`` for `Log2Bins` and
            ``(S, bins + 1)`` for `LinearBins`.
        """
        row, records = self._find_layer(layer), self.records
        counts = np.empty((len(records), self.bins.bins), dtype=np.int64)
        ends = np.empty((2, len(records)))
        for at, record in enumerate(records):
            data = self.packed(record).data
            counts[at] = self.layout.dense(data, slice(row, row + 1))[0]
            ends[:, at] = self.layout.views(data)[1][row, -2:]
        return counts, self.bins.edges(*torch.from_numpy(ends)).numpy()

    def select(self, kind: str) -> History:
        """The rows of one kind, where ``watch(what=...)`` has recorded several.

        Args:
            kind: as for ``what`` of `gradstat.watch`, or ``"unit"``, the largest magnitude of each
                unit of an activation.

        Returns:
            A new History of as many records and the same scalars, its layers named by their
            parameters or modules.
        """
        columns = self._columns("select", kind)
        rows = [self.rows[column] for column in columns]
        chosen = self.take(columns, rows, [row.name for row in rows])
        chosen.depth = None if self.depth is None else self.depth[columns]
        chosen.logged = self.logged.between()
        return chosen

    def update_ratio(self) -> Array:
        """How large a step's change of the weights was, as a share of them.

        Returns:
            The rms of ``update`` over that of ``param``: float64 ``(S, L)``, for the layers of
            ``select("update")``; infinite for weights of zero that changed.
        """
        update, weight = (self._columns("update_ratio", kind) for kind in (UPDATE, PARAM))
        rms = self["rms"]
        with np.errstate(all="ignore"):
            ratio: Array = rms[:, update] / rms[:, weight]
        return ratio

    def dead_units(self) -> Array:
        """The share of each module's units whose output was zero all through a record.

        Returns:
            float64 ``(S, L)``, for the layers of ``select("unit")``, which are those of
            ``select("activation")``.
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
        fields = np.concatenate([none, *(each[2][:, :, at] for each in self.numbers())])
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

        As of all methods that write a file, one that is there is replaced, and OSError says that it
        cannot be written.
        """
        reading.save(as_path("History.save", path), self.snapshot())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what `save` wrote, or what ``watch(path=...)`` has written so far.

        Args:
            path: the file or the directory. Of a directory whose last file is cut off, the block of
                records at its end is left out, with a RuntimeWarning. One that several ranks wrote
                is put together as by `merge`; a RuntimeWarning says which ranks it lacks.

        Raises:
            FileNotFoundError: there is no such file; another OSError: it cannot be opened.
            ValueError: a damaged file, one that neither of them wrote, or a directory that lacks
                one.

        Records of a large directory are read when their numbers are, and so is their damage found;
        its files are to stay as they are meanwhile. What several ranks hold together is kept in a
        temporary file, beyond 32 MB, for as long as the History is there.
        """
        return cls.from_records(ranks.load(as_path("History.load", path)))

    def reduce(
        self, group: dist.ProcessGroup | None = None, *, replicated: bool | None = None
    ) -> History:
        """What all ranks of a distributed run measured, together, on each; all must call it.

        Values that several ranks hold count once. A DTensor knows which: shards are put together
        and replicas are not, on one mesh or on several. Other gradients are the same on each rank
        when the optimizer steps, and during backward, as under DistributedDataParallel, each rank's
        own part of the batch; beside tensor parallelism alone they are the same on its mesh.

        Ranks that hold different layers, as pipeline stages do, are put together to all of them.
        Counts, min and max are exact; the variance follows Chan's formula. Each rank
        gets the records of all ranks, some steps at a time, and puts them together.

        Args:
            group: by default all ranks.
            replicated: whether gradients that are no DTensors are the same on each rank; by default
                ``True`` unless they were measured during backward. ``False`` also takes what
                several meshes hold, and what is partial, as each one's own.

        Raises:
            ValueError: on each rank: other bins or steps elsewhere, histograms over other ranges,
                a layer that should be the same on several ranks and is not.
        """
        return History.from_records(ranks.reduce(self.snapshot(), group, replicated))

    @classmethod
    def merge(
        cls, parts: Sequence[History | str | os.PathLike[str]], *, replicated: bool | None = None
    ) -> History:
        """What the ranks of a distributed run measured, together, as `reduce` puts it.

        It needs no process group. Where some ranks were ended earlier, it has the steps that all
        have, with a RuntimeWarning that says which are left out; another one says which ranks are
        lacking.

        Args:
            parts: of each rank its history, the file that `save` wrote, or the directory that
                ``watch(path=...)`` wrote; or one directory of them all. Files are read some records
                at a time.
            replicated: as for `reduce`.

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
            found.append(part.snapshot() if isinstance(part, History) else Path(part))
        if not found:
            raise ValueError("History.merge() needs one rank or more; parts is empty")
        return cls.from_records(ranks.merge_parts(found, replicated))

    def _columns(self, function: str, kind: str) -> Array:
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

        By default the thresholds are those that healthy runs stay within. ValueError where there
        are no records. ``docs/reading.md`` describes the findings.
        """
        from gradstat.diagnosis import diagnose

        return diagnose(self, thresholds)

    def to_pandas(self) -> pandas.DataFrame:
        """Make a table: a row for each step, kind and layer, with every field and the histogram.

        Its columns are those of `gradstat.tables`. ImportError where pandas is not installed.
        """
        from gradstat.tables import to_pandas

        return to_pandas(self)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write that table to a Parquet file; ImportError where pyarrow is not installed."""
        from gradstat.tables import to_parquet

        to_parquet(self, path)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write that table to a CSV file, lists as JSON."""
        from gradstat.tables import to_csv

        to_csv(self, path)

    def report(self, path: str | os.PathLike[str], *, title: str = "Gradients") -> None:
        """Write a page to look around in: findings, a map, every layer's distribution over time.

        One file of HTML under that title, which needs neither a network nor a server. TypeError for
        a title that is no text, ValueError where there are no records.
        """
        from gradstat.report.page import write

        write(self, path, title=title)


def check_history(function: str, history: History, name: str = "history") -> History:
    """Refuse what is no single History with records; return those that it has now."""
    if not isinstance(history, History):
        raise TypeError(f"{function}() needs a History; {name} is {type(history).__name__}")
    if len(history) == 0 or not history.layers:
        raise ValueError(f"{function}() needs a History with records; {name} is {history!r}")
    return history.snapshot()


def first_rows(history: History) -> list[str]:
    """Names of the rows of a history's first kind, gradients where they were recorded, by depth."""
    columns = np.flatnonzero(np.array(history.kinds) == history.kinds[:1])
    return [history.layers[at] for at in history.by_depth(columns)]
