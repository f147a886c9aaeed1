import functools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import gradstat
from gradstat import LinearBins, Log2Bins, Statistics
from gradstat.results import DERIVED, FLOATS, INTEGERS

# Statistics are formulas over what an engine measured; the definition's own numbers serve here.
measure = functools.partial(gradstat.statistics, engine="reference")

finite_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def normal(n: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)


def assert_same(got: Statistics, expected: Statistics) -> None:
    """Every field is equal, NaN to NaN."""
    assert got.bins == expected.bins
    assert torch.equal(got.integers, expected.integers)
    assert torch.equal(got.counts, expected.counts)
    torch.testing.assert_close(got.floats, expected.floats, rtol=0, atol=0, equal_nan=True)


def test_fields_agree_with_torch(generator: torch.Generator) -> None:
    x = normal(1000, generator) + 0.3
    s = measure(x)
    expected = {
        "numel": 1000,
        "finite": 1000,
        "zeros": 0,
        "min": x.min(),
        "max": x.max(),
        "abs_max": x.abs().max(),
        "sum": x.sum(),
        "mean": x.mean(),
        "var": x.var(),
        "std": x.std(),
        "l1": x.abs().sum(),
        "l2": torch.linalg.vector_norm(x),
        "rms": (x**2).mean().sqrt(),
    }
    for name, value in expected.items():
        assert float(getattr(s, name)) == pytest.approx(float(value), rel=1e-12), name


def test_fields_have_the_shape_of_the_list(generator: torch.Generator) -> None:
    names = [*INTEGERS, *FLOATS, *DERIVED]
    for shape, x in (((), normal(9, generator)), ((2,), [normal(9, generator)] * 2)):
        s = measure(x, LinearBins(5))
        for name in names:
            assert getattr(s, name).shape == shape, name
        assert s.counts.shape == (*shape, 5)
        assert s.edges.shape == (*shape, 6)
        assert measure(x).edges.shape == (2049,)


def test_fields_of_nothing_are_counts_of_zero_and_undefined_floats() -> None:
    for x in (torch.empty(0), torch.tensor([math.nan, math.inf, -math.inf])):
        s = measure(x)
        assert int(s.numel) == x.numel()
        assert int(s.finite) == int(s.counts.sum()) == 0
        assert (float(s.sum), float(s.l1), float(s.l2)) == (0.0, 0.0, 0.0)
        for name in ("min", "max", "mean", "std", "var", "rms", "abs_max"):
            assert math.isnan(getattr(s, name)), name


def test_std_of_one_value_is_undefined() -> None:
    s = measure(torch.tensor([2.0, math.nan]))
    assert math.isnan(s.std)
    assert (float(s.mean), float(s.min), float(s.max)) == (2.0, 2.0, 2.0)


def test_merge_of_two_shards_has_the_variance_of_their_union(generator: torch.Generator) -> None:
    a, b = normal(10_000, generator), normal(10_000, generator) + 5
    merged = measure(a).merge(measure(b))
    assert float(merged.var) == pytest.approx(float(torch.cat([a, b]).var()), rel=1e-12)
    assert float(merged.var) == pytest.approx(7.25, rel=0.03)


