"""The run that a command is given: read, watched, and not written over."""

from __future__ import annotations

from pathlib import Path

from gradstat.files import CutOffError
from gradstat.history import History, archive


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
    files = [run, *(archive.segments(run) if run.is_dir() else [])]
    if output.exists() and any(file.exists() and output.samefile(file) for file in files):
        raise ValueError(f"{output} is the run itself, or a file of it; write to another one")


def run_name(path: Path) -> str:
    """Name of a run: that of its file without the suffix, or of its directory."""
    path = path.resolve()
    return path.name if path.is_dir() else path.stem


def state(path: Path) -> tuple[int, ...]:
    """Something that changes whenever the run's files do."""
    files = archive.segments(path) if path.is_dir() else [path]
    newest = files[-1].stat() if files else None
    return (len(files), newest.st_mtime_ns, newest.st_size) if newest else (0,)


def read_newest(path: Path) -> History | None:
    """The records that were written last; none of a directory that is only begun."""
    try:
        return History.from_records(archive.newest(path))
    except CutOffError:
        if path.is_dir():
            return None
        raise
