"""What each rank of a distributed run wrote, merged some steps of all ranks at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from gradstat.arrays import Array
from gradstat.history.alignment import (
    at_steps,
    join_depths,
    names_of,
    ranges_of,
    union,
    with_rows,
)
from gradstat.history.copies import Copies, Holding, told_of_replicas
from gradstat.history.packed_counts import SparseRows
from gradstat.history.records import SAME, Records, concatenate
from gradstat.history.scalars import Scalars
from gradstat.history.union_floats import check_ranges, extremes_of, terms, union_floats

_FUNCTION = "History.merge()"
# Of each rank, and of all of them, that is held at a time.
_MOST_BYTES, _MOST_BYTES_OF_ALL = 4 << 20, 64 << 20


def bytes_at_a_time(n_ranks: int) -> int:
    """How much of each rank's file is to be read at a time."""
    return min(_MOST_BYTES, _MOST_BYTES_OF_ALL // max(n_ranks, 1))


class RankRecords:
    """The records of one rank, a few at a time.

    Args:
        rank: its number.
        first: some of its records.
        pieces: those that follow, in order.
    """

    def __init__(self, rank: int, first: Records, pieces: Iterator[Records]) -> None:
        self.rank = rank
        self.held = first  # those that come next
        self.scalars = Scalars()
        # How many ranks there were, each number with the step that it begins with.
        self._worlds: list[tuple[int, float]] = []
        self._pieces = pieces
        self._is_over = False
        self._note(self.held)

    def fill(self, n_bytes: int) -> None:
        """Hold so much, if there is as much."""
        parts = [self.held]
        n_held = self.held.nbytes
        while n_held < n_bytes and not self._is_over:
            piece = next(self._pieces, None)
            if piece is None:
                self._is_over = True
            else:
                self._note(piece)
                parts.append(piece)
                n_held += piece.nbytes
        self.held = concatenate(parts)

    def take(self, step: int) -> Records:
        """Those up to a step, which are then no longer held."""
        taken, self.held = self.held.before(step + 1), self.held.since(step + 1)
        return taken

    def world_at(self, step: int) -> tuple[float, float]:
        """How many ranks there were in a step that is held, and from which step on another number.

        A run may have been resumed with fewer of them, or more.
        """
        found, end = math.inf, math.inf
        for first, world in reversed(self._worlds):
            found = world
            if first <= step:
                break
            end = first
        return found, end

    def _note(self, piece: Records) -> None:
        self.scalars.extend(piece.scalars)
        world = math.inf if piece.world is None else piece.world
        if piece.steps and (not self._worlds or self._worlds[-1][1] != world):
            self._worlds.append((piece.steps[0], world))


def merge_files(
    ranks: Sequence[RankRecords], replicated: bool | None = None, *, quiet: bool = False
) -> Records:
    """Records that all ranks hold together.

    Args:
        ranks: one at least.
        replicated: as for `History.reduce`.
        quiet: say nothing of steps that are left out.

    Returns:
        The union of their rows at the steps that all have, of origin `SAME`. Where a run was
        resumed with other ranks, all are those that it had in a step.

    Raises:
        ValueError: other bins, other ranges, or copies that are not equal.
    """
    _check_bins(ranks)
    rows = union([rank.held.rows for rank in ranks])
    names = names_of([(rank.held.rows, rank.held.layers) for rank in ranks])
    layers = [names[row] for row in rows]
    windows, left_out = [with_rows(at_steps(ranks[0].held, []), rows, layers)], set[int]()
    n_bytes = bytes_at_a_time(len(ranks))
    leader = min(ranks, key=lambda rank: rank.rank)
    while True:
        for rank in ranks:
            rank.fill(n_bytes)
        holding = [rank for rank in ranks if rank.held.steps]
        if not holding:
            break
        world, end = leader.world_at(min(rank.held.steps[0] for rank in holding))
        going = [rank for rank in ranks if rank.rank < world] or list(ranks)
        until = min(end - 1, *(rank.held.steps[-1] for rank in holding))
        taken = [rank.take(int(until)) for rank in ranks]
        taken = [each for each, rank in zip(taken, ranks, strict=True) if rank in going]
        steps = sorted(set[int].intersection(*(set(each.steps) for each in taken)))
        left_out |= set[int].union(*(set(each.steps) for each in taken)) - set(steps)
        if steps:
            parts = [with_rows(at_steps(each, steps), rows, layers) for each in taken]
            parts = [told_of_replicas(_FUNCTION, each, replicated) for each in parts]
            windows.append(_merge_window([rank.rank for rank in going], parts))
            del parts
        del taken  # before others come
    if left_out and not quiet:
        warnings.warn(
            f"{_FUNCTION} leaves out {len(left_out)} steps that not all ranks have: "
            f"{ranges_of(sorted(left_out))}",
            RuntimeWarning,
            stacklevel=5,
        )
    scalars = Scalars()
    for rank in ranks:
        scalars.extend(rank.scalars, f"rank{rank.rank}/")
    return replace(
        concatenate(windows),
        origins=np.full(len(rows), SAME, np.int64),
        scalars=scalars,
        depth=join_depths(rows, [(rank.held.rows, rank.held.depth) for rank in ranks]),
        rank=None,
        world=None,
        layout=None,
    )


def _merge_window(ranks: Sequence[int], parts: Sequence[Records]) -> Records:
    """Records of all ranks at the same steps, of the same rows."""
    copies = Copies(_FUNCTION)
    first, bins = parts[0], parts[0].bins
    firsts = [copies.add(rank, Holding.of(part)) for rank, part in zip(ranks, parts, strict=True)]
    # Of the ranks that hold the same values the first one's count.
    is_first = np.stack(firsts)[:, None, :, None]
    integers = np.where(is_first, np.stack([part.integers for part in parts]), 0)
    floats = np.where(is_first, np.stack([part.floats for part in parts]), np.nan)
    extremes = extremes_of(bins, integers, floats)
    least, greatest = np.fmin.reduce(extremes), np.fmax.reduce(extremes)
    # As of no parts at all.
    least = np.where(np.isnan(least), np.inf, least)
    greatest = np.where(np.isnan(greatest), -np.inf, greatest)
    check_ranges(_FUNCTION, first, least, greatest)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = terms(bins, integers, floats, least, greatest).sum(0)
    partial = [part.partial_step for part in parts if part.partial_step is not None]
    return replace(
        first,
        integers=integers.sum(0),
        floats=union_floats(integers[..., 1].sum(0), sums, least, greatest),
        counts=SparseRows.sum(
            [_only(part, rows) for part, rows in zip(parts, firsts, strict=True)],
            bins.bins,
        ),
        scalars=Scalars(),
        partial_step=partial[0] if partial else None,
    )


def _only(part: Records, rows: Array) -> SparseRows:
    """Histograms of some of the rows, those of the others empty."""
    if rows.all():
        return part.counts
    source = np.arange(len(part.counts)).reshape(-1, len(rows))
    return part.counts.rearranged(np.where(rows, source, -1).ravel())


def _check_bins(ranks: Sequence[RankRecords]) -> None:
    for rank in ranks:
        if rank.held.bins != ranks[0].held.bins:
            raise ValueError(
                f"{_FUNCTION} needs the same bins on each rank; bins on rank {rank.rank} is "
                f"{rank.held.bins}, on rank {ranks[0].rank} {ranks[0].held.bins}"
            )
