"""What has no other home: whole files, escapes, names that would do, warnings, forks, JSON, arrays.

Nothing here needs NumPy or PyTorch before it is called: the command line starts without them.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import secrets
import stat
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import NDArray

__version__ = "0.1.0"  # the build reads it, without running this

Array: TypeAlias = "NDArray[Any]"

ENGINE_VARIABLE = "GRADSTAT_ENGINE"  # of the environment: which engine is used

_MOST_NAMES = 8  # in a message
# Lines that no warning is about. Torch calls hooks from its own code.
_INSIDE: tuple[str, ...] = (f"{Path(__file__).parent}{os.sep}", threading.__file__)


class CutOffError(ValueError):
    """A file ends before what it should hold."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of ``path`` once all is written."""
    # A file that is there stays as it is if what follows fails. A link stays, and the file that it
    # leads to is replaced. The new file has the mode of the old one. A file that is not regular,
    # such as a pipe, is written to as it is. An OSError has ``path`` as its ``filename``.
    target, mode = Path(os.path.realpath(path)), None
    try:
        with suppress(FileNotFoundError):
            mode = target.stat().st_mode
        if mode is not None and not stat.S_ISREG(mode):
            yield target
            return
        # Nobody can have put a link there: the name is random, and the file must be new.
        unfinished = target.with_name(f".gradstat.{secrets.token_hex(8)}.tmp")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        os.close(os.open(unfinished, flags, 0o666 if mode is None else 0o600))
        try:
            yield unfinished
            if mode is not None:
                with suppress(OSError):  # some file systems have no modes
                    unfinished.chmod(stat.S_IMODE(mode))
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        # The error of a full disk has no name at all, others have that of the unfinished file.
        if error.errno is not None and not error.filename2:
            error.filename = str(path)
        raise


def escaped(text: object) -> str:
    """Text in one line, with Python's escapes of all that is acted on or not shown."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )


def encodable(name: str) -> str:
    """A name that UTF-8 can encode: one of undecodable bytes has their escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def plural(n: int, what: str) -> str:
    """How many of something there are."""
    return f"{n} {what}{'s' * (n != 1)}"


def check_integer(function: str, name: str, number: int, least: int) -> int:
    """An argument that is an integer of at least that; TypeError or ValueError for another one."""
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise TypeError(f"{function}() needs an integer; {name} is {number!r}")
    if number < least:
        raise ValueError(f"{function}() needs a number of {least} or more; {name} is {number}")
    if number >= 1 << 62:
        raise ValueError(f"{function}() needs a number below 2**62; {name} is {number}")
    return int(number)


def as_path(function: str, path: str | os.PathLike[str]) -> Path:
    """A path that is an argument; TypeError for what is none."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{function}() needs a path; path is {path!r}")
    return Path(path)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells in columns; the first column and bars of "#" are aligned to the left."""
    columns = []
    for at, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        is_left = at == 0 or any(cell.startswith("#") for cell in column)
        columns.append([cell.ljust(width) if is_left else cell.rjust(width) for cell in column])
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def one_of(name: object, names: Sequence[str]) -> str:
    """Those of the names, perhaps hundreds, that are like one which is none of them."""
    close = difflib.get_close_matches(str(name), names, 3)
    shown = ", ".join(map(repr, names[:_MOST_NAMES])) or "none"
    if len(names) > _MOST_NAMES:
        shown += f" and {len(names) - _MOST_NAMES} others"
    question = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
    return f"one of {shown}{question}"


def warn(message: str) -> None:
    """Give a RuntimeWarning, at the innermost line that is neither gradstat's nor PyTorch's."""
    torch = sys.modules.get("torch")
    inside = _INSIDE
    if torch is not None:
        inside = (*_INSIDE, f"{Path(inspect.getfile(torch)).parent}{os.sep}")
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


class _Forgetful(Protocol):
    def forget_other_threads(self) -> None:
        """Give up locks that nobody will release, and what another thread has begun."""


_FORGETFUL: weakref.WeakSet[_Forgetful] = weakref.WeakSet()


def call_after_fork(x: _Forgetful) -> None:
    """Have an object's ``forget_other_threads`` called in each process that is forked from here."""
    _FORGETFUL.add(x)


def _forget_other_threads() -> None:
    for x in list(_FORGETFUL):
        x.forget_other_threads()


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_forget_other_threads)


def json_text(value: object, indent: int | None = None) -> str:
    """JSON of a value, with null for NaN and infinities, which JSON does not have."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:  # there are some; others need no second look
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def divide(total: Array, count: Array) -> Array:
    """Quotient; NaN where there is nothing to divide by."""
    import numpy as np

    quotient = np.full(np.broadcast_shapes(total.shape, count.shape), math.nan)
    np.divide(total, count, out=quotient, where=count > 0)
    return quotient


def evenly_spread(n: int, most: int) -> Array:
    """Positions of at most so many of n things, the first and the last among them."""
    import numpy as np

    return np.linspace(0, n - 1, min(most, n)).round().astype(np.int64)


def median(x: Array) -> Array:
    """Median over the first axis of what is not NaN, the lower of two; NaN where there is none."""
    import numpy as np

    ordered = np.sort(x, axis=0)
    count = np.count_nonzero(~np.isnan(x), axis=0)
    middle: Array = np.take_along_axis(ordered, np.maximum(count - 1, 0)[None] // 2, axis=0)[0]
    return middle


def windows_of(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Things one after the other, as many at a time as have so much together, or one."""
    start, size = 0, 0
    for at, its_size in enumerate(sizes):
        if size + its_size > most and at > start:
            yield slice(start, at)
            start, size = at, 0
        size += its_size
    if start < len(sizes):
        yield slice(start, len(sizes))
