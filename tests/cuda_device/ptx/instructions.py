"""What each instruction does: lines of Python on arrays with an element for each lane.

To teach an instruction: a line of SIMPLE if it is one expression of its operands, else a function
with ``@op("its name")`` that emits lines; what it computes goes to arithmetic.py. Emitted code has
the group of warps ``w``, its registers ``r``, the mask of active lanes ``m``, all of arithmetic.py,
and ``PLACE`` (number of each lane), ``LANE`` (that within its warp), ``EVERY`` (all lanes).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from cuda_device.ptx import arithmetic
from cuda_device.ptx.arithmetic import ROUND, UINT, shfl_index, u4, u8
from cuda_device.ptx.memory import LOCAL_WINDOW, SHARED_WINDOW, UnsupportedInstruction
from cuda_device.ptx.parsing import TYPES, Instr, Kernel, Operand, Type

HELPERS = {**vars(arithmetic), "where": np.where}


def splat(value: Any, dtype: Any, lanes: int) -> np.ndarray:
    return np.full(lanes, value, dtype)


def shuffle(mode: str, b: int, c: int, part: int, lanes: int) -> np.ndarray:
    """Source lanes, or whether they are in range."""
    return shfl_index(mode, np.full(lanes, b, u4), np.full(lanes, c, u4))[part]


class Emitter:
    """Turns instructions into lines of Python.

    ``q`` names the mask in force, None for all lanes. Lines do not depend on how many lanes there
    are; the constants that they name are made for a number of lanes.
    """

    def __init__(self, kernel: Kernel):
        self.kernel, self.lines, self.q, self.ftz = kernel, [], None, False
        self.constants: dict[str, Callable[[int], np.ndarray]] = {}

    def line(self, text: str) -> None:
        self.lines.append(text)

    def splat(self, value: Any, dtype: Any) -> str:
        name = f"C{np.dtype(dtype).name}_{value}"
        name = name.replace("-", "m").replace(".", "p").replace("+", "")
        self.constants[name] = partial(splat, value, dtype)
        return name

    def shuffle(self, mode: str, b: int, c: int) -> tuple[str, str]:
        names = f"J{mode}_{b}_{c}", f"OK{mode}_{b}_{c}"
        for part, name in enumerate(names):
            self.constants[name] = partial(shuffle, mode, b, c, part)
        return names

    def raw(self, o: Operand, bits: int) -> str:
        """Expression for an operand's low `bits` bits (zero-extended), as unsigned array."""
        if o.kind == "reg":
            text = f"r[{o.val}]" if o.bits == bits else f"r[{o.val}].astype(u{bits // 8})"
            return f"~{text}" if o.neg else text
        if o.kind == "imm":
            value = bool(o.val) ^ o.neg if bits == 1 else o.val & ((1 << bits) - 1)
            return self.splat(value, UINT[bits])
        if o.kind == "real":
            code = {32: "<f", 64: "<d"}[bits]
            return self.splat(int.from_bytes(struct.pack(code, o.val), "little"), UINT[bits])
        if o.kind == "sreg":
            return f"w.special({o.val!r})" + ("" if bits == 32 else f".astype(u{bits // 8})")
        if o.kind == "sym":
            return self.splat(self.kernel.symbols[o.val] + o.off, UINT[bits])
        raise UnsupportedInstruction(f"operand {o.kind} {o.val}")

    def src(self, o: Operand, t: Type) -> str:
        """Expression for an operand as working values: float64 for the 16-bit floats."""
        if o.kind == "imm" and t.kind == "s" and t.pack == 1:
            v = o.val & ((1 << t.bits) - 1)
            return self.splat(v - (v >> (t.bits - 1) << t.bits), f"i{t.bits // 8}")
        form = {
            "u": "{}" if t.pack == 1 else "{}.view(u2)",
            "s": f"{{}}.view(i{t.bits // 8})",
            "f16": "h2d({}.view(u2))",
            "bf16": "b2d({}.view(u2))",
            "f32": "ftz({}.view(f4))" if self.ftz else "{}.view(f4)",
            "f64": "{}.view(f8)",
        }.get(t.kind, "{}")
        return form.format(self.raw(o, t.width))

    def put(self, d: Operand, expr: str, t: Type) -> None:
        """Assign working values to a register: rounded, extended, masked."""
        if d.kind == "sink":
            return
        if t.kind == "f32":
            expr = f"n32(ftz({expr}))" if self.ftz else f"n32({expr})"
        elif t.kind in ("f16", "bf16"):
            expr = f"{'d2h' if t.kind == 'f16' else 'd2b'}({expr})"
        if d.bits > t.width:
            expr = f"({expr}).astype({'i' if t.kind == 's' else 'u'}{d.bits // 8})"
        elif d.bits < t.width:
            raise UnsupportedInstruction(f"{t} into a {d.bits}-bit register")
        if t.kind in ("s", "f64") or t.pack == 2:
            expr = f"({expr}).view(u{d.bits // 8})"
        if self.q is not None:
            expr = f"where({self.q}, {expr}, r[{d.val}])"
        self.line(f"r[{d.val}] = {expr}")

    def address(self, o: Operand) -> str:
        """Expression for the address in a memory operand, in the width of its register."""
        if o.val.kind == "sym":
            return self.splat(self.kernel.symbols[o.val.val] + o.val.off + o.off, u8)
        bits = o.val.bits or 64
        text = self.raw(o.val, bits)
        return f"({text} + {self.splat(o.off % (1 << bits), UINT[bits])})" if o.off else text


