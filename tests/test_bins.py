import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gradstat.bins import FLOAT32_MAX, FLOAT64_MAX, LinearBins, Log2Bins, float32_below, parse_bins

# Ordinary ranges, and each kind that float32 makes hard: far from zero, a few float32 wide,
# subnormal, wider than float32's largest.
RANGES = [
    (-0.5, 0.5),
    (0.0, 1.0),
    (-1e-3, 7e-3),
    (1000.0, 1001.0),
    (1.0, 1.000001),
    (1e-44, 3e-43),
    (-1e-38, 1e-38),
    (1e30, 3e30),
    (-3e38, 3e38),
    (-FLOAT32_MAX, FLOAT32_MAX),
]

finite_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def float32(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def neighbours(x: torch.Tensor) -> torch.Tensor:
    """Values with the float32 just below and just above each."""
    inf = torch.tensor(math.inf)
    near = torch.cat([x, torch.nextafter(x, inf), torch.nextafter(x, -inf)])
    return near[near.isfinite()]


def test_log2_index_is_the_top_bits_in_order(generator: torch.Generator) -> None:
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).int()
    x = bits.view(torch.float32)
    x = x[x.isfinite()]
    magnitude = x.abs().numpy().view(np.uint32) >> 21
    expected = np.where(x.numpy() < 0, 1023 - magnitude.astype(np.int64), 1024 + magnitude)
    assert np.array_equal(Log2Bins().index(x, x, x).numpy(), expected)


def test_log2_index_counts_both_zeros_in_one_bin() -> None:
    x = float32(0.0, -0.0)
    assert Log2Bins().index(x, x, x).tolist() == [1024, 1024]


def test_log2_edges_are_the_smallest_float64_of_each_bin() -> None:
    bins, edges = Log2Bins(), Log2Bins().edges(torch.zeros(()), torch.zeros(()))
    assert edges.shape == (2049,)
    assert edges.dtype == torch.float64
    assert bool((edges[1:] >= edges[:-1]).all())
    at = torch.arange(2049)[edges.isfinite()]
    first = edges[at]
    below = torch.nextafter(first, torch.tensor(-math.inf, dtype=torch.float64))
    assert torch.equal(bins.index(first, first, first), at)
    assert torch.equal(bins.index(below, below, below), at - 1)


@given(st.floats(allow_nan=False, allow_infinity=False))
@example(2.0**-25 * (1 - 2.0**-30))
@example(5e-324)
@example(1e300)
def test_log2_bins_of_both_signs_mirror_each_other(value: float) -> None:
    x = torch.tensor([value, -value], dtype=torch.float64)
    bins = Log2Bins().index(x, x, x)
    assert int(bins.sum()) == (2048 if value == 0 else 2047)


@given(finite_float32)
def test_log2_bin_is_the_same_for_every_dtype_that_holds_the_value(value: float) -> None:
    x = float32(value)
    bins = Log2Bins()
    assert bins.index(x, x, x) == bins.index(x.double(), x, x)


def test_log2_bins_are_at_most_a_quarter_wide() -> None:
    edges = Log2Bins().edges(torch.zeros(()), torch.zeros(()))
    normal = edges[(edges >= 2.0**-126) & edges.isfinite()]
    assert float((normal[1:] / normal[:-1]).max()) == 1.25


