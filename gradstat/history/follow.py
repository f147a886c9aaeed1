"""`Follower`: a run read while it is written, what is new at each look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gradstat.history import archive, rank_directories
from gradstat.history.merge_files import RankRecords, bytes_at_a_time, merge_files
from gradstat.history.records import Records, concatenate
from gradstat.util import CutOffError

_BYTES = 4 << 20  # of a file that are read at a look, or a block more

# Device, inode, time of the last change where it is never appended to, whether it has a block.
_File = tuple[int, int, int, bool]
_Files = dict[Path, tuple[_File, int]]  # and how many bytes


class Look(NamedTuple):
    """What a look has found.

    Args:
        records: new ones, if there are any.
        is_anew: whether these are the first ones, and those before no longer hold.
        is_all: whether there are no more at the moment.
    """

    records: Records | None
    is_anew: bool
    is_all: bool


class Follower:
    """Reads a run that is written meanwhile: a few megabytes at each look, each record once.

    A run that is resumed, replaced, or joined by another rank is read from its beginning again.

    Args:
        path: file or directory, which need not be there yet.

    Attributes:
        written_s: when its files were written to last, in seconds since 1970; 0: there are none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.written_s = 0.0
        self._files: _Files = {}
        self._source: Iterator[Records | None] | None = None
        self._begun: set[tuple[int, int]] = set()  # files that have a whole block
        self._error: ValueError | None = None  # of these files

    def look(self) -> Look | None:
        """Read what is new.

        Returns:
            ``None`` where there are no files.

        Raises:
            OSError: a file cannot be opened.
            ValueError: one is damaged or another kind. It is not read again before it changes.
        """
        found = self._find()
        if not found:
            self._files, self._source = {}, None
            return None
        is_anew = self._source is None or not _goes_on(self._files, found)
        if self._error is not None and found == self._files:
            raise self._error.with_traceback(None)
        self._files, self._error = found, None
        if self._source is not None and not is_anew:
            try:
                records = next(self._source, None)
            except (OSError, ValueError):
                is_anew = True  # another run may have taken the place of this one
        if is_anew:
            self._source = _followed(self._path)
            try:
                records = next(self._source, None)
            except (OSError, ValueError) as error:
                self._source = None
                # A run that begins has files of number 0 alone, without a whole block for a moment.
                begins = self._path.is_dir() and not any(int(path.stem) for path in found)
                if isinstance(error, CutOffError) and begins:
                    return Look(None, is_anew=False, is_all=True)
                self._error = error if isinstance(error, ValueError) else None
                raise
        return Look(records, is_anew, is_all=records is None)

    def _find(self) -> _Files:
        found: _Files = {}
        self.written_s = 0.0
        for path, stat in rank_directories.stats_of(self._path).items():
            is_journal, file = path.suffix == archive.SUFFIX, (stat.st_dev, stat.st_ino)
            # A resumed run's file is left out until it has a block, from which on it supersedes.
            if is_journal and file not in self._begun and archive.is_begun(path):
                self._begun.add(file)
            changed = 0 if is_journal else stat.st_mtime_ns
            found[path] = (*file, changed, file in self._begun), stat.st_size
            self.written_s = max(self.written_s, stat.st_mtime)
        return found


def _goes_on(before: _Files, now: _Files) -> bool:
    """Whether the same files are there, none of them shorter."""
    return before.keys() == now.keys() and all(
        before[path][0] == now[path][0] and before[path][1] <= now[path][1] for path in now
    )


def read_quietly(path: Path) -> Records | None:
    """All records that a run has, without a warning of those that are being written."""
    follower, parts = Follower(path), []
    while (look := follower.look()) is not None and look.records is not None:
        parts.append(look.records)
    return concatenate(parts) if parts else None


def _followed(path: Path) -> Iterator[Records | None]:
    folders = rank_directories.directories(path)
    if folders and archive.segments(path):
        yield rank_directories.read(path)  # which refuses it
    elif len(folders) > 1:
        yield from _followed_ranks(folders)
    else:
        yield from archive.followed(folders[0] if folders else path, _BYTES)


def _followed_ranks(folders: list[Path]) -> Iterator[Records | None]:
    """Records that all ranks have, merged as `rank_directories.read` merges them."""
    n_bytes = bytes_at_a_time(len(folders))
    sources = [archive.followed(folder, n_bytes) for folder in folders]
    ranks: list[RankRecords] = []
    held: list[list[Records]] = [[] for _ in folders]  # of each rank what others have yet to write
    while True:
        new = [next(source, None) for source in sources]
        for pieces, piece in zip(held, new, strict=True):
            pieces += [] if piece is None else [piece]
        if all(piece is None for piece in new):
            yield None
        last = [
            max([step for each in pieces for step in each.steps[-1:]] or [-1]) for pieces in held
        ]
        if min(last) < 0:
            continue
        if not ranks:
            numbers = map(rank_directories.number_of, folders)
            ranks = [
                RankRecords(number, pieces[0].before(0), iter(()), is_journal=True)
                for number, pieces in zip(numbers, held, strict=True)
            ]
        end = min(last) + 1
        for rank, pieces in zip(ranks, held, strict=True):
            rank.go_on([piece.before(end) for piece in pieces])
        held = [_since(pieces, end) for pieces in held]
        yield merge_files(ranks, quiet=True)


def _since(pieces: list[Records], step: int) -> list[Records]:
    """The rest of some pieces, from a step on."""
    rest = [replace(each.since(step), scalars=each.scalars.between(step)) for each in pieces]
    return [each for each in rest if each.steps or each.scalars.names]
