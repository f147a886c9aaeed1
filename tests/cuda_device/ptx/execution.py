"""Execution of kernels.

A kernel is cut into *segments*: straight-line runs that end at a memory access, a warp-wide
operation, a barrier or a branch. Each becomes a Python function, once for full warps and once for
partial ones, in which a register is an array with an element for each lane, of the unsigned type
of the register's width (bool for predicates).

What is executed is a *group* of warps in step: all warps of some blocks, or one warp. It is a set
of lane sets, each at its own segment; the set that is furthest behind runs, and sets that meet
merge. Warp-wide operations and barriers hold lanes back until all that are named have arrived.
Groups of one warp are scheduled by seed, so that races have a chance to show.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

import numpy as np

from cuda_device.ptx.arithmetic import (
    UFUNC,
    UINT,
    WARP,
    b2d,
    d2b,
    d2h,
    f2,
    f4,
    f8,
    h2d,
    i8,
    pmax,
    pmin,
    u1,
    u2,
    u4,
    u8,
)
from cuda_device.ptx.instructions import (
    ATOMIC,
    CONTROL,
    HELPERS,
    TOUCHES_MEMORY,
    WARP_WIDE,
    Emitter,
    emit,
    is_barrier,
)
from cuda_device.ptx.memory import (
    LOCAL_BASE,
    LOCAL_WINDOW,
    SHARED_BASE,
    SHARED_WINDOW,
    BarrierDivergence,
    Buffer,
    DataRace,
    Deadlock,
    KernelError,
    Memory,
    MemoryFault,
    Races,
    StepLimit,
    Trap,
    UninitialisedRead,
    UnsupportedInstruction,
)
from cuda_device.ptx.parsing import Kernel, Operand, Parser, Type

MOST_BLOCKS, MOST_LANES = 8, 2048  # in step at a time
RESIDENT_BLOCKS = 8  # in flight at a time when warps are scheduled
MOST_RACING_WARPS = 4096
Lanes = np.ndarray  # a mask, or None for all of them


@cache
def places(lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each lane its number, that within its warp, and True."""
    place = np.arange(lanes)
    return place, place % WARP, np.ones(lanes, bool)


@dataclass
class Segment:
    """Instructions first..last-1, and how control leaves them."""

    first: int
    last: int
    kind: str  # fall, bra, exit, bar
    target: int = -1
    sync: Operand | None = None  # lanes that must be here together; sink operand: all of them