OPS: dict[str, Callable[[Emitter, Instr], None]] = {}


def op(*names: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        OPS.update(dict.fromkeys(names, function))
        return function

    return register


class Fields(dict):
    """What a template may name.

    {a} {b} ... are operands as working values of the main type, {A} {B} ... raw bits of its width,
    {B32} or {C1} raw bits of another width; {bits} and {signed} are the type's; {?mod} is whether
    the instruction has a modifier, {mod} its first one.
    """

    def __init__(self, e: Emitter, i: Instr):
        t = i.types[0]
        super().__init__(bits=t.bits, signed=t.kind == "s", mod=i.mods[0] if i.mods else "")
        self.e, self.i = e, i

    def __missing__(self, key: str) -> str:
        if key[0] == "?":
            return str(key[1:] in self.i.mods)
        o, t = self.i.args["abcd".index(key[0].lower()) + 1], self.i.types[0]
        return self.e.src(o, t) if key.islower() else self.e.raw(o, int(key[1:] or t.width))


# Templates, and the type of the result: main type, its bits, a 32-bit word, or a predicate. Names
# ending in .f, .h or .i apply to float, 16-bit float or other operands.
SIMPLE = {
    "and": ("{A} & {B}", "bits"),
    "or": ("{A} | {B}", "bits"),
    "xor": ("{A} ^ {B}", "bits"),
    "not": ("~{A}", "bits"),
    "cnot": ("({A} == 0).astype({A}.dtype)", "bits"),
    "selp": ("where({C1}, {A}, {B})", "bits"),
    "prmt": ("prmt({A}, {B}, {C})", "bits"),
    "shf": ("funnel({A}, {B}, {C}, {?l}, {?clamp})", "bits"),
    "bfe": ("bfe({A}, {B32}, {C32}, {signed})", "bits"),
    "bfi": ("bfi({A}, {B}, {C32}, {D32})", "bits"),
    "brev": ("brev({A})", "bits"),
    "copysign": ("np.copysign({b}, {a}).view({A}.dtype)", "bits"),
    "popc": ("np.bitwise_count({A}).astype(u4)", "word"),
    "clz": ("({bits} - 1 - top_bit({A})).astype(u4)", "word"),
    "bfind": ("bfind({a}, {?shiftamt})", "word"),
    "testp": ("testp({a}, '{mod}')", "pred"),
    "abs.i": ("np.abs({a})", "main"),
    "abs.f": ("np.abs({a})", "main"),
    "abs.h": ("{A}.view(u2) & u2(0x7FFF)", "bits"),
    "neg.i": ("-{a}", "main"),
    "neg.f": ("-{a}", "main"),
    "neg.h": ("{A}.view(u2) ^ u2(0x8000)", "bits"),
    "min.i": ("np.minimum({a}, {b})", "main"),
    "max.i": ("np.maximum({a}, {b})", "main"),
    "div.i": ("divide({a}, {b}, False)", "main"),
    "rem.i": ("divide({a}, {b}, True)", "main"),
    "div.f": ("{a} / {b}", "main"),
    "rcp": ("1 / {a}", "main"),
    "rsqrt": ("1 / via64(np.sqrt, {a})", "main"),
    "sqrt": ("via64(np.sqrt, {a})", "main"),
    "ex2": ("via64(np.exp2, {a})", "main"),
    "lg2": ("via64(np.log2, {a})", "main"),
    "sin": ("via64(np.sin, {a})", "main"),
    "cos": ("via64(np.cos, {a})", "main"),
    "tanh": ("via64(np.tanh, {a})", "main"),
}


def simple(e: Emitter, i: Instr) -> bool:
    """Emit an instruction of the SIMPLE table, if it is one."""
    t = i.types[0] if i.types else TYPES["b32"]
    suffix = ".h" if t.kind in ("f16", "bf16") else ".f" if t.is_float else ".i"
    found = SIMPLE.get(i.op + suffix) or SIMPLE.get(i.op)
    if found is None and suffix == ".h":
        found = SIMPLE.get(i.op + ".f")
    if found is None:
        return False
    if "relu" in i.mods and not t.is_float:
        raise UnsupportedInstruction("relu of integers")
    only_rn(i)
    bits = Type("u", t.bits, t.pack) if t.kind != "pred" else t
    template, result = found
    out = {"main": t, "bits": bits, "word": TYPES["u32"], "pred": TYPES["pred"]}[result]
    e.put(i.args[0], template.format_map(Fields(e, i)), out)
    return True


def unsigned(t: Type) -> Type:
    return t if t.is_float or t.kind == "pred" else Type("u", t.bits, t.pack)


def rounding(i: Instr) -> str:
    return next((m for m in i.mods if m in ("rn", "rz", "rm", "rp")), "rn")


def only_rn(i: Instr) -> None:
    if rounding(i) != "rn":
        raise UnsupportedInstruction("rounding mode")


@op("add", "sub", "mul", "addc", "subc")
def _(e, i):
    (d, a, b), t, name = i.args, i.types[0], i.op.rstrip("c")
    sign = {"add": "+", "sub": "-", "mul": "*"}[name]
    if not t.is_float:
        if i.op.endswith("c") or "cc" in i.mods:
            carry(e, i, f"{e.raw(a, 32)}.astype(u8) {sign} {e.raw(b, 32)}", sign)
        elif name == "mul":
            e.put(d, *product(e, i))
        elif "sat" in i.mods:
            raise UnsupportedInstruction("integer saturation")
        else:
            e.put(d, f"{e.src(a, unsigned(t))} {sign} {e.src(b, unsigned(t))}", unsigned(t))
        return
    # With two types, a is a 16-bit float.
    if len(i.types) == 2 or (t.kind == "f32" and rounding(i) != "rn"):
        function, minus = f"{'mul' if name == 'mul' else 'add'}32", "-" if name == "sub" else ""
        expr = f"{function}({e.src(a, i.types[-1])}, {minus}{e.src(b, t)}, {rounding(i)!r})"
    else:
        only_rn(i)
        expr = f"{e.src(a, t)} {sign} {e.src(b, t)}"
    e.put(d, f"sat({expr})" if "sat" in i.mods else expr, t)


def product(e: Emitter, i: Instr) -> tuple[str, Type]:
    """The lo, hi or wide part of an integer product, and its type."""
    t, (a, b) = i.types[0], i.args[1:3]
    letter = "i" if t.kind == "s" else "u"
    if "wide" in i.mods:
        cast = f".astype({letter}{t.bits // 4})"
        return f"{e.src(a, t)}{cast} * {e.src(b, t)}{cast}", Type(t.kind, t.bits * 2)
    if "hi" in i.mods:
        if t.bits == 64:
            return f"mulhi64({e.src(a, t)}, {e.src(b, t)})", t
        wide = f"{e.src(a, t)}.astype({letter}8) * {e.src(b, t)}.astype({letter}8)"
        return f"({wide} >> {t.bits}).astype({letter}{t.bits // 8})", t
    return f"{e.src(a, unsigned(t))} * {e.src(b, unsigned(t))}", unsigned(t)


def carry(e: Emitter, i: Instr, total: str, sign: str) -> None:
    """Extended-precision step: `total` is a 64-bit sum that may exceed 32 bits."""
    if i.types[0].bits != 32:
        raise UnsupportedInstruction("64-bit carry chain")
    e.line(f"t = {total}" + (f" {sign} w.carry" if i.op.endswith("c") else ""))
    e.put(i.args[0], "t.astype(u4)", TYPES["u32"])
    if "cc" in i.mods:
        e.line(f"w.carry = where({e.q or 'EVERY'}, (t >> 32) & 1, w.carry)")


@op("mad", "madc", "fma")
def _(e, i):
    (d, a, b, c), t, mode = i.args, i.types[0], rounding(i)
    if not t.is_float:
        part, out = product(e, i)
        if i.op == "madc" or "cc" in i.mods:
            carry(e, i, f"({part}).view(u4).astype(u8) + {e.raw(c, 32)}", "+")
        else:
            e.put(d, f"({part}) + {e.src(c, out)}", out)
        return
    if len(i.types) == 2:  # a and b are 16-bit floats
        x, y, z = e.src(a, i.types[1]), e.src(b, i.types[1]), e.src(c, t)
        expr = f"round32(*two_sum({x} * {y}, {z}.astype(f8)), {mode!r})"
    elif t.kind == "f32":
        expr = f"fma32({e.src(a, t)}, {e.src(b, t)}, {e.src(c, t)}, {mode!r})"
    else:
        only_rn(i)
        function = "fma64" if t.kind == "f64" else "fma_odd"
        expr = f"{function}({e.src(a, t)}, {e.src(b, t)}, {e.src(c, t)})"
    if "sat" in i.mods or "relu" in i.mods:
        expr = f"{'sat' if 'sat' in i.mods else 'relu'}({expr})"
    e.put(d, expr, t)


@op("min", "max")
def _(e, i):
    """Floats; there may be a third operand."""
    t, (expr, *others) = i.types[0], [e.src(a, i.types[0]) for a in i.args[1:]]
    function = f"np.{i.op}imum" if "NaN" in i.mods else f"p{i.op}"
    for other in others:
        if "xorsign" in i.mods:
            expr = f"xorsign({function}, {expr}, {other})"
        else:
            expr = f"{function}({expr}, {other})"
    e.put(i.args[0], f"relu({expr})" if "relu" in i.mods else expr, t)


@op("shl", "shr")
def _(e, i):
    (d, a, b), t = i.args, i.types[0]
    dtype = f"{'i' if t.kind == 's' else 'u'}{t.bits // 8}"
    if b.kind == "imm":
        n = e.splat(min(b.val & 0xFFFFFFFF, t.bits), dtype)
    else:
        n = f"np.minimum({e.raw(b, 32)}, u4({t.bits})).astype({dtype})"
    e.put(d, f"{e.src(a, t)} {'<<' if i.op == 'shl' else '>>'} {n}", t)


@op("lop3")
def _(e, i):
    d, *abc, lut = i.args
    x = [e.raw(o, 32) for o in abc]
    rows = [n for n in range(8) if lut.val >> n & 1]
    signs = [["" if n >> (2 - j) & 1 else "~" for j in range(3)] for n in rows]
    terms = ["(" + " & ".join(map("".join, zip(row, x, strict=True))) + ")" for row in signs]
    e.put(d, " | ".join(terms) or e.splat(0, u4), TYPES["u32"])


@op("slct")
def _(e, i):
    (d, a, b, c), t = i.args, i.types[0]
    choice = f"{e.src(c, i.types[1])} >= 0"
    e.put(d, f"where({choice}, {e.raw(a, t.width)}, {e.raw(b, t.width)})", Type("b", t.width))


COMPARE = {
    "eq": "{a} == {b}",
    "ne": "{a} != {b}",
    "lt": "{a} < {b}",
    "le": "{a} <= {b}",
    "gt": "{a} > {b}",
    "ge": "{a} >= {b}",
    "lo": "{a} < {b}",
    "ls": "{a} <= {b}",
    "hi": "{a} > {b}",
    "hs": "{a} >= {b}",
    "ne.f": "({a} < {b}) | ({a} > {b})",
    "equ": "~(({a} < {b}) | ({a} > {b}))",
    "neu": "{a} != {b}",
    "ltu": "~({a} >= {b})",
    "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})",
    "geu": "~({a} < {b})",
    "num": "({a} == {a}) & ({b} == {b})",
    "nan": "({a} != {a}) | ({b} != {b})",
}


@op("setp", "set")
def _(e, i):
    (d, a, b, *extra), t = i.args, i.types[-1]
    how = next(m for m in i.mods if m in COMPARE)
    form = COMPARE["ne.f" if how == "ne" and t.is_float else how]
    t = unsigned(t) if how in ("lo", "ls", "hi", "hs") else t
    e.line(f"t = {form.format(a=e.src(a, t), b=e.src(b, t))}")
    join = next((s for m, s in (("and", "&"), ("or", "|"), ("xor", "^")) if m in i.mods), "")
    if join:
        if t.pack == 2:
            raise UnsupportedInstruction("packed comparison joined with a predicate")
        e.line(f"c = {e.raw(extra[0], 1)}")
        join = f" {join} c"
    if i.op == "set":  # all ones, or 1.0; for each half of a packed operand
        out = i.types[0] if t.pack == 1 or i.types[0].is_float else TYPES["u16x2"]
        one = "astype(f8)" if out.kind in ("f16", "bf16") else "astype(f4)"
        e.put(
            d,
            f"(t{join}).{one}" if out.is_float else f"-(t{join}).astype(u{out.bits // 8})",
            unsigned(out),
        )
    elif t.pack == 2:  # a predicate for each half
        for half, o in enumerate(filter(None, (d, d.also))):
            e.put(o, f"t[{half}::2]", TYPES["pred"])
    else:
        e.put(d, "t" + join, TYPES["pred"])
        if d.also:
            e.put(d.also, "~t" + join, TYPES["pred"])


@op("mov")
def _(e, i):
    (d, a), t = i.args, i.types[0]
    if a.kind == "vec":  # pack, first element lowest
        each = t.width // len(a.val)
        cast = f"astype(u{t.width // 8})"
        parts = [f"({e.raw(o, each)}.{cast} << {n * each})" for n, o in enumerate(a.val)]
        e.put(d, " | ".join(parts), Type("b", t.width))
    elif d.kind == "vec":
        each = t.width // len(d.val)
        e.line(f"t = {e.raw(a, t.width)}")
        for n, o in enumerate(d.val):
            e.put(o, f"(t >> {n * each}).astype(u{each // 8})", Type("b", each))
    else:
        e.put(d, e.raw(a, t.width), Type("pred" if t.width == 1 else "b", t.width))


@op("cvt")
def _(e, i):
    d, a, *rest = i.args
    to, frm = i.types
    integer = next((m for m in i.mods if m in ROUND), None)

    def convert(o: Operand) -> str:
        x = e.src(o, frm)
        dtype = f"{'i' if to.kind == 's' else 'u'}{to.bits // 8}"
        if not frm.is_float and not to.is_float:
            x = f"clamp({x}, {to.kind == 's'}, {to.bits})" if "sat" in i.mods else x
            return f"({x}).astype({dtype})"
        if not to.is_float:
            wide = frm.kind == "f64" or to.bits == 64
            return f"f2i({x}.astype(f8), {integer!r}, {dtype}, {wide})"
        mode = rounding(i)
        if to.kind == "f32":
            if frm.kind == "bf16":
                return f"({x}).astype(f4)"
            if mode != "rn":
                if frm.bits == 64 and not frm.is_float:
                    raise UnsupportedInstruction("rounding mode")
                return f"round32({x}.astype(f8), 0.0, {mode!r})"
            x = f"{x}.astype(f4)" if frm.kind != "f32" else x
        elif to.kind == "f64" or to != frm:
            x = f"{x}.astype(f8)"
        if integer:
            x = f"ROUND[{integer!r}]({x})"
        x = f"sat({x})" if "sat" in i.mods else f"relu({x})" if "relu" in i.mods else x
        if to.kind in ("f16", "bf16") and mode != "rn":
            if mode != "rz" or frm.kind != "f32":
                raise UnsupportedInstruction("rounding mode")
            x = f"{'h2d(d2h' if to.kind == 'f16' else 'b2d(d2b'}({x}, 'rz'))"
        return x

    if rest:  # packed pair: the first source is the high half
        if to.pack != 2 or frm.kind != "f32":
            raise UnsupportedInstruction("packed conversion")
        e.line(f"t = np.stack([{convert(rest[0])}, {convert(a)}], 1).ravel()")
        e.put(d, "t", to)
    elif frm.kind == "bf16" and to.kind == "f32" and not integer and "sat" not in i.mods:
        # Compiled to a shift: a NaN's payload survives.
        e.put(d, f"{e.raw(a, 16)}.astype(u4) << 16", Type("b", 32))
    else:
        e.put(d, convert(a), to)


@op("cvta")
def _(e, i):
    space = next((m for m in i.mods if m != "to"), "global")
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space.split("::")[0], 0)
    x = e.raw(i.args[1], i.types[0].bits)
    sign = "-" if "to" in i.mods else "+"
    e.put(i.args[0], f"{x} {sign} u8({window})" if window else x, unsigned(i.types[0]))


