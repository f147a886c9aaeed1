"""Records on disk: a ``.npz`` file, or a directory of files that a run writes as it goes on.

Both hold the same sections, arrays by name. docs/format.md has the layout.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

from gradstat.files import CutOffError, replacing
from gradstat.history import blocks, npz, sections
from gradstat.history.records import Records, check, concatenate

SUFFIX = ".gradstat"


def write(path: Path, records: Records, *, compress: bool = True) -> None:
    """Write a ``.npz`` file, which appears whole or not at all.

    Args:
        path: the file; one that is there is replaced.
        records: what it is to hold.
        compress: it; takes ten times as long.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as unfinished:
        npz.write(unfinished, sections.head(records) | sections.body(records), compress=compress)


def read(path: Path) -> Records:
    """Read a file, or all files of a directory.

    Args:
        path: of what `write` or a journal wrote.

    Returns:
        All its records. Those at the end of a directory's last file that are cut off are left out,
        with a warning.

    Raises:
        FileNotFoundError: there is no such file; another OSError: it cannot be opened.
        ValueError: a damaged file or one of another kind, a directory without files or without one
            of them.
    """
    if not path.is_dir():
        return _read_file(path).records
    files = _numbered(path)
    if not files:
        raise ValueError(
            f"History.load() needs a directory that watch() wrote; {path} has no records"
        )
    # The last first: it says where it found those before it cut off.
    parts: list[_File] = []
    found_bytes: dict[int, set[int]] = {}
    for number, file in reversed(list(enumerate(files))):
        may_end_early = number == len(files) - 1 or file.stat().st_size in found_bytes.get(
            number, ()
        )
        try:
            part = _read_file(file, may_end_early=may_end_early)
        except CutOffError:
            if not may_end_early or (number == 0 and not parts):
                raise
            _warn(file, "all of its records are lost")
            continue
        parts.insert(0, part)
        for before, n_bytes in enumerate(part.bytes_before):
            found_bytes.setdefault(before, set()).add(n_bytes)
    return _join(path, parts)


def newest(path: Path) -> Records:
    """Read the newest records alone: those of a directory that were written last, or of a file.

    Raises:
        As `read`.
    """
    files = segments(path) if path.is_dir() else []
    file = files[-1] if files else path
    return read(file) if file.is_dir() else _read_file(file, newest=True).records


def check_fits(path: Path, records: Records) -> None:
    """Refuse a directory with the records of other layers or bins than some.

    Raises:
        ValueError: it holds those of another run, it lacks a file, or it is damaged.
    """
    for file in reversed(_numbered(path)):
        try:
            found = _read_file(file, newest=True).records
        except CutOffError:
            continue
        if (found.rows, found.bins) != (records.rows, records.bins):
            raise ValueError(
                f"watch() needs the layers and bins of the run that it goes on with; path is "
                f"{path}, which has {len(found.rows)} rows over {found.bins}, and there are "
                f"{len(records.rows)} over {records.bins}"
            )
        return


def segments(path: Path) -> list[Path]:
    """Files of a directory, in their order."""
    return sorted(
        file for file in path.iterdir() if file.suffix in (SUFFIX, ".npz") and file.stem.isdigit()
    )


def segment_name(number: int) -> str:
    """Name of a file in a directory of them."""
    return f"{number:08}{SUFFIX}"


def _numbered(path: Path) -> list[Path]:
    """Files of a directory, none of which may be lacking."""
    files = segments(path)
    for number, file in enumerate(files):
        if file.name not in (segment_name(number), f"{number:08}.npz"):
            raise ValueError(
                f"History.load() needs all files that watch() wrote; {path} lacks number {number}"
            )
    return files


class _File(NamedTuple):
    """What a file holds.

    Args:
        records: all of them, or the newest.
        first_step: from which on those of files before it are superseded, if it says so.
        bytes_before: how long those files were when it was begun.
    """

    records: Records
    first_step: int | None
    bytes_before: list[int]


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file; any other, such as a pipe, is refused rather than waited for."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=opener) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"History.load() needs a regular file; {path} is none")
        yield file


def _read_file(path: Path, *, may_end_early: bool = True, newest: bool = False) -> _File:
    with _opened(path) as file:
        try:
            is_journal = file.read(len(blocks.MAGIC)) == blocks.MAGIC or path.suffix == SUFFIX
            if is_journal:
                reader = blocks.Reader(file)
                source, lost = _join_blocks(reader, newest)
                if lost and not may_end_early:
                    raise CutOffError(f"it is cut off; {lost}")
            else:
                source, lost = npz.Members(file), ""
            records = sections.to_records(source)
            check(records)
            first_step, bytes_before = sections.resumption(source) or (None, [])
        except MemoryError:
            raise
        except Exception as error:  # zipfile, zlib and NumPy meet damage with a dozen kinds
            kind = CutOffError if isinstance(error, CutOffError) else ValueError
            raise kind(
                f"History.load() needs a file that History.save() or watch() wrote; {path} is "
                f"damaged or another kind: {error}"
            ) from error
    if lost:
        _warn(path, lost)
    return _File(records, first_step, bytes_before)


def _warn(path: Path, lost: str) -> None:
    warnings.warn(
        f"History.load() leaves out the end of {path}, which is cut off: {lost}",
        RuntimeWarning,
        stacklevel=5,
    )


def _join_blocks(reader: blocks.Reader, newest: bool) -> tuple[sections.Source, str]:
    """All blocks of a file, or the last one alone, and what is lost of one that is cut off."""
    lost = ""
    if newest:
        found = reader.last()
    else:
        found = list(reader.blocks())
        while reader.grows():
            found += reader.blocks()
        if reader.is_cut_off:
            n = reader.n_lost
            lost = "an unknown number of records" if n is None else f"at most {n} records"
    if not found:
        raise CutOffError("it ends within its first block")
    for number, block in enumerate(found):
        if len(block.sections["steps"]) != block.n_records:
            raise ValueError(f"block {number} holds another number of records than it says")
    return sections.join([block.sections for block in found]), lost


def _join(path: Path, files: Sequence[_File]) -> Records:
    parts: list[Records] = []
    least: int | None = None
    for records, first_step, _ in reversed(files):
        parts.insert(0, records if least is None else records.before(least))
        if first_step is not None and (least is None or first_step < least):
            least = first_step
    run = (parts[0].rows, parts[0].layers, parts[0].bins)
    fit = all((part.rows, part.layers, part.bins) == run for part in parts)
    steps = [step for part in parts for step in part.steps]
    if not fit or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"History.load() needs the files of one run; {path} has those of several")
    return concatenate(parts)
