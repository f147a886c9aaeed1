"""Every engine against definitions that share no code with it: math.fsum, math.hypot, NumPy."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from conftest import Engine, sized

from gradstat import LinearBins, Log2Bins, Statistics
from gradstat.bins import FLOAT64_MAX, Bins
from gradstat.results import INTEGERS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Merging reads results, which are the same of all dtypes: one that engines widen, and the widest.
MERGED = [torch.bfloat16, torch.float64]

# Of float64; of a sum and a mean whose terms cancel, a share of those of the magnitudes.
TOLERANCES = {
    "reference": {"relative": 1e-12, "of magnitudes": 1e-15},
    "cpu": {"relative": 1e-5, "of magnitudes": 1e-6},
    "triton": {"relative": 1e-5, "of magnitudes": 1e-6},
}

# Down to the smallest and up to the largest values of each type.
SCALES = {
    torch.float16: [6e-8, 1e-5, 1.0, 1e4, 6e4],
    torch.bfloat16: [1e-40, 1e-30, 1.0, 1e30, 3e38],
    torch.float32: [1e-44, 1e-30, 1.0, 1e30, 3e38],
    torch.float64: [5e-323, 1e-300, 1e-44, 1e-30, 1.0, 1e30, 3e38, 1e300],
}

# One of each mode, and the fewest bins; float16 and Log2Bins meet every edge of 2**-24 to 65504.
SCHEMES = [
    Log2Bins(),
    LinearBins(30, -0.5, 0.5),
    LinearBins(1, 0.0, 1e30),
    LinearBins(30),
    LinearBins(10, nice=True),
]


def samples(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Some of a few elements, some over 4,096: a block of the CPU engine, a tile of Triton's."""
    generator = torch.Generator().manual_seed(20)

    def normal(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    def uniform(n: int) -> torch.Tensor:
        return torch.rand(n, generator=generator, dtype=torch.float64) * 2 - 1

    strange = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, -math.nan, 1.0, -1.0])
    mixed = normal(4480)
    mixed[::7] = strange.double().repeat(80)
    tensors = [
        *(uniform(300) * scale for scale in SCALES[dtype]),
        normal(5000),
        # A mean far from zero beside the spread.
        1000 + normal(300) * 0.5,
        torch.zeros(4100),
        -torch.zeros(3),
        torch.full((4100,), -0.1, dtype=torch.float64),
        torch.full((2,), SCALES[dtype][-1], dtype=torch.float64),
        mixed,
        strange,
        torch.full((4100,), math.nan),
        torch.tensor([math.inf] * 3),
        torch.tensor([-7.0, math.nan, -7.0]),
        # One value carries all sums.
        torch.cat([normal(299) * 1e-7, torch.tensor([100.0])]),
        torch.empty(0),
        torch.tensor(0.25),
        torch.tensor(math.inf),
    ]
    return [x.to(dtype).to(device) for x in tensors]


@functools.cache
def measured(engine: Engine, dtype: torch.dtype, bins: Bins) -> Statistics:
    return engine.measure(samples(dtype, engine.device), bins).to("cpu")


def n_elements_of_several_items(engine: Engine) -> int:
    """The reference has no items; Triton's hold 8,192 elements, the CPU engine's 65,536."""
    return 300_000 if engine.name == "cpu" else sized(on_card=300_000, in_software=9000)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().resolve_neg().cpu().double().reshape(-1).numpy()


def assert_counts_are_numpys(s: Statistics, tensors: Sequence[torch.Tensor]) -> None:
    """Each field of integers and each bin holds what NumPy counts."""
    assert len(s) == len(tensors)
    for i, (row, tensor) in enumerate(zip(s, tensors, strict=True)):
        x = to_numpy(tensor)
        finite = x[np.isfinite(x)]
        expected = {
            "numel": x.size,
            "finite": finite.size,
            "zeros": np.sum(x == 0),
            "nan": np.isnan(x).sum(),
            "posinf": np.isposinf(x).sum(),
            "neginf": np.isneginf(x).sum(),
            "below": np.sum(finite < float(row.low)),
            "above": np.sum(finite > float(row.high)),
        }
        got = {name: int(getattr(row, name)) for name in INTEGERS}
        assert got == {name: int(n) for name, n in expected.items()}, i
        counts, _ = np.histogram(finite, bins=row.edges.cpu().numpy())
        assert np.array_equal(row.counts.cpu().numpy(), counts), i


