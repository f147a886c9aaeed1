"""What a row of a record is of, and the one layout of a record, from the engine to the file.

A record is a step, a time and one block of bytes. Engines write it, and history, journal, file and
merging hand it on as it is; it is unpacked when its numbers are read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from gradstat.bins import Bins
from gradstat.results import FLOATS, INTEGERS, PACKED, Statistics, union_floats, union_packed
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
    """What a row of a record is of.

    Args:
        kind: one of `KINDS`.
        name: of the parameter or module that has values of that kind.
    """

    kind: str
    name: str

    def __str__(self) -> str:
        """The row as it is printed: a gradient by its parameter's name, others after their kind."""
        return self.name if self.kind == GRAD else f"{self.kind}/{self.name}"

    @classmethod
    def printed(cls, kind: str, text: str) -> Row:
        """The row of a kind that is printed so."""
        return cls(kind, text if kind == GRAD else text.removeprefix(f"{kind}/"))


# The bytes of a record: its own, or a part of a file that is mapped.
Data: TypeAlias = bytes | memoryview

_ALIGNMENT = 8
_SUMMED_ROWS = 2048  # that are dense at a time
_WIDE = 1 << 32  # elements of a row from which on counts need 8 bytes
_LAST_END = struct.Struct("<I")


class Record(NamedTuple):
    """One record of L rows.

    Args:
        step: its number.
        time_s: when it was recorded, in seconds since 1970; NaN if unknown.
        data: its numbers, in the order of a `RecordLayout`.
    """

    step: int
    time_s: float
    data: Data

    @property
    def n_bytes(self) -> int:
        """Of its numbers."""
        return len(self.data)

    def head(self, n_bytes: int) -> Data:
        """The first bytes of its numbers."""
        return self.data[:n_bytes]

    @property
    def is_checked(self) -> bool:
        """Whether its numbers are known to be plausible."""
        return True


