"""What PTX's instructions compute, on arrays with an element for each lane.

Such an array is never modified in place. Warps lie one after another in it, 32 lanes each.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

WARP = 32

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
UINT = {1: np.bool_, 8: u1, 16: u2, 32: u4, 64: u8}


def n32(x):
    """Bits of a float32 result; NaN becomes PTX's canonical 0x7fffffff."""
    nan = x != x
    return np.where(nan, u4(0x7FFFFFFF), x.view(u4)) if np.count_nonzero(nan) else x.view(u4)


def ftz(x):
    return np.where(np.abs(x) < f4(2.0**-126), np.copysign(f4(0), x), x)


def sat(x):
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))


def relu(x):
    return np.where(x < 0, x.dtype.type(0), x)


def two_sum(a, b):
    """a + b in float64, and the exact rounding error of that sum."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def odd64(s, err):
    """Round s + err to odd, so that one more rounding to a narrower format is exact."""
    err = np.where(np.isfinite(s), err, 0.0)
    move = (err != 0) & (s.view(u8) & u8(1) == 0)
    return np.where(move, np.nextafter(s, np.copysign(np.inf, err)), s)


def odd32(x):
    """Round float64 to float32, to odd."""
    y = x.astype(f4)
    err = np.where(np.isnan(x) | (x == y), 0.0, x - y)
    move = (err != 0) & (y.view(u4) & u4(1) == 0)
    return np.where(move, np.nextafter(y, np.copysign(np.inf, err).astype(f4)), y)


def round32(s, err, mode):
    """Round the exact value s + err (float64) to float32: rn, rz, rm or rp."""
    if mode == "rn":
        return odd64(s, err).astype(f4)
    y = s.astype(f4)
    over = np.where(np.isfinite(s), y - s - err, 0.0)  # result minus exact value
    down = (over > 0) & ((mode == "rm") | ((mode == "rz") & (y > 0)))
    up = (over < 0) & ((mode == "rp") | ((mode == "rz") & (y < 0)))
    y = np.where(down, np.nextafter(y, f4(-np.inf)), y)
    return np.where(up, np.nextafter(y, f4(np.inf)), y)


def add32(a, b, mode):
    return round32(*two_sum(a.astype(f8), b.astype(f8)), mode)


def mul32(a, b, mode):
    return round32(a.astype(f8) * b.astype(f8), 0.0, mode)


def fma_odd(a, b, c):
    """a * b + c for operands whose product is exact in float64, rounded to odd."""
    return odd64(*two_sum(a * b, c))


def fma32(a, b, c, mode="rn"):
    product, c = a.astype(f8) * b.astype(f8), c.astype(f8)
    if mode == "rn":  # two roundings differ from one only at a float32 midpoint or for subnormals
        s = product + c
        bits = s.view(u8)
        tie = (bits & u8(0x1FFFFFFF)) == u8(0x10000000)
        tiny = ((bits & u8(2**63 - 1)) - u8(1)) < u8(0x3810000000000000)
        if not np.count_nonzero(tie | tiny):
            return s.astype(f4)
    return round32(*two_sum(product, c), mode)


def split64(x):
    """High and low half of a float64's digits."""
    t = x * 134217729.0
    high = t - (t - x)
    return high, x - high


def fma64(a, b, c):
    """Boldo and Melquiond's algorithm; fractions for extreme exponents."""
    a, b, c = np.broadcast_arrays(a, b, c)
    exponents = [np.abs(np.frexp(x)[1]) for x in (a, b, c)]
    exponents.append(np.abs(np.frexp(a)[1] + np.frexp(b)[1]))
    tame = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    tame &= np.max(exponents, 0) < 900
    x, y, z = (np.where(tame, v, 1.0) for v in (a, b, c))
    (xh, xl), (yh, yl) = split64(x), split64(y)
    product = x * y
    low = xl * yl - (((product - xh * yh) - xl * yh) - xh * yl)
    sum_high, sum_low = two_sum(z, low)
    high, rest = two_sum(product, sum_high)
    out = high + odd64(*two_sum(sum_low, rest))
    # Only a sum of zero has a sign of its own.
    out = np.where(out == 0, x * y + z, out)
    if not tame.all():
        wild = ~tame
        out[wild] = fma64_by_fractions(a[wild], b[wild], c[wild])
    return out


def fma64_by_fractions(a, b, c):
    out = a * b + c
    for i in np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        try:
            out[i] = float(exact) if exact else out[i]
        except OverflowError:
            out[i] = np.inf if exact > 0 else -np.inf
    return out


