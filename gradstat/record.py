"""What a row of a record is of, who holds it, and the one layout of a record, from engine to file.

A record is a step, a time and one block of bytes. Engines write the bytes, and history, journal and
file hand them on as they are. They are unpacked where parts of a record or ranks are put together,
and when numbers are read.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, zip_longest
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from gradstat.bins import Bins
from gradstat.results import (
    FLOATS,
    INTEGERS,
    PACKED,
    Statistics,
    as_statistics,
    union_floats,
    union_packed,
)
from gradstat.util import Array

GRAD, PARAM, UPDATE = "grad", "param", "update"
ACTIVATION, UNIT, GRAD_OUTPUT = "activation", "unit", "grad_output"

# In the order of a record's rows.
KINDS = (GRAD, PARAM, UPDATE, ACTIVATION, UNIT, GRAD_OUTPUT)

# What a parameter has, and what a module's output has.
OF_PARAMETERS = (GRAD, PARAM, UPDATE)
OF_OUTPUTS = (ACTIVATION, UNIT, GRAD_OUTPUT)

# What a value of each kind is called.
NOUNS = {
    GRAD: "gradient",
    PARAM: "parameter",
    UPDATE: "update",
    ACTIVATION: "activation",
    UNIT: "unit peak",
    GRAD_OUTPUT: "output gradient",
}

# What backward computes, the last layer first.
FROM_THE_END = (GRAD, GRAD_OUTPUT)


class Row(NamedTuple):
    """What a row of a record is of."""

    kind: str  # one of `KINDS`
    name: str  # of the parameter or module that has values of that kind

    def __str__(self) -> str:
        """The row as it is printed: a gradient by its parameter's name, others after their kind."""
        return self.name if self.kind == GRAD else f"{self.kind}/{self.name}"

    @classmethod
    def printed(cls, kind: str, text: str) -> Row:
        """The row of a kind that is printed so."""
        return cls(kind, text if kind == GRAD else text.removeprefix(f"{kind}/"))


# Owners that are no rank: values are this rank's alone, or the same on each rank.
OWN, SAME = -1, -2
# Shards without a number: nothing is known of them, or they are of a sum that was not taken.
UNKNOWN, PARTIAL = -1, -2


class Placement(NamedTuple):
    """Which part of which tensor a rank holds of a row, and who holds the same."""

    owner: int = OWN  # the first rank that holds the same values, `OWN` or `SAME`
    # Number of the shard, from 0, and how many there are, of a DTensor: replicas on one mesh or on
    # several have the same. `UNKNOWN` or `PARTIAL` in its place.
    shard: tuple[int, int] = (UNKNOWN, UNKNOWN)
    shape: tuple[int, ...] = ()  # of the whole tensor, where the shard is known

    def replica(self, *, is_of_output: bool) -> Hashable:
        """What ranks that hold the same values have in common; ``None``: they are its own alone."""
        if self.owner < 0 or self.shard[0] == UNKNOWN:
            return None if self.owner == OWN else self.owner
        if is_of_output:
            # Those of another mesh are of another batch.
            return None if self.shard[0] == PARTIAL else self.owner
        # Another mesh may hold the same, as FSDP does outside the plan of tensor parallelism.
        return (self.shape, *self.shard)


# Integers, floats and formats of records.
Numbers: TypeAlias = tuple[Array, Array, Array]

_ALIGNMENT = 8
_SUMMED_ROWS = 2048  # that are dense at a time
_WIDE = 1 << 32  # elements of a row from which on counts need 8 bytes


class Record(NamedTuple):
    """One record of L rows."""

    step: int
    time_s: float  # when it was recorded, in seconds since 1970; NaN if unknown
    data: bytes  # its numbers, in the order of a `RecordLayout`

    @property
    def n_bytes(self) -> int:
        """Of its numbers."""
        return len(self.data)


