"""The ranks of a distributed run put together: while they run, and from what they wrote."""

from __future__ import annotations

import math
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import distributed as dist

from gradstat.bins import LinearBins
from gradstat.history import reading
from gradstat.history.file import Spool
from gradstat.history.records import AnyRecord, Records, Scalars
from gradstat.record import (
    GRAD,
    KINDS,
    NOUNS,
    OF_OUTPUTS,
    OWN,
    PARTIAL,
    SAME,
    UNKNOWN,
    Placement,
    Record,
    Row,
    Unpacked,
    union,
)
from gradstat.results import FLOATS
from gradstat.util import Array, CutOffError, warn, windows_of

_NAME = re.compile(r"rank-(\d+)")
_LOAD, _MERGE, _REDUCE = "History.load()", "History.merge()", "reduce()"
_EXTREMES = [FLOATS.index(name) for name in ("min", "max")]
_RANGE = [FLOATS.index(name) for name in ("low", "high")]
# Of each rank's records that are unpacked at a time, and of all ranks'.
_MOST_BYTES, _MOST_BYTES_OF_ALL = 4 << 20, 64 << 20


def reduce(mine: Records, group: dist.ProcessGroup | None, replicated: bool | None) -> Records:
    """As `History.reduce`: ranks tell each other what they have, then send it, some at a time."""
    mine = told_of_replicas(_REDUCE, mine, replicated)
    mine.verify()  # nobody waits for a rank that cannot read its own
    sizes = [record.n_bytes for record in mine.records]
    told = _gather((mine.at([]), mine.logged, mine.steps, sizes), group)
    parts: list[Records] = [part for part, *_ in told]
    union = _Union(_REDUCE, range(len(parts)), parts)
    for at, (_, _, steps, *_) in enumerate(told):
        if not np.array_equal(steps, told[0][2]):
            raise ValueError(
                f"{_REDUCE} needs the same steps on each rank; steps on rank {at} is "
                f"{_shorten(steps.tolist())}, on rank 0 {_shorten(told[0][2].tolist())}"
            )
    numbers = dist.get_process_group_ranks(group)
    sizes = np.sum([each for *_, each in told], axis=0).tolist()
    for window in windows_of(sizes, _MOST_BYTES_OF_ALL):
        sent = [mine.packed(record) for record in mine.records[window]]
        for part, records in zip(parts, _gather(sent, group), strict=True):
            part.set_records(records)
        union.add(numbers, parts)
    scalars = Scalars()
    for at, (_, logged, *_) in enumerate(told):
        scalars.extend(logged, f"rank{at}/")
    return union.records(scalars, parts)


def _gather(x: object, group: dist.ProcessGroup | None) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, x, group)
    return gathered


def _shorten(x: list[int]) -> str:
    return str(x) if len(x) < 6 else f"[{x[0]!r}, {x[1]!r}, ... {x[-1]!r}] of {len(x)}"