def space_of(i: Instr) -> str:
    spaces = ("global", "shared", "local", "param", "const")
    found = [m.split("::")[0] for m in i.mods if m.split("::")[0] in spaces]
    return {"const": "global"}.get(found[0], found[0]) if found else "generic"


def order_of(i: Instr) -> str | None:
    """Memory ordering of a strong access; None for a weak one."""
    strong = [m for m in i.mods if m in ("relaxed", "acquire", "release", "acq_rel")]
    if strong:
        return strong[0]
    return "relaxed" if "volatile" in i.mods or i.op in ("atom", "red") else None


@op("ld", "ldu")
def _(e, i):
    t, d = i.types[0], i.args[0]
    out = d.val if d.kind == "vec" else [d]
    if space_of(i) == "param":
        base = i.args[1].val
        if base.kind != "param":
            raise UnsupportedInstruction("parameter address")
        e.line(f"t = w.parameter({base.val!r}, {i.args[1].off}, {t.bits // 8}, {len(out)})")
    else:
        where = f"{i.index}, {space_of(i)!r}, {e.address(i.args[1])}"
        e.line(f"t = w.load({where}, {t.bits // 8}, {len(out)}, {e.q}, {order_of(i)!r})")
    for n, o in enumerate(out):
        if t.kind == "s":
            e.put(o, f"t[{n}].view(i{t.bits // 8})", t)
        else:
            e.put(o, f"t[{n}]", Type("b", t.bits))


