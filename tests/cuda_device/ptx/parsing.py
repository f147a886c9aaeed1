"""The text of PTX, as instructions."""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cuda_device.ptx.arithmetic import u1
from cuda_device.ptx.memory import LOCAL_BASE, SHARED_BASE, Memory, UnsupportedInstruction


class Type(NamedTuple):
    kind: str  # u, s, b, pred, f16, bf16, f32, f64
    bits: int
    pack: int = 1

    @property
    def width(self) -> int:
        return self.bits * self.pack

    @property
    def is_float(self) -> bool:
        return "f" in self.kind


TYPES = {f"{k}{b}": Type(k, b) for k in "usb" for b in (8, 16, 32, 64)}
TYPES |= {
    n: Type(n, b) for n, b in (("f16", 16), ("bf16", 16), ("f32", 32), ("f64", 64), ("pred", 1))
}
TYPES |= {f"{n}x2": TYPES[n]._replace(pack=2) for n in ("f16", "bf16", "f32", "u16", "s16")}


class Operand(NamedTuple):
    kind: str  # reg, imm, real, sreg, sym, mem, vec, label, sink
    val: Any = None
    bits: int = 0  # register width
    off: int = 0  # mem: byte offset
    neg: bool = False  # !predicate
    also: Any = None  # the q of d|q


class Instr(NamedTuple):
    index: int
    opcode: str  # ld.global.v4.b32
    op: str  # ld
    mods: list[str]
    types: list[Type]
    args: list[Operand]
    guard: Operand | None
    text: str
    line: int
    loc: tuple[int, int] | None


@dataclass
class Kernel:
    """One .entry: its instructions, parameters, registers and statically known addresses."""

    name: str
    params: list[tuple[str, Type, bool]] = field(default_factory=list)
    threads: int = 0
    regs: list[int] = field(default_factory=list)  # width of each register
    instrs: list[Instr] = field(default_factory=list)
    labels: dict[Any, int] = field(default_factory=dict)  # (scope, name) or name -> instruction
    symbols: dict[str, int] = field(default_factory=dict)
    files: dict[int, str] = field(default_factory=dict)
    local_bytes: int = 0
    uses: Counter = field(default_factory=Counter)  # occurrences of each register

    def where(self, k: int) -> str:
        i = self.instrs[k]
        loc = f" ({self.files.get(i.loc[0], '?')}:{i.loc[1]})" if i.loc else ""
        return f"PTX line {i.line} `{i.text}`{loc}"


def registers(operands: list[Operand]) -> Iterator[int]:
    """Each occurrence of a register."""
    for o in operands:
        if o.kind == "reg":
            yield o.val
        inner = o.val if o.kind == "vec" else [o.val] if o.kind == "mem" else []
        yield from registers([*inner, *filter(None, [o.also])])


VARIABLE = re.compile(
    r"(\.extern\s+|\.visible\s+|\.weak\s+)*\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([\w$]+)\s*(\[\s*(\d*)\s*\])?\s*(?:=\s*(\{[^}]*\}|[^;]+))?;"
)
OPCODE = re.compile(r"([a-z_]\w*)((?:\.[\w:]+)*)")