class _Union:
    """The records of all ranks, put together window by window."""

    def __init__(self, function: str, ranks: Sequence[int], parts: Sequence[Records]) -> None:
        self._function = function  # what errors are of
        for rank, part in zip(ranks, parts, strict=True):
            for what in ("bins", "formats"):
                theirs, first = (getattr(each, what) for each in (part, parts[0]))
                if theirs != first:
                    raise ValueError(
                        f"{function} needs the same {what} on each rank; {what} on rank {rank} is "
                        f"{theirs}, on rank {ranks[0]} {first}"
                    )
        names = {
            row: name for part in parts for row, name in zip(part.rows, part.layers, strict=True)
        }
        rows = list(names)
        # Rows that all parts have stay in their places.
        if any(part.rows != rows for part in parts):
            rows.sort(key=lambda row: KINDS.index(row.kind))
        self._whole = Records(rows, parts[0].bins, parts[0].formats)
        self._whole.layers = [names[row] for row in rows]
        for part in parts:
            self._whole.modules |= part.modules
        self._whole.placements = [Placement(SAME)] * len(rows)
        self._kept: list[AnyRecord] = []
        self._spool = Spool()

    def add(self, ranks: Sequence[int], parts: Sequence[Records]) -> None:
        """Take records of ranks, which have these numbers, at the same steps."""
        whole = self._whole
        aligned = [self._with_all_rows(part) for part in parts]
        unpacked = [part.unpack() for part in aligned]
        rows = np.arange(len(whole.rows))
        for at, is_first in enumerate(self._first_replicas(ranks, aligned, unpacked)):
            # Where several ranks hold the same values, those of the first one count.
            if not is_first.all():
                unpacked[at] = unpacked[at].take(np.where(is_first, rows, -1))
        self._check_ranges(parts[0].records, unpacked)
        data = whole.layout.pack_all(union(unpacked, whole.bins.bins))
        together = zip(parts[0].records, data, strict=True)
        self._kept += self._spool.keep(
            [Record(record.step, record.time_s, packed) for record, packed in together]
        )
        partial = [part.partial_step for part in parts if part.partial_step is not None]
        whole.partial_step = partial[0] if partial else whole.partial_step

    def records(self, scalars: Scalars, parts: Sequence[Records]) -> Records:
        """All of them; the parts know the orders of their rows by now."""
        self._whole.set_records(self._kept)
        self._whole.logged, self._whole.depth = scalars, _join_depths(self._whole.rows, parts)
        return self._whole

    def _with_all_rows(self, part: Records) -> Records:
        rows = self._whole.rows
        if part.rows == rows:
            return part
        column_of = {row: column for column, row in enumerate(part.rows)}
        columns = np.array([column_of.get(row, -1) for row in rows], np.int64)
        return part.take(columns, rows, self._whole.layers)

    def _first_replicas(
        self, ranks: Sequence[int], parts: Sequence[Records], unpacked: Sequence[Unpacked]
    ) -> list[Array]:
        """Of each part and row whether no part before holds the same: bool ``(L,)`` each."""
        rows = self._whole.rows
        first: dict[tuple[int, Any], int] = {}
        found = []
        for at, part in enumerate(parts):
            is_first, others = np.ones(len(rows), bool), dict[int, list[int]]()
            for column, row in enumerate(rows):
                placement = part.placements[column]
                replica = placement.replica(is_of_output=row.kind in OF_OUTPUTS)
                if replica is None:
                    continue
                holder = first.setdefault((column, replica), at)
                if holder != at:
                    is_first[column] = False
                    others.setdefault(holder, []).append(column)
                    if placement.shard[0] == PARTIAL:
                        self._refuse_partial(row, ranks[holder], ranks[at])
            for holder, columns in others.items():
                differs = _differences(unpacked[holder], unpacked[at], columns)
                for place, record in np.argwhere(differs.T)[:1].tolist():
                    step = part.records[record].step
                    self._refuse(rows[columns[place]], ranks[holder], ranks[at], step)
            found.append(is_first)
        return found

    def _refuse_partial(self, row: Row, holder: int, rank: int) -> None:
        raise ValueError(
            f"{self._function} needs gradients that are whole; the {NOUNS[row.kind]} of {row.name} "
            f"is partial on ranks {holder} and {rank}, a sum that has not been taken: "
            f"redistribute it before a step that is measured with when='step', or pass "
            f"replicated=False if each rank's part is to count"
        )

    def _refuse(self, row: Row, holder: int, rank: int, step: int) -> None:
        raise ValueError(
            f"{self._function} needs what is the same on several ranks to be equal there; the "
            f"{NOUNS[row.kind]} of {row.name} in step {step} is not the same on ranks {holder} "
            f"and {rank}: measure it when it is whole, as with when='step', or pass "
            f"replicated=False if each rank has its own"
        )

    def _check_ranges(self, records: Sequence[Any], unpacked: Sequence[Unpacked]) -> None:
        bins = self._whole.bins
        if not isinstance(bins, LinearBins):
            return
        ends = np.stack([part.floats[..., _RANGE] for part in unpacked])
        least, greatest = np.fmin.reduce(ends), np.fmax.reduce(ends)
        differs = ((least != greatest) & ~np.isnan(least)).any(-1)
        for at, column in np.argwhere(differs)[:1].tolist():
            raise ValueError(
                f"{self._function} needs Log2Bins, or LinearBins with a range; the range of {bins} "
                f"of {self._whole.layers[column]} in step {records[at].step} is not the same on all"
            )


def _differences(one: Unpacked, other: Unpacked, columns: list[int]) -> Array:
    """Where counts of elements or extremes of some rows differ: bool ``(S, M)``."""
    differs = (one.integers[:, columns] != other.integers[:, columns]).any(-1)
    # One NaN.
    ends = [
        np.nan_to_num(each.floats[:, columns][..., _EXTREMES], nan=0.0) for each in (one, other)
    ]
    found: Array = differs | (ends[0] != ends[1]).any(-1)
    return found