def assert_floats_are_right(s: Statistics, tensors: Sequence[torch.Tensor], engine: Engine) -> None:
    tolerance = TOLERANCES[engine.name]
    close = functools.partial(pytest.approx, rel=tolerance["relative"], abs=0.0, nan_ok=True)
    for i, (row, tensor) in enumerate(zip(s, tensors, strict=True)):
        x = to_numpy(tensor)
        values = x[np.isfinite(x)].tolist()
        n, nan = len(values), math.nan
        total, magnitude = math.fsum(values), math.fsum(map(abs, values))
        mean = total / n if n else nan
        std = math.hypot(*(v - mean for v in values)) / math.sqrt(n - 1) if n > 1 else nan
        l2 = math.hypot(*values)
        margin = max(tolerance["relative"] * abs(total), tolerance["of magnitudes"] * magnitude)
        got = {name: float(getattr(row, name)) for name in ("sum", "mean", "std", "l1", "l2")}
        assert got["l1"] == close(magnitude), i
        assert got["l2"] == close(l2), i
        assert got["std"] == close(std), i
        assert abs(got["sum"] - total) <= margin, i
        assert got["mean"] == pytest.approx(mean, rel=0.0, abs=margin / max(n, 1), nan_ok=True), i
        assert float(row.rms) == close(l2 / math.sqrt(n) if n else nan), i
        variance = pytest.approx(std * std, rel=2 * tolerance["relative"], abs=0.0, nan_ok=True)
        assert float(row.var) == variance, i
        extremes = [min(values), max(values), max(map(abs, values))] if n else [nan] * 3
        got_extremes = [float(end) for end in (row.min, row.max, row.abs_max)]
        assert got_extremes == pytest.approx(extremes, rel=0.0, abs=0.0, nan_ok=True), i


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_measure_counts_the_ends_of_a_known_range(engine: Engine, dtype: torch.dtype) -> None:
    # Rounded to the nearest float32, 0.1 is above itself and 0.9 below.
    x = torch.tensor([0.1, 0.5, 0.9], dtype=dtype, device=engine.device)
    s = engine.measure([x, -x], LinearBins(2, 0.1, 0.9))[0]
    assert int(s.counts.sum()) == 3
    assert_counts_are_numpys(engine.measure([x, -x], LinearBins(2, -0.9, -0.1)), [x, -x])


WIDE = {
    "two values": [-1e300, 1e300],
    "one value": [1e39],
    "a constant": [-3e300] * 70,
    "the largest": [-FLOAT64_MAX, 0.0, FLOAT64_MAX],
    "the largest alone": [FLOAT64_MAX] * 5,
    "small ones among large ones": [-1e300, -1e-300, -5e-324, -0.0, 5e-324, 1e-30, 1e30, 1e300],
    "just beyond": [0.0, 1.0, 2.0**128],
    "with NaN and infinities": [math.nan, 1e200, math.inf, -2e200, -math.inf],
}


@pytest.mark.parametrize(
    "bins", [LinearBins(2), LinearBins(30), LinearBins(10, nice=True)], ids=str
)
def test_measure_finds_a_range_for_float64_beyond_float32(engine: Engine, bins: Bins) -> None:
    generator = torch.Generator().manual_seed(20)
    tensors = [torch.tensor(x, dtype=torch.float64) for x in WIDE.values()]
    tensors.append(1e305 * torch.randn(5000, generator=generator, dtype=torch.float64))
    tensors.append(torch.ones(3))
    tensors = [x.to(engine.device) for x in tensors]
    s = engine.measure(tensors, bins)
    assert_counts_are_numpys(s, tensors)
    assert torch.equal(s.counts.sum(-1), s.finite)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measure_bins_both_signs_alike(engine: Engine, dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, 2.0**-14, 0.4375], dtype=dtype)
    x = torch.cat([x, torch.nextafter(x, torch.zeros_like(x)), 2 * x])
    if dtype == torch.float64:
        x = torch.cat([x, torch.tensor([2.0**-25 * (1 - 2.0**-30), 1e-300, 1e300], dtype=dtype)])
    s = engine.measure([x.to(engine.device), -x.to(engine.device)], Log2Bins())
    assert torch.equal(s.counts[0], s.counts[1].flip(0))
    assert torch.equal(s.underflow(torch.float16)[0], s.underflow(torch.float16)[1])


