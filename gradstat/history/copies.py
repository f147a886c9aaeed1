"""`Copies`: which ranks hold the same values of a row, so that they count once, and are equal."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from gradstat.history.placements import PARTIAL, UNKNOWN
from gradstat.history.records import OWN, SAME, Records
from gradstat.record import GRAD, NOUNS, OF_OUTPUTS, Row
from gradstat.results import FLOATS
from gradstat.util import Array

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
        # The first rank that holds this of a row, and its fingerprints.
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
                if _is_partial(held):
                    self._refuse_partial(row, (first, rank))
                differs = np.flatnonzero(theirs != mine)
                if len(differs):
                    self._refuse(row, (first, rank), holding.steps[differs[0]])
        return is_first

    def _refuse_partial(self, row: Row, ranks: tuple[int, int]) -> None:
        raise ValueError(
            f"{self._function} needs gradients that are whole; the {NOUNS[row.kind]} of {row.name} "
            f"is partial on ranks {ranks[0]} and {ranks[1]}, a sum that has not been taken: "
            f"redistribute it before a step that is measured with when='step', or pass "
            f"replicated=False if each rank's part is to count"
        )

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
    """Records of which it is told whether ranks hold the same, where no single mesh says it.

    Args:
        function: what errors are of.
        records: whose origins and layout are replaced.
        replicated: whether gradients that are no DTensors are the same on each rank; ``False`` also
            keeps what is on another mesh, and what is partial, apart. ``None``: as it was recorded.
    """
    if replicated is not None and not isinstance(replicated, bool):
        raise TypeError(f"{function} needs True, False or None; replicated is {replicated!r}")
    if replicated is None:
        return records
    origins, layout = records.origins, records.layout
    is_grad = np.array([row.kind == GRAD for row in records.rows], bool)
    origins = np.where(is_grad & (origins < 0), SAME if replicated else OWN, origins)
    if not replicated and layout is not None:
        origins = np.where(layout.parts[:, 0] == PARTIAL, OWN, origins)
        layout = None
    return replace(records, origins=origins, layout=layout)


def _held(records: Records, at: int) -> Hashable:
    """What is held of a row, the same on each rank that holds the same; ``None``: its own."""
    origin, layout = int(records.origins[at]), records.layout
    if origin == OWN:
        return None
    if origin < 0 or layout is None or layout.parts[at, 0] == UNKNOWN:
        return origin
    if records.rows[at].kind in OF_OUTPUTS:
        # Those of another mesh are of another batch.
        return None if layout.parts[at, 0] == PARTIAL else origin
    # Another mesh may hold the same, as FSDP does outside the plan of tensor parallelism.
    return (layout.shapes[at], *layout.parts[at].tolist())


def _is_partial(held: Hashable) -> bool:
    return isinstance(held, tuple) and held[1] == PARTIAL
