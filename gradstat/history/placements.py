"""`Placements`: which part of which tensor a rank holds of each row, and who holds the same."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from gradstat.util import Array

# Owners that are no rank: values are this rank's alone, or the same on each rank.
OWN, SAME = -1, -2
# Shards without a number: nothing is known of them, or they are of a sum that was not taken.
UNKNOWN, PARTIAL = -1, -2


@dataclass(frozen=True)
class Placements:
    """The shard that a rank holds of each of L rows.

    Args:
        owners: int64 ``(L,)``: the first rank that holds the same values, `OWN` or `SAME`.
        shards: int64 ``(L, 2)``: number of the shard, from 0, and how many there are, of rows that
            are DTensors. Replicas on one mesh or on several have the same number. `UNKNOWN` or
            `PARTIAL` in its place.
        shapes: of the whole tensors, where shards are known.
    """

    owners: Array
    shards: Array
    shapes: list[tuple[int, ...]]

    @classmethod
    def unknown(cls, n_rows: int) -> Placements:
        """Each row is this rank's alone, as far as is known."""
        shards = np.full((n_rows, 2), UNKNOWN, np.int64)
        return cls(np.full(n_rows, OWN, np.int64), shards, [()] * n_rows)

    @classmethod
    def same(cls, n_rows: int) -> Placements:
        """Each rank holds the same, as of a run that is merged."""
        placements = cls.unknown(n_rows)
        placements.owners[:] = SAME
        return placements

    def set(self, row: int, owner: int, shard: tuple[int, int], shape: tuple[int, ...]) -> None:
        """Learn of a row."""
        self.owners[row], self.shards[row], self.shapes[row] = owner, shard, shape

    def copy_row(self, row: int, like: int) -> None:
        """Learn that a row is placed as another one."""
        self.owners[row], self.shards[row] = self.owners[like], self.shards[like]
        self.shapes[row] = self.shapes[like]

    def equals(self, other: Placements) -> bool:
        """Whether the same is known of the same rows."""
        return (
            np.array_equal(self.owners, other.owners)
            and np.array_equal(self.shards, other.shards)
            and self.shapes == other.shapes
        )

    def copy(self) -> Placements:
        """The same, which stays as it is."""
        return Placements(self.owners.copy(), self.shards.copy(), list(self.shapes))

    def take(self, columns: Sequence[int]) -> Placements:
        """Those of some rows; -1 stands for one of which nothing is known."""
        taken = Placements.unknown(len(columns))
        for row, column in enumerate(columns):
            if column >= 0:
                n, of = self.shards[column].tolist()
                taken.set(row, int(self.owners[column]), (n, of), self.shapes[column])
        return taken

    def replica(self, row: int, *, is_of_output: bool) -> Hashable:
        """What ranks that hold the same values of a row have in common; ``None``: its own alone."""
        owner, shard = int(self.owners[row]), self.shards[row].tolist()
        if owner < 0 or shard[0] == UNKNOWN:
            return None if owner == OWN else owner
        if is_of_output:
            # Those of another mesh are of another batch.
            return None if shard[0] == PARTIAL else owner
        # Another mesh may hold the same, as FSDP does outside the plan of tensor parallelism.
        return (self.shapes[row], *shard)

    def is_partial(self, row: int) -> bool:
        """Whether a row is a part of a sum that has not been taken."""
        return bool(self.shards[row, 0] == PARTIAL)
