"""`Follower`: a run read while it is written, what is new at each look."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gradstat.history import reading
from gradstat.history.file import SUFFIX
from gradstat.history.ranks import directories, merge, rank_of, stats_of
from gradstat.history.records import Records
from gradstat.util import CutOffError

_BYTES = 4 << 20  # of a file that are looked through at a look, or a block more

# Device, inode, time of the last change where it is never appended to, whether it has a block.
_File = tuple[int, int, int, bool]
_Files = dict[Path, tuple[_File, int]]  # and how many bytes


class Look(NamedTuple):
    """What a look has found."""

    records: Records | None  # new ones, if there are any
    is_anew: bool  # these are the first ones, and those before no longer hold
    is_all: bool  # there are no more at the moment


class Follower:
    """Reads a run that is written meanwhile: a few megabytes at each look, each record once."""

    # A run that is resumed, replaced, or joined by another rank is read from its beginning again.
    # It need not be there yet. With ``newest`` the records that were written last are enough: those
    # of one process come block by block, unread.

    def __init__(self, path: Path, *, newest: bool = False) -> None:
        self._path, self._is_newest = path, newest
        self.written_s = 0.0  # when its files were written to last, since 1970; 0: there are none
        self._files: _Files = {}
        self._source: Iterator[Records | None] | None = None
        self._begun: set[tuple[int, int]] = set()  # files that have a whole block
        self._error: ValueError | None = None  # of these files, which are damaged
        self._tried_again: _Files = {}

    def look(self) -> Look | None:
        """Read what is new; ``None`` where there are no files."""
        # OSError if a file cannot be opened, ValueError if one is damaged or another kind: it is
        # not read again before it changes.
        found = self._find()
        if not found:
            self._files, self._source = {}, None
            return None
        before, self._files = self._files, found
        if self._error is not None and found == before:
            raise self._error.with_traceback(None)
        self._error = None
        is_anew = self._source is None or not _goes_on(before, found)
        if self._source is None or is_anew:
            self._source = _followed(self._path, newest=self._is_newest)
        try:
            records = next(self._source, None)
        except (OSError, ValueError) as error:
            self._source = None
            if not is_anew and found != self._tried_again:
                # Another run may have taken the place of this one.
                self._tried_again = found
                return self.look()
            # A run that begins has files of number 0 alone, without a whole block for a moment.
            begins = self._path.is_dir() and not any(int(path.stem) for path in found)
            if is_anew and begins and isinstance(error, CutOffError):
                return Look(None, is_anew=False, is_all=True)
            self._error = error if isinstance(error, ValueError) else None
            raise
        return Look(records, is_anew, is_all=records is None)

    def _find(self) -> _Files:
        found: _Files = {}
        self.written_s = 0.0
        for path, stat in stats_of(self._path).items():
            is_journal, file = path.suffix == SUFFIX, (stat.st_dev, stat.st_ino)
            # A resumed run's file is left out until it has a block, from which on it supersedes.
            if is_journal and file not in self._begun and reading.is_begun(path):
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


def _followed(path: Path, *, newest: bool) -> Iterator[Records | None]:
    folders = directories(path)
    if len(folders) > 1:
        yield from _followed_ranks(folders, newest=newest)
        return
    for piece in reading.followed(folders[0] if folders else path, 1 if newest else _BYTES):
        if piece is not None and not newest:
            piece.verify()
        yield piece


def _followed_ranks(folders: list[Path], *, newest: bool) -> Iterator[Records | None]:
    """Records that all ranks have, merged as `ranks.load` merges them."""
    sources = [reading.followed(folder, 1 if newest else _BYTES) for folder in folders]
    ranks = [rank_of(folder, []) for folder in folders]
    while True:
        new = [next(source) for source in sources]
        for rank, piece in zip(ranks, new, strict=True):
            if piece is not None:
                rank.add(piece)
        is_all = all(piece is None for piece in new)
        common = min(rank.last_step for rank in ranks)
        if common >= 0 and (is_all or not newest):
            if newest:  # the last block of each, or what all have of it
                recent = min(rank.pieces[-1].first_step for rank in ranks)
                for rank in ranks:
                    rank.skip(min(recent, common))
            yield merge(ranks, end=common + 1, quiet=True)
        elif is_all:
            yield None