@pytest.mark.parametrize("scheme", [Log2Bins(), LinearBins(30, -1.0, 1.0)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_merge_agrees_with_the_union(
    scale: float, scheme: Log2Bins | LinearBins, generator: torch.Generator
) -> None:
    parts = [
        normal(100, generator, torch.float32) * scale,
        torch.tensor([scale, 0.0, -0.0, math.nan, math.inf, -math.inf]),
        torch.empty(0),
        torch.tensor([3 * scale]),
        torch.full((7,), math.nan),
        normal(3000, generator, torch.float32) * scale + 10 * scale,
    ]
    merged = functools.reduce(Statistics.merge, [measure(part, scheme) for part in parts])
    union = measure(torch.cat(parts), scheme)
    assert torch.equal(merged.integers, union.integers)
    assert torch.equal(merged.counts, union.counts)
    torch.testing.assert_close(merged.floats, union.floats, rtol=1e-12, atol=0)


def exact_std(values: list[float]) -> float:
    """Standard deviation by fractions, rounded once."""
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    variance = sum((value - mean) ** 2 for value in exact) / (len(exact) - 1)
    # By an even power of two, so that its root is a normal number.
    half = (variance.numerator.bit_length() - variance.denominator.bit_length()) // 2
    scaled = float(variance / Fraction(2) ** (2 * half))
    return math.ldexp(math.sqrt(scaled), half)


# Sums that overflow though the values and their deviations do not, and equal values.
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([-1e307] * 100, [1e307] * 100),
        ([1e307, 1.1e307] * 40, [1e307] * 100),
        ([-1e306, -2e306] * 300, [1e306, 3e306, 2e306] * 200),
        ([1.7e308] * 50, [-1.7e308] * 50),
        ([1e308], [-1e308, 1.5e308]),
        ([0.1] * 3, [0.1] * 7),
        ([1e-300, 2e-300], [3e-300]),
        ([2.0], [3.0]),
    ],
    ids=lambda values: f"{len(values)} of {values[0]}",
)
def test_merge_has_the_std_of_the_union_whatever_the_size(a: list[float], b: list[float]) -> None:
    parts = [measure(torch.tensor(part, dtype=torch.float64)) for part in (a, b)]
    merged = parts[0].merge(parts[1])
    assert float(merged.std) == pytest.approx(exact_std(a + b), rel=1e-12, abs=0.0)


@given(
    value=st.floats(allow_nan=False, allow_infinity=False),
    n=st.integers(1, 300),
    m=st.integers(1, 300),
)
def test_merge_of_equal_values_has_no_spread(value: float, n: int, m: int) -> None:
    a, b = (measure(torch.full((k,), value, dtype=torch.float64)) for k in (n, m))
    assert float(a.merge(b).std) == 0


def test_merge_of_values_too_large_for_their_norm_says_so() -> None:
    x = torch.tensor([1e308, 1.1e308] * 1000, dtype=torch.float64)
    assert math.isnan(measure(x).merge(measure(x)).std)
    assert math.isnan(measure(x).merge(measure(x)).merge(measure(torch.ones(3))).std)


def test_merge_with_nothing_changes_nothing(generator: torch.Generator) -> None:
    x, empty = measure([normal(9, generator), torch.tensor([2.0])]), measure([torch.empty(0)] * 2)
    assert_same(x.merge(empty), x)
    assert_same(empty.merge(x), x)
    assert_same(empty.merge(empty), empty)


@pytest.mark.parametrize("scheme", [Log2Bins(), LinearBins(5, -1.0, 1.0)])
def test_merge_with_an_absent_layer_changes_nothing(
    scheme: Log2Bins | LinearBins, generator: torch.Generator
) -> None:
    x = measure([normal(9, generator), normal(5, generator)], scheme)
    absent = Statistics(
        scheme,
        torch.zeros_like(x.integers),
        torch.full_like(x.floats, math.nan),
        torch.zeros_like(x.counts),
    )
    assert_same(x.merge(absent), x)
    assert_same(absent.merge(x), x)
    assert_same(absent.merge(absent), absent)


def test_merge_refuses_what_does_not_add_up(generator: torch.Generator) -> None:
    x = normal(9, generator)
    for a, b in (
        (measure(x), measure(x, LinearBins(5))),
        (measure(x), measure([x])),
        (measure(x, LinearBins(5, 0.0, 1.0)), measure(x, LinearBins(5, 0.0, 2.0))),
    ):
        with pytest.raises(ValueError, match=re.escape("merge() needs the same bins and shape; ")):
            a.merge(b)
    with pytest.raises(ValueError, match=re.escape("merge() needs histograms over the same range")):
        measure(x, LinearBins(5)).merge(measure(x * 2, LinearBins(5)))


