"""The files of a run: blocks that are appended to a file, and ``.npz`` files that NumPy reads.

docs/format.md has their layout. Whatever a file declares is checked before it is believed.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import tempfile
import threading
import time
import weakref
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, repeat
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gradstat.record import Record
from gradstat.util import Array, CutOffError

SUFFIX = ".gradstat"
MAGIC, VERSION = b"gradstat", 1

# Magic, version, number of the block, bytes of its head, records in it, their bytes, checksum of
# the head; then the checksum of these and of the header before.
_HEADER = struct.Struct("<8sIIIIQI")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_INDEX = np.dtype(
    [("step", "<i8"), ("time_s", "<f8"), ("n_bytes", "<u8"), ("crc", "<u4"), ("zero", "<u4")]
)
_ALIGNMENT = 8
_NO_WAITING = getattr(os, "O_NONBLOCK", 0)
_PIECE = 1 << 20
_MOST_READ, _MOST_OPEN = 1 << 30, 200  # bytes at once, files
_IN_MEMORY = 32 << 20  # bytes of a run that is put together
_PATIENCE_S = 0.25  # longer than a write that goes on lets a file be

# Bytes at the end of a zip archive without a comment, and before them of a large one.
_DIRECTORY_END, _LOCATOR = 22, 20
_MOST_DIRECTORY = 1 << 16  # bytes
_MOST_INFLATED = 1032  # bytes that deflate makes of one, at most


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Name the file in whatever is wrong with it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib, json and NumPy meet damage with a dozen kinds
        kind = CutOffError if isinstance(error, CutOffError) else ValueError
        raise kind(
            f"History.load() needs a file that History.save() or watch() wrote; {path} is "
            f"{_kind_of(path) or f'damaged or another kind: {error}'}"
        ) from error


def _kind_of(path: Path) -> str:
    """What else a file is, where its beginning says so, as that of a checkpoint does; else ""."""
    with suppress(OSError), open_regular(path) as file:
        begins = file.read(256)
        if begins.startswith(b"PK") and b"/data.pkl" in begins:
            return "a checkpoint that torch.save() wrote: it holds weights, no record of a run"
    return ""


@contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes]]:
    """Open a regular file; any other, such as a pipe, is refused rather than waited for."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | _NO_WAITING)) as file:
        _check_regular(file.fileno(), path)
        yield file


def _check_regular(descriptor: int, path: Path) -> os.stat_result:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"History.load() needs a regular file; {path} is none")
    return found


def _read_at(descriptor: int, n_bytes: int, at: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, n_bytes, at)
    with _seeking:  # on Windows
        os.lseek(descriptor, at, os.SEEK_SET)
        return os.read(descriptor, n_bytes)


class RunFile:
    """A regular file that is read at any place; it stays readable when it is renamed or removed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self._descriptor: _Descriptor | None = None
        self._get()

    def read(self, at: int, n_bytes: int) -> bytes:
        """Bytes from a place on; fewer where the file ends."""
        descriptor, parts = self._get(), list[bytes]()
        # No system reads more than 2 GB at once, and macOS refuses to.
        while n_bytes and (part := _read_at(descriptor.number, min(n_bytes, _MOST_READ), at)):
            parts.append(part)
            at, n_bytes = at + len(part), n_bytes - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def size(self) -> int:
        return os.fstat(self._get().number).st_size

    def _get(self) -> _Descriptor:
        # Whoever reads holds a descriptor that another thread has let go of.
        descriptor = self._descriptor
        if descriptor is None:
            flags = os.O_RDONLY | _NO_WAITING | getattr(os, "O_BINARY", 0)
            descriptor = _Descriptor(os.open(self.path, flags), self.path)
            self._identity = self._identity or descriptor.identity
            if descriptor.identity != self._identity:
                raise ValueError("another file has taken its place")
            self._descriptor = descriptor
            _opened.append(weakref.ref(self))
            if len(_opened) > _MOST_OPEN and (oldest := _opened.popleft()()) not in (None, self):
                oldest._descriptor = None
        return descriptor


class _Descriptor:
    """An open file, closed when nobody holds it."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        weakref.finalize(self, os.close, self.number)
        found = _check_regular(self.number, path)
        self.identity = found.st_dev, found.st_ino


