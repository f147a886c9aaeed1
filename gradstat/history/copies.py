"""`Copies`: which ranks hold the same values of a row, so that they count once, and are equal."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from gradstat.arrays import Array
from gradstat.history.records import OWN, SAME, Records
from gradstat.kinds import GRAD, NOUNS, Row
from gradstat.results import FLOATS

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(32)


class Holding(NamedTuple):
    """What a rank holds.

    Args:
        rows: L of them.
        layers: their names, as printed.
        depth: as in `Records`.
        steps: S numbers.
        held: of each row, what is the same on each rank that holds the same; ``None``: its own.
        prints: `fingerprints`, int64 ``(S, L)``.
    """

    rows: list[Row]
    layers: list[str]
    depth: Array | None
    steps: list[int]
    held: list[Hashable]
    prints: Array

    @classmethod
    def of(cls, records: Records) -> Holding:
        """What a rank with these records holds."""
        held = [_held(records, at) for at in range(len(records.rows))]
        prints = fingerprints(records)
        return cls(records.rows, records.layers, records.depth, records.steps, held, prints)


class Copies:
    """What ranks hold of each row at the same steps, told one after the other.

    Args:
        function: what errors are of.
    """

    def __init__(self, function: str) -> None:
        self._function = function
        # Of each row and of what is held of it: the first rank, and its fingerprints.
        self._first: dict[tuple[Row, Hashable], tuple[int, Array]] = {}

    def add(self, rank: int, holding: Holding) -> Array:
        """Take what one rank holds.

        Args:
            rank: its number.
            holding: L rows.

        Returns:
            Of each row whether no rank before holds the same: bool ``(L,)``.

        Raises:
            ValueError: a row that another rank should hold the same of, and does not.
        """
        is_first = np.ones(len(holding.rows), bool)
        for at, (row, held) in enumerate(zip(holding.rows, holding.held, strict=True)):
            if held is None:
                continue
            mine = holding.prints[:, at]
            first, theirs = self._first.setdefault((row, held), (rank, mine))
            if theirs is not mine:
                is_first[at] = False
                differs = np.flatnonzero(theirs != mine)
                if len(differs):
                    self._refuse(row, (first, rank), holding.steps[differs[0]])
        return is_first

    def _refuse(self, row: Row, ranks: tuple[int, int], step: int) -> None:
        raise ValueError(
            f"{self._function} needs what is the same on several ranks to be equal there; the "
            f"{NOUNS[row.kind]} of {row.name} in step {step} is not the same on ranks {ranks[0]} "
            f"and {ranks[1]}: measure it when it is whole, as with when='step', or pass "
            f"replicated=False if each rank has its own"
        )


def fingerprints(records: Records) -> Array:
    """A number for each row of each record, int64 ``(S, L)``: equal where counts and extremes are.

    The numbers of elements and the extremes are looked at.
    """
    extremes = records.floats[..., [FLOATS.index("min"), FLOATS.index("max")]]
    # One zero, and one NaN.
    extremes = np.where(np.isnan(extremes), 0.0, extremes) + 0.0
    found = np.zeros(records.integers.shape[:2], np.uint64)
    for columns in (records.integers, extremes.view(np.int64)):
        for column in np.moveaxis(columns, -1, 0):
            found = (found ^ column.astype(np.uint64)) * _FACTOR
            found ^= found >> _SHIFT
    return found.view(np.int64)


def told_of_replicas(function: str, records: Records, replicated: bool | None) -> Records:
    """Records of gradients that are no DTensors the same on each rank, or not, if that is told."""
    if replicated is None:
        return records
    if not isinstance(replicated, bool):
        raise TypeError(f"{function} needs True, False or None; replicated is {replicated!r}")
    plain = (records.origins < 0) & np.array([row.kind == GRAD for row in records.rows], bool)
    return replace(records, origins=np.where(plain, SAME if replicated else OWN, records.origins))


def _held(records: Records, at: int) -> Hashable:
    """What is held of a row, the same on each rank that holds the same; ``None``: its own."""
    origin = int(records.origins[at])
    return None if origin == OWN else origin