@pytest.mark.parametrize("scale", [65536.0, 1.0, 2.0**-40])
@pytest.mark.parametrize("scheme", [Log2Bins(), LinearBins(30), LinearBins(30, -0.5, 0.5)])
def test_unscale_is_exact(
    scale: float, scheme: Log2Bins | LinearBins, generator: torch.Generator
) -> None:
    x = normal(1000, generator, torch.float32) * torch.logspace(-20, 0, 1000)
    x[:4] = torch.tensor([0.0, math.nan, math.inf, -math.inf])
    if isinstance(scheme, LinearBins) and scheme.low is not None:
        scaled = measure(x * scale, LinearBins(30, -0.5 * scale, 0.5 * scale))
    else:
        scaled = measure(x * scale, scheme)
    for divisor in (scale, torch.tensor(scale)):
        got, expected = scaled.unscale(divisor), measure(x, scheme)
        assert torch.equal(got.integers, expected.integers)
        assert torch.equal(got.counts, expected.counts)
        assert torch.equal(got.edges, expected.edges)
        torch.testing.assert_close(got.floats, expected.floats, rtol=0, atol=0)


def test_unscale_moves_what_leaves_the_bins_to_their_ends() -> None:
    x = torch.tensor([1.0, -1.0, 1.5, 2.0**-120])
    small = measure(x).unscale(2.0**127).unscale(2.0**2)
    assert torch.equal(small.counts, measure(x * 2.0**-127 * 2.0**-2).counts)
    assert small.counts[[1023, 1024]].tolist() == [1, 3]
    large = measure(x).unscale(2.0**-127).unscale(2.0**-2)
    assert large.counts[[4, 2043]].tolist() == [1, 2]
    assert int(large.counts.sum()) == 4


def test_unscale_by_less_than_one_is_exact_for_normal_magnitudes_alone() -> None:
    normal = torch.tensor([2.0**-126, -1.75 * 2.0**-126, 2.0**-125, 0.0])
    for scale in (2.0**-1, 2.0**-40, 2.0**-100):
        assert torch.equal(measure(normal).unscale(scale).counts, measure(normal / scale).counts)
    # One bin holds an octave of these, and goes to the lowest of its four.
    subnormal = torch.tensor([2.0**-128, 1.75 * 2.0**-128])
    unscaled = measure(subnormal).unscale(2.0**-40).counts
    assert torch.equal(unscaled, measure(torch.full((2,), 2.0**-88)).counts)
    # These are in the bin of zero, and stay there.
    nearest = measure(torch.tensor([2.0**-149, 0.0])).unscale(2.0**-40).counts
    assert int(nearest[1024]) == 2


@pytest.mark.parametrize("scale", [0.0, -2.0, 3.0, math.inf, math.nan])
def test_unscale_refuses_what_is_not_a_power_of_two(scale: float) -> None:
    message = re.escape(f"unscale() needs a positive power of two; scale is {scale}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        measure(torch.ones(2)).unscale(scale)


@given(
    values=st.lists(finite_float32, min_size=1, max_size=60),
    q=st.floats(0, 1),
    scheme=st.sampled_from([Log2Bins(), LinearBins(30), LinearBins(3, nice=True)]),
)
def test_quantile_is_within_the_bin_of_the_value(
    values: list[float], q: float, scheme: Log2Bins | LinearBins
) -> None:
    x = torch.tensor(values)
    s = measure(x, scheme)
    at = max(math.ceil(q * len(values)), 1) - 1
    value = np.sort(x.double().numpy())[at]
    edges = s.edges.numpy()
    bin_ = np.flatnonzero(np.histogram([value], edges)[0])[0]
    low, high = max(edges[bin_], float(s.min)), min(edges[bin_ + 1], float(s.max))
    assert low <= float(s.quantile(q)) <= high


def test_quantile_is_close_for_many_values(generator: torch.Generator) -> None:
    x = normal(100_000, generator)
    q = torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99], dtype=torch.float64)
    exact = torch.quantile(x, q)
    for scheme, width in ((Log2Bins(), 0.25), (LinearBins(1000), 0.01)):
        s = measure([x, 2 * x], scheme)
        for i in range(5):
            estimate = s.quantile(float(q[i]))
            bound = width * (exact[i].abs() if isinstance(scheme, Log2Bins) else 1)
            assert abs(float(estimate[0] - exact[i])) <= bound
            assert abs(float(estimate[1] - 2 * exact[i])) <= 2 * bound


