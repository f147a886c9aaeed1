"""Memory at simulated addresses, and the order of what warps do to it."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any

import numpy as np

from cuda_device.ptx.arithmetic import i4, i8, u1, u8

SHARED_BASE = 1024  # first address of a block's shared memory: null and small offsets fault
LOCAL_BASE = 64  # likewise for a lane's local memory
SHARED_WINDOW, LOCAL_WINDOW = 1 << 56, 1 << 57  # where generic addresses find the two
GLOBAL_BASE, GLOBAL_GAP = 0x7F00_0000_0000, 4096


class KernelError(RuntimeError):
    """Base of everything that a kernel can do wrong."""


class UnsupportedInstruction(KernelError): ...


class MemoryFault(KernelError): ...


class UninitialisedRead(KernelError): ...


class BarrierDivergence(KernelError): ...


class Deadlock(KernelError): ...


class StepLimit(KernelError): ...


class DataRace(KernelError): ...


class Trap(KernelError): ...


class Buffer:
    """A piece of memory with a base address, seen as unsigned integers of each width."""

    def __init__(self, base: int, data: np.ndarray, name: str, writable: bool = True):
        self.base, self.size, self.name, self.writable = base, data.size, name, writable
        self.views = {w: data[: data.size // w * w].view(f"u{w}") for w in (1, 2, 4, 8)}


class Memory:
    """Global memory: NumPy arrays at simulated addresses, accessed in place."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.buffers: list[Buffer] = []
        self.known: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        self.next = GLOBAL_BASE

    def alloc(self, array: np.ndarray, name: str | None = None, offset: int = 0) -> int:
        """The address of an array: 256-byte aligned, plus `offset` bytes."""
        if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
            raise TypeError("Memory.alloc() needs a C-contiguous numpy array")
        key = (array.__array_interface__["data"][0], array.nbytes)
        if key in self.known and array.nbytes:
            return self.known[key][0]
        start = self.next + offset
        self.next = -(-(start + array.nbytes + GLOBAL_GAP) // 256) * 256
        data = array.reshape(-1).view(u1) if array.size else np.zeros(0, u1)
        name = name or f"buffer {len(self.buffers)}"
        self.starts.append(start)
        self.buffers.append(Buffer(start, data, name, array.flags.writeable))
        self.known[key] = (start, array)
        return start

    def find(self, address: int) -> Buffer | None:
        """The buffer that starts last at or before `address`."""
        i = bisect.bisect_right(self.starts, address) - 1
        return self.buffers[i] if i >= 0 else None

    def pieces(self, addresses: np.ndarray) -> Iterator[np.ndarray]:
        """Positions of the addresses in each buffer."""
        found = np.searchsorted(np.array(self.starts, u8), addresses, side="right")
        for i in np.unique(found):
            yield np.flatnonzero(found == i)


class Races:
    """Happens-before checker over warps, for shared and global memory.

    vc[w, v] is the latest step of warp v that warp w is ordered after. Barriers, release/acquire
    operations and fences join clocks. Two accesses to a byte race when they are unordered, one of
    them writes, and not both are atomic (or volatile); storing the value already there over an
    unordered write is let pass. In global memory only the last reader of a byte is remembered.
    """

    def __init__(self, n_warps: int, warps_in_block: int):
        self.vc = np.eye(n_warps, dtype=i8)
        self.rows = warps_in_block
        self.shadows: dict[int, Any] = {}
        self.released: dict[tuple[int, int], np.ndarray] = {}
        self.fenced: dict[int, np.ndarray] = {}
        self.seen: dict[int, np.ndarray] = {}

    def barrier(self, warps: list[int]) -> None:
        self.vc[warps] = self.vc[warps].max(0)
        self.vc[warps, warps] += 1

    def fence(self, w: int) -> None:
        if w in self.seen:
            self.vc[w] = np.maximum(self.vc[w], self.seen[w])
        self.fenced[w] = self.vc[w].copy()
        self.vc[w, w] += 1

    def synchronise(self, w: int, buf: Buffer, off, sem: str, reads: bool, writes: bool) -> None:
        acquire, release = sem in ("acquire", "acq_rel"), sem in ("release", "acq_rel")
        keys = [(id(buf), o) for o in set(off.tolist())]
        for key in keys if reads else ():
            if (clock := self.released.get(key)) is not None:
                if acquire:
                    self.vc[w] = np.maximum(self.vc[w], clock)
                else:
                    self.seen[w] = np.maximum(self.seen.get(w, 0), clock)
        publish = self.vc[w].copy() if release else self.fenced.get(w)
        if writes and publish is not None:
            for key in keys:
                self.released[key] = np.maximum(self.released.get(key, 0), publish)
            self.vc[w, w] += release

    def access(
        self, warp: Any, k: int, buf: Buffer, off, nbytes: int, kind: str, new, strong: bool
    ) -> None:
        """Check and record a load, store or atomic; `new` has the bytes that each lane stores."""
        w, me = warp.first, self.vc[warp.first]
        shared = buf is warp.shared
        if id(buf) not in self.shadows:
            rows = self.rows if shared else 1
            self.shadows[id(buf)] = (
                np.zeros((2, buf.size), i4),
                np.zeros(buf.size, bool),
                np.zeros((2, rows, buf.size), i4),
                np.zeros((rows, buf.size), bool),
                buf,
            )
        wrote, wrote_strong, read, read_strong, _ = self.shadows[id(buf)]
        at = (off.astype(i8)[:, None] + np.arange(nbytes)).ravel()
        bad = wrote[1, at] > me[wrote[0, at]]
        if strong:
            bad &= ~wrote_strong[at]
        keep = np.zeros(at.size, bool)
        other, writes = wrote[0, at], kind != "load"
        if new is not None:
            keep = bad & (buf.views[1][at] == new.ravel())
            bad &= ~keep
        if writes:
            rbad = read[1][:, at] > me[read[0][:, at]]
            if strong:
                rbad &= ~read_strong[:, at]
            other = np.where(bad, other, read[0][rbad.argmax(0), at])
            bad |= rbad.any(0)
        if bad.any():
            i = int(bad.argmax())
            by = f"warp {int(other[i]) % self.rows} of block {int(other[i]) // self.rows}"
            raise warp.error(
                DataRace,
                k,
                f"{kind} of byte {int(at[i])} of {buf.name} races with {by}: no barrier or "
                "release/acquire orders the two",
            )
        if writes:
            upd = at[~keep]
            wrote[0, upd], wrote[1, upd], wrote_strong[upd] = w, me[w], strong
        if kind != "store":
            row = w % self.rows if shared else 0
            read[0, row, at], read[1, row, at], read_strong[row, at] = w, me[w], strong
