"""Records on disk: a ``.npz`` file, or a directory of files that a run writes as it goes on.

Both hold the same sections, arrays by name. docs/format.md has the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from gradstat.history import blocks, npz, sections
from gradstat.history.opening import damage_of, opened
from gradstat.history.records import Records, check, concatenate
from gradstat.history.source import Source
from gradstat.util import CutOffError, replacing, warn

SUFFIX = ".gradstat"

_NO_BLOCK = "it ends within its first block"


def write(path: Path, records: Records) -> None:
    """Write a ``.npz`` file, which appears whole or not at all.

    Args:
        path: the file; one that is there is replaced.
        records: what it is to hold.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as unfinished:
        npz.write(unfinished, sections.head(records) | sections.body(records))


def pieces(path: Path, n_bytes: float = math.inf) -> Iterator[Records]:
    """Read a file, or all files of a directory, some records at a time.

    Args:
        path: of what `write` or a journal wrote.
        n_bytes: of a file that are read at once, or a block more.

    Yields:
        Records of the same rows, their steps rising. Those at the end of a directory's last file
        that are cut off are left out, with a warning.

    Raises:
        FileNotFoundError: there is no such file; another OSError: it cannot be opened.
        ValueError: a damaged file or one of another kind, a directory without files or without one
            of them.
    """
    yield from filter(None, _pieces(path, n_bytes))


def followed(path: Path, n_bytes: float) -> Iterator[Records | None]:
    """Read as `pieces`, and go on for ever with a directory's last file, which a run writes.

    Yields:
        As `pieces`; ``None`` when there is nothing new yet, or no whole block of it.

    Raises:
        As `pieces`.
    """
    yield from _pieces(path, n_bytes, goes_on=True)


def _pieces(path: Path, n_bytes: float, *, goes_on: bool = False) -> Iterator[Records | None]:
    if not path.is_dir():
        yield from _read_file(path, n_bytes)
        return
    run, last_step = None, -1
    plan = _plan(path, quiet=goes_on)
    for file, may_end_early, end in plan:
        is_last = file == plan[-1][0]
        for records in _read_file(file, n_bytes, may_end_early, end, goes_on=goes_on and is_last):
            if records is None:
                yield None
                continue
            found = records.rows, records.layers, records.bins, records.formats
            run = run or found
            if found != run or any(step <= last_step for step in records.steps[:1]):
                raise ValueError(
                    f"History.load() needs the files of one run; {path} has those of several"
                )
            last_step = max([last_step, *records.steps[-1:]])
            yield records
            del records  # somebody else's, who may have let go of them


def newest(path: Path) -> Records:
    """Read the newest records alone: those of a directory that were written last, or of a file.

    Raises:
        As `pieces`.
    """
    if not path.is_dir():
        return _read_newest(path)
    end = math.inf
    for found in _newest_of_each(path):
        found = found.before(end)
        if found.steps:
            return found
        if found.resumption is not None:
            end = min(end, found.resumption[0])
    return concatenate(list(pieces(path)))


def check_fits(path: Path, records: Records) -> None:
    """Refuse a directory with the records of other layers or bins than some.

    Raises:
        ValueError: it holds those of another run, it lacks a file, or it is damaged.
    """
    found = next(_newest_of_each(path), None)
    if found is None:
        return
    if (found.rows, found.bins) != (records.rows, records.bins):
        raise ValueError(
            f"watch() needs the layers and bins of the run that it goes on with; path is {path}, "
            f"which has {len(found.rows)} rows over {found.bins}, and there are "
            f"{len(records.rows)} over {records.bins}"
        )
    if found.formats != records.formats:
        raise ValueError(
            f"watch() needs the formats of the run that it goes on with; path is {path}, which has "
            f"{', '.join(found.formats) or 'none'}, and there are "
            f"{', '.join(records.formats) or 'none'}"
        )


def _newest_of_each(path: Path) -> Iterator[Records]:
    """The newest records of each file of a directory, the last file first; not of a torn one."""
    for file in reversed(_numbered(path)):
        with suppress(CutOffError):
            yield _read_newest(file)


def segments(path: Path) -> list[Path]:
    """Files of a directory, in their order; none where there is no directory."""
    if not path.is_dir():
        return []
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