# Files that are open; of the ranks of a large run not all are at a time.
_opened: deque[weakref.ref[RunFile]] = deque()
_seeking = threading.Lock()


class _Index(NamedTuple):
    """Where the records of a block are."""

    file: RunFile  # that they are in
    starts: list[int]  # first byte of each
    sizes: list[int]  # bytes of each
    checksums: list[int]  # of each
    checked: bytearray  # of each, see `StoredRecord.checked`


class StoredRecord(NamedTuple):
    """A `Record` in a file, whose bytes are read when they are asked for."""

    step: int
    time_s: float
    of_block: _Index
    place: int  # in that block

    @property
    def path(self) -> Path:
        return self.of_block.file.path

    @property
    def n_bytes(self) -> int:
        return self.of_block.sizes[self.place]

    @property
    def data(self) -> bytes:
        """Its numbers; ValueError if the file was damaged since, or is another one."""
        data = self.head(self.n_bytes)
        with damage_of(self.path):
            if len(data) < self.n_bytes:
                raise CutOffError(f"it ends within the record of step {self.step}")
            if zlib.crc32(data) != self.of_block.checksums[self.place]:
                raise ValueError(f"its record of step {self.step} has another checksum")
        return data

    def head(self, n_bytes: int) -> bytes:
        """The first bytes of it, of which no checksum is known."""
        return self.of_block.file.read(self.of_block.starts[self.place], n_bytes)

    @property
    def checked(self) -> int:
        """1 if its numbers were found to be plausible, 2 if its histograms were, too; else 0."""
        return self.of_block.checked[self.place]

    def set_checked(self, *, whole: bool) -> None:
        self.of_block.checked[self.place] = max(self.checked, 1 + whole)