@dataclass(frozen=True)
class RecordLayout:
    """Where the numbers of a record are in its bytes."""

    # docs/format.md describes it. ``pack_rows`` in ``engines/cpu/work.py`` makes the same bytes of
    # what an engine has measured.

    n_rows: int  # L
    n_formats: int  # F
    n_bins: int  # of each histogram

    @cached_property
    def fixed(self) -> np.dtype[np.void]:
        """What each record begins with, before the numbers of the filled bins."""
        n = self.n_rows
        return np.dtype(
            [
                ("integers", "<i8", (n, len(INTEGERS))),
                ("floats", "<f8", (n, len(FLOATS))),
                ("formats", "<f8", (n, self.n_formats, len(PACKED))),
                ("ends", "<u4", (n + n % 2,)),
            ]
        )

    @cached_property
    def bin_type(self) -> np.dtype[np.unsignedinteger]:
        """Of the numbers of filled bins."""
        return np.dtype("<u2" if self.n_bins <= 1 << 16 else "<u4")

    def fits(self, data: bytes) -> bool:
        """Whether bytes are as many as a record of this layout has."""
        if len(data) < self.fixed.itemsize:
            return False
        _, n, counts = self._ends(data)
        return len(data) == self._counts_at(n) + _padded(counts.itemsize * n)

    def views(self, data: bytes) -> Numbers:
        """Integers, floats and formats of a record, as `Unpacked` has them, without S: views."""
        fixed = self._fixed(data)[0]
        return fixed["integers"], fixed["floats"], fixed["formats"]

    def entries(self, data: bytes) -> tuple[Array, Array, Array]:
        """Where the filled bins of each row end, their numbers and their counts: views."""
        ends, n, counts = self._ends(data)
        bins = np.frombuffer(data, self.bin_type, n, self.fixed.itemsize)
        return ends, bins, np.frombuffer(data, counts, n, self._counts_at(n))

    def dense(self, data: bytes, rows: slice = slice(None)) -> Array:
        """Histograms of rows that follow each other, by default of all: int64 ``(n, bins)``."""
        ends, bins, counts = self.entries(data)
        start, stop, _ = rows.indices(self.n_rows)
        edges = np.append(ends[start - 1] if start else 0, ends[start:stop]).astype(np.int64)
        part = slice(edges[0], edges[-1])
        dense = np.zeros((len(edges) - 1, self.n_bins), np.int64)
        dense[np.repeat(np.arange(len(dense)), np.diff(edges)), bins[part]] = counts[part]
        return dense

    def statistics(self, data: bytes, bins: Bins, rows: slice = slice(None)) -> Statistics:
        """Rows that follow each other, by default all: copies, on the CPU."""
        integers, floats = (x[rows].copy() for x in self.views(data)[:2])
        return as_statistics(bins, (integers, floats, self.dense(data, rows)))

    def pack(self, integers: Array, floats: Array, formats: Array | None, counts: Array) -> bytes:
        """The bytes of a record; counts are int64 ``(L, bins)``, empty bins among them."""
        # The other numbers are as in `Unpacked`; ``None`` stands for no formats.
        # NumPy finds what is not zero several times faster in one dimension and among booleans.
        at = np.flatnonzero((counts != 0).ravel())
        rows, bins = np.divmod(at, self.n_bins)
        ends = np.searchsorted(rows, np.arange(self.n_rows), side="right")
        if formats is None:
            formats = np.empty((self.n_rows, 0, len(PACKED)))
        numbers = integers[None], floats[None], formats[None]
        return self.pack_all(Unpacked(*numbers, ends, bins, counts.ravel()[at]))[0]

    def pack_all(self, records: Unpacked) -> list[bytes]:
        """The bytes of each of several records."""
        packed, start = [], 0
        ends = records.ends.reshape(len(records.integers), self.n_rows)
        for integers, floats, formats, its_ends in zip(*records[:3], ends, strict=True):
            stop = int(its_ends[-1]) if self.n_rows else start
            fixed = np.zeros(1, self.fixed)
            fixed["integers"], fixed["floats"], fixed["formats"] = integers, floats, formats
            fixed["ends"][0, : self.n_rows] = its_ends - start
            bins, counts = (each[start:stop] for each in (records.bins, records.counts))
            parts = bins.astype(self.bin_type), counts.astype(self._count_type(integers))
            padded = (part.tobytes() + bytes(-part.nbytes % _ALIGNMENT) for part in parts)
            packed.append(b"".join([fixed.tobytes(), *padded]))
            start = stop
        return packed

    def unpack(self, records: Sequence[bytes]) -> Unpacked:
        """Numbers of several records."""
        fixed, entries = self._joined(records), [self.entries(data)[1:] for data in records]
        starts = np.cumsum([0, *(len(bins) for bins, _ in entries)])[:-1]
        ends = fixed["ends"][:, : self.n_rows] + starts[:, None]
        empty = np.empty(0, self.bin_type), np.empty(0, "<u4")
        bins, counts = (np.concatenate(each) for each in zip(empty, *entries, strict=True))
        numbers = fixed["integers"], fixed["floats"], fixed["formats"]
        return Unpacked(*numbers, ends.ravel(), bins, counts)

    def numbers(self, records: Sequence[bytes]) -> Numbers:
        """Integers, floats and formats of several records, whose `fixed` bytes are enough."""
        fixed = self._joined(records)
        return fixed["integers"], fixed["floats"], fixed["formats"]

    def _joined(self, records: Sequence[bytes]) -> Array:
        # In memory that may be changed.
        joined = bytearray().join([data[: self.fixed.itemsize] for data in records])
        return self._fixed(joined, len(records))

    def _fixed(self, data: bytes | bytearray, n: int = 1) -> Array:
        # As numpy.frombuffer(), which takes no type without bytes: that of a run without rows.
        return np.ndarray(n, self.fixed, data)

    def assemble(
        self, parts: Sequence[tuple[Sequence[int], bytes]], joins: Sequence[int] = ()
    ) -> bytes:
        """One record of several that have some of its rows each: these rows, and their bytes."""
        # A row that never comes has no values. Of one that comes several times the last one counts,
        # but those that join are counted together.
        # Those of as many rows have one layout, and are unpacked together.
        alike: dict[int, list[int]] = {}
        for at, (rows, _) in enumerate(parts):
            alike.setdefault(len(rows), []).append(at)
        unpacked, starts, start = [], [0] * len(parts), 0
        for n, places in alike.items():
            layout = replace(self, n_rows=n)
            unpacked.append(layout.unpack([parts[at][1] for at in places]))
            for at in places:
                starts[at], start = start, start + n
        whole, source = _side_by_side(unpacked), np.full(self.n_rows, -1)
        joined: dict[int, list[int]] = {row: [] for row in joins}
        for (rows, _), first in zip(parts, starts, strict=True):
            source[list(rows)] = np.arange(first, first + len(rows))
            for at, row in enumerate(rows, first):
                if row in joined:
                    joined[row].append(at)
        if joined:
            turns = zip_longest(*joined.values(), fillvalue=-1)
            together = union([whole.take(np.array(turn)) for turn in turns], self.n_bins)
            source[list(joined)] = np.arange(start, start + len(joined))
            whole = _side_by_side([whole, together])
        return self.pack_all(whole.take(source))[0]

    def _ends(self, data: bytes) -> tuple[Array, int, np.dtype[np.unsignedinteger]]:
        """Where the filled bins of each row end, how many there are, and the type of counts."""
        fixed = self._fixed(data)
        ends = fixed["ends"][0, : self.n_rows]
        n = int(ends[-1]) if self.n_rows else 0
        return ends, n, self._count_type(fixed["integers"][0])

    def _counts_at(self, n_entries: int) -> int:
        return self.fixed.itemsize + _padded(self.bin_type.itemsize * n_entries)

    def _count_type(self, integers: Array) -> np.dtype[np.unsignedinteger]:
        return np.dtype("<u8" if integers[:, 0].max(initial=0) >= _WIDE else "<u4")


