"""What each rank of a distributed run wrote, merged some steps of all ranks at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from gradstat.history.alignment import join_depths, ranges_of, union, with_rows
from gradstat.history.copies import Copies, Holding, told_of_replicas
from gradstat.history.packed_counts import SparseRows
from gradstat.history.records import SAME, Records, concatenate
from gradstat.history.scalars import Scalars
from gradstat.history.union_floats import check_ranges, extremes_of, terms, union_floats
from gradstat.history.union_quantized import union_of
from gradstat.util import Array, warn

_FUNCTION = "History.merge()"
# That are held at a time of each rank, and of all of them.
_MOST_BYTES, _MOST_BYTES_OF_ALL = 4 << 20, 64 << 20


def bytes_at_a_time(n_ranks: int) -> int:
    """How much of each rank's file is to be read at a time."""
    return min(_MOST_BYTES, _MOST_BYTES_OF_ALL // max(n_ranks, 1))


class Attempt(NamedTuple):
    """One time that a run was started or resumed, the same for all ranks that took part.

    Args:
        first_step: of a resumed run; -1 where it was not resumed.
        world: how many ranks there were, if it is known.
        number: of attempts of this first step and world, from 0.
    """

    first_step: int
    world: int | None
    number: int


class RankRecords:
    """The records of one rank, a few at a time.

    Args:
        rank: its number.
        first: some of its records.
        pieces: those that follow, in order.
        is_journal: whether they are all that a rank wrote to its directory, so that they say which
            attempts there were.
    """

    def __init__(
        self, rank: int, first: Records, pieces: Iterator[Records], *, is_journal: bool = False
    ) -> None:
        self.rank, self.is_journal = rank, is_journal
        self.held = first  # those that come next, all of one attempt, with the same origins
        self.depth = first.depth
        self.scalars = Scalars()
        # Each supersedes those before it, from its first step on.
        self.attempts: list[Attempt] = []
        self._last: object = None  # world and resumption of the last one
        self._pieces = pieces
        self._next: Records | None = None  # read already, and not like those that are held
        self._is_over = False
        self._note(first)

    def fill(self, n_bytes: int) -> None:
        """Hold so much, if there is as much of one attempt with the same origins."""
        parts = [self.held]
        n_held = self.held.nbytes
        while n_held < n_bytes and not self._is_over:
            piece, self._next = self._next or self._read(), None
            if piece is None:
                self._is_over = True
            elif not parts[-1].steps:
                parts = [piece]
            elif piece.steps and not _are_alike(parts[-1], piece):
                self._next = piece
                break
            elif piece.steps:
                parts.append(piece)
            n_held = sum(part.nbytes for part in parts)
        self.held = concatenate(parts)

    def go_on(self, pieces: Sequence[Records]) -> None:
        """Take pieces that were not there before, when all others are merged."""
        self._pieces, self._is_over, self.scalars = iter(pieces), False, Scalars()

    def take(self, step: int) -> Records:
        """Those up to a step, which are then no longer held."""
        taken, self.held = self.held.before(step + 1), self.held.since(step + 1)
        return taken

    def attempt_at(self, step: float) -> Attempt | None:
        """The last one that this step is of."""
        found = [each for each in self.attempts if each.first_step <= step]
        return found[-1] if found else None

    def _read(self) -> Records | None:
        piece = next(self._pieces, None)
        if piece is not None:
            self._note(piece)
        return piece

    def _note(self, piece: Records) -> None:
        self.scalars.extend(piece.scalars)
        self.depth = self.depth if piece.depth is None else piece.depth
        if self._last != (piece.world, piece.resumption):
            self._last = piece.world, piece.resumption
            first_step = -1 if piece.resumption is None else piece.resumption[0]
            number = sum(each[:2] == (first_step, piece.world) for each in self.attempts)
            self.attempts.append(Attempt(first_step, piece.world, number))


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
    _check_alike(ranks)
    rows, layers = union([(rank.held.rows, rank.held.layers) for rank in ranks])
    windows, left_out = [with_rows(ranks[0].held.at_steps([]), rows, layers)], set[int]()
    n_bytes = bytes_at_a_time(len(ranks))
    leader = min(ranks, key=lambda rank: rank.rank)
    superseded = set[int]()
    while True:
        for rank in ranks:
            rank.fill(n_bytes)
        holding = [rank for rank in ranks if rank.held.steps]
        if not holding:
            break
        start = min(rank.held.steps[0] for rank in holding)
        world = (leader.attempt_at(start) or leader.attempts[0]).world
        going = [rank for rank in ranks if world is None or rank.rank < world] or list(ranks)
        ends = [each.first_step for rank in ranks for each in rank.attempts]
        until = min(rank.held.steps[-1] for rank in holding)
        until = min([until, *(end - 1 for end in ends if end > start)])
        taken = [rank.take(until) for rank in ranks]
        taken = [each for each, rank in zip(taken, ranks, strict=True) if rank in going]
        some = set[int].union(*(set(each.steps) for each in taken))
        if len({rank.attempt_at(start) for rank in going if rank.is_journal} - {None}) > 1:
            superseded |= some
            continue
        steps = sorted(set[int].intersection(*(set(each.steps) for each in taken)))
        left_out |= some - set(steps)
        if steps:
            parts = [with_rows(each.at_steps(steps), rows, layers) for each in taken]
            parts = [told_of_replicas(_FUNCTION, each, replicated) for each in parts]
            windows.append(_merge_window([rank.rank for rank in going], parts))
            del parts
        del taken  # before others come
    if left_out and not quiet:
        warn(
            f"{_FUNCTION} leaves out {len(left_out)} steps that not all ranks have: "
            f"{ranges_of(sorted(left_out))}"
        )
    if superseded and not quiet:
        warn(
            f"{_FUNCTION} leaves out {len(superseded)} steps that were superseded when the run was "
            f"resumed, of which some ranks lack the new records: {ranges_of(sorted(superseded))}"
        )
    scalars = Scalars()
    for rank in ranks:
        scalars.extend(_in_force(rank, ranks), f"rank{rank.rank}/")
    return replace(
        concatenate(windows),
        origins=np.full(len(rows), SAME, np.int64),
        scalars=scalars,
        depth=join_depths(rows, [(rank.held.rows, rank.depth) for rank in ranks]),
        rank=None,
        world=None,
        layout=None,
    )


def _are_alike(a: Records, b: Records) -> bool:
    """Whether two pieces of a rank are of one attempt, with the same origins and layout."""
    if (a.world, a.resumption) != (b.world, b.resumption):
        return False
    has_same_layout = b.layout is None if a.layout is None else a.layout.equals(b.layout)
    return has_same_layout and np.array_equal(a.origins, b.origins)


def _in_force(rank: RankRecords, ranks: Sequence[RankRecords]) -> Scalars:
    """Scalars of a rank that no other rank has superseded, when the run was resumed."""
    others = [other for other in ranks if other.is_journal] if rank.is_journal else []
    starts = sorted({max(each.first_step, 0) for other in others for each in other.attempts})
    kept = rank.scalars.between(end=starts[0]) if starts else rank.scalars
    for start, end in pairwise([*starts, math.inf]):
        mine = rank.attempt_at(start)
        if all(other.attempt_at(start) == mine for other in others if mine in other.attempts):
            kept.extend(rank.scalars.between(start, end))
    return kept


def _merge_window(ranks: Sequence[int], parts: Sequence[Records]) -> Records:
    """Records of all ranks at the same steps, of the same rows."""
    copies = Copies(_FUNCTION)
    first, bins = parts[0], parts[0].bins
    firsts = [copies.add(rank, Holding.of(part)) for rank, part in zip(ranks, parts, strict=True)]
    # Where several ranks hold the same values, those of the first one count.
    is_first = np.stack(firsts)[:, None, :, None]
    integers = np.where(is_first, np.stack([part.integers for part in parts]), 0)
    floats = np.where(is_first, np.stack([part.floats for part in parts]), np.nan)
    extremes = extremes_of(bins, integers, floats)
    least, greatest = np.fmin.reduce(extremes), np.fmax.reduce(extremes)
    # No part has any.
    least = np.where(np.isnan(least), np.inf, least)
    greatest = np.where(np.isnan(greatest), -np.inf, greatest)
    check_ranges(_FUNCTION, first, least, greatest)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = terms(bins, integers, floats, least, greatest).sum(0)
    quantized = np.stack([part.quantized for part in parts])
    quantized = np.where(is_first[..., None], quantized, np.nan)
    partial = [part.partial_step for part in parts if part.partial_step is not None]
    return replace(
        first,
        integers=integers.sum(0),
        floats=union_floats(integers[..., 1].sum(0), sums, least, greatest),
        quantized=union_of(quantized),
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


def _check_alike(ranks: Sequence[RankRecords]) -> None:
    for rank in ranks:
        for what in ("bins", "formats"):
            theirs, first = (getattr(each.held, what) for each in (rank, ranks[0]))
            if theirs != first:
                raise ValueError(
                    f"{_FUNCTION} needs the same {what} on each rank; {what} on rank {rank.rank} "
                    f"is {theirs}, on rank {ranks[0].rank} {first}"
                )