@pytest.mark.parametrize("bins", [1, 2, 7, 30, 1000])
@pytest.mark.parametrize(("low", "high"), [r for r in RANGES if 2.0**-100 < r[1] - r[0] < 2.0**126])
def test_linear_index_is_two_rounded_operations(
    low: float, high: float, bins: int, generator: torch.Generator
) -> None:
    at = torch.rand(2000, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    x = (low + at * (high - low)).float().numpy()
    lo, hi = np.float32(low), np.float32(high)
    expected = np.floor((x - lo) * (np.float32(bins) / (hi - lo))).astype(np.int64)
    expected = np.where(x < lo, -1, np.where(x > hi, bins, np.minimum(expected, bins - 1)))
    index = LinearBins(bins).index(torch.from_numpy(x), float32(low), float32(high))
    assert np.array_equal(index.numpy(), expected)


@pytest.mark.parametrize("bins", [1, 2, 30, 1000])
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_linear_edges_are_the_smallest_float32_of_each_bin(
    low: float, high: float, bins: int
) -> None:
    scheme, lo, hi = LinearBins(bins), float32(low), float32(high)
    edges = scheme.edges(lo[0], hi[0])
    assert edges.shape == (bins + 1,)
    assert edges[0] == lo.double()
    assert edges[-1] == hi.double()
    assert bool((edges[1:] >= edges[:-1]).all())
    x = neighbours(edges.float())
    index = scheme.index(x, lo, hi).numpy()
    expected = np.searchsorted(edges.numpy(), x.double().numpy(), side="right") - 1
    expected = np.where(x.numpy() == hi.numpy(), bins - 1, expected)
    assert np.array_equal(index, expected)


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_linear_edges_are_evenly_spaced_to_float32(low: float, high: float) -> None:
    edges = LinearBins(30).edges(torch.tensor(low), torch.tensor(high)).numpy()
    even = np.linspace(float(np.float32(low)), float(np.float32(high)), 31)
    # The rounding of x - low, of the width and of the product, and the edge's own.
    spacing = max(abs(low), abs(high)) * 2.0**-23 + 2.0**-149
    assert np.abs(edges - even).max() <= 2 * spacing + (high - low) * 2.0**-22


def test_linear_edges_take_many_ranges_at_once() -> None:
    low, high = float32(*(r[0] for r in RANGES)), float32(*(r[1] for r in RANGES))
    together = LinearBins(30).edges(low, high)
    assert together.shape == (len(RANGES), 31)
    for i in range(len(RANGES)):
        assert torch.equal(together[i], LinearBins(30).edges(low[i], high[i]))


@given(
    values=st.lists(finite_float32, max_size=40),
    ends=st.tuples(finite_float32, finite_float32),
    bins=st.integers(1, 70),
)
def test_linear_index_is_monotone_and_closed(
    values: list[float], ends: tuple[float, float], bins: int
) -> None:
    low, high = sorted(ends)
    assume(low < high)
    x = float32(*values, low, high).sort().values
    index = LinearBins(bins).index(x, float32(low), float32(high))
    assert bool((index[1:] >= index[:-1]).all())
    inside = (x >= low) & (x <= high)
    assert bool(((index >= 0) & (index < bins) == inside).all())
    assert index[x == high].tolist() == [bins - 1] * int((x == high).sum())


@pytest.mark.parametrize("options", [{}, {"nice": True}])
@pytest.mark.parametrize("bins", [1, 30, 100])
@pytest.mark.parametrize(
    "value", [0.0, 1.0, -0.1, 1e-45, 1e-30, 16777216.0, -1e30, FLOAT32_MAX, -FLOAT32_MAX]
)
def test_automatic_range_of_a_constant_is_one_full_bin(
    value: float, bins: int, options: dict[str, bool]
) -> None:
    scheme, x = LinearBins(bins, **options), float32(value)
    low, high = scheme.automatic_range(x, x)
    assert bool(((low <= x) & (x <= high)).all())
    # At least four float32 wide.
    assert float(high.double() - low.double()) >= 4 * 2.0**-23 * abs(value)
    edges = scheme.edges(low[0], high[0]).numpy()
    assert np.isfinite(edges).all()
    index = int(scheme.index(x, low, high))
    assert np.histogram(x.numpy(), edges)[0].tolist() == [int(i == index) for i in range(bins)]


@given(ends=st.tuples(finite_float32, finite_float32), bins=st.integers(1, 70), nice=st.booleans())
def test_automatic_range_holds_every_value(
    ends: tuple[float, float], bins: int, nice: bool
) -> None:
    lo, hi = float32(min(ends)), float32(max(ends))
    low, high = LinearBins(bins, nice=nice).automatic_range(lo, hi)
    assert low.dtype == high.dtype == torch.float32
    assert bool(((low <= lo) & (hi <= high) & (low < high)).all())
    assert bool(low.isfinite().all())
    assert bool(high.isfinite().all())


@pytest.mark.parametrize("nice", [False, True])
def test_automatic_range_of_nothing_is_zero_to_one(nice: bool) -> None:
    low, high = LinearBins(30).automatic_range(float32(math.nan), float32(math.nan))
    assert (low.item(), high.item()) == (0.0, 1.0)


def test_automatic_range_is_the_hull_of_float64() -> None:
    x = torch.tensor([0.1, 0.2], dtype=torch.float64)
    low, high = LinearBins(30).automatic_range(x[0], x[1])
    assert low.item() <= 0.1 < 0.2 <= high.item()
    assert torch.equal(low, low.float().double())
    assert torch.equal(high, high.float().double())


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.9), (-0.9, -0.1), (-1e-45, 1e-46), (0.5, 2.0)])
def test_known_range_is_rounded_outwards_to_the_nearest_float32(low: float, high: float) -> None:
    ends = LinearBins(2, low, high).known_range
    assert ends is not None
    inf, exact = torch.tensor(math.inf), torch.tensor([low, high], dtype=torch.float64)
    outer = float32(*ends)
    assert outer.tolist() == list(ends)
    assert ends[0] <= low < high <= ends[1]
    # Not further than it must be.
    assert torch.nextafter(outer[0], inf).double() > exact[0]
    assert torch.nextafter(outer[1], -inf).double() < exact[1]


