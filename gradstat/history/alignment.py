"""Records of several ranks brought to the same rows, where pipeline stages have different ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from gradstat.history.records import OWN, Records
from gradstat.record import KINDS, Row
from gradstat.util import Array


def union(parts: Sequence[tuple[Sequence[Row], Sequence[str]]]) -> tuple[list[Row], list[str]]:
    """All rows that there are, kind by kind, those of the first part first, and their names.

    Args:
        parts: the rows of each and their names, as printed.
    """
    names = {row: name for rows, layers in parts for row, name in zip(rows, layers, strict=True)}
    rows = list(names)
    # What stays as it is needs no copy.
    if any(list(part) != rows for part, _ in parts):
        rows.sort(key=lambda row: KINDS.index(row.kind))
    return rows, [names[row] for row in rows]


def join_depths(
    rows: Sequence[Row], parts: Sequence[tuple[Sequence[Row], Array | None]]
) -> Array | None:
    """Places of rows among those of their kind: each part's come after those of the part before.

    Args:
        rows: the union.
        parts: the rows of each and their places, ``None`` where they are not known.

    Returns:
        int64 ``(L,)``; ``None`` if any part does not know its own.
    """
    places: dict[Row, int] = {}
    n_placed: Counter[str] = Counter()
    for own, depth in parts:
        if depth is None:
            return None
        for at in np.argsort(depth, kind="stable").tolist():
            if own[at] not in places:
                kind = own[at].kind
                places[own[at]] = n_placed[kind]
                n_placed[kind] += 1
    return np.array([places[row] for row in rows], np.int64)


def with_rows(records: Records, rows: Sequence[Row], layers: Sequence[str]) -> Records:
    """The same records with other rows: those that there are not are absent, and nobody else's.

    Args:
        records: S of them.
        rows: all of those that they have, and others, in any order.
        layers: their names, as printed.
    """
    if records.rows == list(rows):
        return records
    column_of = {row: column for column, row in enumerate(records.rows)}
    columns = np.array([column_of.get(row, -1) for row in rows], np.int64)
    return with_columns(records, columns, rows, layers)


def with_columns(
    records: Records, columns: Array, rows: Sequence[Row], layers: Sequence[str]
) -> Records:
    """The same records with the rows of some columns, by number, -1 for one that is absent.

    Args:
        records: S of them.
        columns: int64 ``(L,)``.
        rows: L of them.
        layers: their names, as printed.
    """
    at = np.arange(len(records.steps))[:, None] * len(records.rows) + columns
    return replace(
        records,
        rows=list(rows),
        layers=list(layers),
        integers=_taken(records.integers, columns, 0),
        floats=_taken(records.floats, columns, np.nan),
        quantized=_taken(records.quantized, columns, np.nan),
        counts=records.counts.rearranged(np.where(columns < 0, -1, at).ravel()),
        origins=_taken(records.origins[None], columns, OWN)[0],
        layout=None if records.layout is None else records.layout.rows(columns.tolist()),
        depth=None,
    )


def _taken(x: Array, columns: Array, absent: float) -> Array:
    has = columns >= 0
    if has.all():
        return x[:, columns]
    taken = np.full((len(x), len(columns), *x.shape[2:]), absent, x.dtype)
    taken[:, has] = x[:, columns[has]]
    return taken


def ranges_of(numbers: Sequence[int]) -> str:
    """Rising numbers in words: ``0 to 3, 5``; of many the first and the last."""
    starts = [0, *(at + 1 for at, (a, b) in enumerate(pairwise(numbers)) if b > a + 1)]
    ends = [*(start - 1 for start in starts[1:]), len(numbers) - 1]
    spans = [
        f"{numbers[a]}" if a == b else f"{numbers[a]} to {numbers[b]}"
        for a, b in zip(starts, ends, strict=True)
    ]
    return ", ".join(spans if len(spans) < 5 else [spans[0], "...", spans[-1]])