class Program:
    """A kernel cut into segments, compiled as they are first run."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.segments = self.split()
        # Whether it has nothing that is only understood one warp at a time.
        self.goes_in_step = not any(
            is_barrier(i) and (len(i.args) > 1 or i.guard or {"arrive", "red"} & set(i.mods))
            for i in kernel.instrs
        )
        self.codes: dict[tuple[int, bool], tuple[CodeType, dict[str, Any]]] = {}
        self.environments: dict[int, dict[str, Any]] = {}
        self.functions: dict[int, list[Any]] = {}

    def resolve(self, o: Operand) -> int:
        scopes, name = o.val
        for s in reversed(scopes):
            if (s, name) in self.kernel.labels:
                return self.kernel.labels[s, name]
        raise KernelError(f"no label {name}")

    def split(self) -> list[Segment]:
        instrs, cut = self.kernel.instrs, {0, len(self.kernel.instrs)}
        for i in instrs:
            if i.op == "bra":
                cut.add(self.resolve(i.args[0]))
            if i.op in WARP_WIDE or is_barrier(i):
                cut.add(i.index)
            if i.op in CONTROL + WARP_WIDE + TOUCHES_MEMORY or is_barrier(i):
                cut.add(i.index + 1)
        edges = sorted(cut)
        number = {first: n for n, first in enumerate(edges)}
        segments = []
        for first, last in itertools.pairwise(edges):
            i = instrs[last - 1]
            kind = {"bra": "bra", "ret": "exit", "exit": "exit"}.get(i.op, "fall")
            s = Segment(first, last, "bar" if is_barrier(i) else kind)
            if s.kind == "bra":
                s.target = number[self.resolve(i.args[0])]
            if i.op in WARP_WIDE or s.kind == "bar":
                is_named = i.op not in ("ldmatrix", "stmatrix") and s.kind != "bar"
                s.sync = i.args[-1] if is_named or "warp" in i.mods else Operand("sink")
                s.kind = "fall" if "warp" in i.mods else s.kind
            segments.append(s)
        return segments

    def functions_for(self, lanes: int) -> list[Any]:
        """Two for each segment: for all lanes, and for some; None is not compiled yet."""
        if lanes not in self.functions:
            place, lane, every = places(lanes)
            self.environments[lanes] = {**HELPERS, "PLACE": place, "LANE": lane, "EVERY": every}
            self.functions[lanes] = [None] * (2 * len(self.segments))
        return self.functions[lanes]

    def function(self, n: int, is_partial: bool, lanes: int) -> Callable[..., Any]:
        """Compile a segment; it returns the lanes that take the branch, exit or barrier."""
        if (n, is_partial) not in self.codes:
            self.codes[n, is_partial] = self.code(n, is_partial)
        code, constants = self.codes[n, is_partial]
        environment = self.environments[lanes]
        for name, make in constants.items():
            if name not in environment:
                environment[name] = make(lanes)
        exec(code, environment)
        function = environment.pop("f")
        self.functions[lanes][2 * n + is_partial] = function
        return function

    def code(self, n: int, is_partial: bool) -> tuple[CodeType, dict[str, Any]]:
        s, e = self.segments[n], Emitter(self.kernel)
        for i in self.kernel.instrs[s.first : s.last]:
            emit(e, i, "m" if is_partial else None)
        body = "\n ".join(e.lines or ["pass"])
        name = f"<segment {n} of {self.kernel.name}>"
        return compile(f"def f(w, r, m):\n {body}", name, "exec"), e.constants


SPECIAL = {
    "%tid.x": lambda g: g.thread,
    "%ctaid.x": lambda g: g.number % g.launch.grid[0],
    "%ctaid.y": lambda g: g.number // g.launch.grid[0] % g.launch.grid[1],
    "%ctaid.z": lambda g: g.number // (g.launch.grid[0] * g.launch.grid[1]),
    "%nctaid.x": lambda g: g.launch.grid[0],
    "%nctaid.y": lambda g: g.launch.grid[1],
    "%nctaid.z": lambda g: g.launch.grid[2],
    "%ntid.x": lambda g: g.launch.threads,
    "%laneid": lambda g: g.lane,
    "%warpid": lambda g: g.thread // WARP,
    "%nwarpid": lambda g: g.launch.n_warps,
    "WARP_SZ": lambda g: WARP,
    "%lanemask_eq": lambda g: 1 << g.lane,
    "%lanemask_lt": lambda g: (1 << g.lane) - 1,
    "%lanemask_le": lambda g: (2 << g.lane) - 1,
    "%lanemask_gt": lambda g: ~((2 << g.lane) - 1),
    "%lanemask_ge": lambda g: ~((1 << g.lane) - 1),
    "%dynamic_smem_size": lambda g: g.launch.shared_bytes,
    **dict.fromkeys(("%tid.y", "%tid.z", "%smid", "%cluster_ctarank"), lambda g: 0),
    **dict.fromkeys(("%clock", "%clock64", "%globaltimer"), lambda g: 0),
    **dict.fromkeys(("%ntid.y", "%ntid.z"), lambda g: 1),
}


class Group:
    """Warps in step: registers, the lanes that run (pc, m), and those behind or waiting.

    Args:
        launch: what they are part of.
        first: number of the first warp in the grid.
        n_warps: those of whole blocks; or one, of a block.
        block: the block of one warp.
    """

    def __init__(self, launch: Launch, first: int, n_warps: int, block: Block | None = None):
        self.launch, self.first, self.block = launch, first, block
        self.lanes = n_warps * WARP
        self.place, self.lane, self.every = places(self.lanes)
        self.number, self.thread = divmod(first * WARP + self.place, launch.threads)
        poison = launch.poison(self.lanes)
        kernel = launch.program.kernel
        self.r = [poison[b] for b in kernel.regs]
        self.pc, self.m = 0, None  # None: all lanes
        self.rest: dict[int, Lanes] = {}
        self.parked: dict[int, Lanes] = {}
        self.state, self.waits_at, self.carry = "run", -1, np.zeros(self.lanes, u8)
        self.copies: list[list[Any]] = [[]]
        self.specials: dict[str, np.ndarray] = {}
        self.local = self.local_at = self.shared_at = None
        if kernel.local_bytes:
            data = np.zeros(self.lanes * kernel.local_bytes, u1)
            self.local = Buffer(LOCAL_BASE, data, "local memory")
            self.local_at = self.place.astype(u8) * u8(kernel.local_bytes)
        if block is not None:
            self.shared = block.shared
        else:
            stride = -(-max(launch.shared_bytes, 1) // 16) * 16
            self.shared = launch.garbage(stride * (self.lanes // launch.threads))
            self.shared_at = (self.number - self.number[0]).astype(u8) * u8(stride)

    def special(self, name: str) -> np.ndarray:
        if name not in self.specials:
            if name not in SPECIAL:
                raise UnsupportedInstruction(f"special register {name}")
            value = np.asarray(SPECIAL[name](self)).astype(u4)
            self.specials[name] = np.broadcast_to(value, (self.lanes,)).copy()
        return self.specials[name]

    def parameter(self, name: str, off: int, width: int, n: int) -> list[np.ndarray]:
        return self.launch.parameter(name, off, width, n, self.lanes)

    def error(self, kind: type[KernelError], k: int, message: str, at: int = -1) -> KernelError:
        """An error at instruction k, saying where that is."""
        somewhere = 0 if self.m is None else int(self.m.argmax())
        place = at if at >= 0 else somewhere
        gx, gy, _ = self.launch.grid
        number = int(self.number[place])
        block = number % gx, number // gx % gy, number // (gx * gy)
        who = f"block {block} warp {int(self.thread[place]) // WARP}"
        who += f" lane {place % WARP}" if at >= 0 else ""
        return kind(f"{message}; {who}; {self.launch.program.kernel.where(k)}")

    def unsupported(self, k: int, mask: Lanes | None, why: str) -> None:
        if mask is None or mask.any():
            raise self.error(UnsupportedInstruction, k, f"unsupported instruction ({why})")

    def trap(self, k: int, mask: Lanes | None) -> None:
        if mask is None or mask.any():
            raise self.error(Trap, k, "trap")

    def fence(self) -> None:
        if self.launch.races:
            self.launch.races.fence(self.first)

    def check_sources(self, k: int, j: np.ndarray, active: Lanes) -> None:
        bad = active & ~active[j]
        if bad.any():
            raise self.error(KernelError, k, "shfl reads from an inactive lane", int(bad.argmax()))

    # memory

    def resolve(
        self, k: int, space: str, addr: np.ndarray, at: np.ndarray, nbytes: int, write: bool
    ) -> list[tuple[Any, Buffer, np.ndarray]]:
        """Check addresses; (positions, buffer, byte offsets) for each buffer that they touch."""
        launch, first = self.launch, int(addr[0])
        if space == "generic":
            space = "global"
            for name, window in (("local", LOCAL_WINDOW), ("shared", SHARED_WINDOW)):
                if first >= window:
                    space, addr = name, addr - u8(window)
                    break
        if space == "shared":
            buf, size, offset = self.shared, launch.shared_bytes, self.shared_at
        elif space == "local":
            buf, size, offset = self.local, launch.program.kernel.local_bytes, self.local_at
        else:
            buf, offset = launch.memory.find(first), None
            size = buf.size if buf is not None else 0
        if buf is not None:
            off = addr - buf.base
            outside, misaligned = off > size - nbytes, addr & (nbytes - 1)
            if not np.count_nonzero(outside) and not np.count_nonzero(misaligned):
                if write and not buf.writable:
                    raise self.error(MemoryFault, k, f"store to read-only {buf.name}")
                return [(slice(None), buf, off if offset is None else off + offset[at])]
        if space == "global":
            pieces = list(launch.memory.pieces(addr))
            if len(pieces) > 1:
                return [
                    (n, *self.resolve(k, space, addr[n], at[n], nbytes, write)[0][1:])
                    for n in pieces
                ]
        is_outside = buf is None or bool(outside.any())
        bad = 0 if buf is None else int((outside if is_outside else misaligned != 0).argmax())
        a = int(addr[bad])
        where = "in no buffer"
        if buf is not None:
            where = f"{a - buf.base} bytes into {buf.name} of {size} bytes"
        how = "out-of-bounds" if is_outside else "misaligned"
        what = f"{how} {space} {'store' if write else 'load'} of {nbytes} bytes"
        raise self.error(MemoryFault, k, f"{what} at {a:#x}, {where}", int(at[bad]))

    def observe(
        self,
        k: int,
        buf: Buffer,
        off: np.ndarray,
        nbytes: int,
        kind: str,
        values: list[np.ndarray] | None = None,
        sem: str | None = None,
    ) -> None:
        """Race and initialisation checks before a load, store or atomic."""
        launch, shared = self.launch, buf is self.shared
        if launch.races:
            if sem:
                reads, writes = kind != "store", kind != "load"
                launch.races.synchronise(self.first, buf, off, sem, reads, writes)
            new = np.stack(values, 1).view(u1) if kind == "store" else None
            launch.races.access(self, k, buf, off, nbytes, kind, new, sem is not None)
        if launch.check_uninit and shared:
            at = (off.astype(i8)[:, None] + np.arange(nbytes)).ravel()
            if kind != "store" and not self.block.written[at].all():
                raise self.error(UninitialisedRead, k, "shared memory read before it is written")
            if kind != "load":
                self.block.written[at] = True

    def load(
        self,
        k: int,
        space: str,
        addr: np.ndarray,
        width: int,
        n: int,
        mask: Lanes | None = None,
        sem: str | None = None,
    ) -> list[np.ndarray]:
        """Words j = 0 ... n - 1 of each lane."""
        at = self.place if mask is None else mask.nonzero()[0]
        if mask is not None:
            if not at.size:
                return [np.zeros(self.lanes, f"u{width}")] * n
            addr = addr[at]
        pieces = self.resolve(k, space, addr, at, width * n, False)
        shift = width.bit_length() - 1
        if self.launch.is_watched:
            for _, buf, off in pieces:
                self.observe(k, buf, off, width * n, "load", None, sem)
        if mask is None and len(pieces) == 1:
            ((_, buf, off),) = pieces
            view, words = buf.views[width], off >> shift
            return [view[words]] + [view[words + j] for j in range(1, n)]
        out = [np.zeros(self.lanes, f"u{width}") for _ in range(n)]
        for which, buf, off in pieces:
            for j in range(n):
                out[j][at[which]] = buf.views[width][(off >> shift) + j]
        return out

    def store(
        self,
        k: int,
        space: str,
        addr: np.ndarray,
        width: int,
        values: list[np.ndarray],
        mask: Lanes | None = None,
        sem: str | None = None,
    ) -> None:
        at = self.place
        if mask is not None:
            at = mask.nonzero()[0]
            if not at.size:
                return
            addr, values = addr[at], [v[at] for v in values]
        nbytes, shift, launch = width * len(values), width.bit_length() - 1, self.launch
        for which, buf, off in self.resolve(k, space, addr, at, nbytes, True):
            mine = [v[which] for v in values]
            if launch.is_watched:
                self.observe(k, buf, off, nbytes, "store", mine, sem)
            view, words = buf.views[width], off >> shift
            for j, v in enumerate(mine):
                view[words + j] = v
                if launch.races and np.count_nonzero(view[words + j] != v):
                    what = f"lanes of one store write different values to one place in {buf.name}"
                    raise self.error(DataRace, k, what)

    def atomic(
        self,
        k: int,
        space: str,
        addr: np.ndarray,
        what: str,
        kind: tuple[str, int, int],
        values: list[np.ndarray],
        mask: Lanes | None,
        sem: str | None,
        needed: bool,
    ) -> np.ndarray:
        """Read-modify-write in the order of lanes; the old values, if they are needed."""
        t = Type(*kind)
        width = t.width // 8
        at = self.place if mask is None else mask.nonzero()[0]
        if not at.size:
            return self.launch.poison(self.lanes)[t.width]
        addr, values = addr[at], [v[at] for v in values]
        out = np.zeros(self.lanes, f"u{width}")
        for which, buf, off in self.resolve(k, space, addr, at, width, True):
            if self.launch.is_watched:
                self.observe(k, buf, off, width, "atomic", None, sem)
            words, mine = off >> (width.bit_length() - 1), [v[which] for v in values]
            dtype = {"s": f"i{width}", "f32": "f4", "f64": "f8"}.get(t.kind, f"u{width}")
            if what == "inc" and (mine[0] == 0xFFFFFFFF).all():
                what, mine = "add", [np.ones_like(mine[0])]
            if not needed and what in UFUNC and t.kind not in ("f16", "bf16"):
                UFUNC[what].at(buf.views[width].view(dtype), words, mine[0].view(dtype))
                continue
            raw, view = buf.views[width], buf.views[width].view(dtype)
            for n, (place, a) in enumerate(zip(at[which].tolist(), words.tolist(), strict=True)):
                out[place] = raw[a]
                if t.kind in ("f16", "bf16") and what in ("add", "min", "max"):
                    raw[a] = half_atomic(what, t.kind, raw[a], mine[0][n]).view(f"u{width}")[0]
                    continue
                old, *operands = (v.item() for v in (view[a], *(v.view(dtype)[n] for v in mine)))
                if t.is_float:
                    total = view.dtype.type(old) + operands[0]
                    view[a] = total if what == "add" else operands[-1]
                else:
                    new = ATOMIC[what](old, operands[0], operands[-1])
                    raw[a] = new & ((1 << 8 * width) - 1)
        return out

    def finish_copies(self, keep: int) -> None:
        """Carry out cp.async groups until only the `keep` newest committed ones remain."""
        while len(self.copies) - 1 > keep:
            for k, dst, src, size, count, mask in self.copies.pop(0):
                active = self.every if mask is None else mask
                width = min(size, 8)
                for j in range(0, size, width):
                    want = active & (count > j)
                    if (want & (count < j + width)).any():
                        raise self.error(UnsupportedInstruction, k, "cp.async of part of a word")
                    (v,) = self.load(k, "global", src + src.dtype.type(j), width, 1, want)
                    self.store(k, "shared", dst + dst.dtype.type(j), width, [v], active)

    # control flow

    def go_on(self, pc: int, mask: Lanes | None) -> None:
        """Continue the lanes of `mask` at `pc`, then run whichever lanes are furthest behind."""
        if mask is not None and mask.any():
            self.rest[pc] = self.rest[pc] | mask if pc in self.rest else mask
        if self.rest:
            self.pc = min(self.rest)
            m = self.rest.pop(self.pc)
            self.m = None if m.all() else m
        elif self.parked:
            spots = "; ".join(
                f"lanes {np.flatnonzero(m).tolist()} wait at {self.launch.at_segment(p)}"
                for p, m in self.parked.items()
            )
            gone = np.flatnonzero(~np.logical_or.reduce(list(self.parked.values()))).tolist()
            raise BarrierDivergence(
                f"block {int(self.number[0])}, warps from {int(self.thread[0]) // WARP}: lanes "
                f"that are needed never come: {spots}; lanes {gone} have exited"
            )
        else:
            self.state = "done"
            self.copies.append([])
            self.finish_copies(0)

    def gathered(self, s: Segment) -> bool:
        """At a warp-wide operation with some lanes: those whose warp or block is all here go on."""
        here = self.m | self.parked.pop(self.pc, False)
        is_for_block = s.kind == "bar" and self.block is None
        rows = here.reshape(-1, self.launch.threads if is_for_block else WARP)
        missing = ~rows
        if not is_for_block and s.sync.kind != "sink":
            words = np.array([s.sync.val])
            if s.sync.kind != "imm":
                words = self.r[s.sync.val].reshape(rows.shape)
                words = words[np.arange(len(rows)), rows.argmax(1)]
            missing = (words.astype(i8)[:, None] >> np.arange(WARP) & 1 != 0) & ~rows
        waits = rows & missing.any(1)[:, None]
        if waits.any():
            self.parked[self.pc] = waits.ravel()
            here = here & ~waits.ravel()
            if not here.any():
                self.go_on(-1, None)
                return False
        self.m = None if here.all() else here
        return True

    def run(self, budget: int) -> int:
        """Execute up to `budget` segments, or until the group blocks or ends; how many it did."""
        program, r, every = self.launch.program, self.r, self.every
        functions, segments = program.functions_for(self.lanes), program.segments
        done = 0
        while done < budget and self.state == "run":
            pc = self.pc
            s = segments[pc]
            if s.sync is not None and self.m is not None and not self.gathered(s):
                continue
            m = self.m
            is_partial = m is not None
            function = functions[2 * pc + is_partial]
            if function is None:
                function = program.function(pc, is_partial, self.lanes)
            taken = function(self, r, m)
            done += 1
            if s.kind == "fall" or (s.kind == "bar" and self.block is None):
                if not self.rest:
                    self.pc = pc + 1
                else:
                    self.go_on(pc + 1, m if is_partial else every)
                continue
            m = m if is_partial else every
            taken = m if taken is None else taken
            n, total = np.count_nonzero(taken), np.count_nonzero(m)
            if s.kind == "bra":
                if (n == total or n == 0) and not self.rest:
                    self.pc = s.target if n else pc + 1
                else:
                    if n:
                        self.rest[s.target] = self.rest.get(s.target, False) | taken
                    self.go_on(pc + 1, m & ~taken)
            elif s.kind == "exit":
                self.go_on(pc + 1, m & ~taken)
            elif n == 0:
                self.pc = pc + 1
            elif n < self.lanes:
                lanes = np.flatnonzero(taken).tolist()
                what = f"only lanes {lanes} of the warp reach the barrier"
                raise self.error(BarrierDivergence, s.last - 1, what)
            else:
                self.pc = pc + 1
                self.block.arrive(self, s.last - 1)
        return done


def half_atomic(what: str, kind: str, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Of one or two 16-bit floats in a word."""
    up, down = (h2d, d2h) if kind == "f16" else (b2d, d2b)
    function = {"add": np.add, "min": pmin, "max": pmax}[what]
    return down(function(*(up(np.atleast_1d(v).view(u2)) for v in (old, new))))


