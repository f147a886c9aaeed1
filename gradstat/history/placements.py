"""`Placements`: which part of which tensor a rank holds of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradstat.util import Array

# Parts without a number: nothing is known of them, and they are of a sum that was not taken.
UNKNOWN, PARTIAL = -1, -2


@dataclass(frozen=True)
class Placements:
    """The part that a rank holds of each of L rows; nothing is known of rows that are no DTensors.

    Args:
        parts: int64 ``(L, 2)``: number of the part, from 0, and how many parts there are.
            Replicas on one mesh or on several have the same number. `UNKNOWN`, `PARTIAL` in its
            place.
        shapes: of the whole tensors.
    """

    parts: Array
    shapes: list[tuple[int, ...]]

    @classmethod
    def unknown(cls, n_rows: int) -> Placements:
        """Nothing is known of so many rows."""
        return cls(np.full((n_rows, 2), UNKNOWN, np.int64), [()] * n_rows)

    def set(self, row: int, part: tuple[int, int], shape: tuple[int, ...]) -> None:
        """Learn of a row."""
        self.parts[row], self.shapes[row] = part, shape

    def equals(self, other: Placements | None) -> bool:
        """Whether the same is known of the same rows."""
        if other is None:
            return False
        return np.array_equal(self.parts, other.parts) and self.shapes == other.shapes

    def copy(self) -> Placements:
        """The same, which stays as it is."""
        return Placements(self.parts.copy(), list(self.shapes))

    def rows(self, columns: Sequence[int]) -> Placements:
        """That of some rows; -1 stands for one of which nothing is known."""
        found = Placements.unknown(len(columns))
        for row, column in enumerate(columns):
            if column >= 0:
                n, of = self.parts[column].tolist()
                found.set(row, (n, of), self.shapes[column])
        return found

    @classmethod
    def from_flat(cls, parts: Array, sizes: Array, ends: Array) -> Placements:
        """That of shapes one after the other, and where each ends.

        Raises:
            ValueError: ends that do not divide the shapes.
        """
        starts = np.concatenate([[0], ends])
        if (np.diff(starts) < 0).any() or starts[-1] != len(sizes):
            raise ValueError(f"its shape_ends do not divide the {len(sizes)} numbers of its shapes")
        spans = zip(starts.tolist(), ends.tolist(), strict=False)
        return cls(parts, [tuple(sizes[a:b].tolist()) for a, b in spans])

    def flat(self) -> tuple[Array, Array, Array]:
        """What `from_flat` takes."""
        sizes = np.array([n for shape in self.shapes for n in shape], np.int64)
        return self.parts, sizes, np.cumsum([len(shape) for shape in self.shapes], dtype=np.int64)
