"""Where sections are read from, and how names and numbers are read from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gradstat.util import Array


class Shaped(Protocol):
    """An array, or what a file declares of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array's."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As an array's."""


class Source(Protocol):
    """Sections of a file, which are read one by one."""

    @property
    def has_checksum(self) -> bool:
        """Whether one was found, and right."""

    @property
    def headers(self) -> Mapping[str, Shaped]:
        """What there is, by name."""

    def read(self, name: str) -> Array:
        """An array of numbers."""

    def texts(self, name: str) -> list[str]:
        """An array of texts, flat."""


def encoded(names: Sequence[str]) -> tuple[Array, Array]:
    """Names as bytes one after the other, and where each ends."""
    data = [name.encode("utf-8", "surrogatepass") for name in names]
    ends = np.cumsum([len(name) for name in data], dtype=np.int64)
    return np.frombuffer(b"".join(data), np.uint8), ends


def names_of(source: Source, of: str) -> list[str]:
    """Names of rows, or of scalars."""
    ends, n_bytes = source.read(f"{of}name_ends").tolist(), source.headers[f"{of}names"].shape[0]
    starts = [0, *ends[:-1]] if ends else []
    falls = any(start > end for start, end in zip(starts, ends, strict=True))
    if falls or sum(ends[-1:]) != n_bytes:
        raise ValueError(f"its {of}name_ends do not divide the {n_bytes} bytes of its {of}names")
    data = source.read(f"{of}names").tobytes()
    return [data[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends, strict=True)]


def integer(source: Source, name: str) -> int | None:
    """A single number, if there is one."""
    return int(integers(source, name)) if name in source.headers else None


def integers(source: Source, name: str) -> Array:
    """An array of integers, int64."""
    # A "safe" cast refuses what could lose anything.
    return source.read(name).astype(np.int64, casting="safe", copy=False)


def floats(source: Source, name: str) -> Array:
    """An array of floats, float64."""
    return source.read(name).astype(np.float64, casting="safe", copy=False)