class Spool(RunFile):
    """Keeps records: some in memory, others in a temporary file, gone with whoever reads it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.gettempdir())
        self._descriptor = None
        self._n_bytes = 0  # in memory

    def keep(self, records: Sequence[Record | StoredRecord]) -> list[Record | StoredRecord]:
        """The same records, to have in place of these; those of a file stay as they are."""
        new = [each for each in records if isinstance(each, Record)]
        sizes = [record.n_bytes for record in new]
        if self._n_bytes + sum(sizes) <= _IN_MEMORY:
            self._n_bytes += sum(sizes)
            return [*records]
        if self._descriptor is None:
            with tempfile.TemporaryFile() as file:
                self._descriptor = _Descriptor(os.dup(file.fileno()), self.path)
        at = self.size
        try:
            with _seeking, open(self._descriptor.number, "r+b", closefd=False) as file:
                file.seek(at)
                file.writelines(record.data for record in new)
        except OSError as error:
            error.filename = str(self.path)
            raise
        starts = [*accumulate(sizes, initial=at)][:-1]
        checksums = [zlib.crc32(record.data) for record in new]
        where = _Index(self, starts, sizes, checksums, bytearray([2]) * len(new))
        stored = (StoredRecord(x.step, x.time_s, where, place) for place, x in enumerate(new))
        return [next(stored) if isinstance(each, Record) else each for each in records]


class Link(NamedTuple):
    """What the next block of a file must follow."""

    number: int = 0  # of the next block
    checksum: int = 0  # of the block's header


class Block(NamedTuple):
    """A block as it is in a file."""

    said: dict[str, Any]  # what holds for its records, and what was logged
    records: list[StoredRecord]  # in the order of their steps


def encode(
    said: Mapping[str, Any], records: Sequence[Record], before: Link
) -> tuple[list[bytes], Link]:
    """The bytes of a block after another one, in parts, and where they end."""
    index = np.zeros(len(records), _INDEX)
    index["step"] = [record.step for record in records]
    index["time_s"] = [record.time_s for record in records]
    index["n_bytes"] = [len(record.data) for record in records]
    index["crc"] = [zlib.crc32(record.data) for record in records]
    text = json.dumps(said, allow_nan=False).encode()
    head = index.tobytes() + text + b" " * (-len(text) % _ALIGNMENT)
    n_bytes = int(index["n_bytes"].sum())
    header = _HEADER.pack(
        MAGIC, VERSION, before.number, len(head), len(records), n_bytes, zlib.crc32(head)
    )
    checksum = zlib.crc32(header, before.checksum)
    data = [record.data for record in records]
    return [header, _CHECKSUM.pack(checksum), head, *data], Link(before.number + 1, checksum)


class Reader:
    """Reads what the blocks of a file say, from its beginning, as far as they are there."""

    def __init__(self, path: Path) -> None:
        self.file = RunFile(path)
        self._at = self._newest = 0  # of the next block, and of the newest that was read
        self._link = Link()
        self.is_over = False  # no whole block follows those that were read
        self.n_lost: int | None = None  # records in the block that is cut off, if it says so

    def blocks(self, n_bytes: float = math.inf) -> Iterator[Block]:
        """Blocks that follow, of so many bytes or a block more; may be called again."""
        # ValueError for one that is damaged or out of its place.
        end = self._at + n_bytes
        self.is_over = False
        while self._at < end:
            block = self._next()
            if block is None:
                self.is_over = True
                return
            yield block

    @property
    def is_same(self) -> bool:
        """Whether the file still has what was read of it, rather than another run's records."""
        checksum = self.file.read(self._newest + _HEADER.size, _CHECKSUM.size)
        return self._at == 0 or checksum == _CHECKSUM.pack(self._link.checksum)

    @property
    def is_cut_off(self) -> bool:
        """Whether the file ends within the block that follows."""
        return self.file.size != self._at

    def grows(self) -> bool:
        """Whether a block that is cut off is only being written; waits for a moment."""
        size, since_s = self.file.size, time.monotonic()
        while self.is_cut_off and time.monotonic() - since_s < _PATIENCE_S:
            time.sleep(_PATIENCE_S / 10)
            if self.file.size != size:
                return True
        return False

    def _next(self) -> Block | None:
        self.n_lost = None
        header = self.file.read(self._at, HEADER_BYTES)
        if len(header) < HEADER_BYTES:
            return None
        fields = _HEADER.unpack_from(header)
        magic, version, number, n_head, n_records, n_bytes, head_checksum = fields
        if magic != MAGIC or version != VERSION:
            raise ValueError(f"block {self._link.number} is none of version {VERSION}")
        (checksum,) = _CHECKSUM.unpack_from(header, _HEADER.size)
        if checksum != zlib.crc32(header[: _HEADER.size], self._link.checksum):
            raise ValueError(f"block {self._link.number} has another checksum, or another place")
        if number != self._link.number:
            raise ValueError(f"block {self._link.number} says that it is number {number}")
        start = self._at + HEADER_BYTES
        if start + n_head + n_bytes > self.file.size:
            self.n_lost = n_records
            return None
        head = self._head(start, n_head, head_checksum)
        if n_head < n_records * _INDEX.itemsize:
            raise ValueError(f"block {number} has no place for {n_records} records")
        index = np.frombuffer(head, _INDEX, n_records)
        sizes = index["n_bytes"]
        if (sizes > n_bytes).any() or sizes.sum(dtype=np.float64) != n_bytes:
            raise ValueError(f"the records of block {number} do not fill it")
        starts = start + n_head + np.cumsum(sizes, dtype=np.int64) - sizes.astype(np.int64)
        said = json.loads(head[index.nbytes :])
        if not isinstance(said, dict):
            raise ValueError(f"block {number} says {said!r:.80}")
        where = _Index(
            self.file, starts.tolist(), sizes.tolist(), index["crc"].tolist(), bytearray(n_records)
        )
        steps, times = index["step"].tolist(), index["time_s"].tolist()
        self._newest, self._at = self._at, start + n_head + n_bytes
        self._link = Link(number + 1, checksum)
        places = range(n_records)
        return Block(said, list(map(StoredRecord, steps, times, repeat(where), places)))

    def _head(self, start: int, n_bytes: int, checksum: int) -> bytes:
        # A large one is read once more, rather than kept before its checksum is known.
        crc, at, piece = 0, 0, b""
        while at < n_bytes and (piece := self.file.read(start + at, min(n_bytes - at, _PIECE))):
            crc, at = zlib.crc32(piece, crc), at + len(piece)
        if crc != checksum:
            raise ValueError(f"block {self._link.number} has another checksum")
        return piece if n_bytes <= _PIECE else self.file.read(start, n_bytes)