@pytest.mark.parametrize("bins", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measure_counts_what_numpy_counts(engine: Engine, dtype: torch.dtype, bins: Bins) -> None:
    assert_counts_are_numpys(measured(engine, dtype, bins), samples(dtype, "cpu"))


@pytest.mark.parametrize("bins", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measure_counts_and_ranges_equal_the_references(
    engine: Engine, dtype: torch.dtype, bins: Bins
) -> None:
    got = measured(engine, dtype, bins)
    expected = Engine("reference", "cpu").measure(samples(dtype, "cpu"), bins)
    assert torch.equal(got.integers, expected.integers)
    assert torch.equal(got.counts, expected.counts)
    assert torch.equal(got.low, expected.low)
    assert torch.equal(got.high, expected.high)


@pytest.mark.parametrize("bins", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measure_floats_are_those_of_float64(
    engine: Engine, dtype: torch.dtype, bins: Bins
) -> None:
    assert_floats_are_right(measured(engine, dtype, bins), samples(dtype, "cpu"), engine)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_measure_neither_underflows_nor_overflows(
    engine: Engine, scale: float, generator: torch.Generator
) -> None:
    x = (scale * torch.randn(3000, generator=generator)).to(engine.device)
    s = engine.measure([x])[0]
    assert float(s.l2) == pytest.approx(float(torch.linalg.vector_norm(x.double())), rel=1e-5)
    assert float(s.std) == pytest.approx(float(x.double().std()), rel=1e-5)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "misaligned by one": lambda x: x[1:],
    "misaligned by three": lambda x: x[3:-5],
    "transposed": lambda x: x[:180].view(12, 15).t(),
    "strided": lambda x: x[::3],
    "columns": lambda x: x[:180].view(12, 15)[:, 2:-1],
    "one column": lambda x: x[:180].view(12, 15)[:, 7],
    "permuted": lambda x: x[:180].view(3, 4, 15).permute(1, 2, 0),
    "permuted part": lambda x: x[:180].view(3, 4, 15).permute(2, 0, 1)[1:, ::2, 1:],
    "four strided dimensions": lambda x: x[:120].view(3, 4, 5, 2)[::2, ::3, 1::2, :1],
    "channels last": lambda x: (
        x[:120].view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    ),
    "expanded": lambda x: x[:40].view(40, 1).expand(40, 7),
    "one value expanded": lambda x: x[5].expand(3, 50),
    "overlapping": lambda x: x.as_strided((9, 8), (1, 2)),
    "negated": lambda x: torch._neg_view(x[:90]),
    "negated and strided": lambda x: torch._neg_view(x)[2::9],
    "0-dim": lambda x: x[11],
    "empty": lambda x: x[:0].view(0, 4).t(),
    "requiring a gradient": lambda x: x[:9].clone().requires_grad_(),
}


# An automatic range takes a second sweep, with a kernel of its own.
@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measure_reads_any_strides(
    engine: Engine, dtype: torch.dtype, bins: Bins, generator: torch.Generator
) -> None:
    x = torch.randn(200, generator=generator)
    x[::10] = torch.tensor([math.nan, math.inf, 0.0, -math.inf]).repeat(5)
    x = x.to(dtype).to(engine.device)
    views = [view(x) for view in VIEWS.values()]
    s = engine.measure(views, bins)
    assert_counts_are_numpys(s, views)
    assert_floats_are_right(s, views, engine)


@pytest.mark.parametrize("bins", SCHEMES, ids=str)
def test_measure_takes_several_dtypes_in_one_list(
    engine: Engine, bins: Bins, generator: torch.Generator
) -> None:
    tensors = [
        torch.randn(50 + 7 * i, generator=generator).to(dtype).to(engine.device)
        for i, dtype in enumerate([*DTYPES, torch.float32, torch.bfloat16, torch.float16])
    ]
    s = engine.measure(tensors, bins)
    assert_counts_are_numpys(s, tensors)
    assert_floats_are_right(s, tensors, engine)


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(30), LinearBins(3, -1.0, 1.0)], ids=str)
def test_measure_joins_the_parts_of_a_tensor(
    engine: Engine, bins: Bins, generator: torch.Generator
) -> None:
    n = n_elements_of_several_items(engine)
    x = (torch.randn(n + 1, generator=generator) + 3).to(engine.device)[1:]
    # Parts with means apart, so that their deviations do not simply add up.
    x[n // 2 :] -= 8
    columns = x[: n // 30 * 30].view(-1, 30)[:, 1:]
    tensors = [x, columns]
    if not engine.is_interpreted:
        tensors += [x[::2], x.double(), columns.t().half()]
    s = engine.measure(tensors, bins)
    assert_counts_are_numpys(s, tensors)
    assert_floats_are_right(s, tensors, engine)


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(30)], ids=str)
def test_measure_is_identical_from_run_to_run(
    engine: Engine, bins: Bins, generator: torch.Generator
) -> None:
    x = torch.randn(n_elements_of_several_items(engine), generator=generator).to(engine.device)
    first = engine.measure([x, x[:100]], bins)
    for _ in range(1 if engine.is_interpreted else 20):
        again = engine.measure([x, x[:100]], bins)
        assert torch.equal(again.integers, first.integers)
        assert torch.equal(again.floats, first.floats)
        assert torch.equal(again.counts, first.counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 4500])
