"""Findings over depth and over steps, each on a made-up history, and what must not be one."""

import math

import numpy as np
import pytest
import torch
from findings import N, diagnose, noise, only
from histories import append_rows, make_history
from torch import Tensor, nn

import gradstat
from gradstat import LinearBins, Log2Bins
from gradstat.util import median


@pytest.mark.parametrize(
    ("factor", "severity"), [(2.9, None), (3.4, "warning"), (3.9, "severe"), (10.0, "severe")]
)
def test_diagnose_finds_vanishing_by_the_slope_over_depth(
    factor: float, severity: str | None
) -> None:
    history = make_history(
        Log2Bins(), 4, 40, lambda step, layer: noise(step, layer, 1e-2 * factor ** (layer - 3))
    )
    if severity is None:
        assert diagnose(history) == []
        return
    finding = only(history, "vanishing")
    assert (finding.severity, finding.layer, finding.steps) == (severity, "0.weight", (0, 39))
    assert finding.numbers["ratio"] == pytest.approx(factor**-3, rel=0.15)
    assert 10 ** finding.numbers["slope"] == pytest.approx(factor, rel=0.05)
    assert finding.numbers["fit"] > 0.99
    assert finding.numbers["rms"] == pytest.approx(1e-2 * factor**-3, rel=0.1)
    assert finding.numbers["rms_last"] == pytest.approx(1e-2, rel=0.1)
    assert "From 3.weight back to 0.weight the gradient shrinks" in finding.sentence


def test_diagnose_gives_vanishing_the_steps_in_which_it_lasted() -> None:
    def gradient(step: int, layer: int) -> Tensor:
        return noise(step, layer, 10.0 ** (layer - 3) if 40 <= step < 80 else 1.0)

    finding = only(make_history(Log2Bins(), 4, 120, gradient), "vanishing")
    # Two windows of six: too few for a severe one.
    assert (finding.severity, finding.steps) == ("warning", (40, 79))


@pytest.mark.parametrize(
    ("records", "steps"), [(60, None), (100, None), (120, (0, 119)), (300, (0, 299))]
)
def test_diagnose_lets_only_a_short_start_pass(records: int, steps: tuple[int, int] | None) -> None:
    def gradient(step: int, layer: int) -> Tensor:
        return noise(step, layer, 10.0 ** (layer - 3) if step < records else 1.0)

    found = diagnose(make_history(Log2Bins(), 4, 640, gradient))
    assert [each.steps for each in found if each.kind == "vanishing"] == ([steps] if steps else [])


def test_diagnose_takes_the_median_so_that_one_batch_alone_says_nothing() -> None:
    def gradient(step: int, layer: int) -> Tensor:
        return noise(step, layer, 10.0 ** (3 * layer - 9) if step % 4 == 0 else 1.0)

    assert diagnose(make_history(Log2Bins(), 4, 40, gradient)) == []


def test_diagnose_needs_layers_in_line_to_call_it_vanishing() -> None:
    scales = [1e-4, 1.0, 1e-2, 1.0, 1e-2, 1.0, 1e-1, 1e-1]
    history = make_history(Log2Bins(), 8, 20, lambda step, layer: noise(step, layer, scales[layer]))
    assert diagnose(history) == []
    assert only(history, "vanishing", depth_fit=0.1).layer == "0.weight"


def test_diagnose_does_not_take_rows_of_zeros_for_a_small_gradient() -> None:
    def gradient(step: int, layer: int) -> Tensor:
        x = noise(step, layer)
        # As of an embedding, of whose rows a batch needs a few.
        return torch.cat([x[:10], torch.zeros(N * 1000)]) if layer == 0 else x

    history = make_history(Log2Bins(), 3, 4, gradient)
    assert history["rms"][0, 0] < 0.01 * history["rms"][0, 2]
    assert diagnose(history) == []