any_float64 = st.floats(allow_nan=False, allow_infinity=False)
beyond_float32 = st.tuples(any_float64, any_float64).filter(
    lambda pair: max(map(abs, pair)) > FLOAT32_MAX
)


@given(ends=beyond_float32, bins=st.integers(1, 70), nice=st.booleans())
@example(ends=(FLOAT64_MAX, FLOAT64_MAX), bins=30, nice=False)
@example(ends=(-FLOAT64_MAX, -FLOAT64_MAX), bins=30, nice=True)
@example(ends=(-FLOAT64_MAX, FLOAT64_MAX), bins=30, nice=True)
@example(ends=(-(2.0**1023), 2.0**1023), bins=2, nice=False)
def test_automatic_range_beyond_float32_holds_every_value(
    ends: tuple[float, float], bins: int, nice: bool
) -> None:
    scheme = LinearBins(bins, nice=nice)
    lo, hi = torch.tensor(sorted(ends), dtype=torch.float64)
    low, high = scheme.automatic_range(lo, hi)
    assert bool((low <= lo) & (hi <= high) & (low < high))
    edges = scheme.edges(low, high)
    assert bool(edges.isfinite().all())
    assert bool((edges[1:] >= edges[:-1]).all())
    # Values at the edges, next to them, and small ones, which the scaling rounds to zero.
    inf = torch.tensor(math.inf, dtype=torch.float64)
    tiny = torch.tensor([0.0, 5e-324, 1e-200], dtype=torch.float64)
    near = torch.cat([edges, torch.nextafter(edges, inf), torch.nextafter(edges, -inf)])
    x = torch.cat([near, tiny, -tiny])
    x = x[(x >= low) & (x <= high)]
    counts = torch.bincount(scheme.index(x, low, high), minlength=bins)
    assert np.array_equal(counts, np.histogram(x, edges)[0])


@given(
    ends=st.tuples(finite_float32, finite_float32).map(sorted),
    bins=st.integers(1, 300),
    at=st.lists(st.integers(0, 300), min_size=1, max_size=9),
)
def test_edges_of_some_bins_are_those_among_all(
    ends: list[float], bins: int, at: list[int]
) -> None:
    lows, highs = torch.tensor([ends, ends], dtype=torch.float64).T
    some = torch.tensor([at, at[::-1]])
    for scheme in (LinearBins(bins), Log2Bins()):
        chosen = some.clamp(max=scheme.bins)
        every = scheme.edges(lows, highs).expand(2, -1)
        assert scheme.edges(lows, highs, chosen).equal(every.gather(-1, chosen))


def test_linear_edges_beyond_float32_are_evenly_spaced() -> None:
    low, high = torch.tensor([-3e300, 1e301], dtype=torch.float64)
    edges = LinearBins(30).edges(low, high).numpy()
    assert np.abs(edges / 1e301 - np.linspace(-0.3, 1, 31)).max() < 1e-6


