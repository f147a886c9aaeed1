"""Records of several ranks brought to the same rows, where pipeline stages have different ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from gradstat.arrays import Array
from gradstat.history.records import OWN, Records
from gradstat.kinds import KINDS, Row
from gradstat.results import FLOATS, INTEGERS


def union(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """All rows that there are, kind by kind, those of the first part first."""
    rows = dict.fromkeys(row for part in parts for row in part)
    # What stays as it is needs no copy.
    if all(list(part) == list(rows) for part in parts):
        return list(rows)
    return sorted(rows, key=lambda row: KINDS.index(row.kind))


def names_of(parts: Sequence[tuple[Sequence[Row], Sequence[str]]]) -> dict[Row, str]:
    """How each row is printed, from the rows and names of several."""
    return {row: name for rows, names in parts for row, name in zip(rows, names, strict=True)}


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
    at = {row: column for column, row in enumerate(records.rows)}
    column = np.array([at.get(row, -1) for row in rows], np.int64)
    has = column >= 0
    n_steps = len(records.steps)
    integers = np.zeros((n_steps, len(rows), len(INTEGERS)), np.int64)
    floats = np.full((n_steps, len(rows), len(FLOATS)), np.nan)
    quantized = np.full((n_steps, len(rows), *records.quantized.shape[2:]), np.nan)
    for wider, x in (
        (integers, records.integers),
        (floats, records.floats),
        (quantized, records.quantized),
    ):
        wider[:, has] = x[:, column[has]]
    source = np.where(has, np.arange(n_steps)[:, None] * len(records.rows) + column, -1)
    origins = np.full(len(rows), OWN, np.int64)
    origins[has] = records.origins[column[has]]
    return replace(
        records,
        rows=list(rows),
        layers=list(layers),
        integers=integers,
        floats=floats,
        quantized=quantized,
        counts=records.counts.rearranged(source.ravel()),
        origins=origins,
        layout=None if records.layout is None else records.layout.rows(column.tolist()),
        depth=None,
    )


def at_steps(records: Records, steps: Sequence[int]) -> Records:
    """The records of some of the steps, all of which there are; scalars stay."""
    if records.steps == list(steps):
        return records
    at = np.searchsorted(np.array(records.steps, np.int64), np.array(steps, np.int64))
    rows = at[:, None] * len(records.rows) + np.arange(len(records.rows))
    partial = records.partial_step
    return replace(
        records,
        steps=list(steps),
        times=records.times[at],
        integers=records.integers[at],
        floats=records.floats[at],
        quantized=records.quantized[at],
        counts=records.counts.keep(rows.ravel()),
        partial_step=partial if partial in steps else None,
    )


def ranges_of(numbers: Sequence[int]) -> str:
    """Rising numbers in words: ``0 to 3, 5``; of many the first and the last."""
    starts = [0, *(at + 1 for at, (a, b) in enumerate(pairwise(numbers)) if b > a + 1)]
    ends = [*(start - 1 for start in starts[1:]), len(numbers) - 1]
    spans = [
        f"{numbers[a]}" if a == b else f"{numbers[a]} to {numbers[b]}"
        for a, b in zip(starts, ends, strict=True)
    ]
    return ", ".join(spans if len(spans) < 5 else [spans[0], "...", spans[-1]])
