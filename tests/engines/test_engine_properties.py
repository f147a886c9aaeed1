"""Linear counts of every engine against numpy.histogram, on examples that hypothesis makes up."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import CUDA, Engine
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gradstat import LinearBins

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

finite_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Magnitudes of everyday as often as those that float32 makes hard.
ends = st.tuples(finite_float32, finite_float32) | st.tuples(
    st.floats(-4, 4, width=32), st.floats(-4, 4, width=32)
)
# On a device each number is a kernel to compile.
numbers = st.sampled_from([1, 2, 3, 7, 30, 40]) if CUDA else st.integers(1, 40)
values = st.lists(st.floats(-4, 4) | st.floats(), max_size=30)


@dataclass(frozen=True)
class Example:
    """A tensor and the scheme to count it with."""

    x: torch.Tensor
    bins: LinearBins


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Values at the edges of the bins, just below and just above them, among any others."""
    n, dtype = draw(numbers), draw(st.sampled_from(DTYPES))
    mode = draw(st.sampled_from(["explicit", "automatic", "nice"]))
    x = torch.tensor(draw(values), dtype=torch.float64).to(dtype)
    if mode == "explicit":
        low, high = sorted(draw(ends.filter(lambda pair: pair[0] != pair[1])))
        bins = LinearBins(n, low, high)
        range_ = torch.tensor(low), torch.tensor(high)
    else:
        bins = LinearBins(n, nice=mode == "nice")
        finite = x[x.isfinite()]
        nothing = torch.tensor(math.nan, dtype=dtype)
        extremes = (finite.min(), finite.max()) if len(finite) else (nothing, nothing)
        range_ = bins.automatic_range(*extremes)
    edges = bins.edges(*range_)
    near = [edges.to(dtype)] + [
        torch.nextafter(edges.to(dtype), torch.tensor(end, dtype=dtype))
        for end in (-math.inf, math.inf)
    ]
    if mode != "explicit" and len(x):
        # Within the values, so that they leave the range as it is.
        near = [at.clamp(*extremes) for at in near]
    x = torch.cat([x, *near])
    return Example(fill_tile(x) if draw(st.booleans()) else x, bins)


def fill_tile(x: torch.Tensor) -> torch.Tensor:
    """The values again and again: the kernels read a whole tile, 4,096 values, its own way."""
    return x.repeat(math.ceil(4200 / len(x)))[:4200]


def assert_counts_are_numpys(engine: Engine, case: Example) -> None:
    x = case.x.to(engine.device)
    s = engine.measure([x], case.bins)[0]
    finite = case.x[case.x.isfinite()].double().numpy()
    counts, _ = np.histogram(finite, bins=s.edges.cpu().numpy())
    assert np.array_equal(s.counts.cpu().numpy(), counts)
    assert int(s.below) == np.sum(finite < float(s.low))
    assert int(s.above) == np.sum(finite > float(s.high))
    assert int(s.counts.sum() + s.below + s.above) == finite.size


# -0.0 is in a range from 0.0, the subnormal just below it is not; scaled, that one rounds to -0.0.
TINY = 2.0**-149
AROUND_ZERO = torch.tensor([0.0, -0.0, TINY, -TINY, 3 * TINY, -3 * TINY, 1.0, 8e37])

# The engine, the same for all examples of a test, holds nothing that one could leave behind.
stateless = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@stateless
@given(case=examples())
@example(case=Example(AROUND_ZERO, LinearBins(3, 0.0, 1.0)))
@example(case=Example(AROUND_ZERO, LinearBins(1, 0.0, 8.6e37)))
@example(case=Example(AROUND_ZERO, LinearBins(2, -TINY, 8.6e37)))
@example(case=Example(AROUND_ZERO, LinearBins(2, TINY, 8.6e37)))
@example(case=Example(AROUND_ZERO.relu(), LinearBins(2)))
@example(case=Example(fill_tile(AROUND_ZERO), LinearBins(3, 0.0, 1.0)))
@example(case=Example(fill_tile(AROUND_ZERO), LinearBins(2, -TINY, 8.6e37)))
@example(case=Example(fill_tile(AROUND_ZERO.relu()), LinearBins(2)))
@example(case=Example(torch.tensor([0.0, -0.0, 1.0]), LinearBins(2)))
def test_linear_counts_are_numpys(engine: Engine, case: Example) -> None:
    assert_counts_are_numpys(engine, case)


@pytest.mark.slow
@settings(stateless, max_examples=10_000, derandomize=False, print_blob=True)
@given(case=examples())
def test_linear_counts_are_numpys_ten_thousand_times(engine: Engine, case: Example) -> None:
    assert_counts_are_numpys(engine, case)