def test_nice_range_is_that_of_matlab_documentation() -> None:
    low, high = LinearBins(6, nice=True).automatic_range(float32(0.0), float32(29.4))
    expected = [0.0, 4.9, 9.8, 14.7, 19.6, 24.5, 29.4]
    edges = LinearBins(6, nice=True).edges(low[0], high[0])
    assert edges.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("lo", "hi", "bins", "low", "high"),
    [
        # Worked by hand from the rule, step by step.
        (-3.2, 4.1, 10, -3.5, 4.1),
        (0.13, 0.97, 5, 0.1, 1.0),
        (-0.0135, 0.021, 30, -0.014, 0.0211),
        (12.0, 988.0, 4, 0.0, 1000.0),
        # A constant: a range of 1 about it.
        (7.0, 7.0, 30, 6.5, 7.5),
    ],
)
def test_nice_range_follows_the_rule(
    lo: float, hi: float, bins: int, low: float, high: float
) -> None:
    got = LinearBins(bins, nice=True).automatic_range(float32(lo), float32(hi))
    assert [end.item() for end in got] == pytest.approx([low, high], rel=1e-6)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_float32_below_rounds_float64_down(value: float) -> None:
    below = float32_below(torch.tensor(value, dtype=torch.float64))
    assert below.dtype == torch.float32
    if value < -FLOAT32_MAX:
        assert below.item() == -FLOAT32_MAX
    else:
        above = torch.nextafter(below, torch.tensor(math.inf)).item()
        assert below.item() <= value < above or above == math.inf


@given(
    bins=st.integers(1, 1 << 20),
    ends=st.none() | st.tuples(finite_float32, finite_float32),
    nice=st.booleans(),
)
def test_parse_bins_returns_an_equal_scheme(
    bins: int, ends: tuple[float, float] | None, nice: bool
) -> None:
    if ends is None:
        scheme = LinearBins(bins, nice=nice)
    else:
        assume(ends[0] != ends[1])
        scheme = LinearBins(bins, min(ends), max(ends))
    assert parse_bins(scheme.spec) == scheme
    assert parse_bins(Log2Bins().spec) == Log2Bins()


def test_parse_bins_knows_nice_however_it_was_given() -> None:
    assert parse_bins(LinearBins(3, nice=1).spec) == LinearBins(3, nice=True)
    assert LinearBins(3, nice=0).spec == LinearBins(3).spec


@pytest.mark.parametrize(
    "spec",
    [
        *("", "log", "log2 1", "linear", "linear 3", "linear 3 0 1"),
        *("linear 2048 0 1 maybe 7", "linear 2048 0.0 1.0 False 7", "linear 2048 0.0 1.0 maybe"),
        *("linear 3 None None False maybe", "linear 03 None None False", "linear 3 0 1 False"),
    ],
)
def test_parse_bins_refuses_other_text(spec: str) -> None:
    with pytest.raises(ValueError, match="needs the spec of a bin scheme; spec is " + repr(spec)):
        parse_bins(spec)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((30.0,), TypeError, "an integer number of bins; bins is 30.0"),
        ((True,), TypeError, "an integer number of bins; bins is True"),
        (("30",), TypeError, "an integer number of bins; bins is '30'"),
        ((0,), ValueError, "1 to 1048576 bins; bins is 0"),
        ((-3,), ValueError, "1 to 1048576 bins; bins is -3"),
        (((1 << 20) + 1,), ValueError, "1 to 1048576 bins; bins is 1048577"),
        ((3, 0.0), ValueError, "both ends of the range or none; low is 0.0, high is None"),
        ((3, None, 1.0), ValueError, "both ends of the range or none; low is None, high is 1.0"),
        ((3, "0", 1.0), TypeError, "a range of two numbers; low is '0'"),
        ((3, 0.0, math.inf), ValueError, "a range finite in float32; high is inf"),
        ((3, math.nan, 1.0), ValueError, "a range finite in float32; low is nan"),
        ((3, 0.0, 1e39), ValueError, "a range finite in float32; high is 1e+39"),
        ((3, 1.0, 1.0), ValueError, "low < high in float32; low is 1.0, high is 1.0"),
        ((3, 2.0, 1.0), ValueError, "low < high in float32; low is 2.0, high is 1.0"),
        ((3, 1.0, 1.00000001), ValueError, "low < high in float32; low is 1.0, high is 1.00000001"),
        (
            (3, 0.0, 1.0, True),
            ValueError,
            "a range or nice, not both; low is 0.0, nice is True",
        ),
    ],
)
def test_linear_bins_refuses_by_name(
    arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape('LinearBins() needs ' + message)}$"):
        LinearBins(*arguments)


def test_linear_bins_take_numpys_numbers() -> None:
    bins = LinearBins(np.int64(3), np.float32(0), np.float64(1))
    assert bins == LinearBins(3, 0.0, 1.0)
    assert repr(bins) == "LinearBins(3, 0.0, 1.0)"
    with pytest.raises(TypeError, match="needs a range of two numbers; low is False"):
        LinearBins(3, False, True)