class Npz:
    """The arrays of a ``.npz`` file, whose sizes are checked before anything is inflated."""

    # ValueError for another file, and for members that are no plain arrays or declare sizes that
    # they cannot have.

    def __init__(self, file: IO[bytes]) -> None:
        n_members = _count_members(file)
        self._zip = zipfile.ZipFile(file)
        infos = self._zip.infolist()
        self._infos = {info.filename.removesuffix(".npy"): info for info in infos}
        if len(self._infos) < len(infos):
            raise ValueError("it has two members of one name")
        if len(infos) != n_members:
            raise ValueError("its directory lacks members")
        self.declared = {name: self._declared(name) for name in self._infos}

    def read(self, name: str) -> Array:
        """One array; bytes of a text are no more than the file has."""
        is_stored = self._infos[name].compress_type == zipfile.ZIP_STORED
        if self.declared[name][1] == np.uint8 and not is_stored:
            raise ValueError(f"{name} is compressed; texts need to be stored as they are")
        with self._zip.open(self._infos[name]) as member:
            array: Array = np.lib.format.read_array(member, allow_pickle=False)
            member.read(1)  # at its end the checksum is compared
            return array

    def _declared(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        info = self._infos[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed in a way that NumPy does not use")
        with self._zip.open(info) as member:
            # Later versions have headers of any length, which NumPy does not need for these arrays.
            if (magic := np.lib.format.read_magic(member)) != (1, 0):
                raise ValueError(f"{name} is of version {magic[0]}.{magic[1]} of NumPy's format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            n_header = member.tell()
        if dtype.kind not in "iuf":
            raise ValueError(f"{name} holds {dtype}; it needs numbers")
        if info.file_size != n_header + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} is not of the size that its shape, {shape}, needs")
        if info.file_size > _MOST_INFLATED * info.compress_size:
            raise ValueError(f"{name} is larger than what it is compressed to can be")
        return shape, dtype


def write_npz(
    path: Path, arrays: Mapping[str, tuple[tuple[int, ...], str, Iterable[Array]]]
) -> None:
    """Write a ``.npz`` file of arrays by name: shape, type, and parts, one after the other."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, (shape, dtype, parts) in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            # What is not inflated cannot be larger than the file.
            info.compress_type = zipfile.ZIP_STORED if dtype == "|u1" else zipfile.ZIP_DEFLATED
            with file.open(info, "w", force_zip64=True) as member:
                header = {"descr": dtype, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(np.ascontiguousarray(part, dtype).reshape(-1).view(np.uint8).data)


def _count_members(file: IO[bytes]) -> int:
    """Members that an archive's end declares; few, so that its directory is small."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _LOCATOR - _DIRECTORY_END))
    end = file.read(_LOCATOR + _DIRECTORY_END)
    if end[-_DIRECTORY_END:][:4] != b"PK\x05\x06":
        raise CutOffError("it is no .npz file, or cut off")
    n_members, n_bytes = struct.unpack_from("<HI", end[-_DIRECTORY_END:], 10)
    # Only a large archive has another directory, which takes the place of this one.
    has_another = end[:4] == b"PK\x06\x07" and len(end) == _LOCATOR + _DIRECTORY_END
    if n_bytes > _MOST_DIRECTORY or (has_another and size < zipfile.ZIP64_LIMIT):
        raise ValueError("its directory is too large")
    return int(n_members)