def test_quantile_of_float64_beyond_float32_is_between_its_extremes() -> None:
    s = measure(torch.tensor([-1e300, 1e300], dtype=torch.float64))
    for q in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert -1e300 <= float(s.quantile(q)) <= 1e300
    # A linear scheme says more.
    linear = measure(torch.tensor([-1e300, 1e300], dtype=torch.float64), LinearBins(1000))
    assert float(linear.quantile(0.25)) == pytest.approx(-1e300, rel=2e-3)


def test_quantile_of_values_outside_the_range_is_its_ends() -> None:
    x = torch.tensor([-9.0] * 4 + [0.5] * 2 + [9.0] * 4)
    s = measure([x, torch.full((3,), -9.0), torch.full((3,), 9.0)], LinearBins(4, 0.0, 1.0))
    assert s.quantile(0.2).tolist() == [0.0, 0.0, 1.0]
    assert s.quantile(0.9).tolist() == [1.0, 0.0, 1.0]
    assert 0.5 <= float(s.quantile(0.5)[0]) <= 0.75


def test_quantile_of_nothing_is_nan() -> None:
    s = measure([torch.empty(0), torch.tensor([math.nan]), torch.ones(1)])
    assert s.quantile(0.5).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_quantile_refuses_what_is_not_a_fraction(q: float) -> None:
    message = re.escape(f"quantile() needs q between 0 and 1; q is {q}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        measure(torch.ones(2)).quantile(q)


@pytest.mark.parametrize(
    ("dtype", "smallest"),
    [
        (torch.float16, -149),
        # bfloat16's last subnormals share the bin of zero, as `underflow` says.
        (torch.bfloat16, -128),
        (torch.float8_e4m3fn, -149),
        (torch.float8_e5m2, -149),
    ],
)
def test_underflow_is_what_a_cast_loses(
    dtype: torch.dtype, smallest: int, generator: torch.Generator
) -> None:
    exponent = torch.rand(20_000, generator=generator, dtype=torch.float64) * (20 - smallest)
    x = (torch.exp2(exponent + smallest) * normal(20_000, generator).sign()).float()
    x = torch.cat([x[x.abs() >= 2.0**smallest], torch.zeros(100)])
    x = torch.cat([x, torch.tensor([math.nan, math.inf, -math.inf])])
    lost = ((x.to(dtype).float() == 0) & (x != 0)).sum()
    expected = float(lost) / float((x.isfinite() & (x != 0)).sum())
    assert float(measure(x).underflow(dtype)) == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < 1 or dtype == torch.bfloat16


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=2.0**-60, max_value=1.0))
@example(2.0**-25 * (1 - 2.0**-30))
@example(2.0**-25 * (1 + 2.0**-30))
def test_underflow_of_float64_is_what_a_cast_loses_of_either_sign(value: float) -> None:
    for x in (value, -value):
        lost = value < 2.0**-25
        s = measure(torch.tensor([x], dtype=torch.float64))
        assert float(s.underflow(torch.float16)) == lost