class Block:
    """A block whose warps are scheduled: its shared memory and barriers."""

    def __init__(self, launch: Launch, number: int):
        gx, gy, _ = launch.grid
        self.launch, self.index = launch, (number % gx, number // gx % gy, number // (gx * gy))
        self.shared = launch.garbage(launch.shared_bytes)
        self.written = np.zeros(launch.shared_bytes, bool)
        first = number * launch.n_warps
        self.warps = [Group(launch, first + n, 1, self) for n in range(launch.n_warps)]
        self.barriers: dict[int, dict[Group, int]] = {}

    def arrive(self, warp: Group, k: int) -> None:
        i = self.launch.program.kernel.instrs[k]
        if "red" in i.mods:
            what = "unsupported instruction (barrier reduction)"
            raise warp.error(UnsupportedInstruction, k, what)
        values = [o.val if o.kind == "imm" else int(warp.r[o.val][0]) for o in i.args]
        number, count = ([*values, None, None])[:2]
        waiting = self.barriers.setdefault(number or 0, {})
        if count is None and waiting and k not in waiting.values():
            there = self.launch.program.kernel.where(next(iter(waiting.values())))
            what = "warps meet a barrier at different instructions, the others at"
            raise warp.error(BarrierDivergence, k, f"{what} {there}")
        if warp in waiting:
            raise warp.error(BarrierDivergence, k, f"warp arrives twice at barrier {number}")
        waiting[warp] = k
        if "arrive" not in i.mods:
            warp.state, warp.waits_at = "wait", k
        if len(waiting) * WARP >= (count or len(self.warps) * WARP):
            del self.barriers[number or 0]
            if self.launch.races:
                self.launch.races.barrier([w.first for w in waiting])
            for w in waiting:
                w.state = "run"

    def describe(self) -> str:
        waits: dict[int, list[int]] = {}
        for n, warp in enumerate(self.warps):
            waits.setdefault(warp.waits_at if warp.state == "wait" else -1, []).append(n)
        kernel = self.launch.program.kernel
        parts = [
            f"warps {n} " + ("have exited" if k < 0 else f"wait at {kernel.where(k)}")
            for k, n in sorted(waits.items(), reverse=True)
        ]
        return f"block {self.index}: {', '.join(parts)}"


class Launch:
    """What the groups of one launch share."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        grid: Sequence[int],
        n_warps: int,
        args: Sequence[Any],
        shared_bytes: int,
        seed: int | None,
        racecheck: bool,
        check_uninit: bool,
    ):
        self.program, self.memory, self.n_warps = program, memory, n_warps
        self.threads, self.shared_bytes = n_warps * WARP, shared_bytes
        self.grid = (*grid, 1, 1, 1)[:3]
        self.n_blocks = int(np.prod(self.grid))
        self.noise = np.random.default_rng(seed or 0)
        self.poisons: dict[int, dict[int, Any]] = {}
        total = self.n_blocks * n_warps
        if racecheck and total > MOST_RACING_WARPS:
            raise ValueError(f"racecheck needs at most {MOST_RACING_WARPS} warps, got {total}")
        self.races = Races(total, n_warps) if racecheck else None
        self.check_uninit = check_uninit
        self.is_watched = racecheck or check_uninit
        self.parameters = self.encoded(args)
        self.cache: dict[tuple[Any, ...], list[np.ndarray]] = {}

    def encoded(self, args: Sequence[Any]) -> dict[str, bytes]:
        kernel = self.program.kernel
        missing = kernel.params[len(args) :]
        if len(args) > len(kernel.params) or any(not pointer for *_, pointer in missing):
            names = ", ".join(name for name, *_ in kernel.params)
            takes = f"{kernel.name} takes {len(kernel.params)} arguments ({names})"
            raise TypeError(f"{takes}, got {len(args)}")
        found = {}
        values = [*args, *[0] * len(missing)]
        for n, ((name, t, _), value) in enumerate(zip(kernel.params, values, strict=True)):
            if isinstance(value, np.ndarray) and value.ndim:
                value = self.memory.alloc(value, f"argument {n}")
            if t.is_float:
                found[name] = np.asarray(value, {16: f2, 32: f4, 64: f8}[t.bits]).tobytes()
            else:
                found[name] = (int(value) & ((1 << t.bits) - 1)).to_bytes(t.bits // 8, "little")
        return found

    def parameter(self, name: str, off: int, width: int, n: int, lanes: int) -> list[np.ndarray]:
        key = name, off, width, n, lanes
        if key not in self.cache:
            parts = [self.parameters[name][off + j * width :][:width] for j in range(n)]
            words = [int.from_bytes(part, "little") for part in parts]
            self.cache[key] = [np.full(lanes, word, f"u{width}") for word in words]
        return self.cache[key]

    def poison(self, lanes: int) -> dict[int, Any]:
        """Registers start as garbage, by their bits."""
        if lanes not in self.poisons:
            bits = self.noise.integers(0, 1 << 63, lanes, u8)
            words = {b: bits.astype(u) if b > 1 else bits % 2 > 0 for b, u in UINT.items()}
            self.poisons[lanes] = words | {128: None}
        return self.poisons[lanes]

    def garbage(self, nbytes: int) -> Buffer:
        """Shared memory starts as garbage too."""
        return Buffer(SHARED_BASE, self.noise.integers(0, 256, nbytes, u1), "shared memory")

    def run_in_step(self, max_steps: int) -> None:
        """All warps of some blocks at a time."""
        at_once = max(1, min(MOST_BLOCKS, MOST_LANES // self.threads))
        steps = 0
        for first in range(0, self.n_blocks, at_once):
            n_blocks = min(at_once, self.n_blocks - first)
            group = Group(self, first * self.n_warps, n_blocks * self.n_warps)
            while group.state == "run":
                steps += group.run(4096)
                self.check_steps(steps, max_steps, group)

    def run_scheduled(self, seed: int | None, resident: int, max_steps: int) -> None:
        """Each warp on its own, in turn or at random."""
        order = list(range(self.n_blocks))
        rng = random.Random(seed)
        if seed is not None and resident > 1:
            rng.shuffle(order)
        blocks: list[Block] = []
        turn = steps = 0
        while order or blocks:
            while order and len(blocks) < resident:
                blocks.append(Block(self, order.pop(0)))
            ready = [w for b in blocks for w in b.warps if w.state == "run"]
            if not ready:
                raise Deadlock("no warp can run: " + "; ".join(b.describe() for b in blocks))
            warp = rng.choice(ready) if seed is not None else ready[turn % len(ready)]
            turn += 1
            steps += warp.run(1 << rng.randrange(11) if seed is not None else 4096)
            self.check_steps(steps, max_steps, warp)
            if warp.state == "done" and all(w.state == "done" for w in warp.block.warps):
                blocks.remove(warp.block)

    def check_steps(self, steps: int, max_steps: int, group: Group) -> None:
        if steps > max_steps:
            where = self.at_segment(group.pc)
            raise StepLimit(f"more than {max_steps} segments: a loop that never ends? ({where})")

    def at_segment(self, n: int) -> str:
        return self.program.kernel.where(self.program.segments[n].first)


class Module:
    """A parsed PTX module.

    Args:
        ptx: the text, as in `compiled.asm["ptx"]`.
        memory: a global address space to share with other modules.
    """

    def __init__(self, ptx: str, memory: Memory | None = None):
        self.memory = memory if memory is not None else Memory()
        parser = Parser(ptx, self.memory)
        if not parser.kernels:
            raise KernelError("no .entry in this PTX")
        self.programs = {name: Program(kernel) for name, kernel in parser.kernels.items()}
        self.shared_bytes = parser.shared_size

    def launch(
        self,
        grid: Sequence[int],
        args: Sequence[Any],
        num_warps: int | None = None,
        *,
        kernel: str | None = None,
        shared_bytes: int = 0,
        in_step: bool = False,
        seed: int | None = None,
        resident_blocks: int | None = None,
        racecheck: bool = False,
        check_uninit: bool = False,
        max_steps: int = 100_000_000,
    ) -> None:
        """Run a kernel to its end.

        Args:
            grid: number of blocks in x, y, z.
            args: one per parameter: a numpy array (updated in place), an address from
                `memory.alloc`, or a number. Trailing pointer parameters may be left out (null).
            num_warps: warps in a block; by default what the PTX requires.
            kernel: name of the entry; by default the only one.
            shared_bytes: dynamic shared memory, as in `compiled.metadata.shared`.
            in_step: all warps of a block together where the kernel allows it, which is ten times
                as fast. There is no seed then, nor are there checks between warps.
            seed: random interleaving of warps and blocks; None runs warps in turn.
            resident_blocks: in flight at a time; by default 8 with a seed, 1 without.
            racecheck: raise DataRace on unordered conflicting accesses by different warps.
            check_uninit: raise UninitialisedRead where shared memory is read before it is written.
            max_steps: segments to execute before giving up.
        """
        if kernel is None and len(self.programs) > 1:
            raise TypeError(f"launch() needs kernel=, one of {sorted(self.programs)}")
        program = self.programs[kernel or next(iter(self.programs))]
        required = program.kernel.threads // WARP
        n_warps = num_warps or required or 4
        if required and n_warps != required:
            name = program.kernel.name
            raise ValueError(f"{name} is compiled for {required} warps, got num_warps={n_warps}")
        resident = resident_blocks or (RESIDENT_BLOCKS if seed is not None else 1)
        launch = Launch(
            program,
            self.memory,
            grid,
            n_warps,
            args,
            self.shared_bytes + shared_bytes,
            seed,
            racecheck,
            check_uninit,
        )
        with np.errstate(all="ignore"):
            if in_step and program.goes_in_step and seed is None and not launch.is_watched:
                launch.run_in_step(max_steps)
            else:
                launch.run_scheduled(seed, resident, max_steps)
