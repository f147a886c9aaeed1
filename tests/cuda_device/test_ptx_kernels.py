"""The PTX of Triton's kernels, executed: in step, in turn and at random, against NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl

from cuda_device.ptx.execution import Module
from cuda_device.ptx.memory import DataRace
from cuda_device.test_ptx_instructions import INF, from_bf16, to_bf16

# Elsewhere Triton does not compile what it decorates, it interprets it.
pytestmark = pytest.mark.gpu

# bfloat16 as its bits.
NUMPY = {"fp16": np.float16, "fp32": np.float32, "bf16": np.uint16}
WAYS = [
    {"in_step": True},
    {"seed": None},
    {"seed": 1, "racecheck": True, "check_uninit": True},
    {"seed": 2},
]


def widen(x: np.ndarray, dtype: str) -> np.ndarray:
    return from_bf16(x) if dtype == "bf16" else x


def narrow(x: np.ndarray, dtype: str) -> np.ndarray:
    return to_bf16(x) if dtype == "bf16" else np.asarray(x).astype(NUMPY[dtype])


@cache
def compiled(
    kernel: Any, types: str, warps: int, options: tuple[Any, ...], constants: tuple[Any, ...]
) -> tuple[str, int]:
    """PTX and dynamic shared bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    named = dict(constants)
    free = [name for name in kernel.arg_names if name not in named]
    given = dict(zip(free, types.split(), strict=True))
    signature = {name: given.get(name, "constexpr") for name in kernel.arg_names}
    place = kernel.arg_names.index
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(place(name),): value for name, value in constants},
        attrs={(place(name),): [["tt.divisibility", 16]] for name in free if given[name][0] == "*"},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True, **dict(options)}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return made.asm["ptx"], made.metadata.shared


def executed(
    kernel: Any,
    types: str,
    args: list[Any],
    grid: tuple[int, ...] = (1,),
    warps: int = 4,
    ways: list[dict[str, Any]] = WAYS,
    options: dict[str, Any] | None = None,
    **constants: Any,
) -> Iterator[list[Any]]:
    """Copies of the arguments after each way to execute a kernel."""
    keys = tuple((options or {}).items()), tuple(constants.items())
    ptx, shared_bytes = compiled(kernel, types, warps, *keys)
    for way in ways:
        after = [x.copy() if isinstance(x, np.ndarray) else x for x in args]
        Module(ptx).launch(grid, after, warps, shared_bytes=shared_bytes, **way)
        yield after


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=m) + tl.load(y_ptr + i, mask=m), mask=m)


@pytest.mark.parametrize("dtype", NUMPY)
def test_addition_of_each_type(dtype: str) -> None:
    rng = np.random.default_rng(1)
    x, y = (narrow(rng.standard_normal(1000), dtype) for _ in range(2))
    total = widen(x, dtype).astype(np.float64) + widen(y, dtype)
    args = [x, y, np.zeros(1000, NUMPY[dtype]), 1000]
    for after in executed(add, f"*{dtype} *{dtype} *{dtype} i32", args, (4,), BLOCK=256):
        np.testing.assert_array_equal(after[2], narrow(total, dtype))


@triton.jit
def maximum_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reductions(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x_ptr + i, mask=i < n, other=0).to(tl.float32)
    tl.store(out_ptr, tl.sum(v))
    tl.store(out_ptr + 1, tl.min(v))
    tl.store(out_ptr + 2, tl.max(v))
    tl.store(out_ptr + 3, tl.argmax(v, 0).to(tl.float32))
    tl.store(out_ptr + 4, tl.argmin(v, 0).to(tl.float32))
    tl.store(out_ptr + 5, tl.reduce(v, 0, maximum_nan))
    tl.store(out_ptr + 6, tl.sum((v != 0).to(tl.int32)).to(tl.float32))
    tl.store(out_ptr + 7, (tl.xor_sum(v.to(tl.int32, bitcast=True)) & 0xFFFF).to(tl.float32))


