"""Opening a file of records that somebody else may have put there."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gradstat.util import CutOffError


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file; any other, such as a pipe, is refused rather than waited for."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=opener) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"History.load() needs a regular file; {path} is none")
        yield file


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Name the file in whatever is wrong with it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy meet damage with a dozen kinds
        kind = CutOffError if isinstance(error, CutOffError) else ValueError
        raise kind(
            f"History.load() needs a file that History.save() or watch() wrote; {path} is "
            f"damaged or another kind: {error}"
        ) from error