def h2d(bits):
    return bits.view(f2).astype(f8)


def b2d(bits):
    return (bits.astype(u4) << u4(16)).view(f4).astype(f8)


def d2h(x, mode="rn"):
    h = x.astype(f2)
    if mode == "rz":
        h = np.where(np.abs(h) > np.abs(x), np.nextafter(h, f2(0)), h)
    return np.where(h != h, u2(0x7FFF), h.view(u2))


def d2b(x, mode="rn"):
    y = odd32(x)
    bits = y.view(u4)
    if mode == "rn":
        bits = bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))
    return np.where(y != y, u2(0x7FFF), (bits >> u4(16)).astype(u2))


def pmin(a, b):
    """PTX min: a NaN operand is ignored, -0 is below +0."""
    out = np.fmin(a, b)
    if np.count_nonzero(zero := out == 0):
        minus = ((a == 0) & np.signbit(a)) | ((b == 0) & np.signbit(b))
        out = np.where(zero, np.where(minus, out.dtype.type(-0.0), out.dtype.type(0)), out)
    return out


def pmax(a, b):
    return -pmin(-a, -b)


def xorsign(pick, a, b):
    return np.copysign(
        pick(np.abs(a), np.abs(b)), np.where(np.signbit(a) ^ np.signbit(b), f4(-1), f4(1))
    )


def via64(fn, x):
    return fn(x.astype(f8)).astype(x.dtype)


def testp(x, how):
    tiny = np.finfo(x.dtype).tiny
    return {
        "finite": np.isfinite(x),
        "infinite": np.isinf(x),
        "number": x == x,
        "notanumber": x != x,
        "normal": np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": (x != 0) & (np.abs(x) < tiny),
    }[how]


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def f2i(x, mode, dtype, wide_nan):
    """Float (as float64) to integer: clamps; NaN gives 0, or only the top bit where PTX says so."""
    info, v = np.iinfo(dtype), ROUND[mode](x)
    high, low = v >= float(info.max), v <= float(info.min)
    out = np.where(high | low | np.isnan(v), 0.0, v).astype(dtype)
    out = np.where(high, dtype(info.max), np.where(low, dtype(info.min), out))
    nan = info.min if info.min else 1 << (info.bits - 1)
    return np.where(np.isnan(v), dtype(nan if wide_nan else 0), out)


def clamp(x, signed, bits):
    """Clamp integers to the range of another integer type, keeping their dtype."""
    info = np.iinfo(x.dtype)
    return np.clip(
        x, max(info.min, -(1 << bits - 1) if signed else 0), min(info.max, (1 << bits - signed) - 1)
    )


def mulhi64(a, b):
    """High half of the 128-bit product of int64 or uint64 arrays."""
    mask, s, x, y = u8(0xFFFFFFFF), u8(32), a.view(u8), b.view(u8)
    lo = (x & mask) * (y & mask)
    m1 = (x >> s) * (y & mask) + (lo >> s)
    m2 = (x & mask) * (y >> s) + (m1 & mask)
    hi = (x >> s) * (y >> s) + (m1 >> s) + (m2 >> s)
    if a.dtype == i8:
        hi = hi - np.where(a < 0, y, u8(0)) - np.where(b < 0, x, u8(0))
    return hi.view(a.dtype)