class Unpacked(NamedTuple):
    """Numbers of S records of L rows as arrays, which are not to be changed."""

    integers: Array  # int64 (S, L, 8), as `gradstat.results.INTEGERS`
    floats: Array  # float64 (S, L, 8), as `gradstat.results.FLOATS`
    formats: Array  # float64 (S, L, F, 10), as `gradstat.results.PACKED`
    ends: Array  # int64 (S L,), where the filled bins of each row of each record end
    bins: Array  # numbers of the filled bins, (E,), which rise within a row
    counts: Array  # their counts, (E,)

    @property
    def sizes(self) -> Array:
        """How many filled bins each row of each record has: int64 ``(S L,)``."""
        return np.diff(self.ends, prepend=0)

    def edges(self, bins: Bins) -> Array:
        """Lower and upper edge of each filled bin: float64 ``(E, 2)``."""
        ranges = self.floats.reshape(-1, len(FLOATS))[:, FLOATS.index("low") :]
        low, high = torch.from_numpy(np.repeat(ranges, self.sizes, axis=0)).T
        at = torch.from_numpy(self.bins.astype(np.int64))[:, None] + torch.arange(2)
        edges: Array = bins.edges(low, high, at).numpy()
        return edges

    def take(self, columns: Array) -> Unpacked:
        """Other rows of each record, by their numbers; -1 stands for a row without values."""
        n_records, n_rows = self.integers.shape[:2]
        rows = np.arange(n_records)[:, None] * n_rows + columns
        sizes, bins, counts = self.histograms(np.where(columns < 0, -1, rows).ravel())
        return Unpacked(*taken(self[:3], columns), np.cumsum(sizes), bins, counts)

    def histograms(self, rows: Array) -> tuple[Array, Array, Array]:
        """How many filled bins some of the S L rows have, their numbers and their counts."""
        # The rows are given by their numbers; -1 stands for one without any.
        ends = np.append(self.ends, 0)
        sizes = np.append(self.sizes, 0)[rows]
        starts = ends[rows] - np.cumsum(sizes)  # of each row's entries here, less that there
        entries = np.repeat(starts, sizes) + np.arange(sizes.sum())
        return sizes, self.bins[entries], self.counts[entries]