def _join_depths(rows: Sequence[Row], parts: Sequence[Records]) -> Array | None:
    """Places of rows among those of their kind, part after part; ``None`` if one has none."""
    places: dict[Row, int] = {}
    n_placed: Counter[str] = Counter()
    for part in parts:
        if part.depth is None:
            return None
        for at in np.argsort(part.depth, kind="stable").tolist():
            row = part.rows[at]
            if row not in places:
                places[row] = n_placed[row.kind]
                n_placed[row.kind] += 1
    return np.array([places[row] for row in rows], np.int64)


def told_of_replicas(function: str, records: Records, replicated: bool | None) -> Records:
    """Records with the placements that ``replicated`` of `History.reduce` tells of."""
    if replicated is not None and not isinstance(replicated, bool):
        raise TypeError(f"{function} needs True, False or None; replicated is {replicated!r}")
    if replicated is None:
        return records
    told = records.snapshot()
    for at, (owner, shard, shape) in enumerate(told.placements):
        if owner < 0 and records.rows[at].kind == GRAD:
            owner = SAME if replicated else OWN
        if not replicated:
            owner, shard = OWN if shard[0] == PARTIAL else owner, (UNKNOWN, UNKNOWN)
        told.placements[at] = Placement(owner, shard, shape)
    return told


class _Attempt(NamedTuple):
    """One time that a run was started or resumed, the same for all ranks that took part."""

    first_step: int  # of a resumed run; -1 where it was not resumed
    world: int | None  # how many ranks there were, if it is known
    number: int  # of attempts of this first step and world, from 0


class Rank:
    """What one rank recorded, in pieces, each of one attempt and with the same placements."""

    # A journal is all that a rank wrote to its directory: it says which attempts there were.

    def __init__(
        self, number: int, name: str, pieces: Iterable[Records], *, is_journal: bool
    ) -> None:
        self.number, self.name, self.is_journal = number, name, is_journal
        self.logged = Scalars()  # and not yet merged
        # Each supersedes those before it, from its first step on.
        self.attempts: list[_Attempt] = []
        self.like: Records  # the piece that it has told last, with its rows, bins and order
        self.pieces: deque[Records] = deque()  # not yet merged
        for piece in pieces:
            self.add(piece)

    def add(self, piece: Records) -> None:
        """Take what follows; ValueError if it is of another rank."""
        if piece.rank not in (None, self.number):
            raise ValueError(
                f"{_LOAD} needs the files of a rank in its directory; {self.name} has those of "
                f"rank {piece.rank}"
            )
        told = (piece.world, piece.resumption)
        if not self.attempts or (self.like.world, self.like.resumption) != told:
            first_step = -1 if piece.resumption is None else piece.resumption.first_step
            number = sum(each[:2] == (first_step, piece.world) for each in self.attempts)
            self.attempts.append(_Attempt(first_step, piece.world, number))
        self.logged.extend(piece.logged)
        self.like = piece
        if len(piece):
            self.pieces.append(piece.at(range(len(piece))))

    @property
    def last_step(self) -> int:
        """Of those that are not merged; -1 without any."""
        return self.pieces[-1].last_step if self.pieces else -1

    def take(self, step: int) -> Records:
        """The next ones up to a step, which are then no longer there."""
        if not self.pieces:
            return self.like.at([])
        piece = self.pieces.popleft()
        rest = piece.between(step + 1)
        if len(rest):
            self.pieces.appendleft(rest)
        return piece.between(end=step + 1)

    def skip(self, step: int) -> None:
        """Leave out those before a step."""
        while self.pieces and self.pieces[0].first_step < step:
            self.take(step - 1)

    def attempt_at(self, step: float) -> _Attempt | None:
        """The last one that this step is of."""
        found = [each for each in self.attempts if each.first_step <= step]
        return found[-1] if found else None


