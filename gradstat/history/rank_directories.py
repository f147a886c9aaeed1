"""Directories of distributed runs, in which each rank has one; together they are one run."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from gradstat.history import archive
from gradstat.history.alignment import ranges_of
from gradstat.history.merge_files import RankRecords, bytes_at_a_time, merge_files
from gradstat.history.records import Records, concatenate
from gradstat.util import CutOffError, warn

_NAME = re.compile(r"rank-(\d+)")

_LOAD, _MERGE = "History.load()", "History.merge()"

Read = Callable[[Path], Iterator[Records]]


def own_directory(path: Path, rank: int | None) -> Path:
    """Where in a run's directory a rank writes; a process that is no rank writes to it directly.

    Raises:
        ValueError: it has records of a process that was no rank, or of ranks.
    """
    others = rank_directories(path) if rank is None else archive.segments(path)
    if others:
        what = "records of ranks" if rank is None else "records of a process without ranks"
        raise ValueError(f"watch() needs a directory of its own; path is {path}, which has {what}")
    return path if rank is None else path / f"rank-{rank}"


def rank_directories(path: Path) -> list[Path]:
    """Those in a run's directory that have files of records, by rank."""
    if not path.is_dir():
        return []
    folders = [each for each in path.iterdir() if _NAME.fullmatch(each.name)]
    folders = [each for each in folders if archive.segments(each)]
    return sorted(folders, key=lambda folder: (number_of(folder), folder))


def files_of(path: Path) -> list[Path]:
    """All files of a run."""
    if not path.is_dir():
        return [path]
    return [file for each in (path, *rank_directories(path)) for file in archive.segments(each)]


def stats_of(path: Path) -> dict[Path, os.stat_result]:
    """All files of a run that are there, and what the system says of each."""
    found = {}
    for file in files_of(path):
        with suppress(FileNotFoundError):  # it has gone meanwhile
            found[file] = file.stat()
    return found


def read(path: Path, replicated: bool | None = None) -> Records:
    """Read a file, a directory of one process, or one of several ranks as one run.

    Args:
        path: of what `archive.write` or a journal wrote.
        replicated: of ranks, as for `History.merge`.

    Returns:
        Its records, those of several ranks merged.

    Raises:
        As `archive.pieces`, and ValueError as `merge_files`.
    """
    folders = rank_directories(path)
    n_bytes = bytes_at_a_time(len(folders)) if len(folders) > 1 else math.inf
    return _read_ranks(path, lambda each: archive.pieces(each, n_bytes), replicated, quiet=False)


def newest(path: Path) -> Records:
    """Read the newest records alone, as `archive.newest`; of ranks those that all have.

    Raises:
        As `read`.
    """
    found = _read_ranks(path, lambda each: iter([archive.newest(each)]), None, quiet=True)
    # Ranks may have written last at different times.
    return found if found.steps or not rank_directories(path) else read(path)


def merge_parts(parts: Sequence[Records | Path], replicated: bool | None) -> Records:
    """Merge what several ranks measured; files are read one after the other.

    Raises:
        As `read`, and ValueError for a path or a rank that comes twice, and for parts of which only
        some are of a rank.
    """
    if len(parts) == 1 and not isinstance(parts[0], Records) and rank_directories(parts[0]):
        return read(parts[0], replicated)
    found: list[tuple[str, Records | Path]] = []
    for at, part in enumerate(parts):
        if isinstance(part, Records):
            found.append((f"number {at} of the parts", part))
        else:
            found += [(str(each), each) for each in directories(part) or [part]]
    paths = [each.resolve() for _, each in found if isinstance(each, Path)]
    if twice := [path for at, path in enumerate(paths) if path in paths[:at]]:
        raise ValueError(f"{_MERGE} needs each path once; {twice[0]} is there twice")
    n_bytes = bytes_at_a_time(len(found))
    ranks: list[RankRecords] = []
    names: dict[int | None, str] = {}  # of the first part of each rank, and of none
    error: CutOffError | None = None
    for at, (name, part) in enumerate(found):
        pieces = iter([part]) if isinstance(part, Records) else archive.pieces(part, n_bytes)
        is_journal = isinstance(part, Path) and part.is_dir()
        try:
            first = next(pieces)
        except CutOffError as cut_off:  # within its first block
            if not (is_journal and _NAME.fullmatch(Path(name).name)):
                raise
            error = cut_off
            continue
        _check_rank(names, first.rank, name)
        number = at if first.rank is None else first.rank
        ranks.append(RankRecords(number, first, pieces, is_journal=is_journal))
    if error and not ranks:
        raise error
    merged = merge_files(ranks, replicated)
    if None not in names:
        _tell_lacking(f"{_MERGE} lacks {{}} of {{}} ranks", ranks, _worlds(ranks))
    return merged


def _check_rank(names: dict[int | None, str], rank: int | None, name: str) -> None:
    """Refuse a part of a rank that others are of, and parts of which only some are of a rank.

    Args:
        names: of the parts before, by rank, to which this one's is added.
        rank: of the part; ``None``: it is of none, such as a run that is merged already.
        name: of the part.
    """
    if rank is not None and rank in names:
        raise ValueError(f"{_MERGE} needs each rank once; {name} is another one of rank {rank}")
    names.setdefault(rank, name)
    if None in names and len(names) > 1:
        of = next(each for each in names if each is not None)
        raise ValueError(
            f"{_MERGE} needs parts of which each is of a rank, or none; {names[None]} is of none, "
            f"and {names[of]} of rank {of}"
        )


def _read_ranks(path: Path, read: Read, replicated: bool | None, *, quiet: bool) -> Records:
    folders = directories(path)
    if not folders:
        return concatenate(list(read(path)))
    if archive.segments(path):
        raise ValueError(
            f"{_LOAD} needs the files of one run; {path} has those of one process and of "
            f"{len(folders)} ranks"
        )
    ranks: list[RankRecords] = []
    for folder in folders:
        pieces = read(folder)
        try:
            first = next(pieces)
        except CutOffError:  # within its first block
            if len(folders) == 1:
                raise
            continue
        ranks.append(RankRecords(number_of(folder), first, pieces, is_journal=True))
    if not ranks:
        raise ValueError(f"{_LOAD} needs a directory that watch() wrote; {path} has no records")
    if len(folders) == 1:
        found = [first, *pieces]
        merged, worlds = concatenate(found), [each.world for each in found]
    else:
        merged, worlds = merge_files(ranks, replicated, quiet=quiet), _worlds(ranks)
    if not quiet:
        _tell_lacking(f"{_LOAD} lacks {{}} of {{}} ranks in {path}", ranks, worlds)
    return merged


def directories(path: Path) -> list[Path]:
    """As `rank_directories`, of each rank one."""
    folders = rank_directories(path)
    for a, b in pairwise(folders):
        if number_of(a) == number_of(b):
            raise ValueError(
                f"{_LOAD} needs one directory for each rank; {a} and {b} are both of rank "
                f"{number_of(a)}"
            )
    return folders


def number_of(folder: Path) -> int:
    """Rank of a directory of one."""
    return int(folder.name.partition("-")[2])


def _worlds(ranks: Sequence[RankRecords]) -> list[int | None]:
    return [each.world for rank in ranks for each in rank.attempts]


def _tell_lacking(lacks: str, ranks: Sequence[RankRecords], worlds: Sequence[int | None]) -> None:
    world = max(each or 0 for each in worlds)
    if lacking := sorted(set(range(world)) - {rank.rank for rank in ranks}):
        warn(f"{lacks.format(len(lacking), world)}: {ranges_of(lacking)}")