class Parser:
    """Reads a module. Registers declared in inner braces are kept apart by number."""

    def __init__(self, text: str, memory: Memory):
        text = re.sub(
            r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S
        )
        self.files = {int(n): f for n, f in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
        end = re.search(r"^\s*\.section", text, re.M)
        self.text, self.kernels, self.shared_size = text[: end.start() if end else None], {}, 0
        self.newlines = [m.start() for m in re.finditer("\n", text)]
        self.symbols: dict[str, int] = {}
        first = self.text.find(".entry")
        for m in VARIABLE.finditer(self.text, 0, first):
            self.variable(m, memory)
        for m in re.finditer(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", self.text, re.S):
            self.kernel(m)

    def variable(self, m: re.Match, memory: Memory) -> None:
        _, space, align, type_name, name, array, count, init = m.groups()
        itemsize = TYPES[type_name].width // 8
        size = itemsize * (int(count or 0) if array else 1)
        if space == "shared":
            step = int(align or itemsize)
            self.shared_size = -(-self.shared_size // step) * step
            self.symbols[name] = SHARED_BASE + self.shared_size
            self.shared_size += size
        else:
            data = np.zeros(max(size, 1), u1)
            values = [int(v, 0) for v in re.findall(r"-?\w+", init or "") if re.match(r"-?\d", v)]
            raw = b"".join(
                (v & ((1 << 8 * itemsize) - 1)).to_bytes(itemsize, "little") for v in values
            )
            data[: len(raw)] = np.frombuffer(raw, u1)
            self.symbols[name] = memory.alloc(data, name)

    def kernel(self, m: re.Match) -> None:
        k = self.k = Kernel(m[1], files=self.files, symbols=dict(self.symbols))
        for decl in filter(str.strip, (m[2] or "").split(",")):
            words = re.sub(r"\[.*?\]", "", decl).split()
            type_name = next(w[1:] for w in words if w[1:] in TYPES)
            k.params.append((words[-1], TYPES[type_name], ".ptr" in words or type_name == "u64"))
        if threads := re.search(
            r"\.(?:req|max)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", m[3]
        ):
            k.threads = int(np.prod([int(g) for g in threads.groups() if g]))
        self.kernels[k.name] = k
        self.scopes: list[tuple[int, dict[str, Operand]]] = [(0, {})]
        pos, loc, n_scopes, pending = m.end(), None, 0, []
        space, label = re.compile(r"\s*"), re.compile(r"([\w$.%]+)\s*:(?!:)")
        while True:
            pos = space.match(self.text, pos).end()
            if self.text[pos] == "{":
                n_scopes += 1
                self.scopes.append((n_scopes, {}))
                pos += 1
            elif self.text[pos] == "}":
                self.scopes.pop()
                pos += 1
                if not self.scopes:
                    break
            elif lab := label.match(self.text, pos):
                k.labels[self.scopes[-1][0], lab[1]] = len(pending)
                pos = lab.end()
            elif line_directive := re.compile(r"\.(loc|file)\s+(\d+)\s+(\d*).*").match(
                self.text, pos
            ):
                if line_directive[1] == "loc":
                    loc = int(line_directive[2]), int(line_directive[3])
                pos = line_directive.end()
            else:
                end = self.text.index(";", pos)
                statement = " ".join(self.text[pos:end].split())
                if statement.startswith("."):
                    self.directive(statement)
                elif statement:
                    pending.append(self.instruction(len(pending), statement, pos, loc))
                pos = end + 1
        k.instrs = pending
        for i in pending:
            k.uses.update(registers([*i.args, *filter(None, [i.guard])]))

    def directive(self, s: str) -> None:
        k, scope = self.k, self.scopes[-1][1]
        if m := re.match(r"\.reg\s+\.(\w+)\s+(.*)", s):
            for name in m[2].split(","):
                span = re.fullmatch(r"\s*([\w%$]+)<(\d+)>\s*", name)
                for n in [f"{span[1]}{j}" for j in range(int(span[2]))] if span else [name.strip()]:
                    scope[n] = Operand(
                        "reg", len(k.regs), TYPES[m[1]].width if m[1] != "b128" else 128
                    )
                    k.regs.append(scope[n].bits)
        elif m := VARIABLE.match(s + ";"):
            if m[2] == "local":
                align = int(m[3] or 16)
                k.local_bytes = -(-k.local_bytes // align) * align
                k.symbols[m[5]] = LOCAL_BASE + k.local_bytes
                k.local_bytes += TYPES[m[4]].width // 8 * int(m[7] or 1)
            else:
                self.variable(m, Memory())
                k.symbols[m[5]] = self.symbols[m[5]]
        elif not s.startswith((".pragma", ".branchtargets", ".param")):
            raise UnsupportedInstruction(f"directive {s!r}")

    def instruction(self, index: int, s: str, pos: int, loc) -> Instr:
        text, guard = s, None
        if m := re.match(r"@(!?)\s*([\w%$]+)\s*", s):
            guard = self.operand(m[2])._replace(neg=bool(m[1]))
            s = s[m.end() :]
        m = OPCODE.match(s)
        parts, rest = m[2].split(".")[1:], s[m.end() :]
        args, depth, word = [], 0, ""
        for c in rest + ",":
            depth += (c in "{[(") - (c in "}])")
            if c == "," and not depth:
                args += [self.operand(word.strip())] if word.strip() else []
                word = ""
            else:
                word += c
        line = bisect.bisect_left(self.newlines, pos) + 1
        types = [TYPES[p] for p in parts if p in TYPES]
        return Instr(
            index,
            m[0],
            m[1],
            [p for p in parts if p not in TYPES],
            types,
            args,
            guard,
            text,
            line,
            loc,
        )

    def operand(self, s: str) -> Operand:
        if s[0] == "[":
            m = re.fullmatch(r"\[\s*([\w%$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", s)
            if not m:
                return Operand("other", s)
            return Operand("mem", self.operand(m[1]), off=int(m[2] or "0", 0))
        if s[0] == "{":
            return Operand("vec", [self.operand(x.strip()) for x in s[1:-1].split(",")])
        if s[0] == "!":
            return self.operand(s[1:].strip())._replace(neg=True)
        if "|" in s:
            d, q = s.split("|")
            return self.operand(d.strip())._replace(also=self.operand(q.strip()))
        for _, names in reversed(self.scopes):
            if s in names:
                return names[s]
        if s == "_":
            return Operand("sink")
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", s):
            return Operand("imm", int(m[1] or m[2], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", s):
            return Operand("imm", int(s.rstrip("U"), 0))
        if re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?", s):
            return Operand("real", float(s))
        if s.startswith("%") or s == "WARP_SZ":
            return Operand("sreg", s)
        m = re.fullmatch(r"([\w$.]+)\s*(?:\+\s*(\d+))?", s)
        if m and m[1] in self.k.symbols:
            return Operand("sym", m[1], off=int(m[2] or 0))
        if m and any(m[1] == p[0] for p in self.k.params):
            return Operand("param", m[1])
        return Operand("label", (tuple(n for n, _ in self.scopes), s))