def _plan(path: Path, *, quiet: bool) -> list[tuple[Path, bool, float]]:
    """Files of a directory that are to be read.

    Args:
        path: of the directory.
        quiet: say nothing of those that are left out.

    Returns:
        Each file, whether it may be cut off, and the step from which on it is superseded, or inf.
    """
    files = _numbered(path)
    if not files:
        raise ValueError(
            f"History.load() needs a directory that watch() wrote; {path} has no records"
        )
    plan: list[tuple[Path, bool, float]] = []
    end = math.inf
    # The last one comes first: it says how long the others were when it was begun.
    lengths: dict[int, set[int]] = {}
    for number, file in reversed(list(enumerate(files))):
        # A file without a whole block was never the last one of a run.
        may_end_early = not plan or file.stat().st_size in lengths.get(number, ())
        try:
            first_step, before = _resumption(file)
        except CutOffError:
            if not may_end_early or (number == 0 and not plan):
                raise
            if not quiet:
                _warn(file, "all of its records are lost")
            continue
        plan.insert(0, (file, may_end_early, end))
        if first_step is not None:
            end = min(end, first_step)
        for at, n_bytes in enumerate(before):
            lengths.setdefault(at, set()).add(n_bytes)
    return plan


def is_begun(path: Path) -> bool:
    """Whether a file has a whole block."""
    try:
        _resumption(path)
    except (OSError, ValueError):
        return False
    return True


def _is_journal(file: IO[bytes], path: Path) -> bool:
    return file.read(len(blocks.MAGIC)) == blocks.MAGIC or path.suffix == SUFFIX


def _records(source: Source) -> Records:
    records = sections.to_records(source)
    check(records)
    return records


def _resumption(path: Path) -> tuple[int | None, list[int]]:
    """As `sections.resumption`, of the first block of a file, which must be whole."""
    with opened(path) as file, damage_of(path):
        if not _is_journal(file, path):
            npz.Members(file)
            return None, []
        first = next(blocks.Reader(file).blocks(), None)
        if first is None:
            raise CutOffError(_NO_BLOCK)
        return sections.resumption(sections.join([first.sections]))


def _read_newest(path: Path) -> Records:
    with opened(path) as file, damage_of(path):
        if not _is_journal(file, path):
            return _records(npz.Members(file))
        return _records(_joined(blocks.Reader(file).last()))


def _read_file(
    path: Path,
    n_bytes: float = math.inf,
    may_end_early: bool = True,
    end: float = math.inf,
    *,
    goes_on: bool = False,
) -> Iterator[Records | None]:
    """Records of a file before a step, some at a time; ``None`` if there are none yet."""
    head: blocks.Sections = {}
    reader, last_step, is_over = None, -1, False
    while goes_on or not is_over:
        records, lost = None, ""
        with opened(path) as file, damage_of(path):
            if reader is None and not _is_journal(file, path):
                records, is_over, goes_on = _records(npz.Members(file)), True, False
            else:
                reader = blocks.Reader(file) if reader is None else reader.reopened(file)
                if not reader.is_same:
                    raise ValueError("it has other records than before")
                found, is_over = reader.some(n_bytes)
                while is_over and not goes_on and reader.grows():
                    found += reader.blocks()
                if is_over and not goes_on and reader.is_cut_off:
                    n = reader.n_lost
                    lost = "an unknown number of records" if n is None else f"at most {n} records"
                    if not may_end_early:
                        raise CutOffError(f"it is cut off; {lost}")
                if found or not head:
                    records = _records(_joined(found, head))
                    head = head or found[0].sections
                del found
            if records and any(step <= last_step for step in records.steps[:1]):
                raise ValueError("its steps do not rise")
        if lost:
            _warn(path, lost)
        if records:
            last_step = max([last_step, *records.steps[-1:]])
            yield records.before(end)
            del records
        elif goes_on:
            yield None


def _warn(path: Path, lost: str) -> None:
    warn(f"History.load() leaves out the end of {path}, which is cut off: {lost}")


def _joined(found: Sequence[blocks.Block], head: blocks.Sections | None = None) -> Source:
    """Blocks of a file, the first one of which has its head, if that is not given."""
    if not found:
        raise CutOffError(_NO_BLOCK)
    for number, block in enumerate(found):
        if len(block.sections["steps"]) != block.n_records:
            raise ValueError(f"block {number} holds another number of records than it says")
    first = {**(head or {}), **found[0].sections}
    return sections.join([first, *(block.sections for block in found[1:])])