@pytest.mark.parametrize("scale", [1.2e-8, 0.8e-8, 1e-12, 1e-30])
def test_diagnose_finds_vanishing_by_level_below_adams_epsilon(scale: float) -> None:
    history = make_history(
        Log2Bins(), 2, 60, lambda step, layer: noise(step, layer, scale if layer else 1e-2)
    )
    found = [each for each in diagnose(history) if each.kind == "vanishing"]
    if scale > 1e-8:
        assert found == []
        return
    (finding,) = found
    assert (finding.severity, finding.layer, finding.steps) == ("severe", "1.weight", (0, 59))
    assert finding.numbers["rms"] == pytest.approx(scale, rel=0.1)
    assert "below 1e-08" in finding.sentence
    assert not [f for f in diagnose(history, vanishing_level=scale / 2) if f.kind == "vanishing"]


@pytest.mark.parametrize(("final", "severity"), [(1e5, "warning"), (1e9, "severe")])
def test_diagnose_finds_exploding_by_the_growth_over_steps(final: float, severity: str) -> None:
    def gradient(step: int, layer: int) -> Tensor:
        growing = layer == 1 and step > 30
        return noise(step, layer, 1e-2 * (final ** ((step - 30) / 10) if growing else 1))

    finding = only(make_history(Log2Bins(), 3, 41, gradient), "exploding")
    assert (finding.layer, finding.severity) == ("1.weight", severity)
    first, last = finding.steps
    assert 31 < first < 40
    assert last == 40
    # One of three records back, for the median.
    assert finding.numbers["rms"] == pytest.approx(1e-2 * final**0.9, rel=0.2)
    assert finding.numbers["rms_before"] == pytest.approx(1e-2, rel=0.1)
    growth = finding.numbers["rms"] / finding.numbers["rms_before"]
    assert finding.numbers["growth"] == growth


def test_diagnose_finds_gradients_that_explode_from_the_start_and_tells_no_scale() -> None:
    history = make_history(Log2Bins(), 3, 40, lambda step, layer: noise(step, layer, 1e12))
    (finding,) = diagnose(history)
    assert (finding.kind, finding.severity, finding.steps) == ("exploding", "warning", (0, 39))
    assert finding.numbers["rms"] == pytest.approx(1e12, rel=0.1)
    assert len(finding.others) == 2
    # As of a loss scale.
    loud = make_history(Log2Bins(), 3, 40, lambda step, layer: noise(step, layer, 2.0**16))
    assert [each.kind for each in diagnose(loud)] == ["scale"]


@pytest.mark.parametrize(
    ("growth", "shown"), [(1234.5, "1,230-fold"), (7.6543e5, "765,000-fold"), (2e9, "2e+09-fold")]
)
def test_diagnose_rounds_the_growth_to_three_digits(growth: float, shown: str) -> None:
    def gradient(step: int, layer: int) -> Tensor:
        return torch.full((4,), growth if step >= 10 else 1.0)

    finding = only(make_history(Log2Bins(), 1, 15, gradient), "exploding")
    assert f"0.weight's gradient grew {shown}, from an rms of 1.0e+00 to " in finding.sentence
    assert finding.sentence.endswith(" at step 11.")


def test_diagnose_finds_exploding_in_a_run_of_thousands_of_records() -> None:
    history = make_history(LinearBins(1, -1.0, 1.0), 1, 1000, lambda step, layer: noise(step, 0))
    integers, floats = history.record().integers.numpy(), history.record().floats.numpy()
    for step in range(1000, 1100):
        append_rows(history, step, integers, floats * 1e6, history.record().counts.numpy())
    finding = only(history, "exploding")
    assert finding.severity == "severe"
    assert finding.steps[0] == pytest.approx(1000, abs=5)
    assert finding.steps[1] == 1099


def test_diagnose_does_not_take_a_slow_start_for_exploding() -> None:
    def gradient(step: int, layer: int) -> Tensor:
        # As of a layer below one whose weights start at zero.
        return noise(step, layer, 1e-2 * step / 100 if layer == 0 else 1e-2)

    history = make_history(Log2Bins(), 2, 100, gradient)
    growth = history["rms"][99, 0] / history["rms"][1, 0]
    assert growth > 90
    assert diagnose(history, exploding_growth=20.0) == []


def test_diagnose_finds_exploding_over_depth() -> None:
    history = make_history(
        Log2Bins(), 5, 20, lambda step, layer: noise(step, layer, 10.0 ** (-layer))
    )
    finding = only(history, "exploding")
    assert (finding.severity, finding.layer, finding.steps) == ("warning", "0.weight", (0, 19))
    assert finding.numbers["ratio"] == pytest.approx(1e4, rel=0.2)
    assert "grows" in finding.sentence
    assert diagnose(history, exploding_ratio=1e5) == []