def union(parts: Sequence[Unpacked], n_bins: int) -> Unpacked:
    """The same rows of the same records of one or several parts, over the same ranges, together."""
    integers, floats, formats = (
        torch.from_numpy(np.stack(each)) for each in list(zip(*parts, strict=True))[:3]
    )
    return Unpacked(
        integers.sum(0).numpy(),
        union_floats(integers, floats).numpy(),
        union_packed(formats).numpy(),
        *_summed(parts, n_bins),
    )


def _summed(parts: Sequence[Unpacked], n_bins: int) -> tuple[Array, Array, Array]:
    """Histograms of rows added up: ends, numbers of filled bins and counts."""
    n_rows = len(parts[0].ends)
    edges = [np.append(0, part.ends) for part in parts]
    used = np.zeros(n_bins, bool)
    for part in parts:
        used[part.bins] = True
    # Most bins are empty in all rows, and have no place.
    columns, place = np.flatnonzero(used), np.cumsum(used) - 1
    empty = np.empty(0, np.int64)
    found = [(empty, empty, empty)]
    # In memory for some of them, dense.
    for start in range(0, n_rows, _SUMMED_ROWS):
        stop = min(start + _SUMMED_ROWS, n_rows)
        starts = np.arange(stop - start) * len(columns)
        dense = np.zeros(len(starts) * len(columns), np.int64)
        for part, edge in zip(parts, edges, strict=True):
            entries = slice(edge[start], edge[stop])
            rows = np.repeat(starts, np.diff(edge[start : stop + 1]))
            # No bin comes twice in a row.
            dense[place[part.bins[entries]] + rows] += part.counts[entries].astype(np.int64)
        at = np.flatnonzero(dense)
        sizes = np.bincount(at // max(1, len(columns)), minlength=len(starts))
        found.append((sizes, columns[at - np.repeat(starts, sizes)], dense[at]))
    sizes, bins, counts = (np.concatenate(each) for each in zip(*found, strict=True))
    return np.cumsum(sizes), bins, counts


def _side_by_side(parts: Sequence[Unpacked]) -> Unpacked:
    """The rows of all records of all parts as one record."""
    starts = np.cumsum([0, *(len(part.bins) for part in parts)])
    ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
    integers, floats, formats, _, bins, counts = zip(*parts, strict=True)
    return Unpacked(
        # (S, L, ...) of each part as (1, all rows, ...).
        *(np.concatenate([*chain(*each)])[None] for each in (integers, floats, formats)),
        *(np.concatenate(each) for each in (ends, bins, counts)),
    )


def taken(numbers: Numbers, columns: Array) -> Numbers:
    """Some rows of integers, floats and formats by their numbers; -1 stands for an absent one."""
    has, (integers, floats, formats) = columns >= 0, numbers
    found = []
    for x, absent in ((integers, 0), (floats, np.nan), (formats, np.nan)):
        rows = np.full((len(x), len(columns), *x.shape[2:]), absent, x.dtype)
        rows[:, has] = x[:, columns[has]]
        found.append(rows)
    return found[0], found[1], found[2]


def _padded(n_bytes: int) -> int:
    return n_bytes + -n_bytes % _ALIGNMENT
