"""The run that a command is given: read, watched, and not written over."""

from __future__ import annotations

from pathlib import Path

from gradstat.files import CutOffError
from gradstat.history import History, rank_directories


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
    files = [run, *rank_directories.files_of(run)]
    if output.exists() and any(file.exists() and output.samefile(file) for file in files):
        raise ValueError(f"{output} is the run itself, or a file of it; write to another one")


def run_name(path: Path) -> str:
    """Name of a run: that of its file without the suffix, or of its directory."""
    path = path.resolve()
    return path.stem if path.is_file() or path.suffix == ".npz" else path.name


def state(path: Path) -> tuple[int, ...] | None:
    """Something that changes whenever the run's files do; ``None`` before there are any."""
    found = list(rank_directories.stats_of(path).values())
    if not found:
        return None
    return (len(found), *(number for file in found for number in (file.st_mtime_ns, file.st_size)))


def read_newest(path: Path) -> History | None:
    """The records that were written last; ``None`` for a directory that is only begun."""
    try:
        return History.from_records(rank_directories.newest(path))
    except CutOffError:
        if path.is_dir():
            return None
        raise
