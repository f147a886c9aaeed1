"""`replacing`: files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class CutOffError(ValueError):
    """A file ends before what it should hold."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of ``path`` once all is written.

    A link stays, and the file that it leads to is replaced. The new file has the mode of the old
    one. A file that is not regular, such as a pipe or ``/dev/null``, is written to as it is.

    Args:
        path: the file; one that is there stays as it is if what follows fails.

    Yields:
        Another name in the same directory, of an empty file, which is gone afterwards.

    Raises:
        OSError: it cannot be written; its ``filename`` is ``path``, as it was given.
    """
    try:
        with _writing(Path(os.path.realpath(path))) as unfinished:
            yield unfinished
    except OSError as error:
        # The error of a full disk has no name at all, others have that of the unfinished file.
        if error.errno is not None and not error.filename2:
            error.filename = str(path)
        raise


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        yield path
        return
    # Nobody can have put a link there: the name is random, and the file must be new.
    unfinished = path.with_name(f".gradstat.{secrets.token_hex(8)}.tmp")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    os.close(os.open(unfinished, flags, 0o666 if mode is None else 0o600))
    try:
        yield unfinished
        if mode is not None:
            with suppress(OSError):  # some file systems have no modes
                unfinished.chmod(stat.S_IMODE(mode))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