@dataclass(frozen=True)
class RecordLayout:
    """Where the numbers of a record are in its bytes.

    They are little-endian, in this order, each part padded with zeros to 8 bytes: integers, int64
    ``(L, 8)``; floats, float64 ``(L, 8)``; formats, float64 ``(L, F, 10)``; ends, uint32 ``(L,)``,
    where the filled bins of each row end; their numbers, uint16, or uint32 of more than 65,536
    bins; their counts, uint32, or uint64 where a row has 2**32 elements or more. A row without
    values has zeros, NaN and no filled bin.

    Args:
        n_rows: L.
        n_formats: F.
        n_bins: bins of each histogram.
    """

    n_rows: int
    n_formats: int
    n_bins: int

    @cached_property
    def _floats_at(self) -> int:
        return 8 * len(INTEGERS) * self.n_rows

    @cached_property
    def _formats_at(self) -> int:
        return self._floats_at + 8 * len(FLOATS) * self.n_rows

    @cached_property
    def _ends_at(self) -> int:
        return self._formats_at + 8 * len(PACKED) * self.n_formats * self.n_rows

    @cached_property
    def n_fixed(self) -> int:
        """Bytes before the numbers of the filled bins, the same in each record."""
        return self._ends_at + _padded(4 * self.n_rows)

    @cached_property
    def bin_type(self) -> np.dtype[np.unsignedinteger]:
        """Of the numbers of filled bins."""
        return np.dtype("<u2" if self.n_bins <= 1 << 16 else "<u4")

    def fits(self, data: Data) -> bool:
        """Whether bytes are as many as a record of this layout has."""
        if len(data) < self.n_fixed:
            return False
        n, counts = self._n_entries(data), self._count_type(self.integers(data))
        return len(data) == self._counts_at(n) + _padded(counts.itemsize * n)

    def integers(self, data: Data) -> Array:
        """Integers of a record: int64 ``(L, 8)``, a view."""
        flat = np.frombuffer(data, "<i8", len(INTEGERS) * self.n_rows)
        return flat.reshape(self.n_rows, len(INTEGERS))

    def floats(self, data: Data) -> Array:
        """Floats of a record: float64 ``(L, 8)``, a view."""
        flat = np.frombuffer(data, "<f8", len(FLOATS) * self.n_rows, self._floats_at)
        return flat.reshape(self.n_rows, len(FLOATS))

    def formats(self, data: Data) -> Array:
        """What formats would do to each row: float64 ``(L, F, 10)``, a view."""
        shape = self.n_rows, self.n_formats, len(PACKED)
        flat = np.frombuffer(data, "<f8", math.prod(shape), self._formats_at)
        return flat.reshape(shape)

    def entries(self, data: Data) -> tuple[Array, Array, Array]:
        """Where the filled bins of each row end, their numbers and their counts: views."""
        n, counts = self._n_entries(data), self._count_type(self.integers(data))
        return (
            np.frombuffer(data, "<u4", self.n_rows, self._ends_at),
            np.frombuffer(data, self.bin_type, n, self.n_fixed),
            np.frombuffer(data, counts, n, self._counts_at(n)),
        )

    def histogram(self, data: Data, row: int) -> Array:
        """Histogram of one row: int64 ``(bins,)``."""
        histogram: Array = self.dense(data, slice(row, row + 1))[0]
        return histogram

    def dense(self, data: Data, rows: slice = slice(None)) -> Array:
        """Histograms of rows that follow each other, by default of all: int64 ``(n, bins)``."""
        ends, bins, counts = self.entries(data)
        start, stop, _ = rows.indices(self.n_rows)
        edges = np.append(ends[start - 1] if start else 0, ends[start:stop]).astype(np.int64)
        part = slice(edges[0], edges[-1])
        dense = np.zeros((len(edges) - 1, self.n_bins), np.int64)
        dense[np.repeat(np.arange(len(dense)), np.diff(edges)), bins[part]] = counts[part]
        return dense

    def statistics(self, data: Data, bins: Bins, rows: slice = slice(None)) -> Statistics:
        """Rows that follow each other, by default all: copies, on the CPU."""
        numbers = self.integers(data)[rows].copy(), self.floats(data)[rows].copy()
        return Statistics(bins, *map(torch.from_numpy, (*numbers, self.dense(data, rows))))

    def pack(self, integers: Array, floats: Array, formats: Array | None, counts: Array) -> bytes:
        """The bytes of a record.

        Args:
            integers: int64 ``(L, 8)``.
            floats: float64 ``(L, 8)``.
            formats: float64 ``(L, F, 10)``; ``None`` without any.
            counts: int64 ``(L, bins)``.
        """
        # Most columns are zero in all rows, and need not be looked at twice.
        used = np.flatnonzero(np.bitwise_or.reduce(counts, axis=0))
        part = counts.take(used, axis=1)
        # NumPy finds what is not zero several times faster in one dimension and among booleans.
        filled = part != 0
        at = np.flatnonzero(filled.ravel())
        ends = np.cumsum(np.count_nonzero(filled, axis=1))
        bins = used[at % max(1, len(used))]
        if formats is None:
            formats = np.empty((self.n_rows, 0, len(PACKED)))
        numbers = integers[None], floats[None], formats[None]
        return self.pack_all(Unpacked(*numbers, ends, bins, part.ravel()[at]))[0]

    def pack_all(self, records: Unpacked) -> list[bytes]:
        """The bytes of each of several records."""
        packed, start = [], 0
        ends = records.ends.reshape(len(records.integers), self.n_rows)
        for integers, floats, formats, its_ends in zip(*records[:3], ends, strict=True):
            stop = int(its_ends[-1]) if self.n_rows else start
            parts = (
                (integers, "<i8"),
                (floats, "<f8"),
                (formats, "<f8"),
                (its_ends - start, "<u4"),
                (records.bins[start:stop], self.bin_type),
                (records.counts[start:stop], self._count_type(integers)),
            )
            packed.append(b"".join([_bytes_of(array, dtype) for array, dtype in parts]))
            start = stop
        return packed

    def unpack(self, records: Sequence[Data]) -> Unpacked:
        """Numbers of several records."""
        fixed, integers, floats, formats = self._fixed(records)
        ends = self._part(fixed, self._ends_at, "<u4", self.n_rows).astype(np.int64)
        return Unpacked(integers, floats, formats, *self._entries_of(records, ends))

    def numbers(self, records: Sequence[Data]) -> tuple[Array, Array, Array]:
        """Integers, floats and formats of several records, of which `n_fixed` bytes are enough."""
        return self._fixed(records)[1:]

    def _fixed(self, records: Sequence[Data]) -> tuple[Array, Array, Array, Array]:
        n, size = len(records), self.n_fixed
        # In memory that may be changed.
        joined = bytearray().join([data[:size] for data in records])
        fixed = np.frombuffer(joined, np.uint8, n * size).reshape(n, size)
        return (
            fixed,
            self._part(fixed, 0, "<i8", self.n_rows, len(INTEGERS)),
            self._part(fixed, self._floats_at, "<f8", self.n_rows, len(FLOATS)),
            self._part(fixed, self._formats_at, "<f8", self.n_rows, self.n_formats, len(PACKED)),
        )

    @staticmethod
    def _part(fixed: Array, start: int, dtype: str, *shape: int) -> Array:
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        return fixed[:, start : start + n_bytes].view(dtype).reshape(len(fixed), *shape)

    def assemble(self, parts: Sequence[tuple[Sequence[int], RecordLayout, Data]]) -> bytes:
        """One record of several that have some of its rows each.

        Args:
            parts: of each the rows that it has, its layout and its bytes. The last row of those
                that come several times counts; one that never comes has no values.
        """
        source, start = np.full(self.n_rows, -1), 0
        for rows, _, _ in parts:
            source[list(rows)] = np.arange(start, start + len(rows))
            start += len(rows)
        together = _side_by_side([layout.unpack([data]) for _, layout, data in parts])
        return self.pack_all(together.take(source))[0]

    def _entries_of(self, records: Sequence[Data], ends: Array) -> tuple[Array, Array, Array]:
        """Filled bins of records, one after the other, and where those of each row end."""
        entries = [self.entries(data)[1:] for data in records]
        starts = np.cumsum([0, *(len(bins) for bins, _ in entries)])[:-1]
        empty = np.empty(0, self.bin_type), np.empty(0, "<u4")
        bins, counts = (np.concatenate(each) for each in zip(empty, *entries, strict=True))
        return (ends + starts[:, None]).ravel(), bins, counts

    def _n_entries(self, data: Data) -> int:
        if not self.n_rows:
            return 0
        (n,) = _LAST_END.unpack_from(data, self._ends_at + 4 * (self.n_rows - 1))
        return int(n)

    def _counts_at(self, n_entries: int) -> int:
        return self.n_fixed + _padded(self.bin_type.itemsize * n_entries)

    def _count_type(self, integers: Array) -> np.dtype[np.unsignedinteger]:
        return np.dtype("<u8" if integers[:, 0].max(initial=0) >= _WIDE else "<u4")