def merge(
    ranks: Sequence[Rank],
    replicated: bool | None = None,
    *,
    end: float = math.inf,
    quiet: bool = False,
) -> Records:
    """The union of all ranks' rows at the steps before an end that all have, not merged before."""
    # Where a run was resumed with other ranks, all are those that it had in a step. ValueError for
    # other bins, other ranges, replicas that are not equal, and ranks of several runs.
    _check_one_run(ranks)
    union = _Union(_MERGE, [rank.number for rank in ranks], [rank.like for rank in ranks])
    left_out, superseded = set[int](), set[int]()
    leader = min(ranks, key=lambda rank: rank.number)
    n_bytes = min(_MOST_BYTES, _MOST_BYTES_OF_ALL // len(ranks))
    bounds = sorted({each.first_step for rank in ranks for each in rank.attempts} | {end})
    while True:
        coming = [rank.pieces[0] for rank in ranks if rank.pieces]
        start = min([piece.first_step for piece in coming], default=math.inf)
        if start >= end:
            break
        world = (leader.attempt_at(start) or leader.attempts[0]).world
        going = [rank for rank in ranks if world is None or rank.number < world] or list(ranks)
        reached = min([piece.reach(n_bytes) for piece in coming])
        until = int(min([reached, *(bound - 1 for bound in bounds if bound > start)]))
        taken = [rank.take(until) for rank in ranks]
        taken = [each for each, rank in zip(taken, ranks, strict=True) if rank in going]
        some = [{record.step for record in each.records} for each in taken]
        if len({rank.attempt_at(start) for rank in going if rank.is_journal} - {None}) > 1:
            superseded |= set[int].union(*some)
            continue
        steps = set[int].intersection(*some)
        left_out |= set[int].union(*some) - steps
        if steps:
            parts = [told_of_replicas(_MERGE, each.of_steps(steps), replicated) for each in taken]
            union.add([rank.number for rank in going], parts)
            del parts
    if left_out and not quiet:
        warn(
            f"{_MERGE} leaves out {len(left_out)} steps that not all ranks have: "
            f"{ranges_of(sorted(left_out))}"
        )
    if superseded and not quiet:
        warn(
            f"{_MERGE} leaves out {len(superseded)} steps that were superseded when the run was "
            f"resumed, of which some ranks lack the new records: {ranges_of(sorted(superseded))}"
        )
    scalars = Scalars()
    for rank in ranks:
        scalars.extend(_in_force(rank, ranks).between(end=end), f"rank{rank.number}/")
        rank.logged = rank.logged.between(end)
    return union.records(scalars, [rank.like for rank in ranks])


def _check_one_run(ranks: Sequence[Rank]) -> None:
    """Refuse ranks that did not begin together; one that came when a run was resumed did not."""
    begun = [rank for rank in ranks if rank.attempts[0].first_step < 0]
    for rank in begun[1:]:
        first = begun[0]
        worlds = [each.attempts[0].world for each in (first, rank)]
        if None not in worlds and worlds[0] != worlds[1]:
            raise ValueError(
                f"{_MERGE} needs the ranks of one run; {first.name} is of a run of {worlds[0]} "
                f"ranks, {rank.name} of one of {worlds[1]}"
            )
        runs = [each.like.run for each in (first, rank)]
        if None not in runs and runs[0] != runs[1]:
            raise ValueError(
                f"{_MERGE} needs the ranks of one run; {first.name} and {rank.name} are of two"
            )


def _in_force(rank: Rank, ranks: Sequence[Rank]) -> Scalars:
    """Scalars of a rank that no other rank has superseded, when the run was resumed."""
    others = [other for other in ranks if other.is_journal] if rank.is_journal else []
    starts = sorted({max(each.first_step, 0) for other in others for each in other.attempts})
    kept = rank.logged.between(end=starts[0]) if starts else rank.logged
    for start, end in pairwise([*starts, math.inf]):
        mine = rank.attempt_at(start)
        if all(other.attempt_at(start) == mine for other in others if mine in other.attempts):
            kept.extend(rank.logged.between(start, end))
    return kept


def ranges_of(numbers: Sequence[int]) -> str:
    """Rising numbers in words: ``0 to 3, 5``; of many the first and the last."""
    spans: list[list[int]] = []  # the first and the last of each
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [f"{first}" if first == last else f"{first} to {last}" for first, last in spans]
    return ", ".join(texts if len(texts) < 5 else [texts[0], "...", texts[-1]])


def own_directory(path: Path, rank: int | None) -> Path:
    """Where in a run's directory a rank writes; a process that is no rank writes to it directly."""
    others = rank_directories(path) if rank is None else reading.segments(path)
    if others:
        what = "records of ranks" if rank is None else "records of a process without ranks"
        raise ValueError(f"watch() needs a directory of its own; path is {path}, which has {what}")
    return path if rank is None else path / f"rank-{rank}"


def rank_directories(path: Path) -> list[Path]:
    """Those in a run's directory that have files of records, by rank."""
    if not path.is_dir():
        return []
    folders = [each for each in path.iterdir() if _NAME.fullmatch(each.name)]
    folders = [each for each in folders if reading.segments(each)]
    return sorted(folders, key=lambda folder: (_number_of(folder), folder))


def directories(path: Path) -> list[Path]:
    """As `rank_directories`; ValueError for two of one rank, or for records of no rank beside."""
    folders = rank_directories(path)
    for a, b in pairwise(folders):
        if _number_of(a) == _number_of(b):
            raise ValueError(
                f"{_LOAD} needs one directory for each rank; {a} and {b} are both of rank "
                f"{_number_of(a)}"
            )
    if folders and reading.segments(path):
        raise ValueError(
            f"{_LOAD} needs the files of one run; {path} has those of one process and of "
            f"{len(folders)} ranks"
        )
    return folders


def stats_of(path: Path) -> dict[Path, os.stat_result]:
    """All files of a run that are there, and what the system says of each."""
    folders, found = [path, *rank_directories(path)], {}
    files = [file for folder in folders for file in reading.segments(folder)]
    for file in files if path.is_dir() else [path]:
        with suppress(FileNotFoundError):  # it has gone meanwhile
            found[file] = file.stat()
    return found


def load(path: Path, replicated: bool | None = None) -> Records:
    """Read a file, a directory of one process, or one of several ranks, which are merged."""
    folders = directories(path)
    if not folders:
        return reading.load(path)
    ranks = []
    for folder in folders:
        with suppress(CutOffError):  # within its first block
            ranks.append(rank_of(folder, reading.pieces(folder)))
    if not ranks:
        raise ValueError(f"{_LOAD} needs a directory that watch() wrote; {path} has no records")
    merged = reading.load(folders[0]) if len(folders) == 1 else merge(ranks, replicated)
    _tell_lacking(f"{_LOAD} lacks {{}} of {{}} ranks in {path}", ranks)
    return merged


def merge_parts(parts: Sequence[Records | Path], replicated: bool | None) -> Records:
    """As `History.merge`."""
    if len(parts) == 1 and isinstance(parts[0], Path) and rank_directories(parts[0]):
        return load(parts[0], replicated)
    found: list[tuple[str, Records | Path]] = []
    for at, part in enumerate(parts):
        if isinstance(part, Records):
            found.append((f"number {at} of the parts", part))
        else:
            found += [(str(each), each) for each in directories(part) or [part]]
    paths = [os.path.realpath(each) for _, each in found if isinstance(each, Path)]
    if twice := [path for at, path in enumerate(paths) if path in paths[:at]]:
        raise ValueError(f"{_MERGE} needs each path once; {twice[0]} is there twice")
    ranks: list[Rank] = []
    # Of the first part of each rank, and of none: a run that is merged already has none.
    names: dict[int | None, str] = {}
    error: CutOffError | None = None
    for at, (name, part) in enumerate(found):
        is_journal = isinstance(part, Path) and part.is_dir()
        try:
            pieces = [part] if isinstance(part, Records) else list(reading.pieces(part))
        except CutOffError as cut_off:  # within its first block
            if not (is_journal and _NAME.fullmatch(Path(name).name)):
                raise
            error = cut_off
            continue
        rank = pieces[0].rank
        if rank is not None and rank in names:
            raise ValueError(f"{_MERGE} needs each rank once; {name} is another one of rank {rank}")
        names.setdefault(rank, name)
        number = at if rank is None else rank
        ranks.append(Rank(number, name, pieces, is_journal=is_journal))
    if error and not ranks:
        raise error
    if None in names and len(names) > 1:
        of = next(each for each in names if each is not None)
        raise ValueError(
            f"{_MERGE} needs parts of which each is of a rank, or none; {names[None]} is of none, "
            f"and {names[of]} of rank {of}"
        )
    merged = merge(ranks, replicated)
    if None not in names:
        _tell_lacking(f"{_MERGE} lacks {{}} of {{}} ranks", ranks)
    return merged


def rank_of(folder: Path, pieces: Iterable[Records]) -> Rank:
    return Rank(_number_of(folder), str(folder), pieces, is_journal=True)


def _number_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _tell_lacking(lacks: str, ranks: Sequence[Rank]) -> None:
    world = max(each.world or 0 for rank in ranks for each in rank.attempts)
    if lacking := sorted(set(range(world)) - {rank.number for rank in ranks}):
        warn(f"{lacks.format(len(lacking), world)}: {ranges_of(lacking)}")