@pytest.mark.parametrize("other", [None, 3, "log2"])
def test_merge_refuses_what_is_no_statistics(other: object) -> None:
    s = measure(torch.ones(3))
    q = gradstat.quantization(torch.ones(3), "float8_e5m2")
    for wrong in (other, q):
        message = f"merge() needs Statistics; other is {type(wrong).__name__}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            s.merge(wrong)
    for wrong in (other, s):
        message = f"merge() needs a Quantization; other is {type(wrong).__name__}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            q.merge(wrong)


def test_underflow_to_bfloat16_takes_the_last_subnormals_to_be_lost() -> None:
    x = torch.tensor([2.0**-130, -(2.0**-140), 2.0**-127, 0.0])
    assert float(measure(x).underflow(torch.bfloat16)) == pytest.approx(2 / 3)


def test_underflow_of_nothing_is_zero() -> None:
    s = measure([torch.empty(0), torch.zeros(3), torch.tensor([math.nan])])
    assert s.underflow(torch.float16).tolist() == [0.0, 0.0, 0.0]


def test_underflow_refuses_other_types_and_bins() -> None:
    names = "torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2"
    message = re.escape(f"underflow() needs one of {names}; dtype is torch.float32")
    with pytest.raises(ValueError, match=f"^{message}$"):
        measure(torch.ones(2)).underflow(torch.float32)
    message = re.escape(f"underflow() needs statistics over Log2Bins; bins is {LinearBins(3)}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        measure(torch.ones(2), LinearBins(3)).underflow(torch.float16)


@pytest.mark.parametrize("dtype", [[], {}, None, "float16"])
def test_underflow_refuses_what_is_no_dtype(dtype: object) -> None:
    message = f"underflow() needs a torch.dtype; dtype is {dtype!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        measure(torch.ones(2)).underflow(dtype)


@pytest.mark.parametrize("scale", ["a", None, [2.0], 2j, torch.ones(1)])
def test_unscale_refuses_what_is_no_number(scale: object) -> None:
    message = f"unscale() needs a number or a 0-dim tensor; scale is {scale!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        measure(torch.ones(2)).unscale(scale)


def test_indexing_gives_the_statistics_of_one_tensor(generator: torch.Generator) -> None:
    tensors = [normal(n, generator) for n in (3, 5, 8)]
    s = measure(tensors)
    assert len(s) == 3
    for i, x in enumerate(tensors):
        assert_same(s[i], measure(x))
    assert_same(s[-1], s[2])
    assert_same(s[1:], measure(tensors[1:]))
    assert [int(row.numel) for row in s] == [3, 5, 8]
    with pytest.raises(IndexError):
        s[3]


def test_indexing_refuses_statistics_of_one_tensor() -> None:
    s = measure(torch.ones(2))
    with pytest.raises(TypeError, match="needs Statistics of a list; this is of one tensor"):
        s[0]
    with pytest.raises(TypeError, match="needs Statistics of a list; this is of one tensor"):
        len(s)
    with pytest.raises(TypeError, match="needs Statistics of a list; this is of one tensor"):
        iter(s)


def test_repr_has_a_line_for_each_tensor() -> None:
    row = "numel=2, zeros=1, nan=0, min=0, max=3, mean=1.5, std=2.121, l2=3"
    x = torch.tensor([0.0, 3.0])
    assert repr(measure(x)) == f"Statistics(Log2Bins():\n  {row})"
    assert repr(measure([x, x])) == f"Statistics(Log2Bins():\n  {row}\n  {row})"


def test_to_keeps_every_number(generator: torch.Generator) -> None:
    s = measure([normal(9, generator)], LinearBins(5))
    assert_same(s.to("cpu"), s)
    assert s.to("meta").counts.device.type == "meta"


@pytest.mark.parametrize("q", [[0.1, 0.9], "0.5", None, torch.tensor([0.5])])
def test_quantile_refuses_what_is_no_number(q: object) -> None:
    with pytest.raises(TypeError, match=r"^quantile\(\) needs a number between 0 and 1; q is "):
        gradstat.statistics(torch.ones(3)).quantile(q)