@op("st")
def _(e, i):
    t, v = i.types[0], i.args[1]
    values = ", ".join(e.raw(o, t.bits) for o in (v.val if v.kind == "vec" else [v]))
    where = f"{i.index}, {space_of(i)!r}, {e.address(i.args[0])}"
    e.line(f"w.store({where}, {t.bits // 8}, [{values}], {e.q}, {order_of(i)!r})")


ATOMIC: dict[str, Callable[[int, int, int], int]] = {  # old value and operands, to new value
    "add": lambda o, b, _: o + b,
    "min": lambda o, b, _: min(o, b),
    "max": lambda o, b, _: max(o, b),
    "and": lambda o, b, _: o & b,
    "or": lambda o, b, _: o | b,
    "xor": lambda o, b, _: o ^ b,
    "exch": lambda o, b, _: b,
    "cas": lambda o, b, c: c if o == b else o,
    "inc": lambda o, b, _: 0 if o >= b else o + 1,
    "dec": lambda o, b, _: b if o == 0 or o > b else o - 1,
}


@op("atom", "red")
def _(e, i):
    t, args = i.types[0], list(i.args)
    d = args.pop(0) if i.op == "atom" else Operand("sink")
    mem, *operands = args
    what = next(m for m in i.mods if m in ATOMIC)
    lists = [o.val if o.kind == "vec" else [o] for o in operands[: 2 if what == "cas" else 1]]
    outs = d.val if d.kind == "vec" else [d]
    for n, o in enumerate(outs if d.kind != "sink" else [d] * len(lists[0])):
        at = e.address(mem._replace(off=mem.off + n * t.width // 8))
        values = ", ".join(e.raw(x[n], t.width) for x in lists)
        needed = o.kind != "sink" and e.kernel.uses[o.val] > 1
        where = f"{i.index}, {space_of(i)!r}, {at}, {what!r}, {tuple(t)!r}"
        e.line(f"t = w.atomic({where}, [{values}], {e.q}, {order_of(i)!r}, {needed})")
        if needed:
            e.put(o, "t", Type("b", t.width))


@op("cp")
def _(e, i):
    """cp.async: copies happen at the wait, as late as is allowed."""
    if i.mods[:2] == ["async", "commit_group"]:
        e.line("w.copies.append([])")
    elif i.mods[:2] in (["async", "wait_group"], ["async", "wait_all"]):
        if i.mods[1] == "wait_all":
            e.line("w.copies.append([])")
        e.line(f"w.finish_copies({i.args[0].val if i.args else 0})")
    elif i.mods[0] == "async" and i.mods[1] in ("ca", "cg"):
        dst, src, size, *valid = i.args
        partly = valid and valid[0].bits != 64
        count = e.raw(valid[0], 32) if partly else e.splat(size.val, u4)
        copy = f"{i.index}, {e.address(dst)}, {e.address(src)}, {size.val}, {count}, {e.q}"
        e.line(f"w.copies[-1].append(({copy}))")
    else:
        raise UnsupportedInstruction("cp form")


@op("ldmatrix", "stmatrix")
def _(e, i):
    if "m8n8" not in i.mods or i.types[0].bits != 16:
        raise UnsupportedInstruction("matrix shape")
    loads = i.op == "ldmatrix"
    mem, regs = (i.args[1], i.args[0]) if loads else (i.args[0], i.args[1])
    e.line(f"a = {e.address(mem)}")
    for n, o in enumerate(regs.val if regs.kind == "vec" else [regs]):
        if "trans" in i.mods:  # a lane holds two elements of one column
            rows = [f"a[PLACE - LANE + {8 * n} + 2 * (LANE % 4) + {j}]" for j in (0, 1)]
            places = [f"{row} + (LANE // 4 * 2).astype(a.dtype)" for row in rows]
            if loads:
                halves = [f"w.load({i.index}, 'shared', {x}, 2, 1, {e.q})[0]" for x in places]
                lo, hi = (f"{half}.astype(u4)" for half in halves)
                e.put(o, f"{lo} | {hi} << 16", Type("b", 32))
            else:
                for j, x in enumerate(places):
                    half = f"(r[{o.val}] >> {16 * j}).astype(u2)"
                    e.line(f"w.store({i.index}, 'shared', {x}, 2, [{half}], {e.q})")
        else:
            x = f"a[PLACE - LANE + {8 * n} + LANE // 4] + (LANE % 4 * 4).astype(a.dtype)"
            if loads:
                e.put(o, f"w.load({i.index}, 'shared', {x}, 4, 1, {e.q})[0]", Type("b", 32))
            else:
                e.line(f"w.store({i.index}, 'shared', {x}, 4, [r[{o.val}]], {e.q})")


@op("shfl")
def _(e, i):
    d, a, b, c, _ = i.args
    mode = i.mods[1]
    if b.kind == c.kind == "imm":
        j, ok = e.shuffle(mode, b.val & 31, c.val)
    else:
        e.line(f"j, ok = shfl_index({mode!r}, {e.raw(b, 32)}, {e.raw(c, 32)})")
        j, ok = "j", "ok"
    if e.q:
        e.line(f"w.check_sources({i.index}, {j}, {e.q})")
    e.put(d, f"{e.raw(a, 32)}[{j}]", Type("b", 32))
    if d.also:
        e.put(d.also, ok, TYPES["pred"])


@op("vote", "match", "redux", "activemask", "elect")
def _(e, i):
    d, word, pred = i.args[0], Type("b", 32), TYPES["pred"]
    if i.op == "activemask":
        e.put(d, f"ballot(EVERY, {e.q})", word)
    elif i.op == "elect":
        e.line(f"t = leader({e.q or 'EVERY'})")
        e.put(d, "t", word)
        if d.also:
            e.put(d.also, "LANE == t", pred)
    elif i.op == "redux":
        x = e.src(i.args[1], i.types[0])
        x = f"np.abs({x})" if "abs" in i.mods else x
        e.put(d, f"redux({i.mods[1]!r}, {x}, {e.q}, {'NaN' in i.mods})", i.types[0])
    elif i.op == "match":
        e.line(f"t, ok = match({e.raw(i.args[1], i.types[0].bits)}, {e.q}, {'all' in i.mods})")
        e.put(d, "t", word)
        if d.also:
            e.put(d.also, "ok", pred)
    else:
        e.line(f"t = ballot({e.raw(i.args[1], 1)}, {e.q}); all_ = ballot(EVERY, {e.q})")
        all_or_none = "(t == 0) | (t == all_)"
        forms = {"ballot": "t", "any": "t != 0", "all": "t == all_", "uni": all_or_none}
        e.put(d, forms[i.mods[1]], word if i.mods[1] == "ballot" else pred)


@op("membar", "fence")
def _(e, i):
    e.line("w.fence()")


@op("createpolicy")
def _(e, i):
    e.put(i.args[0], e.splat(0, u8), Type("b", 64))


@op(
    *("prefetch", "prefetchu", "discard", "applypriority"),
    *("nanosleep", "griddepcontrol", "setmaxnreg", "pmevent"),
)
def _(e, i):
    """No effect on results."""


@op("trap", "brkpt")
def _(e, i):
    e.line(f"w.trap({i.index}, {e.q})")


def is_barrier(i: Instr) -> bool:
    return i.op in ("bar", "barrier") and "cluster" not in i.mods


REFUSED = {"satfinite", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}
CONTROL = ("bra", "ret", "exit")
WARP_WIDE = ("shfl", "vote", "match", "redux", "elect", "ldmatrix", "stmatrix")
TOUCHES_MEMORY = ("ld", "ldu", "st", "atom", "red", "cp", "membar", "fence")


def emit(e: Emitter, i: Instr, mask: str | None) -> None:
    """Emit an instruction; one that cannot be executed raises when it is reached."""
    if i.guard:
        test = e.raw(i.guard, 1)
        e.line(f"q = {test} & m" if mask else f"q = {test}")
        mask = "q"
    e.q, e.ftz = mask, "ftz" in i.mods and any(t.kind == "f32" for t in i.types)
    done = len(e.lines)
    try:
        if i.op in CONTROL or is_barrier(i):
            e.line(f"return {mask}")
        elif REFUSED.intersection(i.mods):
            raise UnsupportedInstruction(i.opcode)
        elif not simple(e, i):
            OPS[i.op](e, i)
    except (
        *(UnsupportedInstruction, LookupError, ValueError),
        *(StopIteration, AttributeError, TypeError),
    ) as why:
        e.lines[done:] = [f"w.unsupported({i.index}, {mask}, {str(why)!r})"]
