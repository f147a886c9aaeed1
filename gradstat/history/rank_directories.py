"""Directories of distributed runs: one in them for each rank, which together are one run."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gradstat.files import CutOffError
from gradstat.history import archive
from gradstat.history.alignment import ranges_of
from gradstat.history.merge_files import RankRecords, bytes_at_a_time, merge_files
from gradstat.history.records import Records, concatenate

_NAME = re.compile(r"rank-(\d+)")

Read = Callable[[Path], Iterator[Records]]


def own_directory(path: Path, rank: int | None) -> Path:
    """Where in a run's directory a rank writes; a process that is none writes to itself.

    Raises:
        ValueError: it has records of a process that was no rank, or of ranks.
    """
    others = rank_directories(path) if rank is None else _segments(path)
    if others:
        what = "records of ranks" if rank is None else "records of a process without ranks"
        raise ValueError(f"watch() needs a directory of its own; path is {path}, which has {what}")
    return path if rank is None else path / f"rank-{rank}"


def rank_directories(path: Path) -> list[Path]:
    """Those in a run's directory that have files of records, by rank."""
    if not path.is_dir():
        return []
    found = [(each, _NAME.fullmatch(each.name)) for each in path.iterdir()]
    ranks = sorted((int(match[1]), each) for each, match in found if match and each.is_dir())
    return [each for _, each in ranks if archive.segments(each)]


def files_of(path: Path) -> list[Path]:
    """All files of a run."""
    if not path.is_dir():
        return [path]
    return [file for each in (path, *rank_directories(path)) for file in archive.segments(each)]


def read(path: Path, replicated: bool | None = None) -> Records:
    """Read a file, a directory of one process, or one of several ranks as one run.

    Args:
        path: of what `archive.write` or a journal wrote.
        replicated: of ranks, as for `History.merge`.

    Returns:
        Its records, those of several ranks merged.

    Raises:
        As `archive.read`, and ValueError as `merge_files`.
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
        As `read`, and ValueError for a rank that comes twice.
    """
    if len(parts) == 1 and not isinstance(parts[0], Records) and rank_directories(parts[0]):
        return read(parts[0], replicated)
    found: list[Records | Path] = []
    for part in parts:
        folders = [] if isinstance(part, Records) else rank_directories(part)
        found += folders or [part]
    n_bytes = bytes_at_a_time(len(found))
    ranks: list[RankRecords] = []
    seen: set[int] = set()
    for at, part in enumerate(found):
        pieces = iter([part]) if isinstance(part, Records) else archive.pieces(part, n_bytes)
        first = next(pieces)
        rank = at if first.rank is None else first.rank
        if rank in seen:
            raise ValueError(
                f"History.merge() needs each rank once; number {at} of the parts is another one of "
                f"rank {rank}"
            )
        seen.add(rank)
        is_journal = isinstance(part, Path) and part.is_dir()
        ranks.append(RankRecords(rank, first, pieces, is_journal=is_journal))
    return merge_files(ranks, replicated)


def _read_ranks(path: Path, read: Read, replicated: bool | None, *, quiet: bool) -> Records:
    folders = rank_directories(path)
    if not folders:
        return concatenate(list(read(path)))
    if archive.segments(path):
        raise ValueError(
            f"History.load() needs the files of one run; {path} has those of one process and of "
            f"{len(folders)} ranks"
        )
    if len(folders) == 1:
        records = concatenate(list(read(folders[0])))
        if not quiet:
            _tell_lacking(path, {_number(folders[0])}, records.world or 0)
        return records
    ranks: list[RankRecords] = []
    world = 0
    for folder in folders:
        pieces = read(folder)
        try:
            first = next(pieces)
        except CutOffError:  # within its first block
            continue
        world = max(world, first.world or 0)
        ranks.append(RankRecords(_number(folder), first, pieces, is_journal=True))
    if not ranks:
        raise ValueError(
            f"History.load() needs a directory that watch() wrote; {path} has no records"
        )
    merged = merge_files(ranks, replicated, quiet=quiet)
    if not quiet:
        _tell_lacking(path, {rank.rank for rank in ranks}, world)
    return merged


def _number(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _segments(path: Path) -> list[Path]:
    return archive.segments(path) if path.is_dir() else []


def _tell_lacking(path: Path, seen: set[int], world: int) -> None:
    if lacking := sorted(set(range(world)) - seen):
        warnings.warn(
            f"History.load() lacks {len(lacking)} of {world} ranks in {path}: {ranges_of(lacking)}",
            RuntimeWarning,
            stacklevel=5,
        )
