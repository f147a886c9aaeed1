"""Arrays in a ``.npz`` file that NumPy reads too, sealed with a checksum over all its bytes.

The seal is the zip archive's comment. What a file declares is checked before any of it is inflated.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gradstat.util import Array, CutOffError

_SEAL = b"gradstat crc32 "
_SEAL_BYTES = len(_SEAL) + 8
# Bytes at the end of a zip archive without a comment, and before them of a large one.
_DIRECTORY_END, _LOCATOR = 22, 20
_MOST_DIRECTORY = 1 << 16  # bytes
_PIECE = 1 << 20
_MOST_INFLATED = 1032  # bytes that deflate makes of one, at most
_MOST_CHARACTERS = 1 << 20  # of one text


class Header(NamedTuple):
    """What a member declares.

    Args:
        shape: of the array.
        dtype: plain numbers or texts.
        offset: bytes before its data.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    offset: int


def write(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write a new file.

    Args:
        path: the file.
        arrays: by name.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:
        np.savez_compressed(file, **dict[str, Any](arrays))
    seal(path)


def seal(path: Path) -> None:
    """Give a ``.npz`` file without a comment its checksum."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", _SEAL_BYTES))
        file.seek(0)
        crc = _checksum(file, path.stat().st_size)
        file.write(_SEAL + b"%08x" % crc)


class Members:
    """The arrays of a file.

    Args:
        file: open, of known size.

    Raises:
        ValueError: it is no ``.npz`` file, it is sealed and damaged, or its members are no plain
            arrays or declare sizes that they cannot have.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.has_checksum = _check_seal(file)
        n_members = _count_members(file, _SEAL_BYTES if self.has_checksum else 0)
        self._zip = zipfile.ZipFile(file)
        infos = self._zip.infolist()
        self._infos = {info.filename.removesuffix(".npy"): info for info in infos}
        if len(self._infos) < len(infos):
            raise ValueError("it has two members of one name")
        if len(infos) != n_members:
            raise ValueError("its directory lacks members")
        self.headers = {name: self._header(name) for name in self._infos}

    def read(self, name: str) -> Array:
        """One array of numbers."""
        with self._zip.open(self._infos[name]) as member:
            array: Array = np.lib.format.read_array(member, allow_pickle=False)
            return array

    def texts(self, name: str) -> list[str]:
        """An array of texts, in memory for one of them at a time."""
        header = self.headers[name]
        with self._zip.open(self._infos[name]) as member:
            member.read(header.offset)
            texts = [
                str(np.frombuffer(member.read(header.dtype.itemsize), header.dtype)[0])
                for _ in range(math.prod(header.shape))
            ]
            member.read(1)  # at its end the checksum is compared
        return texts

    def _header(self, name: str) -> Header:
        info = self._infos[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed in a way that NumPy does not use")
        with self._zip.open(info) as member:
            # Later versions have headers of any length, which NumPy does not need for these arrays.
            if (magic := np.lib.format.read_magic(member)) != (1, 0):
                raise ValueError(f"{name} is of version {magic[0]}.{magic[1]} of NumPy's format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            offset = member.tell()
        if dtype.kind not in "biufU" or dtype.itemsize > 4 * _MOST_CHARACTERS:
            raise ValueError(f"{name} holds {dtype}; it needs numbers or texts")
        if info.file_size != offset + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} is not of the size that its shape, {shape}, needs")
        if info.file_size > _MOST_INFLATED * info.compress_size:
            raise ValueError(f"{name} is larger than what it is compressed to can be")
        return Header(shape, dtype, offset)


def _check_seal(file: IO[bytes]) -> bool:
    """Whether a file has a checksum, which must be its own."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SEAL_BYTES))
    mark = file.read()
    if not mark.startswith(_SEAL):
        return False
    file.seek(0)
    if mark != _SEAL + b"%08x" % _checksum(file, size - _SEAL_BYTES):
        raise ValueError("its checksum is another")
    return True


def _count_members(file: IO[bytes], comment_bytes: int) -> int:
    """Members that an archive's end declares; few, so that its directory is small."""
    size = file.seek(0, os.SEEK_END)
    at = size - comment_bytes - _DIRECTORY_END
    file.seek(max(0, at - _LOCATOR))
    end = file.read(_LOCATOR + _DIRECTORY_END)
    if at < 0 or end[-_DIRECTORY_END:][:4] != b"PK\x05\x06":
        raise CutOffError("it is no .npz file, or cut off")
    n_members, n_bytes = struct.unpack_from("<HI", end[-_DIRECTORY_END:], 10)
    # Only a large archive has another directory, which takes the place of this one.
    has_another = end[:4] == b"PK\x06\x07" and len(end) == _LOCATOR + _DIRECTORY_END
    if n_bytes > _MOST_DIRECTORY or (has_another and size < zipfile.ZIP64_LIMIT):
        raise ValueError("its directory is too large")
    return int(n_members)


def _checksum(file: IO[bytes], n_bytes: int) -> int:
    crc = 0
    while n_bytes and (piece := file.read(min(_PIECE, n_bytes))):
        crc = zlib.crc32(piece, crc)
        n_bytes -= len(piece)
    return crc
