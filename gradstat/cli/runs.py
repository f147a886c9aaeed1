"""The runs that commands are given: one to read, or several to serve (`RunList`)."""

from __future__ import annotations

import os
import threading
import time
import zipfile
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from gradstat.history import History
from gradstat.history.file import open_regular
from gradstat.history.ranks import files_of, stats_of
from gradstat.report.live_run import LiveRun
from gradstat.util import escaped

_MOST_SIDE_BY_SIDE = 4
_FIRST_NUMBER = 1000  # of runs of a directory
_WRITTEN_S = 60.0  # since the last change; a run is taken to be going on for so long


def load(path: Path) -> History:
    """Read a run that has records.

    Args:
        path: file or directory.

    Returns:
        Its history.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is damaged, another kind of file, or has no records.
    """
    history = History.load(path)
    if len(history) == 0:
        raise ValueError(f"{path} has no records yet")
    return history


def check_output(run: Path, output: Path) -> None:
    """Refuse to write over a run that is read."""
    files = [run, *files_of(run)]
    if output.exists() and any(file.exists() and output.samefile(file) for file in files):
        raise ValueError(f"{output} is the run itself, or a file of it; write to another one")


def run_name(path: Path) -> str:
    """Name of a run: that of its file without the suffix, or of its directory."""
    path = path.resolve()
    return path.stem if path.is_file() or path.suffix == ".npz" else path.name


class RunList:
    """Runs by number. A number stays that of its run, also when others come and go.

    Those that were given have theirs by their place, those of directories by their names, so that
    a server that is started again knows them by the same.

    Args:
        paths: runs, which need not be there yet, and directories of runs.
    """

    def __init__(self, paths: list[Path]) -> None:
        # The process may change its directory later.
        self._paths = list(dict.fromkeys(path.absolute() for path in paths))
        self._lock = threading.Lock()
        self._runs = {at: LiveRun(path) for at, path in enumerate(self._paths)}
        self._numbers = {path: at for at, path in enumerate(self._paths)}

    @property
    def is_single(self) -> bool:
        """Whether there is one run, rather than several or a directory of them."""
        return len(self._paths) == 1 and not _is_directory_of_runs(self._paths[0])

    @property
    def title(self) -> str:
        """Heading of the list."""
        return run_name(self._paths[0]) if len(self._paths) == 1 else "Runs"

    def side_by_side(self) -> list[int]:
        """The runs that are shown at first: all, if they were given one by one and are few."""
        given = [self._number(path) for path in self._paths if not _is_directory_of_runs(path)]
        return given if len(given) == len(self._paths) <= _MOST_SIDE_BY_SIDE else []

    def find(self, number: int) -> LiveRun | None:
        """The run of a number, if there is one."""
        if number not in self._runs:
            self.listed()  # it may be one of a directory
        return self._runs.get(number)

    def name(self, run: LiveRun) -> str:
        """The heading of a run, or its path where others have the same heading."""
        return self._headings()[run.path]

    def listed(self) -> list[dict[str, Any]]:
        """Number, name, seconds since the last change, and bytes of each run.

        Within a directory those that are being written come first, and then the newest. Seconds are
        ``None`` where there is nothing yet.
        """
        groups = [
            [each for each in path.iterdir() if _is_run(each)]
            if _is_directory_of_runs(path)
            else [path]
            for path in self._paths
        ]
        numbers = {path: self._number(path) for group in groups for path in group}
        headings = self._headings()
        found = []
        for group in groups:
            lines = [_line(numbers[path], headings[path], path) for path in group]
            # Those that are being written keep their places, whichever changed last.
            found += sorted(lines, key=lambda line: (_minutes(line["quiet"]), line["name"]))
        return found

    def _headings(self) -> dict[Path, str]:
        """The name of each run, or its path where others have the same name."""
        names = {run.path: run_name(run.path) for run in list(self._runs.values())}
        n_of_name = Counter(names.values())
        return {path: name if n_of_name[name] == 1 else str(path) for path, name in names.items()}

    def _number(self, path: Path) -> int:
        with self._lock:
            if path not in self._numbers:
                number = _FIRST_NUMBER + zlib.crc32(os.fsencode(path))
                while number in self._runs:
                    number += 1
                self._numbers[path], self._runs[number] = number, LiveRun(path)
            return self._numbers[path]


def _line(number: int, name: str, path: Path) -> dict[str, Any]:
    files = _files_of(path).values()
    quiet = time.time() - max(each.st_mtime for each in files) if files else None
    return {
        "number": number,
        "name": escaped(name),
        "quiet": quiet and max(0.0, round(quiet, 1)),
        "bytes": sum(each.st_size for each in files),
    }


def _minutes(quiet: float | None) -> float:
    """Seconds since a run was written to; 0 while it is being written."""
    return 0.0 if quiet is None or quiet < _WRITTEN_S else quiet


def _files_of(path: Path) -> dict[Path, os.stat_result]:
    """As `stats_of`; none if the run has gone or may not be read."""
    try:
        return stats_of(path)
    except OSError:
        return {}


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # it has gone, or may not be looked at
        return None


def _is_directory_of_runs(path: Path) -> bool:
    if not path.is_dir() or _files_of(path):
        return False
    # That the directory itself cannot be read is an error.
    return any(_is_run(each) for each in path.iterdir())


def _is_run(path: Path) -> bool:
    stat = None if path.name.startswith(".") else _stat(path)
    if stat is None:
        return False
    if S_ISDIR(stat.st_mode):
        return bool(_files_of(path))
    return path.suffix == ".npz" and _is_saved(path, stat.st_mtime_ns)


@lru_cache(4096)
def _is_saved(path: Path, _: int) -> bool:
    """Whether `History.save` wrote a file, by the names in it; asked anew when its time changes."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as members:
            return {"run.npy", "integers.npy"} <= set(members.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):  # no file, as a pipe is none
        return False