def test_measure_gives_a_constant_a_range_of_one_or_of_a_few_float32(
    engine: Engine, dtype: torch.dtype, n: int
) -> None:
    values = [0.0, 1.0, -0.25, 1000.0, 2.0**20, -(2.0**20), 2.0**21, 3.0 * 2**24, 1e30, -3e38]
    tensors = [torch.full((n,), value, dtype=torch.float32).to(dtype) for value in values]
    s = engine.measure([x.to(engine.device) for x in tensors], LinearBins(30)).to("cpu")
    for i, tensor in enumerate(tensors):
        value = tensor[0].item()
        # Half a unit to each side up to 2**20; beyond, 2**-21 of the value: 4 to 8 float32.
        half = max(0.5, abs(value) / 2**21)
        assert float(s.low[i]) == float(np.float32(value - half))
        assert float(s.high[i]) == float(np.float32(value + half))


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(30, -0.5, 0.5)], ids=str)
@pytest.mark.parametrize("dtype", MERGED, ids=str)
def test_merge_of_an_engines_parts_is_the_union(
    engine: Engine, dtype: torch.dtype, bins: Bins
) -> None:
    tensors = samples(dtype, engine.device)
    s = engine.measure(tensors, bins)
    merged = functools.reduce(Statistics.merge, s)
    union = torch.cat([x.reshape(-1) for x in tensors])
    # The bins of both are those of one engine, so the counts are equal.
    expected = engine.measure([union], bins)
    assert torch.equal(merged.integers, expected.integers[0])
    assert torch.equal(merged.counts, expected.counts[0])
    row = Statistics(bins, merged.integers[None], merged.floats[None].clone(), merged.counts[None])
    assert_counts_are_numpys(row, [union])
    assert_floats_are_right(row, [union], engine)


@pytest.mark.parametrize("dtype", MERGED, ids=str)
def test_merge_of_the_same_row_by_two_engines_is_of_twice_its_values(
    engine: Engine, dtype: torch.dtype
) -> None:
    # But the first, of the smallest numbers, whose norm has few digits.
    tensors = samples(dtype, "cpu")[1:]
    ours = engine.measure([x.to(engine.device) for x in tensors], LinearBins(30, -0.5, 0.5))
    theirs = Engine("reference", "cpu").measure(tensors, LinearBins(30, -0.5, 0.5))
    for merged in (theirs.merge(ours), ours.merge(theirs)):
        doubled = [torch.cat([x.reshape(-1)] * 2) for x in tensors]
        assert_counts_are_numpys(merged.to("cpu"), doubled)
        assert_floats_are_right(merged.to("cpu"), doubled, engine)