class Unpacked(NamedTuple):
    """Numbers of S records of L rows as arrays, which are not to be changed.

    Args:
        integers: int64 ``(S, L, 8)``, as `gradstat.results.INTEGERS`.
        floats: float64 ``(S, L, 8)``, as `gradstat.results.FLOATS`.
        formats: float64 ``(S, L, F, 10)``, as `gradstat.results.PACKED`.
        ends: int64 ``(S L,)``, where the filled bins of each row of each record end.
        bins: numbers of the filled bins, ``(E,)``, which rise within a row.
        counts: their counts, ``(E,)``.
    """

    integers: Array
    floats: Array
    formats: Array
    ends: Array
    bins: Array
    counts: Array

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
        """Other rows of each record, by their numbers; -1 stands for a row without values.

        Args:
            columns: int64 ``(M,)``.
        """
        n_records, n_rows = self.integers.shape[:2]
        rows = np.arange(n_records)[:, None] * n_rows + columns
        sizes, bins, counts = self.histograms(np.where(columns < 0, -1, rows).ravel())
        return Unpacked(
            taken(self.integers, columns, 0),
            taken(self.floats, columns, np.nan),
            taken(self.formats, columns, np.nan),
            np.cumsum(sizes),
            bins,
            counts,
        )

    def histograms(self, rows: Array) -> tuple[Array, Array, Array]:
        """The filled bins of some rows of all records.

        Args:
            rows: numbers of N of the S L rows, int64 ``(N,)``; -1 stands for one without any.

        Returns:
            How many each has, int64 ``(N,)``, their numbers and their counts.
        """
        ends = np.append(self.ends, 0)
        sizes = np.append(self.sizes, 0)[rows]
        starts = ends[rows] - np.cumsum(sizes)  # of each row's entries here, less that there
        entries = np.repeat(starts, sizes) + np.arange(sizes.sum())
        return sizes, self.bins[entries], self.counts[entries]