@pytest.mark.parametrize(("dtype", "warps"), [("fp32", 1), ("fp32", 8), ("fp16", 4), ("bf16", 4)])
def test_reductions_of_each_type(dtype: str, warps: int) -> None:
    values = np.random.default_rng(2).standard_normal(3001).astype(np.float32)
    values[::7] = 0
    args = [narrow(values, dtype), np.zeros(8, np.float32), 3001]
    x = np.pad(widen(args[0], dtype).astype(np.float32), (0, 4096 - 3001))
    xor = np.bitwise_xor.reduce(x.view(np.uint32)) & 0xFFFF
    exact = [x.min(), x.max(), x.argmax(), x.argmin(), x.max(), np.count_nonzero(x), xor]
    for _, out, _ in executed(reductions, f"*{dtype} *fp32 i32", args, warps=warps, BLOCK=4096):
        np.testing.assert_allclose(out[0], x.sum(dtype=np.float64), rtol=1e-4)
        np.testing.assert_array_equal(out[1:], exact)


def test_reductions_of_nan() -> None:
    x = np.random.default_rng(3).standard_normal(3001).astype(np.float32)
    x[5], x[2000], x[2001] = np.nan, np.inf, np.nan
    args = [x, np.zeros(8, np.float32), 3001]
    for _, out, _ in executed(reductions, "*fp32 *fp32 i32", args, BLOCK=4096):
        # Minimum and maximum ignore NaN, maximum with propagate_nan does not.
        np.testing.assert_array_equal(out[1:3], [np.nanmin(x), np.inf])
        np.testing.assert_array_equal(out[[0, 5]], np.nan)


@triton.jit
def histogram(x_ptr, out_ptr, n, BLOCK: tl.constexpr, BINS: tl.constexpr, MASKED: tl.constexpr):
    counts = tl.zeros((BINS,), tl.int32)
    i = tl.arange(0, BLOCK)
    for t in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        if MASKED:
            v = tl.load(x_ptr + t + i, mask=t + i < n, other=0)
            counts += tl.histogram(v, BINS, mask=t + i < n)
        else:
            counts += tl.histogram(tl.load(x_ptr + t + i), BINS)
    tl.atomic_add(out_ptr + tl.arange(0, BINS), counts, sem="relaxed")


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bins", [32, 2048])
def test_histogram_of_a_list_of_bins(bins: int, masked: bool, warps: int) -> None:
    rng, n = np.random.default_rng(4), 5000 if masked else 4096
    x = (rng.integers(0, bins, n) * rng.integers(0, 2, n)).astype(np.int32)
    args = [x, np.zeros(bins, np.int32), n]
    constants = {"BLOCK": 1024, "BINS": bins, "MASKED": masked}
    for after in executed(histogram, "*i32 *i32 i32", args, (3,), warps, **constants):
        np.testing.assert_array_equal(after[1], np.bincount(x, minlength=bins))


def test_histogram_without_its_barrier_races() -> None:
    types, constants = "*i32 *i32 i32", {"BLOCK": 1024, "BINS": 2048, "MASKED": True}
    ptx, shared_bytes = compiled(histogram, types, 4, (), tuple(constants.items()))
    before, barrier, after = ptx.rpartition("bar.sync \t0;")
    assert barrier
    x = np.random.default_rng(5).integers(0, 2048, 5000).astype(np.int32)
    args = [x, np.zeros(2048, np.int32), 5000]
    with pytest.raises(DataRace):
        Module(before + after).launch(
            (3,), args, 4, shared_bytes=shared_bytes, seed=1, racecheck=True
        )


