"""`Journal`: records on their way to a directory, a few seconds of them at a time."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gradstat.history import History, archive

_INTERVAL_S = 5.0
_MOST_BYTES = 64 << 20  # kept for a disk that cannot be written


class Journal:
    """Appends records to a directory as numbered files, each whole or not there.

    What cannot be written is kept and tried again; the first time a warning says so.

    Args:
        path: the directory; it is made if need be.
        like: a history of the same layers and bins.

    Raises:
        ValueError: records are there already.
    """

    def __init__(self, path: Path, like: History) -> None:
        found = len(archive.segments(path))
        self._path, self._like = path, like
        self._buffer = History(like.rows, like.bins)
        self._n_segments = 0
        self._has_warned = False
        self._process = os.getpid()
        # The first file has no records: it shows at once whether the directory can be written, and
        # keeps other runs and ranks away.
        if found:
            raise _refusal(path, found)
        self._write()

    def append(self, step: int, *arrays: NDArray[Any]) -> None:
        """Take a record, as `History.append`; once in a while write all that are waiting."""
        self._buffer.append(step, *arrays)
        if time.monotonic() >= self._due_s:
            self.flush()

    def flush(self) -> None:
        """Write all records that are waiting."""
        # A forked process has a copy of records that are not its own.
        if len(self._buffer) and os.getpid() == self._process:
            self._write()

    def _write(self) -> None:
        self._due_s = time.monotonic() + _INTERVAL_S
        self._buffer.origins[:] = self._like.origins
        file = self._path / archive.segment_name(self._n_segments)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            archive.write(file, self._buffer.to_records(), compress=False, new=True)
        except OSError as error:
            if not len(self._buffer) and isinstance(error, FileExistsError) and file.exists():
                # Another one has begun to write there since it was looked at.
                raise _refusal(self._path, 1) from error
            self._give_notice(error)
            if self._buffer.nbytes < _MOST_BYTES:
                return
        else:
            self._n_segments += 1
        self._buffer = History(self._like.rows, self._like.bins)

    def _give_notice(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"watch() cannot write to {self._path} and keeps its records in memory: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def _refusal(path: Path, found: int) -> ValueError:
    return ValueError(
        f"watch() needs a directory without records; path is {path}, which has {found} files of "
        f"them"
    )
