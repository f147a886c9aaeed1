"""Arrays in a file that grows: one block after the other, each with a checksum.

A file that is cut off anywhere still has its first blocks. docs/format.md has the layout.
"""

from __future__ import annotations

import math
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import IO, Any, NamedTuple

import numpy as np

from gradstat.util import Array

MAGIC = b"gradstat"
_VERSION = 2

# Magic, bytes of the payload, number of the block, records in it, its sections, checksum of the
# payload, version; then the checksum of these and of the header before.
_HEADER = struct.Struct("<8sQIIIII")
_CHECKSUM = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_SECTION = struct.Struct("<16s6sH4Q")  # name, dtype, number of dimensions, shape
_DTYPE = re.compile(rb"<[iu][248]|<f[48]|\|[iub]1|<U[1-9][0-9]{0,3}")
_ALIGNMENT = 8
_PATIENCE_S = 0.25  # longer than a write that goes on lets a file be
_PIECE = 1 << 20

Sections = dict[str, Array]


class Block(NamedTuple):
    """A block as it is in a file.

    Args:
        n_records: in it.
        sections: arrays by name, views of its bytes.
    """

    n_records: int
    sections: Sections


class Link(NamedTuple):
    """Where in a file a block ends.

    Args:
        number: of the next block.
        checksum: of the block's header.
    """

    number: int = 0
    checksum: int = 0


def encode(sections: Mapping[str, Array], n_records: int, before: Link) -> tuple[list[Any], Link]:
    """The bytes of a block.

    Args:
        sections: of at most four dimensions each.
        n_records: in them.
        before: where the block before it ends.

    Returns:
        The bytes in parts, views of the arrays among them, and where they end.
    """
    table = bytearray()
    parts: list[Any] = []
    for name, array in sections.items():
        array = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
        shape = (*array.shape, 0, 0, 0, 0)[:4]
        table += _SECTION.pack(name.encode(), array.dtype.str.encode(), array.ndim, *shape)
        parts += [array.reshape(-1).view(np.uint8), bytes(-array.nbytes % _ALIGNMENT)]
    parts.insert(0, bytes(table))
    n_bytes, payload = sum(len(part) for part in parts), 0
    for part in parts:
        payload = zlib.crc32(part, payload)
    header = _HEADER.pack(
        MAGIC, n_bytes, before.number, n_records, len(sections), payload, _VERSION
    )
    checksum = zlib.crc32(header, before.checksum)
    parts = [header, _CHECKSUM.pack(checksum), *parts]
    return parts, Link(before.number + 1, checksum)


class Reader:
    """Reads the blocks of a file, from its beginning, as far as they are there.

    Args:
        file: open, of known size.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._at = self._newest = 0  # of the next block, and of the newest that was read
        self._link = Link()
        self.n_lost: int | None = None  # records in the block that is cut off, if it says so

    def blocks(self) -> Iterator[Block]:
        """Blocks that follow; may be called again once a file has grown.

        Raises:
            ValueError: one is damaged, or out of its place.
        """
        while (header := self._header()) is not None:
            n_bytes, n_records, n_sections, checksum, link = header
            payload = self._payload(n_bytes, checksum)
            self._newest, self._link = self._at, link
            self._at += _HEADER_BYTES + n_bytes
            yield Block(n_records, _sections(payload, n_sections))

    def reopened(self, file: IO[bytes]) -> Reader:
        """This reader where it is, now that the file has been opened anew."""
        self._file = file
        return self

    @property
    def is_same(self) -> bool:
        """Whether the file still has what was read of it, rather than another run's records."""
        self._file.seek(self._newest + _HEADER.size)
        return self._at == 0 or self._file.read(_CHECKSUM.size) == _CHECKSUM.pack(
            self._link.checksum
        )

    def some(self, n_bytes: float) -> tuple[list[Block], bool]:
        """Blocks that follow, of so many bytes or a block more, and whether these are all."""
        found: list[Block] = []
        start = self._at
        for block in self.blocks():
            found.append(block)
            if self._at - start >= n_bytes:
                return found, False
        return found, True

    def last(self) -> list[Block]:
        """The first block and, if any has records, the last one of them; others are passed over."""
        first = next(self.blocks(), None)
        if first is None:
            return []
        found: tuple[int, Link] | None = None
        while (header := self._header()) is not None:
            n_bytes, n_records, _, _, link = header
            if n_records:
                found = self._at, self._link
            self._at += _HEADER_BYTES + n_bytes
            self._link = link
        if found is None:
            return [first]
        self._at, self._link = found
        return [first, next(self.blocks())]

    @property
    def is_cut_off(self) -> bool:
        """Whether the file ends within the block that follows."""
        return self._size() != self._at

    def grows(self) -> bool:
        """Whether a block that is cut off is only being written; waits for a moment."""
        size, since_s = self._size(), time.monotonic()
        while self.is_cut_off and time.monotonic() - since_s < _PATIENCE_S:
            time.sleep(_PATIENCE_S / 10)
            if self._size() != size:
                return True
        return False

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _header(self) -> tuple[int, int, int, int, Link] | None:
        """What a block's header says, if all of the block is there."""
        self.n_lost = None
        self._file.seek(self._at)
        header = self._file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES:
            return None
        (checksum,) = _CHECKSUM.unpack_from(header, _HEADER.size)
        if checksum != zlib.crc32(header[: _HEADER.size], self._link.checksum):
            raise ValueError(f"block {self._link.number} has another checksum, or another place")
        magic, n_bytes, number, n_records, n_sections, payload, version = _HEADER.unpack_from(
            header
        )
        if magic != MAGIC or number != self._link.number or version != _VERSION:
            raise ValueError(f"block {self._link.number} is none of version {_VERSION}")
        if self._at + _HEADER_BYTES + n_bytes > self._size():
            self.n_lost = n_records
            return None
        return n_bytes, n_records, n_sections, payload, Link(number + 1, checksum)

    def _payload(self, n_bytes: int, checksum: int) -> bytes:
        # What is large is read once more, rather than kept before its checksum is known.
        crc, left, piece = 0, n_bytes, b""
        while left and (piece := self._file.read(min(left, _PIECE))):
            crc = zlib.crc32(piece, crc)
            left -= len(piece)
        if left or crc != checksum:
            raise ValueError(f"block {self._link.number} has another checksum")
        if n_bytes <= _PIECE:
            return piece
        self._file.seek(self._at + _HEADER_BYTES)
        return self._file.read(n_bytes)


def _sections(payload: bytes, n_sections: int) -> Sections:
    at = n_sections * _SECTION.size
    sections: Sections = {}
    for name_bytes, dtype_bytes, n_dims, *dims in _SECTION.iter_unpack(payload[:at]):
        name, dtype = _declared(name_bytes, dtype_bytes)
        if name in sections:
            raise ValueError(f"section {name} comes twice")
        shape = dims[:n_dims]
        n = math.prod(shape)
        sections[name] = np.frombuffer(payload, dtype, n, at).reshape(shape)
        at += n * dtype.itemsize
        at += -at % _ALIGNMENT
    if at != len(payload):
        raise ValueError("sections do not fill their block")
    return sections


@lru_cache(64)
def _declared(name: bytes, dtype: bytes) -> tuple[str, np.dtype[Any]]:
    name, dtype = name.rstrip(b"\0"), dtype.rstrip(b"\0")
    if not _DTYPE.fullmatch(dtype):
        raise ValueError(f"section {name!r} holds {dtype!r}; it needs numbers or texts")
    return name.decode("ascii"), np.dtype(dtype.decode())