@triton.jit
def atomics(x_ptr, key_ptr, f_ptr, i_ptr, l_ptr, old_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    v = tl.load(x_ptr + i, mask=m, other=0.0)
    k = tl.load(key_ptr + i, mask=m, other=0)
    tl.atomic_add(f_ptr + k, v, mask=m)
    tl.atomic_max(f_ptr + 16 + k, v, mask=m)
    tl.atomic_min(f_ptr + 32 + k, v, mask=m)
    c = v.to(tl.int32)
    tl.atomic_add(i_ptr + k, c, mask=m)
    tl.atomic_max(i_ptr + 16 + k, c, mask=m)
    tl.atomic_min(i_ptr + 32 + k, c, mask=m)
    tl.atomic_and(i_ptr + 48 + k, c, mask=m)
    tl.atomic_or(i_ptr + 64 + k, c, mask=m)
    tl.atomic_xor(i_ptr + 80 + k, c, mask=m)
    tl.atomic_add(l_ptr + k, c.to(tl.int64), mask=m)
    ticket = tl.atomic_add(i_ptr + 96, 1)
    tl.atomic_xchg(i_ptr + 97, 5)
    tl.atomic_cas(i_ptr + 98, 0, 1)
    tl.store(old_ptr + ticket, ticket)
    place = tl.atomic_add(i_ptr + 99 + k * 0, k * 0 + 1, mask=m)
    tl.store(old_ptr + 64 + place, place, mask=m)


def test_atomics_of_each_kind() -> None:
    rng = np.random.default_rng(6)
    ints = np.zeros(128, np.int32)
    ints[16:32], ints[32:48], ints[48:64] = -(2**31), 2**31 - 1, -1
    floats = np.zeros(48, np.float32)
    floats[16:32], floats[32:48] = -INF, INF
    # Whole numbers: sums do not depend on the order.
    x = (1000 * rng.standard_normal(700)).astype(np.float32).round()
    key = rng.integers(0, 16, 700).astype(np.int32)
    args = [x, key, floats, ints, np.zeros(16, np.int64), np.full(64 + 1024, -1, np.int32), 700]
    of = [x[key == k] for k in range(16)]
    whole = [g.astype(np.int32) for g in of]
    each = [np.add, np.maximum, np.minimum, np.bitwise_and, np.bitwise_or, np.bitwise_xor]
    types = "*fp32 *i32 *fp32 *i32 *i64 *i32 i32"
    for after in executed(atomics, types, args, (3,), BLOCK=256):
        wanted = [[f.reduce(g) for g in of] for f in each[:3]]
        np.testing.assert_array_equal(after[2].reshape(3, 16), wanted)
        wanted = [[f.reduce(g) for g in whole] for f in each]
        np.testing.assert_array_equal(after[3][:96].reshape(6, 16), wanted)
        np.testing.assert_array_equal(after[3][96:100], [3, 5, 1, 700])
        np.testing.assert_array_equal(after[4], [g.sum() for g in whole])
        np.testing.assert_array_equal(after[5][:3], np.arange(3))
        np.testing.assert_array_equal(after[5][64 : 64 + 700], np.arange(700))
        np.testing.assert_array_equal(after[5][64 + 700 :], -1)


@triton.jit
def half_atomics(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.atomic_add(out_ptr + i % 16, x, mask=i < n)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_atomics_of_halves(dtype: str) -> None:
    x = narrow(np.random.default_rng(7).integers(-8, 9, 250), dtype)
    wanted = np.pad(widen(x, dtype), (0, 6)).reshape(16, 16).sum(0)
    args = [x, np.zeros(16, NUMPY[dtype]), 250]
    for after in executed(half_atomics, f"*{dtype} *{dtype} i32", args, BLOCK=256):
        np.testing.assert_array_equal(widen(after[1], dtype), wanted)


@triton.jit
def casts(x_ptr, half_ptr, bf_ptr, i8_ptr, i32_ptr, i64_ptr, back_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    m = i < n
    v = tl.load(x_ptr + i, mask=m)
    tl.store(half_ptr + i, v.to(tl.float16), mask=m)
    tl.store(bf_ptr + i, v.to(tl.bfloat16), mask=m)
    tl.store(i8_ptr + i, v.to(tl.int8), mask=m)
    tl.store(i32_ptr + i, v.to(tl.int32), mask=m)
    tl.store(i64_ptr + i, v.to(tl.int64), mask=m)
    tl.store(back_ptr + i, v.to(tl.int32).to(tl.float32) + v.to(tl.float16).to(tl.float32), mask=m)


def test_casts_of_float32() -> None:
    x = (30 * np.random.default_rng(8).standard_normal(250)).astype(np.float32)
    x[:11] = [0.5, 1.5, 2.5, -0.5, -1.5, 1e-40, -1e-40, 6e-8, 2.9e-8, 3e-8, 5.9e-8]
    x[11:15] = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8]
    x[15:19] = [-0.0, 126.9, -127.9, 1 + 2**-8 + 2**-20]
    whole, half = np.trunc(x), x.astype(np.float16)
    dtypes = np.float16, np.uint16, np.int8, np.int32, np.int64, np.float32
    args = [x, *(np.zeros(250, dtype) for dtype in dtypes), 250]
    wanted = [half, to_bf16(x), *(whole.astype(dtype) for dtype in dtypes[2:5])]
    wanted.append(whole + half.astype(np.float32))
    types = "*fp32 *fp16 *bf16 *i8 *i32 *i64 *fp32 i32"
    for after in executed(casts, types, args, BLOCK=256):
        for got, want in zip(after[1:7], wanted, strict=True):
            np.testing.assert_array_equal(got, want)


@triton.jit
def functions(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x_ptr + i)
    a = tl.abs(v)
    tl.store(out_ptr + i, tl.exp(v))
    tl.store(out_ptr + BLOCK + i, tl.log(a))
    tl.store(out_ptr + 2 * BLOCK + i, tl.rsqrt(a))
    tl.store(out_ptr + 3 * BLOCK + i, tl.exp2(v))
    tl.store(out_ptr + 4 * BLOCK + i, tl.log2(a))
    tl.store(out_ptr + 5 * BLOCK + i, 1.0 / v)
    tl.store(out_ptr + 6 * BLOCK + i, tl.erf(v))
    tl.store(out_ptr + 7 * BLOCK + i, tl.fma(v, v, v))
    tl.store(out_ptr + 8 * BLOCK + i, tl.floor(v))
    tl.store(out_ptr + 9 * BLOCK + i, tl.ceil(v))
    tl.store(out_ptr + 10 * BLOCK + i, tl.sqrt_rn(a))
    tl.store(out_ptr + 11 * BLOCK + i, tl.div_rn(v, 3.0 + a))
    tl.store(out_ptr + 12 * BLOCK + i, tl.clamp(v, -1.0, 1.0))


def test_functions_of_float32() -> None:
    x = (3 * np.random.default_rng(9).standard_normal(256)).astype(np.float32)
    wide, a = x.astype(np.float64), np.abs(x).astype(np.float64)
    near = [np.exp(wide), np.log(a), 1 / np.sqrt(a), np.exp2(wide), np.log2(a), 1 / wide]
    near += [np.vectorize(math.erf)(wide), wide * wide + wide]
    exact = [np.floor(x), np.ceil(x), np.sqrt(np.abs(x)), x / (3 + np.abs(x)), np.clip(x, -1, 1)]
    args = [x, np.zeros((13, 256), np.float32)]
    for _, out in executed(functions, "*fp32 *fp32", args, BLOCK=256):
        np.testing.assert_allclose(out[:8], near, rtol=2e-5, atol=2e-7)
        np.testing.assert_array_equal(out[8:], exact)


@triton.jit
def moves(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, tl.sort(v))
    tl.store(out_ptr + BLOCK + i, tl.flip(v, 0))
    t = tl.trans(tl.reshape(v, [16, BLOCK // 16]))
    tl.store(out_ptr + 2 * BLOCK + i, tl.reshape(t, [BLOCK]))
    tl.store(out_ptr + 3 * BLOCK + i, tl.cumsum(v, 0))


def test_moves_between_lanes() -> None:
    given = np.random.default_rng(10).standard_normal(250).astype(np.float32)
    x = np.pad(given, (0, 6))
    args = [given, np.zeros((4, 256), np.float32), 250]
    for _, out, _ in executed(moves, "*fp32 *fp32 i32", args, BLOCK=256):
        np.testing.assert_array_equal(out[:3], [np.sort(x), x[::-1], x.reshape(16, 16).T.ravel()])
        np.testing.assert_allclose(out[3], np.cumsum(x, dtype=np.float64), rtol=1e-3, atol=1e-5)


@triton.jit
def integers64(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    m = i < n
    v = tl.load(x_ptr + i, mask=m, other=1)
    high = tl.umulhi(v.to(tl.uint64), v.to(tl.uint64)).to(tl.int64)
    tl.store(out_ptr + i, v * v + v // 3 + v % 5, mask=m)
    tl.store(out_ptr + BLOCK + i, (v << 3) | (v >> 2) ^ -v, mask=m)
    tl.store(out_ptr + 2 * BLOCK + i, high, mask=m)
    tl.store(out_ptr + 3 * BLOCK + i, tl.maximum(v, 7) + tl.minimum(v, -7) + tl.abs(v), mask=m)


def test_integers_of_64_bits() -> None:
    x = np.random.default_rng(11).integers(-(2**62), 2**62, 250)
    x[:6] = [0, 1, -1, 2**63 - 1, -(2**63), -7]
    rows = []
    for v in x.tolist():
        third, fifth = (abs(v) // n * (1 if v > 0 else -1) for n in (3, 5))  # towards zero
        square = v * v + third + (v - 5 * fifth)
        high = (v % 2**64) ** 2 >> 64
        rows.append([square, (v << 3) | (v >> 2) ^ -v, high, max(v, 7) + min(v, -7) + abs(v)])
    wanted = np.array([[(n + 2**63) % 2**64 - 2**63 for n in row] for row in rows]).T
    args = [x, np.zeros((4, 256), np.int64), 250]
    for _, out, _ in executed(integers64, "*i64 *i64 i32", args, BLOCK=256):
        np.testing.assert_array_equal(out[:, :250], wanted)


@triton.jit
def floats64(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x_ptr + i, mask=i < n, other=1)
    tl.store(out_ptr + i, v * v + v / 3, mask=i < n)
    tl.store(out_ptr + BLOCK + i, tl.sqrt(tl.abs(v)), mask=i < n)
    tl.store(out_ptr + 2 * BLOCK, tl.sum(v))
    tl.store(out_ptr + 2 * BLOCK + 1, tl.max(v))
    tl.atomic_add(out_ptr + 2 * BLOCK + 2, tl.sum(v))


def test_floats_of_64_bits() -> None:
    x = np.random.default_rng(12).standard_normal(250)
    fused = [float(Fraction(v) ** 2 + Fraction(v / 3)) for v in x.tolist()]
    total = x.sum() + 6
    args = [x, np.zeros(515), 250]
    for _, out, _ in executed(floats64, "*fp64 *fp64 i32", args, BLOCK=256):
        np.testing.assert_array_equal(out[:250], fused)
        np.testing.assert_array_equal(out[256:506], np.sqrt(np.abs(x)))
        np.testing.assert_allclose(out[512:], [total, max(x.max(), 1), total], rtol=1e-12)


@triton.jit
def pipelined(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for t in tl.range(0, n, BLOCK, num_stages=3):
        acc += tl.load(x_ptr + t + i, mask=t + i < n, other=0.0)
    tl.store(out_ptr + i, acc)


def test_loads_that_are_pipelined() -> None:
    x = np.random.default_rng(13).standard_normal(9000).astype(np.float32)
    wanted = np.pad(x, (0, 216)).reshape(9, 1024).sum(0, dtype=np.float64)
    args = [x, np.zeros(1024, np.float32), 9000]
    for _, out, _ in executed(pipelined, "*fp32 *fp32 i32", args, BLOCK=1024):
        np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)


@triton.jit
def collatz(x_ptr, out_ptr):
    p = tl.program_id(0)
    v = tl.load(x_ptr + p)
    c = 0
    while v > 1:
        if v % 2 == 0:  # noqa: SIM108  (a branch is what is tested)
            v = v // 2
        else:
            v = 3 * v + 1
        c += 1
    tl.store(out_ptr + p, c)


def test_blocks_that_take_different_ways() -> None:
    args = [np.array([1, 27, 97, 6], np.int32), np.zeros(4, np.int32)]
    for _, out in executed(collatz, "*i32 *i32", args, (4,)):
        np.testing.assert_array_equal(out, [0, 111, 118, 8])


@triton.jit
def last_block(
    x_ptr,
    part_ptr,
    count_ptr,
    out_ptr,
    BLOCK: tl.constexpr,
    SEM: tl.constexpr,
    BARRIER: tl.constexpr,
):
    pid = tl.program_id(0)
    r = tl.arange(0, BLOCK)
    tl.store(part_ptr + pid * BLOCK + r, tl.load(x_ptr + pid * BLOCK + r) * 2)
    if BARRIER:
        tl.debug_barrier()
    done = tl.atomic_add(count_ptr, 1, sem=SEM, scope="gpu")
    if done == tl.num_programs(0) - 1:
        acc = tl.zeros((BLOCK,), tl.float32)
        for i in range(tl.num_programs(0)):
            acc += tl.load(part_ptr + i * BLOCK + r, cache_modifier=".cg")
        tl.store(out_ptr + r, acc)
        tl.store(count_ptr, 0)


def last_block_args() -> list[np.ndarray]:
    x = np.random.default_rng(14).standard_normal((6, 128)).astype(np.float32)
    return [x, np.full_like(x, np.nan), np.zeros(1, np.int32), np.zeros(128, np.float32)]


def test_last_block_sees_what_others_have_stored() -> None:
    args, constants = last_block_args(), {"BLOCK": 128, "SEM": "acq_rel", "BARRIER": True}
    wanted = np.cumsum(2 * args[0], 0, dtype=np.float32)[-1]
    for after in executed(last_block, "*fp32 *fp32 *i32 *fp32", args, (6,), **constants):
        np.testing.assert_array_equal(after[3], wanted)
        assert after[2] == 0


@pytest.mark.parametrize(("sem", "barrier"), [("relaxed", True), ("acq_rel", False)])
def test_last_block_without_ordering_is_a_race(sem: str, barrier: bool) -> None:
    constants = {"BLOCK": 128, "SEM": sem, "BARRIER": barrier}
    types, way = "*fp32 *fp32 *i32 *fp32", {"seed": 0, "racecheck": True}
    with pytest.raises(DataRace):
        list(executed(last_block, types, last_block_args(), (6,), ways=[way], **constants))


@triton.jit
def grid_barrier(x_ptr, max_ptr, count_ptr, out_ptr, n, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.atomic_max(max_ptr, tl.max(tl.abs(v)), sem="relaxed")
    tl.debug_barrier()
    tl.atomic_add(count_ptr, 1, sem="release", scope="gpu")
    while tl.atomic_add(count_ptr, 0, sem="acquire", scope="gpu") < tl.num_programs(0):
        pass
    tl.debug_barrier()
    tl.store(out_ptr + i, v / tl.load(max_ptr, volatile=True), mask=i < n)


def test_blocks_that_wait_for_each_other() -> None:
    x = np.random.default_rng(15).standard_normal(500).astype(np.float32)
    args = [x, np.zeros(1, np.float32), np.zeros(1, np.int32), np.zeros(500, np.float32), 500]
    ways = [way for way in WAYS if way.get("seed", 0) is not None]  # not one after another
    options = {"launch_cooperative_grid": True}
    types = "*fp32 *fp32 *i32 *fp32 i32"
    for after in executed(grid_barrier, types, args, (4,), 4, ways, options, BLOCK=128):
        np.testing.assert_allclose(after[3], x / np.abs(x).max(), rtol=1e-6)


@triton.jit
def combine(m1, q1, w1, m2, q2, w2):
    d = m2 - m1
    w = w1 + w2
    r = tl.where(w == 0.0, 0.0, w2 / w)
    return m1 + d * r, q1 + q2 + d * d * w1 * r, w


@triton.jit
def welford(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x_ptr + i, mask=i < n, other=0.0)
    mean, m2, w = tl.reduce((v, v * 0.0, tl.where(i < n, 1.0, 0.0)), 0, combine)
    tl.store(out_ptr, mean)
    tl.store(out_ptr + 1, m2)
    tl.store(out_ptr + 2, w)


def test_reduction_of_a_tuple() -> None:
    x = 3 + np.random.default_rng(16).standard_normal(2000).astype(np.float32)
    wide = x.astype(np.float64)
    wanted = [wide.mean(), ((wide - wide.mean()) ** 2).sum(), 2000]
    for _, out, _ in executed(
        welford, "*fp32 *fp32 i32", [x, np.zeros(3, np.float32), 2000], BLOCK=2048
    ):
        np.testing.assert_allclose(out, wanted, rtol=1e-4)
