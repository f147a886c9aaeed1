"""The gradient noise scale: of noise that is known, and where there is none to be had."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from histories import append_rows
from torch import Tensor, nn
from watching import absent, arrays

import gradstat
from gradstat import History, Log2Bins
from gradstat.record import Row

N, BATCH = 400, (8, 64)
NOISE, GRADIENT = (2.0, 0.5), (0.2, 0.1)  # of one example, rms of two layers
TRUE = [(s / g) ** 2 for s, g in zip(NOISE, GRADIENT, strict=True)]
WHOLE = sum(s**2 for s in NOISE) / sum(g**2 for g in GRADIENT)


def record(history: History, step: int, tensors: list[Tensor]) -> None:
    append_rows(history, step, *arrays(gradstat.statistics(tensors)))


def train(n_steps: int, *, ranks: int = 1, seed: int = 3) -> tuple[History, History]:
    """Gradients of a quadratic whose examples have normal noise: small batches and big ones."""
    generator = torch.Generator().manual_seed(seed)
    small, big = (History(["a", "b"], Log2Bins()) for _ in range(2))
    n_small = BATCH[1] // BATCH[0]
    for step in range(n_steps):
        batches = [
            g + s / math.sqrt(BATCH[0]) * torch.randn(n_small, N, generator=generator)
            for s, g in zip(NOISE, GRADIENT, strict=True)
        ]
        record(small, step, [x[:ranks].flatten() for x in batches])
        record(big, step, [x.mean(0) for x in batches])
    return small, big


@pytest.mark.parametrize("ranks", [1, 8])
def test_noise_scale_finds_the_noise_of_a_quadratic(ranks: int) -> None:
    noise = gradstat.noise_scale(*train(300, ranks=ranks), *BATCH)
    assert noise.layers == ["a", "b"]
    assert noise.steps.tolist() == list(range(300))
    assert noise.per_layer.shape == (300, 2)
    assert noise.per_layer[-1] == pytest.approx(TRUE, rel=0.1)
    assert noise.whole[-1] == pytest.approx(WHOLE, rel=0.1)
    assert noise.per_layer.dtype == noise.whole.dtype == np.float64


def test_noise_scale_of_each_step_is_the_formula() -> None:
    small, big = train(5)
    noise = gradstat.noise_scale(small, big, *BATCH, decay=0)
    b, c = BATCH
    s, g = small["l2"] ** 2, big["l2"] ** 2
    trace, signal = (s - g) / (1 / b - 1 / c), (c * g - b * s) / (c - b)
    expected = np.where((trace >= 0) & (signal > 0), trace / signal, np.nan)
    assert noise.per_layer == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert np.isfinite(expected).any()
    whole = trace.sum(1) / signal.sum(1)
    assert noise.whole == pytest.approx(np.where(signal.sum(1) > 0, whole, np.nan), nan_ok=True)


def test_noise_scale_averages_before_it_divides() -> None:
    small, big = train(40)
    each = gradstat.noise_scale(small, big, *BATCH, decay=0.5)
    b, c = BATCH
    s, g = (small["l2"] ** 2).sum(1), (big["l2"] ** 2).sum(1)
    trace, signal = (s - g) / (1 / b - 1 / c), (c * g - b * s) / (c - b)
    weights = 0.5 ** np.arange(40)[::-1]
    assert each.whole[-1] == pytest.approx(trace @ weights / (signal @ weights), rel=1e-6)


def test_noise_scale_of_an_accumulation() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 1)
    with (
        gradstat.watch(model, when="call") as first,
        gradstat.watch(model, accumulation_steps=4) as last,
        gradstat.watch(model) as alone,
    ):
        for at in range(400):
            loss = model(torch.randn(8, 16)).square().mean()
            (loss / 4).backward()
            if at % 4 == 0:
                first.measure()
            if at % 4 == 3:
                model.zero_grad()
    assert len(alone.history) == 400
    noise = gradstat.noise_scale(first.history, last.history, 8, 32, scale=4)
    # Of one example the gradient is 2 (w x + b) x: of known mean and covariance.
    with torch.no_grad():
        x = torch.randn(200_000, 16)
        gradients = 2 * model(x) * x
        true = float(gradients.var(0).sum() / gradients.mean(0).square().sum())
    assert noise.whole[-1] == pytest.approx(true, rel=0.25)
    assert noise.steps.tolist() == list(range(100))


def test_noise_scale_is_nan_where_it_is_undefined() -> None:
    small, big = (History(["a", "b"], Log2Bins()) for _ in range(2))
    one, two = torch.ones(4), 2 * torch.ones(4)
    nan = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    cases = [
        ([two, one], [one, one]),  # noise of a alone
        ([one, one], [two, one]),  # the noise of a is negative
        ([100 * one, one], [one, one]),  # the squared gradient of a is negative
        ([nan, one], [one, one]),
        ([one, one], [one, nan]),
    ]
    for step, (mine, theirs) in enumerate(cases):
        record(small, step, mine)
        record(big, step, theirs)
    for history, values in ((small, two), (big, one)):
        rows = [
            np.concatenate(x)
            for x in zip(arrays(gradstat.statistics([values])), absent(Log2Bins()), strict=True)
        ]
        append_rows(history, 5, *rows)
    noise = gradstat.noise_scale(small, big, 1, 8, decay=0)
    known = [
        [True, True],
        [False, True],
        [False, True],
        [False, True],
        [True, False],
        [True, False],
    ]
    assert np.isfinite(noise.per_layer).tolist() == known
    assert noise.per_layer[0, 1] == 0
    # A layer that is absent is no part of the whole, one that is not finite is.
    assert np.isfinite(noise.whole).tolist() == [True, False, False, False, False, True]
    assert noise.whole[5] == noise.per_layer[5, 0]


def test_noise_scale_goes_on_after_what_is_not_finite() -> None:
    small, big = train(4)
    broken = History(["a", "b"], Log2Bins())
    for step in range(4):
        tensors = [torch.full((N,), float("nan"))] * 2
        rows = arrays(small.record(step)) if step != 1 else arrays(gradstat.statistics(tensors))
        append_rows(broken, step, *rows)
    left = History(["a", "b"], Log2Bins())
    for step in (0, 2, 3):
        append_rows(left, step, *arrays(small.record(step)))
    got = gradstat.noise_scale(broken, big, *BATCH)
    expected = gradstat.noise_scale(left, big, *BATCH)
    assert expected.steps.tolist() == [0, 2, 3]
    assert np.isnan(got.whole[1])
    np.testing.assert_array_equal(got.whole[[0, 2, 3]], expected.whole)


SMALL, BIG = train(1)
OTHER = History(["c"], Log2Bins())
record(OTHER, 0, [torch.ones(2)])
LATER = History(["a"], Log2Bins())
record(LATER, 7, [torch.ones(2)])
SPARSE = History(["a"], Log2Bins())
record(SPARSE, 0, [torch.ones(3)])
WEIGHTS = History([Row("param", "a")], Log2Bins())
record(WEIGHTS, 0, [torch.ones(2)])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, BIG, 1, 2), {}, TypeError, "a History; small is int"),
        ((SMALL, None, 1, 2), {}, TypeError, "a History; big is NoneType"),
        ((SMALL, BIG, "1", 2), {}, TypeError, "a number; small_batch is '1'"),
        ((SMALL, BIG, 1, True), {}, TypeError, "a number; big_batch is True"),
        ((SMALL, BIG, 0, 2), {}, ValueError, "a positive number; small_batch is 0"),
        ((SMALL, BIG, 1, math.inf), {}, ValueError, "a positive number; big_batch is inf"),
        ((SMALL, BIG, 1, 10**400), {}, ValueError, "a positive number; big_batch is 1"),
        ((SMALL, BIG, 1, 2), {"scale": -1}, ValueError, "a positive number; scale is -1"),
        ((SMALL, BIG, 1, 2), {"decay": 1}, ValueError, "a decay from 0 to below 1; decay is 1"),
        (
            (SMALL, BIG, 2, 2),
            {},
            ValueError,
            "a small batch below the big one; small_batch is 2, big_batch 2",
        ),
        ((SMALL, OTHER, 1, 2), {}, ValueError, "layers that both histories have; small has"),
        ((SMALL, LATER, 1, 2), {}, ValueError, "steps that both histories have; small has"),
        ((SMALL, WEIGHTS, 1, 2), {}, ValueError, "gradients; big has param"),
        ((SMALL, SPARSE, 1, 2), {}, ValueError, "the same elements of both, not those that a"),
        ((SMALL, History(["a"], Log2Bins()), 1, 2), {}, ValueError, "a History with records"),
    ],
)
def test_noise_scale_refuses(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(f'noise_scale() needs {message}')}"):
        gradstat.noise_scale(*arguments, **options)