def divide(a, b, remainder):
    """C division; a zero divisor gives all ones, as on the hardware."""
    zero = b == 0
    d = np.where(zero, b.dtype.type(1), b)
    r = np.fmod(a, d)
    return np.where(zero, ~(b & 0), r if remainder else (a - r) // d)


def prmt(a, b, sel):
    source, out = a.astype(u8) | (b.astype(u8) << u8(32)), np.zeros(a.size, u8)
    for i in range(4):
        nibble = (sel.astype(u8) >> u8(4 * i)) & u8(15)
        byte = (source >> ((nibble & u8(7)) * u8(8))) & u8(255)
        byte = np.where(nibble & u8(8) != 0, (byte >> u8(7)) * u8(255), byte)
        out |= byte << u8(8 * i)
    return out.astype(u4)


def bfe(a, pos, length, signed):
    """Extract `length` bits at `pos`; signed fields take the sign of their top bit or of a's."""
    bits = a.dtype.itemsize * 8
    wide = a.astype(u8)
    pos, length = pos.astype(u8) & u8(255), length.astype(u8) & u8(255)
    out = np.where(length >= bits, wide >> pos, (wide >> pos) & ((u8(1) << length) - u8(1)))
    if signed:
        top = np.minimum(pos + length - u8(1), u8(bits - 1))
        fill = (length > 0) & ((wide >> top) & u8(1) != 0)
        kept = np.minimum(length, np.maximum(u8(bits), pos) - pos)
        out = np.where(fill, out | ~((u8(1) << kept) - u8(1)), out)
    return out.astype(a.dtype)


def bfi(a, b, pos, length):
    bits = u8(b.dtype.itemsize * 8)
    pos, length = pos.astype(u8) & u8(255), np.minimum(length.astype(u8) & u8(255), bits)
    mask = np.where(length >= 64, ~u8(0), (u8(1) << length) - u8(1)) << pos
    return ((b.astype(u8) & ~mask) | ((a.astype(u8) << pos) & mask)).astype(b.dtype)


def top_bit(x):
    """Index of the highest set bit; -1 for zero."""
    x = x.astype(u8)
    for n in (1, 2, 4, 8, 16, 32):
        x = x | (x >> u8(n))
    return np.bitwise_count(x).astype(i8) - 1


def bfind(x, shift_amount):
    """Highest bit that differs from the sign: its index, or the shift that brings it to the top."""
    t = top_bit(np.where(x < 0, ~x, x))
    return np.where(t < 0, t, x.dtype.itemsize * 8 - 1 - t if shift_amount else t).astype(u4)


def brev(x):
    bits = np.unpackbits(x.view(u1).reshape(x.size, -1), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(x.dtype).ravel()


def funnel(lo, hi, shift, left, clamp):
    n = np.minimum(shift, u4(32)) if clamp else shift & u4(31)
    both = lo.astype(u8) | (hi.astype(u8) << u8(32))
    return ((both << n.astype(u8)) >> u8(32) if left else both >> n.astype(u8)).astype(u4)


def lane_of(x):
    """Number of each lane within its warp."""
    return np.arange(x.size) % WARP


def ballot(p, active):
    """For each lane, a word with the bits of its warp."""
    p = p if active is None else p & active
    bits = np.packbits(p.reshape(-1, WARP), axis=1, bitorder="little")
    return np.repeat(bits.view(u4).ravel(), WARP)


def shfl_index(mode, b, c):
    """Source lane of every lane, and whether it is in range."""
    lane = lane_of(b)
    b, clamp, seg = b.astype(i8) & 31, c.astype(i8) & 31, (c.astype(i8) >> 8) & 31
    first, last = lane & seg, (lane & seg) | (clamp & ~seg)
    j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~seg)}[mode]
    ok = (j >= last) if mode == "up" else (j <= last)
    return np.where(ok, j, lane) + np.arange(b.size) - lane, ok


def leader(active):
    """For each lane, the first active lane of its warp."""
    return np.repeat(active.reshape(-1, WARP).argmax(1), WARP).astype(u4)


UFUNC = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def redux(op, x, active, nan):
    """Reduce over the active lanes of each warp."""
    if x.dtype.kind == "f":
        on = np.ones(x.size, bool) if active is None else active
        rows = zip(x.reshape(-1, WARP), on.reshape(-1, WARP), strict=True)
        found = np.array([redux_float(op, row[here], nan) for row, here in rows], x.dtype)
        return np.repeat(found, WARP)
    info = np.iinfo(x.dtype)
    neutral = {"min": info.max, "max": info.min, "and": -1 if info.min else info.max}.get(op, 0)
    x = x if active is None else np.where(active, x, x.dtype.type(neutral))
    return np.repeat(UFUNC[op].reduce(x.reshape(-1, WARP), axis=1, dtype=x.dtype), WARP)


def redux_float(op, x, nan):
    kept = x if nan else x[x == x]
    if not kept.size:
        return np.nan
    found = kept.min() if op == "min" else kept.max()
    if found == 0 and np.any((kept == 0) & (np.signbit(kept) == (op == "min"))):
        return -0.0 if op == "min" else 0.0
    return found


def match(x, active, every):
    """Lanes that hold the same value (any), or all if they all do (all); and that predicate."""
    on = np.ones(x.size, bool) if active is None else active
    rows, on = x.reshape(-1, WARP), on.reshape(-1, WARP)
    same = (rows[:, :, None] == rows[:, None, :]) & on[:, None, :]
    words = np.packbits(same, axis=2, bitorder="little").view(u4).ravel()
    agree = [len(set(row[here].tolist())) == 1 for row, here in zip(rows, on, strict=True)]
    agree = np.repeat(np.array(agree), WARP)
    if every:
        words = np.where(agree, ballot(on.ravel(), None), u4(0))
    return words, agree
