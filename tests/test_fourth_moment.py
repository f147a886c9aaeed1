"""Kurtosis off a histogram against float64, element by element."""

import math

import pytest
import torch
from torch import Tensor

import gradstat
from gradstat import LinearBins, Log2Bins

N = 20_000


def true(x: Tensor) -> float:
    deviations = x.double() - x.double().mean()
    deviations = deviations / deviations.abs().max()
    return float((deviations**4).mean() / (deviations**2).mean() ** 2)


def sample(name: str, generator: torch.Generator) -> Tensor:
    normal = torch.randn(N, generator=generator)
    if name == "sparse":
        return normal * (torch.rand(N, generator=generator) < 0.01)
    if name == "one outlier":
        return torch.cat([normal, torch.tensor([1e3])])
    if name == "student t":
        # Of 5 degrees of freedom.
        return normal / torch.randn(5, N, generator=generator).square().mean(0).sqrt()
    return {
        "normal": normal,
        "shifted": normal + 1.5,
        "uniform": torch.rand(N, generator=generator) - 0.5,
        "laplace": normal.sign() * torch.empty(N).exponential_(generator=generator),
        "lognormal": normal.exp(),
        "gamma": torch.empty(2, N).exponential_(generator=generator).sum(0),
        "rayleigh": torch.empty(N).exponential_(generator=generator).sqrt(),
        "half-normal": normal.abs(),
        "gelu": torch.nn.functional.gelu(normal),
    }[name]


# Of what is smooth, has a long side, and of what single elements make.
TOLERANCES = {
    "normal": 0.05,
    "shifted": 0.05,
    "uniform": 0.05,
    "laplace": 0.05,
    "gamma": 0.12,
    "rayleigh": 0.12,
    "half-normal": 0.12,
    "gelu": 0.12,
    "sparse": 0.05,
    "one outlier": 1e-6,
    "lognormal": 0.15,
    "student t": 0.15,
}


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", TOLERANCES)
def test_kurtosis_is_that_of_the_elements(name: str, seed: int, scale: float) -> None:
    x = sample(name, torch.Generator().manual_seed(seed)) * scale
    got = float(gradstat.statistics(x).kurtosis)
    assert got == pytest.approx(true(x), rel=TOLERANCES[name])


@pytest.mark.parametrize("name", TOLERANCES)
@pytest.mark.parametrize(
    "scale", [2.0**-1040, 1e-300, 1e-42, 1e-40, 1e39, 1e300], ids=lambda scale: f"{scale:.0e}"
)
def test_kurtosis_is_nan_outside_of_the_normal_numbers_of_float32(name: str, scale: float) -> None:
    x = sample(name, torch.Generator().manual_seed(0)).double() * scale
    assert math.isnan(gradstat.statistics(x).kurtosis)


@pytest.mark.parametrize("name", TOLERANCES)
def test_kurtosis_is_within_its_bound_or_nan_at_the_ends_of_the_normal_numbers(name: str) -> None:
    x = sample(name, torch.Generator().manual_seed(0)).double()
    for exponent in (*range(-140, -112), *range(115, 131)):
        y = x * 2.0**exponent
        got = float(gradstat.statistics(y).kurtosis)
        assert math.isnan(got) or got == pytest.approx(true(y), rel=TOLERANCES[name]), exponent


def test_kurtosis_is_within_its_bound_wherever_elements_lie_in_their_bins() -> None:
    for low, high in ((1.0, 1.2499), (1.2499, 1.0)):
        # Most elements at one end of their bins, a few large ones at the other.
        few, most = 4 * low, high
        x = torch.tensor([most, -most] * 500 + [few, -few] * 8 + [8.0, -8.0])
        assert 1 / 2.5 < float(gradstat.statistics(x).kurtosis) / true(x) < 2.5


@pytest.mark.parametrize(("name", "most"), [("laplace", 0.09), ("rayleigh", 0.16)])
def test_kurtosis_of_a_thousand_elements_is_hardly_ever_beyond_its_bound(
    name: str, most: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [part for _ in range(20) for part in sample(name, generator).split(1000)]
    kurtosis = gradstat.statistics(tensors).kurtosis.tolist()
    pairs = zip(kurtosis, map(true, tensors), strict=True)
    errors = sorted(abs(got / right - 1) for got, right in pairs if not math.isnan(got))
    assert len(errors) > 300
    assert errors[int(0.97 * len(errors))] <= TOLERANCES[name]
    assert errors[-1] <= most


def test_kurtosis_leaves_out_what_is_not_finite(generator: torch.Generator) -> None:
    x = torch.randn(1000, generator=generator)
    broken = torch.cat([x, torch.tensor([math.nan, math.inf, -math.inf])])
    assert torch.equal(gradstat.statistics(broken).kurtosis, gradstat.statistics(x).kurtosis)


@pytest.mark.parametrize(
    "x",
    [[], [1.0], [1.0, -2.0, 3.0], [2.0] * 10, [0.0] * 10, [1.0, 1.01, 1.02, 0.99, 0.98]],
    ids=str,
)
def test_kurtosis_is_nan_where_a_histogram_cannot_tell(x: list[float]) -> None:
    assert math.isnan(gradstat.statistics(torch.tensor(x)).kurtosis)


def test_kurtosis_over_linear_bins_has_the_range_of_float64(generator: torch.Generator) -> None:
    x = torch.randn(N, generator=generator).double()
    assert math.isnan(gradstat.statistics(x * 1e-300, LinearBins(200)).kurtosis)
    beyond = gradstat.statistics(x * 1e300, LinearBins(200)).kurtosis
    assert float(beyond) == pytest.approx(true(x), rel=0.05)


@pytest.mark.parametrize("bins", [LinearBins(200), LinearBins(200, -3.0, 3.0)], ids=repr)
def test_kurtosis_is_read_off_linear_bins_too(bins: LinearBins, generator: torch.Generator) -> None:
    x = torch.randn(N, generator=generator)
    assert float(gradstat.statistics(x, bins).kurtosis) == pytest.approx(true(x), rel=0.05)


def test_kurtosis_of_a_list_is_that_of_each(generator: torch.Generator) -> None:
    x = [torch.randn(n, generator=generator) for n in (5, 100, 2)]
    whole = gradstat.statistics(x).kurtosis
    each = torch.stack([gradstat.statistics(one, Log2Bins()).kurtosis for one in x])
    torch.testing.assert_close(whole, each, equal_nan=True, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n_bins", [1, 2, 5])
def test_kurtosis_of_values_that_lie_evenly_in_wide_bins_is_exact(n_bins: int) -> None:
    x = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    got = float(gradstat.statistics(x, LinearBins(n_bins, -1, 1)).kurtosis)
    assert got == pytest.approx(true(x), rel=1e-4)
