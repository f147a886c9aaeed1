"""Single instructions of PTX, against Python's own numbers, and what is reported of mistakes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from cuda_device.ptx.execution import Module
from cuda_device.ptx.memory import (
    BarrierDivergence,
    DataRace,
    Deadlock,
    KernelError,
    Memory,
    MemoryFault,
    StepLimit,
    Trap,
    UninitialisedRead,
    UnsupportedInstruction,
)

pytestmark = [
    pytest.mark.gpu,  # nobody else runs PTX
    # The interpreter counts bits with NumPy 2.
    pytest.mark.skipif(not hasattr(np, "bitwise_count"), reason="needs NumPy 2"),
]

INF = float("inf")


def to_bf16(x: np.ndarray) -> np.ndarray:
    u = np.asarray(x, np.float32).view(np.uint32)
    return np.where(x != x, 0x7FC0, (u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def run(
    body: str, *arrays: np.ndarray, warps: int = 1, grid: int = 1, shared: int = 0, **options: Any
) -> None:
    """Run PTX in which %rd0, %rd1, ... point at the arrays and %r0 is %tid.x."""
    params = ", ".join(f".param .u64 p{n}" for n in range(len(arrays)))
    load = "\n".join(f"ld.param.u64 %rd{n}, [p{n}];" for n in range(len(arrays)))
    ptx = f"""
    .version 8.7
    .target sm_90
    .address_size 64
    .extern .shared .align 16 .b8 smem[];
    .visible .entry k({params})
    {{
    .reg .pred %p<9>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %rd<30>;
    {load}
    mov.u32 %r0, %tid.x;
    {body}
    ret;
    }}"""
    Module(ptx).launch((grid,), list(arrays), num_warps=warps, shared_bytes=shared, **options)


def apply(opcode: str, *sources: np.ndarray, out=np.uint32, tail: str = "") -> np.ndarray:
    """Run one instruction on arrays of 32 n elements, a source register per array."""
    n = len(sources[0])
    result = np.zeros(n, out)
    names = {1: "%h", 2: "%h", 4: "%r", 8: "%rd"}
    lines = []
    for j, x in enumerate([*sources, result]):
        size = x.dtype.itemsize
        lines.append(f"mad.wide.u32 %rd{10 + j}, %r30, {size}, %rd{j};")
        if j < len(sources):
            lines.append(f"ld.global.b{8 * size} {names[size]}{10 + j}, [%rd{10 + j}];")
    regs = ", ".join(f"{names[x.dtype.itemsize]}{10 + j}" for j, x in enumerate(sources))
    size = result.dtype.itemsize
    if out is bool:
        lines.append(
            f"{opcode} %p1, {regs}{tail}; selp.b16 %h19, 1, 0, %p1;"
            f"st.global.b8 [%rd{10 + len(sources)}], %h19;"
        )
    else:
        lines.append(
            f"{opcode} {names[size]}9, {regs}{tail};"
            f"st.global.b{8 * size} [%rd{10 + len(sources)}], {names[size]}9;"
        )
    index = "mov.u32 %r31, %ctaid.x; shl.b32 %r31, %r31, 5; add.s32 %r30, %r0, %r31;"
    body = index + "\n".join(lines)
    run(body, *sources, result, grid=n // 32)
    in_step = np.zeros(n, out)
    run(body, *sources, in_step, grid=n // 32, in_step=True)
    np.testing.assert_array_equal(in_step, result)
    return result


def floats(rng, n, special=(), dtype=np.float32):
    """Random floats of every magnitude, with special values mixed in."""
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[np.dtype(dtype).itemsize]
    x = rng.integers(0, np.iinfo(bits).max, n, bits, endpoint=True).view(dtype)
    x = np.where(np.isnan(x), dtype(1), x)
    values = np.array([0.0, -0.0, INF, -INF, 1.0, -1.5, *special], dtype)
    return np.where(rng.random(n) < 0.3, rng.choice(values, n), x)


def rounded(exact: Fraction, mode: str) -> np.float32:
    """The float32 next to an exact value, by comparing fractions."""
    with np.errstate(all="ignore"):
        y = np.float32(float(exact))
        if np.isinf(y):
            y = np.float32(np.copysign(np.finfo(np.float32).max, y))
        near = sorted({y, np.nextafter(y, np.float32(-INF)), np.nextafter(y, np.float32(INF))})
    top = (
        Fraction(2) ** 128 if mode == "rn" else Fraction(2) ** 999
    )  # to nearest, infinity is as if the next power of two
    value = {v: Fraction(float(v)) if np.isfinite(v) else top * (1 if v > 0 else -1) for v in near}
    below = max((v for v in near if value[v] <= exact), default=near[0])
    above = min((v for v in near if value[v] >= exact), default=near[-1])
    if mode == "rz":
        mode = "rm" if exact > 0 else "rp"
    if mode in ("rm", "rp"):
        return below if mode == "rm" else above
    down, up = exact - value[below], value[above] - exact
    even = below if not int(np.float32(below).view(np.uint32)) & 1 else above
    return below if down < up else above if up < down else even


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_float32_arithmetic_rounds_once(op, mode):
    rng = np.random.default_rng(1)
    a, b, c = (
        floats(rng, 2048, (1 + 2.0**-23, 1 + 2.0**-12, 2.0**-126, 2.0**-149, 2.0**-24, 2.0**-75))
        for _ in range(3)
    )
    b[1::3] = np.where(
        np.isfinite(a[1::3]),
        rng.choice([1, -1, 2.0**-24, 1 + 2.0**-23], a[1::3].size).astype(np.float32),
        1,
    )
    with np.errstate(all="ignore"):
        c[::2] = (-a * b)[::2] * np.float32(1 + 2.0**-22)
    c[~np.isfinite(c)] = 0
    sources = (a, b, c) if op == "fma" else (a, b)
    got = apply(f"{op}.{mode}.f32", *sources, out=np.float32)
    for g, x, y, z in zip(got, a, b, c, strict=True):
        with np.errstate(all="ignore"):
            plain = {"add": x + y, "sub": x - y, "mul": x * y, "fma": np.float64(x) * y + z}[op]
        if not (np.isfinite(x) and np.isfinite(y)):
            np.testing.assert_array_equal(g, np.float32(plain))
            continue
        x, y, z = (Fraction(float(v)) for v in (x, y, z))
        exact = {"add": x + y, "sub": x - y, "mul": x * y, "fma": x * y + z}[op]
        assert g == rounded(exact, mode) if exact else g == 0, (x, y, z)


def test_float64_fma_rounds_once():
    rng = np.random.default_rng(2)
    a, b, c = rng.standard_normal((3, 64))
    c[::2] = -a[::2] * b[::2]
    want = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(apply("fma.rn.f64", a, b, c, out=np.float64), want)


def test_ftz_flushes_inputs_and_results():
    a = np.tile(np.array([2.0**-127, -(2.0**-149), 2.0**-100, 1.0], np.float32), 8)
    b = np.tile(np.array([1.0, 1.0, 2.0**-30, 2.0**-130], np.float32), 8)
    np.testing.assert_array_equal(apply("mul.ftz.f32", a, b, out=np.float32), np.zeros(32))
    np.testing.assert_array_equal(
        apply("mul.f32", a, b, out=np.float32)[:4], [2.0**-127, -(2.0**-149), 2.0**-130, 2.0**-130]
    )


def test_nan_results_are_canonical():
    x = np.full(32, 0xFFC00123, np.uint32)
    one = np.ones(32, np.float32)
    assert set(apply("add.f32", x, one).tolist()) == {0x7FFFFFFF}
    assert set(apply("cvt.f32.f16", np.full(32, 0x7E01, np.uint16)).tolist()) == {0x7FFFFFFF}
    assert set(apply("cvt.f32.bf16", np.full(32, 0x7FC1, np.uint16)).tolist()) == {0x7FC10000}
    assert set(apply("cvt.rn.bf16.f32", x, out=np.uint16).tolist()) == {0x7FFF}


def test_min_max_nan_and_signed_zero():
    a = np.tile(np.array([np.nan, 1, -0.0, 0.0, np.nan, 2, -INF, -0.0], np.float32), 4)
    b = np.tile(np.array([1, np.nan, 0.0, -0.0, np.nan, -3, 1, -5], np.float32), 4)
    got = {
        op: apply(op, a, b, out=np.float32)[:8]
        for op in ("min.f32", "max.f32", "min.NaN.f32", "max.NaN.f32")
    }
    np.testing.assert_array_equal(got["min.f32"], [1, 1, 0, 0, np.nan, -3, -INF, -5])
    np.testing.assert_array_equal(got["max.f32"], [1, 1, 0, 0, np.nan, 2, 1, 0])
    np.testing.assert_array_equal(np.signbit(got["min.f32"][2:4]), True)
    np.testing.assert_array_equal(np.signbit(got["max.f32"][[2, 3, 7]]), [False, False, True])
    np.testing.assert_array_equal(np.isnan(got["min.NaN.f32"]), np.isnan(a[:8] + b[:8]))
    np.testing.assert_array_equal(np.isnan(got["max.NaN.f32"]), np.isnan(a[:8] + b[:8]))


@pytest.mark.parametrize(
    ("kind", "frm", "nan"),
    [
        ("s16", "f32", 0),
        ("u16", "f32", 0),
        ("s32", "f32", 0),
        ("u32", "f32", 0),
        ("s64", "f32", -(2**63)),
        ("u64", "f32", 2**63),
        ("s32", "f64", -(2**31)),
        ("u32", "f64", 2**31),
    ],
)
def test_cvt_to_integer_rounds_and_saturates(kind, frm, nan):
    dtype = np.dtype(kind.replace("s", "int").replace("u", "uint"))
    info = np.iinfo(dtype)
    rng = np.random.default_rng(3)
    x = np.concatenate(
        [
            [
                np.nan,
                INF,
                -INF,
                2.0**70,
                -(2.0**70),
                0.5,
                1.5,
                2.5,
                -0.5,
                -1.5,
                -2.5,
                1e-45,
                float(info.max),
                float(info.min),
            ],
            rng.standard_normal(50) * float(info.max) / 2,
        ]
    ).astype(np.float32 if frm == "f32" else np.float64)
    for mode, fn in {"rni": round, "rzi": int, "rmi": np.floor, "rpi": np.ceil}.items():
        want = [
            nan
            if v != v
            else info.max
            if v == INF
            else info.min
            if v == -INF
            else min(max(int(fn(float(v))), info.min), info.max)
            for v in x
        ]
        got = apply(f"cvt.{mode}.{kind}.{frm}", x, out=dtype)
        np.testing.assert_array_equal(got, np.array(want, object).astype(dtype), err_msg=mode)


def test_half_conversions_are_exact_and_round_to_nearest():
    every = np.arange(65536, dtype=np.uint16)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(
            apply("cvt.f32.f16", every, out=np.float32), every.view(np.float16).astype(np.float32)
        )
        np.testing.assert_array_equal(apply("cvt.f32.bf16", every), every.astype(np.uint32) << 16)
        x = floats(np.random.default_rng(4), 4096)
        x[:2048] = every[::32].view(np.float16).astype(np.float32) * np.float32(1 + 2.0**-11)
        np.testing.assert_array_equal(
            apply("cvt.rn.f16.f32", x, out=np.float16), x.astype(np.float16)
        )
        finite = x[np.isfinite(x)][:2048]
        np.testing.assert_array_equal(
            apply("cvt.rn.bf16.f32", finite, out=np.uint16), to_bf16(finite)
        )
        pair = apply("cvt.rn.bf16x2.f32", finite, finite[::-1].copy())
        np.testing.assert_array_equal(
            pair, to_bf16(finite).astype(np.uint32) << 16 | to_bf16(finite[::-1])
        )


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["add", "mul", "fma"])
def test_half_arithmetic_rounds_once(op, kind):
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 65536, (3, 1024), np.uint16)
    with np.errstate(invalid="ignore"):
        value = [
            (b.view(np.float16) if kind == "f16" else from_bf16(b)).astype(np.float64) for b in bits
        ]
    ok = np.isfinite(value[0]) & np.isfinite(value[1]) & np.isfinite(value[2])
    got = apply(
        f"{op}{'.rn' if op == 'fma' else ''}.{kind}",
        *bits[: 3 if op == "fma" else 2],
        out=np.uint16,
    )
    packed = apply(
        f"{op}{'.rn' if op == 'fma' else ''}.{kind}x2",
        *(b.view(np.uint32) for b in bits[: 3 if op == "fma" else 2]),
    )
    np.testing.assert_array_equal(packed.view(np.uint16), got)
    for n in np.flatnonzero(ok):
        x, y, z = (Fraction(v[n]) for v in value)
        exact = {"add": x + y, "mul": x * y, "fma": x * y + z}[op]
        g = got[n : n + 1]
        g = (
            Fraction(float(g.view(np.float16)[0] if kind == "f16" else from_bf16(g)[0]))
            if (g[0] & 0x7FFF) < (0x7C00 if kind == "f16" else 0x7F80)
            else None
        )
        if g is None:  # overflow
            assert abs(exact) >= (
                65520 if kind == "f16" else Fraction(2) ** 128 - Fraction(2) ** 119
            )
            continue
        least = Fraction(2) ** (-24 if kind == "f16" else -133)
        precision = 11 if kind == "f16" else 8
        ulp = (
            max(least, Fraction(2) ** int(np.frexp(float(exact))[1] - precision))
            if exact
            else least
        )
        assert abs(g - exact) <= ulp / 2, (x, y, z)
        if abs(g - exact) == ulp / 2:
            assert (g / ulp / 2).denominator == 1


PACKED_INTEGER = {
    "add.u16x2": lambda a, b: a + b,
    "min.u16x2": np.minimum,
    "max.u16x2": np.maximum,
    "min.s16x2": lambda a, b: np.minimum(a.view(np.int16), b.view(np.int16)).view(np.uint16),
    "max.s16x2": lambda a, b: np.maximum(a.view(np.int16), b.view(np.int16)).view(np.uint16),
}


@pytest.mark.parametrize("op", PACKED_INTEGER)
def test_packed_integers_are_two_of_16_bits(op):
    a, b = np.random.default_rng(9).integers(0, 65536, (2, 512), np.uint16)
    got = apply(op, a.view(np.uint32), b.view(np.uint32))
    np.testing.assert_array_equal(got.view(np.uint16), PACKED_INTEGER[op](a, b))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["min", "max", "min.NaN", "max.NaN", "sub", "neg", "abs"])
def test_packed_halves_are_what_single_ones_are(op, kind):
    sources = np.random.default_rng(10).integers(0, 65536, (2, 1024), np.uint16)
    sources[:, :8] = [[0, 0x8000, 0x7FFF, 1, 0, 0x7FFF, 0xFFFF, 0x8000], [0x8000, 0, 1, 0x7FFF] * 2]
    sources = sources[: 1 if op in ("neg", "abs") else 2]
    single = apply(f"{op}.{kind}", *sources, out=np.uint16)
    packed = apply(f"{op}.{kind}x2", *(x.view(np.uint32) for x in sources))
    np.testing.assert_array_equal(packed.view(np.uint16), single)


@pytest.mark.parametrize(("kind", "one"), [("f16", 0x3C00), ("bf16", 0x3F80)])
def test_packed_comparisons_are_ones_or_words_of_ones(kind, one):
    a, b = np.random.default_rng(11).integers(0, 3, (2, 512), np.uint16) << 15
    a[:4], b[:4] = 0x7FFF, [0x7FFF, 0, 0x7FFF, 1]  # NaN equals nothing; -0 equals 0
    equal = (a & 0x7FFF == 0) & (b & 0x7FFF == 0)
    words = a.view(np.uint32), b.view(np.uint32)
    ones = apply(f"set.eq.{kind}x2.{kind}x2", *words).view(np.uint16)
    np.testing.assert_array_equal(ones, np.where(equal, one, 0))
    full = apply(f"set.eq.u32.{kind}x2", *words).view(np.uint16)
    np.testing.assert_array_equal(full, np.where(equal, 0xFFFF, 0))
    low = apply(f"setp.eq.{kind}x2", *words, out=bool)
    np.testing.assert_array_equal(low, equal[::2])


def test_unordered_comparisons():
    a = np.tile(np.array([1, 2, np.nan, 1], np.float32), 8)
    b = np.tile(np.array([2, 2, 1, np.nan], np.float32), 8)
    want = {
        "eq": "0100",
        "ne": "1000",
        "lt": "1000",
        "le": "1100",
        "gt": "0000",
        "ge": "0100",
        "equ": "0111",
        "neu": "1011",
        "ltu": "1011",
        "leu": "1111",
        "gtu": "0011",
        "geu": "0111",
        "num": "1100",
        "nan": "0011",
    }
    for how, bits in want.items():
        got = apply(f"setp.{how}.f32", a, b, out=bool)
        assert "".join(str(int(v)) for v in got[:4]) == bits, how


def signed(v: int, bits: int) -> int:
    return (v + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


INTEGER = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: signed(a, 32) * signed(b, 32) >> 32,
    "mul.wide.u32": lambda a, b: a * b,
    "mul.wide.s32": lambda a, b: signed(a, 32) * signed(b, 32),
    "min.s32": lambda a, b: min(signed(a, 32), signed(b, 32)),
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: signed(a, 32) >> min(b, 32),
    "div.s32": lambda a, b: int(Fraction(signed(a, 32), signed(b, 32))) if b else -1,
    "rem.u32": lambda a, b: a % b if b else -1,
    "mul.hi.u64": lambda a, b: a * b >> 64,
    "mul.hi.s64": lambda a, b: signed(a, 64) * signed(b, 64) >> 64,
    "mul.lo.s64": lambda a, b: a * b,
}


@pytest.mark.parametrize("op", INTEGER)
def test_integer_instructions(op):
    bits = 64 if op.endswith("64") else 32
    dtype = np.uint64 if bits == 64 else np.uint32
    rng = np.random.default_rng(6)
    a, b = rng.integers(0, np.iinfo(dtype).max, (2, 256), dtype, endpoint=True)
    edge = np.array([0, 1, 2, 31, 32, 33, 2 ** (bits - 1), 2**bits - 1, 2 ** (bits - 1) - 1], dtype)
    a, b = (
        np.where(rng.random(256) < 0.4, rng.choice(edge, 256), a),
        np.where(rng.random(256) < 0.5, rng.choice(edge, 256), b),
    )
    out = np.uint64 if "wide" in op else dtype
    want = [
        INTEGER[op](x, y) % 2 ** (8 * np.dtype(out).itemsize)
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(apply(op, a, b, out=out), np.array(want, out))


def test_bit_instructions():
    rng = np.random.default_rng(7)
    a, b, c = rng.integers(0, 2**32, (3, 256), np.uint64).astype(np.uint32)
    a[:3] = [0, 1, 2**31]
    n = rng.integers(0, 40, 256).astype(np.uint32)
    A, B, N = (v.tolist() for v in (a, b, n))
    np.testing.assert_array_equal(apply("popc.b32", a), [v.bit_count() for v in A])
    np.testing.assert_array_equal(apply("clz.b32", a), [32 - v.bit_length() for v in A])
    np.testing.assert_array_equal(apply("brev.b32", a), [int(f"{v:032b}"[::-1], 2) for v in A])
    np.testing.assert_array_equal(apply("lop3.b32", a, b, c, tail=", 0xCA"), (a & b) | (~a & c))
    np.testing.assert_array_equal(apply("lop3.b32", a, b, c, tail=", 0x96"), a ^ b ^ c)
    np.testing.assert_array_equal(
        apply("shf.l.wrap.b32", a, b, n),
        [(y << 32 | x) << (k % 32) >> 32 & 0xFFFFFFFF for x, y, k in zip(A, B, N, strict=True)],
    )
    np.testing.assert_array_equal(
        apply("shf.r.clamp.b32", a, b, n),
        [(y << 32 | x) >> min(k, 32) & 0xFFFFFFFF for x, y, k in zip(A, B, N, strict=True)],
    )
    np.testing.assert_array_equal(apply("bfe.u32", a, tail=", 4, 9"), a >> 4 & 0x1FF)
    np.testing.assert_array_equal(
        apply("bfe.s32", a, tail=", 28, 8").view(np.int32), a.view(np.int32) >> 28
    )
    np.testing.assert_array_equal(
        apply("bfi.b32", a, b, tail=", 8, 12"), (b & ~np.uint32(0xFFF00)) | ((a & 0xFFF) << 8)
    )
    np.testing.assert_array_equal(
        apply("prmt.b32", a, b, tail=", 0x7610"), (b & np.uint32(0xFFFF0000)) | (a & 0xFFFF)
    )
    sign = apply("prmt.b32", a, b, tail=", 0xba98")
    np.testing.assert_array_equal(sign.view(np.uint8), np.where(a.view(np.uint8) & 0x80, 0xFF, 0))


def test_carry_chain_adds_128_bits():
    rng = np.random.default_rng(8)
    a, b = rng.integers(0, 2**32, (2, 4, 32), np.uint64).astype(np.uint32)
    a[0], b[0] = 0xFFFFFFFF, 1
    out = np.zeros((4, 32), np.uint32)
    load = "".join(
        f"ld.global.b32 %r{10 + j}, [%rd3+{128 * j}]; ld.global.b32 %r{20 + j}, [%rd4+{128 * j}];"
        for j in range(4)
    )
    chain = "".join(
        f"{op}.u32 %r{j + 1}, %r{10 + j}, %r{20 + j};"
        for j, op in enumerate(("add.cc", "addc.cc", "addc.cc", "addc"))
    )
    store = "".join(f"st.global.b32 [%rd5+{128 * j}], %r{j + 1};" for j in range(4))
    run(
        "".join(f"mad.wide.u32 %rd{3 + j}, %r0, 4, %rd{j};" for j in range(3))
        + load
        + chain
        + store,
        a,
        b,
        out,
    )
    total = [sum(int(x[j, lane]) << 32 * j for x in (a, b) for j in range(4)) for lane in range(32)]
    np.testing.assert_array_equal(
        out, [[t >> 32 * j & 0xFFFFFFFF for t in total] for j in range(4)]
    )


def test_shuffles():
    lanes = np.arange(32, dtype=np.uint32)
    mine = "mad.wide.u32 %rd5, %r0, 4, %rd0;"

    def shuffle(form):
        out = np.zeros(32, np.uint32)
        run(
            f"{mine} shfl.sync.{form}, -1; selp.b32 %r2, 100, 0, %p1; add.u32 %r1, %r1, %r2;"
            "st.global.b32 [%rd5], %r1;",
            out,
        )
        return out

    np.testing.assert_array_equal(shuffle("bfly.b32 %r1|%p1, %r0, 5, 31"), (lanes ^ 5) + 100)
    np.testing.assert_array_equal(
        shuffle("up.b32 %r1|%p1, %r0, 3, 0"), np.where(lanes >= 3, lanes - 3 + 100, lanes)
    )
    np.testing.assert_array_equal(
        shuffle("down.b32 %r1|%p1, %r0, 3, 31"), np.where(lanes < 29, lanes + 3 + 100, lanes)
    )
    np.testing.assert_array_equal(
        shuffle("down.b32 %r1|%p1, %r0, 3, 0x181f"), np.where(lanes % 8 < 5, lanes + 3 + 100, lanes)
    )
    np.testing.assert_array_equal(
        shuffle("idx.b32 %r1|%p1, %r0, 2, 0x181f"), lanes // 8 * 8 + 2 + 100
    )


def test_votes_and_warp_reductions():
    out = np.zeros((8, 32), np.uint32)
    body = """mad.wide.u32 %rd5, %r0, 4, %rd0; and.b32 %r1, %r0, 3; setp.eq.u32 %p1, %r1, 1;
        sub.s32 %r2, %r0, 20;"""
    forms = [
        "vote.sync.ballot.b32 %r3, %p1, -1",
        "vote.sync.any.pred %p2, %p1, -1; selp.b32 %r3, 1, 0, %p2",
        "vote.sync.all.pred %p2, !%p1, -1; selp.b32 %r3, 1, 0, %p2",
        "redux.sync.add.s32 %r3, %r2, -1",
        "redux.sync.min.s32 %r3, %r2, -1",
        "redux.sync.max.u32 %r3, %r2, -1",
        "match.any.sync.b32 %r3, %r1, -1",
        "activemask.b32 %r3",
    ]
    run(
        body + "".join(f"{f}; st.global.b32 [%rd5+{128 * j}], %r3;" for j, f in enumerate(forms)),
        out,
    )
    np.testing.assert_array_equal(
        out[:6, 0].view(np.int32), [0x22222222, 1, 0, 16 * 31 - 640, -20, -1]
    )
    np.testing.assert_array_equal(out[6], [0x11111111 << (k % 4) for k in range(32)])
    np.testing.assert_array_equal(out[7], 0xFFFFFFFF)


def test_predicated_vector_load_keeps_inactive_lanes():
    x, out = np.arange(128, dtype=np.uint32), np.zeros((32, 4), np.uint32)
    run(
        """mad.wide.u32 %rd3, %r0, 16, %rd0; mad.wide.u32 %rd4, %r0, 16, %rd1;
        setp.lt.u32 %p1, %r0, 20;
        mov.u32 %r1, 7; mov.u32 %r2, 7; mov.u32 %r3, 7; mov.u32 %r4, 7;
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
        st.global.v4.b32 [ %rd4 + 0 ], { %r1, %r2, %r3, %r4 };""",
        x[:80].copy(),
        out,
    )
    np.testing.assert_array_equal(out.ravel(), np.where(np.arange(128) < 80, x, 7))


def test_scopes_hide_registers_and_labels():
    out = np.zeros(32, np.uint32)
    scope = """{{ .reg .b32 t; .reg .pred q; mov.b32 t, {0}; setp.ge.u32 q, %r0, 16; @q bra L;
        add.u32 t, t, 1; L: add.u32 %r{1}, t, 0; }}"""
    run(
        "mad.wide.u32 %rd5, %r0, 4, %rd0;"
        + scope.format(10, 1)
        + scope.format(100, 2)
        + "add.u32 %r3, %r1, %r2; st.global.b32 [%rd5], %r3;",
        out,
    )
    np.testing.assert_array_equal(out, np.where(np.arange(32) < 16, 112, 110))


def test_lanes_diverge_and_meet_again():
    out = np.zeros((2, 32), np.uint32)
    run(
        """mad.wide.u32 %rd5, %r0, 4, %rd0; mov.u32 %r1, 0; mov.u32 %r2, %r0;
        LOOP: setp.eq.u32 %p1, %r2, 0; @%p1 bra DONE;
        and.b32 %r3, %r2, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra EVEN;
        add.u32 %r1, %r1, 100; bra NEXT;
        EVEN: add.u32 %r1, %r1, 1;
        NEXT: sub.u32 %r2, %r2, 1; bra LOOP;
        DONE: shfl.sync.idx.b32 %r4, %r1, 31, 31, -1;
        st.global.b32 [%rd5], %r1; st.global.b32 [%rd5+128], %r4;""",
        out,
    )
    want = [(n + 1) // 2 * 100 + n // 2 for n in range(32)]
    np.testing.assert_array_equal(out, [want, [want[31]] * 32])


def test_local_memory_is_private():
    out = np.zeros(32, np.uint32)
    run(
        """.local .align 8 .b8 depot[16]; mad.wide.u32 %rd5, %r0, 4, %rd0; mov.b64 %rd6, depot;
        cvta.local.u64 %rd7, %rd6;
        st.local.b32 [%rd6+4], %r0; mov.u32 %r1, 5; st.b32 [%rd7+8], %r1;
        ld.local.b32 %r2, [%rd6+8]; ld.b32 %r3, [%rd7+4];
        add.u32 %r3, %r3, %r2; st.global.b32 [%rd5], %r3;""",
        out,
    )
    np.testing.assert_array_equal(out, np.arange(32) + 5)


def test_atomics_return_distinct_old_values():
    count, old = np.zeros(4, np.uint32), np.zeros((3, 64), np.uint32)
    run(
        """mad.wide.u32 %rd5, %r0, 4, %rd1; atom.global.add.u32 %r1, [%rd0], 2;
        st.global.b32 [%rd5], %r1;
        atom.global.inc.u32 %r1, [%rd0+4], 9; st.global.b32 [%rd5+256], %r1;
        atom.global.cas.b32 %r1, [%rd0+8], 0, 7; st.global.b32 [%rd5+512], %r1;
        red.global.max.s32 [%rd0+12], %r0;""",
        count,
        old,
        warps=2,
    )
    np.testing.assert_array_equal(count, [128, 4, 7, 63])
    np.testing.assert_array_equal(np.sort(old[0]), np.arange(0, 128, 2))
    np.testing.assert_array_equal(np.bincount(old[1]), [7] * 4 + [6] * 6)
    np.testing.assert_array_equal(np.sort(old[2]), [0] + [7] * 63)


def test_matrix_store_then_load_transposes():
    out = np.zeros((2, 32), np.uint32)
    run(
        """mad.wide.u32 %rd5, %r0, 4, %rd0; and.b32 %r1, %r0, 7; shl.b32 %r1, %r1, 4;
        mov.u32 %r2, smem; add.u32 %r1, %r1, %r2;
        shl.b32 %r3, %r0, 17; shl.b32 %r4, %r0, 1; or.b32 %r3, %r3, %r4; add.u32 %r3, %r3, 0x10000;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r3}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r1];
        ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r7}, [%r1];
        st.global.b32 [%rd5], %r6; st.global.b32 [%rd5+128], %r7;""",
        out,
        shared=128,
    )
    whole = out.view(np.uint16).reshape(2, 8, 8)
    np.testing.assert_array_equal(whole[0].ravel(), np.arange(64))
    np.testing.assert_array_equal(whole[1], whole[0].T)


EXCHANGE = """mad.wide.u32 %rd5, %r0, 4, %rd0; mov.u32 %r1, smem; mad.lo.u32 %r2, %r0, 4, %r1;
        st.shared.b32 [%r2], %r0; {}
    xor.b32 %r3, %r0, 63; mad.lo.u32 %r3, %r3, 4, %r1; ld.shared.b32 %r4, [%r3];
        st.global.b32 [%rd5], %r4;"""


def test_shared_exchange_needs_its_barrier():
    out = np.zeros(64, np.uint32)
    run(EXCHANGE.format("bar.sync 0;"), out, warps=2, shared=256, racecheck=True, check_uninit=True)
    np.testing.assert_array_equal(out, np.arange(64)[::-1])
    with pytest.raises(DataRace, match=r"(load|store) of byte .* of shared memory races with warp"):
        run(EXCHANGE.format(""), out, warps=2, shared=256, racecheck=True)
    early = 0
    for seed in range(20):
        try:
            run(EXCHANGE.format(""), out, warps=2, shared=256, seed=seed, check_uninit=True)
        except UninitialisedRead:
            early += 1
    assert early


def test_same_value_written_twice_is_no_race():
    out = np.zeros(1, np.uint32)
    run("mov.u32 %r1, 5; st.global.b32 [%rd0], %r1;", out, warps=2, racecheck=True)
    with pytest.raises(DataRace):
        run("st.global.b32 [%rd0], %r0;", out, warps=2, racecheck=True)


def test_fences_order_relaxed_atomics():
    """Message passing between blocks: racy without the fences."""
    body = """mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 bra READ; mov.u32 %r2, 42;
        st.global.b32 [%rd0], %r2; {0}
        mov.u32 %r3, 1; st.relaxed.gpu.global.b32 [%rd0+4], %r3; bra END;
        READ: ld.relaxed.gpu.global.b32 %r4, [%rd0+4];
        setp.eq.u32 %p2, %r4, 0; @%p2 bra READ; {0} ld.global.b32 %r5, [%rd0];
        st.global.b32 [%rd0+8], %r5; END:"""
    out = np.zeros(3, np.uint32)
    run(body.format("fence.acq_rel.gpu;"), out, grid=2, racecheck=True)
    assert out.tolist() == [42, 1, 42]
    with pytest.raises(DataRace):
        run(body.format(""), np.zeros(3, np.uint32), grid=2, racecheck=True)


@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        (
            "mad.wide.u32 %rd5, %r0, 4, %rd0; ld.global.b32 %r1, [%rd5+4];",
            MemoryFault,
            "out-of-bounds global load of 4 bytes.*128 bytes into.*lane 31",
        ),
        ("st.global.b32 [%rd0+4096], %r0;", MemoryFault, "out-of-bounds global store"),
        ("ld.global.b32 %r1, [%rd0+-4];", MemoryFault, "in no buffer"),
        ("mov.u64 %rd5, 0; ld.global.b32 %r1, [%rd5];", MemoryFault, "0x0, in no buffer"),
        (
            "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+8];",
            MemoryFault,
            "misaligned global load of 16 bytes",
        ),
        (
            "mov.u32 %r1, smem; ld.shared.b32 %r2, [%r1+256];",
            MemoryFault,
            "out-of-bounds shared load",
        ),
        ("mov.u32 %r1, 0; ld.shared.b32 %r2, [%r1];", MemoryFault, "out-of-bounds shared load"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bra L; bar.sync 0; L:", BarrierDivergence, "never come"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 ret; bar.sync 0;", BarrierDivergence, "have exited"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bar.sync 0;", BarrierDivergence, "only lanes"),
        (
            "setp.lt.u32 %p1, %r0, 7; @%p1 ret; shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;",
            BarrierDivergence,
            "never come",
        ),
        (
            "setp.lt.u32 %p1, %r0, 32; @%p1 bra L; bar.sync 0; L:",
            Deadlock,
            r"warps \[1\] wait at PTX line.*warps \[0\] have exited",
        ),
        (
            "setp.lt.u32 %p1, %r0, 32; @%p1 bra L; bar.sync 0; bra M; L: bar.sync 0; M:",
            BarrierDivergence,
            "different instructions",
        ),
        ("L: bra L;", StepLimit, "a loop that never ends"),
        (
            "tex.1d.v4.f32.s32 {%r1, %r2, %r3, %r4}, [%rd0, {%r1}];",
            UnsupportedInstruction,
            "tex.1d",
        ),
        ("mov.u32 %r1, %envreg3;", UnsupportedInstruction, "envreg3"),
        ("setp.eq.u32 %p1, %r0, 9; @%p1 trap;", Trap, "trap"),
        (
            "setp.lt.u32 %p1, %r0, 7; @%p1 shfl.sync.idx.b32 %r1, %r0, 20, 31, 0x7f;",
            KernelError,
            "inactive lane",
        ),
        ("st.global.b32 [%rd0], %r0;", DataRace, "lanes of one store"),
    ],
)
def test_errors_name_the_cause(body, error, text):
    with pytest.raises(error, match=text):
        run(
            body,
            np.zeros(32, np.uint32),
            warps=2 if "%r0, 32" in body else 1,
            shared=256,
            max_steps=1000,
            racecheck="store" in text and "lanes" in text,
        )


def test_unsupported_is_harmless_until_reached():
    ptx = """.entry k(.param .u64 p) { .reg .pred %p1; .reg .b32 %r1; setp.eq.u32 %p1, 0, 1;
        @%p1 tex.1d.v4 %r1, %r1; ret; }"""
    Module(ptx).launch((1,), [0], num_warps=1)


def test_store_to_read_only_array():
    x = np.zeros(4, np.uint32)
    x.flags.writeable = False
    with pytest.raises(MemoryFault, match="read-only"):
        run("st.global.b32 [%rd0], %r0;", x)


def test_one_load_may_touch_several_buffers():
    memory = Memory()
    parts = [np.full(4, n, np.uint32) for n in range(4)]
    table = np.array([memory.alloc(p) for p in parts], np.int64)
    out = np.zeros(32, np.uint32)
    ptx = """.entry k(.param .u64 a, .param .u64 b) { .reg .b32 %r<4>; .reg .b64 %rd<9>;
        ld.param.u64 %rd0, [a]; ld.param.u64 %rd1, [b];
        mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 3; mad.wide.u32 %rd2, %r1, 8, %rd0;
        ld.global.b64 %rd3, [%rd2]; ld.global.b32 %r2, [%rd3+4];
        mad.wide.u32 %rd4, %r0, 4, %rd1; st.global.b32 [%rd4], %r2; ret; }"""
    Module(ptx, memory=memory).launch((1,), [table, out], num_warps=1)
    np.testing.assert_array_equal(out, np.arange(32) % 4)


def test_launch_checks_its_arguments():
    ptx = """.entry k(.param .u64 .ptr .global a, .param .u32 n, .param .u64 .ptr s) .reqntid 64
        { ret; }"""
    module = Module(ptx)
    module.launch((1,), [np.zeros(1), 3])
    with pytest.raises(TypeError, match="takes 3 arguments"):
        module.launch((1,), [np.zeros(1)])
    with pytest.raises(ValueError, match="compiled for 2 warps"):
        module.launch((1,), [np.zeros(1), 3], num_warps=4)
    with pytest.raises(TypeError, match="C-contiguous"):
        module.launch((1,), [np.zeros((4, 4))[:, 1], 3])