def test_diagnose_names_the_first_layer_that_backward_met_a_nan_in() -> None:
    def gradient(step: int, layer: int) -> Tensor:
        x = noise(step, layer)
        if step >= 12 and layer <= 2:
            x[:7] = math.nan
            x[7:9] = math.inf
            x[9] = -math.inf
        if step >= 13 and layer == 3:
            x[0] = math.nan
        return x

    finding = only(make_history(Log2Bins(), 4, 40, gradient), "non-finite")
    assert (finding.severity, finding.layer, finding.steps) == ("severe", "2.weight", (12, 39))
    assert finding.numbers == {
        "nan": 7,
        "posinf": 2,
        "neginf": 1,
        "numel": N,
        "records": 28,
        "layers": 3,
    }
    assert (
        "at step 12, before 2 other layers: of 400 elements 7 are NaN and 3 infinite. This"
        in finding.sentence
    )


def test_diagnose_finds_the_layer_in_which_a_real_backward_pass_breaks() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x).sqrt()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Root(), nn.Linear(4, 2))
    with gradstat.watch(model) as w:
        model(torch.rand(3, 4)).sum().backward()
    finding = only(w.history, "non-finite")
    assert (finding.layer, finding.severity, finding.steps) == ("1.weight", "severe", (0, 0))


@pytest.mark.parametrize(
    ("bad", "severity"),
    [([7], "warning"), ([7, 50], "warning"), ([99], "severe"), (range(6), "warning")],
)
def test_diagnose_lets_a_loss_scale_be_tried(bad: list[int], severity: str) -> None:
    def gradient(step: int, layer: int) -> Tensor:
        x = noise(step, layer)
        x[0] = math.inf if step in bad else x[0]
        return x

    finding = only(make_history(Log2Bins(), 2, 100, gradient), "non-finite")
    assert finding.severity == severity
    assert finding.numbers["records"] == len(bad)
    assert finding.steps == (min(bad), max(bad))
    assert ("a GradScaler skips such steps" in finding.sentence) == (severity == "warning")


@pytest.mark.parametrize(
    ("dead", "severity"), [(range(60), "severe"), (range(30, 60), "severe"), (range(30), "warning")]
)
def test_diagnose_finds_dead_layers(dead: range, severity: str) -> None:
    def gradient(step: int, layer: int) -> Tensor:
        return noise(step, layer) * (0 if layer == 1 and step in dead else 1)

    finding = only(make_history(Log2Bins(), 3, 60, gradient), "dead")
    assert (finding.layer, finding.severity) == ("1.weight", severity)
    assert finding.numbers == {"records": len(dead), "zeros": N}
    assert finding.steps[0] >= dead[0]
    assert finding.steps[1] <= dead[-1]


def test_diagnose_lets_a_layer_be_zero_for_a_while_absent_or_broken() -> None:
    def gradient(step: int, layer: int) -> Tensor:
        return noise(step, layer) * (0 if layer == 1 and step % 20 == 0 else 1)

    history = make_history(Log2Bins(), 2, 60, gradient, absent=[(i, 0) for i in range(60)])
    assert diagnose(history) == []


def test_diagnose_ends_a_growth_before_the_records_without_a_gradient() -> None:
    def gradient(step: int, layer: int) -> Tensor:
        if step >= 12:
            return torch.full((4,), math.nan)
        return torch.full((4,), 1e6 if step >= 10 else 1.0)

    history = make_history(Log2Bins(), 1, 20, gradient)
    finding = next(each for each in diagnose(history) if each.kind == "exploding")
    assert finding.steps[1] == 11
    assert "at step 11" in finding.sentence


def test_median_is_the_lower_of_two_of_what_is_known() -> None:
    nan = math.nan
    x = np.array([[3.0, nan, 5.0], [1.0, nan, nan], [nan, nan, 4.0], [nan, nan, 6.0]])
    np.testing.assert_array_equal(median(x), [1.0, nan, 5.0])