def union(parts: Sequence[Unpacked], n_bins: int) -> Unpacked:
    """The same rows of the same records of several parts together.

    Args:
        parts: one at least, of as many records and rows each, over the same ranges.
        n_bins: of each histogram.
    """
    integers, floats, formats = (
        torch.from_numpy(np.stack(each)) for each in list(zip(*parts, strict=True))[:3]
    )
    return Unpacked(
        integers.sum(0).numpy(),
        union_floats(integers, floats).numpy(),
        union_packed(formats).numpy(),
        *_summed([(part.sizes, part.bins, part.counts) for part in parts], n_bins),
    )


_Histograms = tuple[Array, Array, Array]  # sizes of rows, numbers of filled bins, counts


def _summed(parts: Sequence[_Histograms], n_bins: int) -> tuple[Array, Array, Array]:
    """Histograms of rows added up: ends, numbers of filled bins and counts."""
    n_rows = len(parts[0][0])
    edges = [np.append(0, np.cumsum(sizes)) for sizes, _, _ in parts]
    empty = np.empty(0, np.int64)
    found = [(empty, empty, empty)]
    # In memory for some of them, dense.
    for start in range(0, n_rows, _SUMMED_ROWS):
        rows = slice(start, min(start + _SUMMED_ROWS, n_rows))
        some = []
        for (sizes, bins, counts), edge in zip(parts, edges, strict=True):
            entries = slice(edge[rows.start], edge[rows.stop])
            some.append((sizes[rows], bins[entries], counts[entries]))
        found.append(_summed_dense(some, n_bins))
    sizes, bins, counts = (np.concatenate(each) for each in zip(*found, strict=True))
    return np.cumsum(sizes), bins, counts


def _summed_dense(parts: Sequence[_Histograms], n_bins: int) -> _Histograms:
    used = np.zeros(n_bins, bool)
    for _, bins, _ in parts:
        used[bins] = True
    # Most bins are empty in all rows, and have no place.
    columns = np.flatnonzero(used)
    place = np.cumsum(used) - 1
    n_rows = len(parts[0][0])
    dense = np.zeros(n_rows * len(columns), np.int64)
    starts = np.arange(n_rows) * len(columns)
    for sizes, bins, counts in parts:
        # No bin comes twice in a row.
        dense[place[bins] + np.repeat(starts, sizes)] += counts.astype(np.int64)
    at = np.flatnonzero(dense)
    sizes = np.bincount(at // max(1, len(columns)), minlength=n_rows)
    return sizes, columns[at - np.repeat(starts, sizes)], dense[at]


def _side_by_side(parts: Sequence[Unpacked]) -> Unpacked:
    """The rows of all parts, of one record each, as one record."""
    integers, floats, formats, *_ = zip(*parts, strict=True)
    starts = np.cumsum([0, *(len(part.bins) for part in parts)])
    return Unpacked(
        np.concatenate(integers, axis=1),
        np.concatenate(floats, axis=1),
        np.concatenate(formats, axis=1),
        np.concatenate([part.ends + start for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.bins for part in parts]),
        np.concatenate([part.counts for part in parts]),
    )


def taken(x: Array, columns: Array, absent: float) -> Array:
    """Some rows of each record by their numbers, ``(S, M, ...)``; -1 stands for an absent one."""
    found = np.full((len(x), len(columns), *x.shape[2:]), absent, x.dtype)
    has = columns >= 0
    found[:, has] = x[:, columns[has]]
    return found


def _padded(n_bytes: int) -> int:
    return n_bytes + -n_bytes % _ALIGNMENT


def _bytes_of(array: Array, dtype: str | np.dtype[np.unsignedinteger]) -> bytes:
    data = array.astype(dtype, copy=False).tobytes()
    return data + bytes(-len(data) % _ALIGNMENT)
