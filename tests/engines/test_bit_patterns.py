"""Every engine on arbitrary bits: whatever memory holds is a value that NumPy counts too."""

from collections import Counter
from itertools import product

import pytest
import torch
from conftest import Engine
from test_engines import assert_counts_are_numpys, assert_floats_are_right

from gradstat import LinearBins, Log2Bins
from gradstat.bins import Bins

SCHEMES = [Log2Bins(), LinearBins(30), LinearBins(7, -1.0, 1.0)]
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}

# 16-bit elements of a whole tile of Triton's, which has no masked rest.
TILE = 8192

# Exponent and mantissa bits of each type, to tell NaN and infinities without its arithmetic.
FIELDS = {
    torch.float16: (5, 10),
    torch.bfloat16: (8, 7),
    torch.float32: (8, 23),
    torch.float64: (11, 52),
}


def from_bits(patterns: list[int], dtype: torch.dtype) -> torch.Tensor:
    width = dtype.itemsize * 8
    signed = [bits - (1 << width) if bits >> (width - 1) else bits for bits in patterns]
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return torch.tensor(signed, dtype=kind).view(dtype)


def kind_of(bits: int, dtype: torch.dtype) -> str:
    exponent_bits, mantissa_bits = FIELDS[dtype]
    sign = bits >> (exponent_bits + mantissa_bits)
    exponent = bits >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = bits & (1 << mantissa_bits) - 1
    if exponent == (1 << exponent_bits) - 1:
        return "nan" if mantissa else "neginf" if sign else "posinf"
    return "zeros" if exponent == mantissa == 0 else "finite"


def nan_payloads(dtype: torch.dtype) -> list[int]:
    """Infinities and NaN, quiet and signalling: each single bit, all, and all but one."""
    exponent_bits, mantissa_bits = FIELDS[dtype]
    full = (1 << mantissa_bits) - 1
    mantissas = [0, full, *(1 << bit for bit in range(mantissa_bits))]
    mantissas += [full ^ 1 << bit for bit in range(mantissa_bits)]
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    sign = 1 << (exponent_bits + mantissa_bits)
    return [s | infinity | mantissa for s in (0, sign) for mantissa in mantissas]


@pytest.mark.parametrize("bins", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", FIELDS, ids=str)
# A few elements, and a whole tile or block that holds nothing else.
@pytest.mark.parametrize("size", [0, 4500])
def test_measure_counts_every_payload_of_nan(
    engine: Engine, dtype: torch.dtype, bins: Bins, size: int
) -> None:
    patterns = nan_payloads(dtype)
    patterns *= max(1, size // len(patterns))
    s = engine.measure([from_bits(patterns, dtype).to(engine.device)], bins)[0]
    expected = Counter(kind_of(bits, dtype) for bits in patterns)
    for name in ("nan", "posinf", "neginf", "zeros"):
        assert int(getattr(s, name)) == expected[name], name
    assert int(s.finite) == int(s.counts.sum()) == int(s.below) == int(s.above) == 0


@pytest.mark.parametrize("bins", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_measure_counts_each_of_the_patterns_of_sixteen_bits(
    engine: Engine, dtype: torch.dtype, bins: Bins
) -> None:
    # Triton's interpreter widens them alike for all bins: each is tried over those of one kind.
    step = 7 if engine.is_interpreted and bins != SCHEMES[0] else 1
    patterns = list(range(0, 1 << 16, step))
    x = from_bits(patterns, dtype).to(engine.device)
    # A finite part too, which takes no careful path.
    parts = [x, x[x.isfinite()], x[x.isfinite() & (x > 0)]]
    s = engine.measure(parts, bins)
    assert_counts_are_numpys(s, parts)
    assert_floats_are_right(s, parts, engine)
    expected = Counter(kind_of(bits, dtype) for bits in patterns)
    assert int(s.nan[0]) == expected["nan"] > 0
    assert int(s.zeros[0]) == expected["zeros"] > 0


@pytest.mark.parametrize("bins", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_measure_counts_arbitrary_patterns(
    engine: Engine, dtype: torch.dtype, bins: Bins, generator: torch.Generator
) -> None:
    kind = INTEGERS[dtype]
    ends = torch.iinfo(kind)
    bits = torch.randint(ends.min, ends.max, (20_000,), generator=generator, dtype=kind)
    parts = [bits.view(dtype), bits[:300].view(dtype)]
    parts = [x.to(engine.device) for x in parts]
    s = engine.measure(parts, bins)
    assert_counts_are_numpys(s, parts)
    mask = (1 << dtype.itemsize * 8) - 1
    expected = Counter(kind_of(each & mask, dtype) for each in bits.tolist())
    assert int(s.nan[0]) == expected["nan"] > 0


def special_patterns(dtype: torch.dtype) -> list[int]:
    """Zeros, both ends of the subnormals, infinities and a NaN, of both signs."""
    exponent_bits, mantissa_bits = FIELDS[dtype]
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    quiet = 1 << (mantissa_bits - 1)
    magnitudes = [0, 1, (1 << mantissa_bits) - 1, infinity, infinity | quiet]
    return [sign | bits for sign in (0, 1 << 15) for bits in magnitudes]


def rows_with_pairs(dtype: torch.dtype, columns: int) -> torch.Tensor:
    """Rows of usual values; in each one, a special value beside each of them, and beside a usual.

    Two 16-bit elements are one word, which a GPU compares at once. In rows of finite values, the
    usual ones are of one sign, so that a zero or a subnormal is an extreme.
    """
    special = [*from_bits(special_patterns(dtype), dtype), None]
    finite = [x for x in special if x is None or x.isfinite()]
    usual = torch.linspace(0.25, 0.75, columns, device="cpu").to(dtype)
    rows = []
    for others, sign in ((special, 1), (finite, 1), (finite, -1)):
        for first, is_first in product(others, (True, False)):
            row = sign * usual
            for at, second in enumerate(others):
                # Over all words of a thread's loads.
                word = (len(rows) + 5 * at) % (columns // 2)
                pair = (first, second) if is_first else (second, first)
                for half, value in enumerate(pair):
                    if value is not None:
                        row[2 * word + half] = value
            rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("bins", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_measure_tells_the_elements_of_a_pair_apart(
    engine: Engine, dtype: torch.dtype, bins: Bins
) -> None:
    if engine.is_interpreted:
        pytest.skip("Triton's interpreter takes no pairs: it has no PTX")
    parts = list(rows_with_pairs(dtype, TILE).to(engine.device))
    s = engine.measure(parts, bins)
    assert_counts_are_numpys(s, parts)
    assert_floats_are_right(s, parts, engine)
