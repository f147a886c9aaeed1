"""Findings that are read off histograms and magnitudes."""

from typing import Any

import numpy as np
import pytest
import torch
from findings import N, diagnose, noise, only
from histories import make_history
from torch import Tensor, nn

import gradstat
from gradstat import History, LinearBins, Log2Bins, Thresholds
from gradstat.diagnosis.evidence import Evidence
from gradstat.diagnosis.narrow_formats import NARROW
from gradstat.record import GRAD


def test_diagnose_of_noise_is_two_notes() -> None:
    history = make_history(Log2Bins(), 4, 40, noise)
    found = history.diagnose()
    assert [(each.kind, each.severity) for each in found] == [
        ("underflow", "note"),
        ("scale", "note"),
    ]
    underflow, scale = found
    assert underflow.steps == scale.steps == (0, 39)
    assert list(underflow.numbers) == ["float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"]
    shares = [history.record(i).underflow(torch.float8_e4m3fn) for i in range(40)]
    column = history.layers.index(underflow.layer)
    assert underflow.numbers["float8_e4m3fn"] == float(max(share[column] for share in shares))
    largest = history["abs_max"].max()
    assert scale.numbers["abs_max"] == largest
    assert 65504 / 4 < largest * 2 ** scale.numbers["log2_highest_scale"] <= 65504 / 2


def stopped(share: float, factor: float) -> Any:
    """Gradients of which a share is smaller than the rest."""

    def gradient(step: int, layer: int) -> Tensor:
        x = noise(step, layer, 1.0)
        if layer == 1:
            x[: round(share * N)] *= factor
        return x

    return gradient


@pytest.mark.parametrize(
    ("share", "factor", "found"),
    [(0.8, 1e-6, True), (0.4, 1e-6, False), (0.8, 1e-2, False), (0.8, 0.0, False)],
)
def test_diagnose_finds_saturation_where_most_elements_are_octaves_below_the_rms(
    share: float, factor: float, found: bool
) -> None:
    history = make_history(Log2Bins(), 2, 10, stopped(share, factor))
    found_kinds = [each for each in diagnose(history) if each.kind == "saturation"]
    if not found:
        assert found_kinds == []
        return
    finding = only(history, "saturation")
    assert (finding.layer, finding.severity, finding.steps) == ("1.weight", "warning", (0, 9))
    assert finding.numbers["share"] == pytest.approx(share, abs=0.01)
    assert "more than 1024 times smaller than its rms" in finding.sentence
    for octaves in (30.0, 10**9, 1e308):  # the last ones more than float64 has
        assert diagnose(history, saturation_octaves=octaves, underflow_share=1.0) == []
    assert diagnose(history, saturation_share=0.9, underflow_share=1.0) == []


@pytest.mark.parametrize(("largest", "found"), [(1e-33, True), (2e-35, False)])
def test_diagnose_tells_zeros_from_the_smallest_numbers(largest: float, found: bool) -> None:
    def gradient(step: int, layer: int) -> Tensor:
        x = noise(step, layer, 1e-39)
        x[: N // 2] = 0
        x[-1] = largest
        return x

    history = make_history(Log2Bins(), 1, 10, gradient)
    # Numbers below 2**-128 have a bin in common with zero.
    assert (history["rms"].max() / 1024 > 2.0**-128) == found
    shares = [f.numbers["share"] for f in diagnose(history) if f.kind == "saturation"]
    assert shares == ([(N / 2 - 1) / (N / 2)] if found else [])


def test_diagnose_finds_saturated_units_of_a_real_network() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(20, 40), nn.Linear(40, 10)
    with torch.no_grad():
        first.bias[:32] = 15.0
    model = nn.Sequential(first, nn.Sigmoid(), last)
    with gradstat.watch(model) as w:
        for _ in range(5):
            target = torch.randint(10, (64,))
            nn.functional.cross_entropy(model(torch.randn(64, 20)), target).backward()
            model.zero_grad()
    finding = only(w.history, "saturation")
    assert finding.layer == "0.weight"
    assert finding.numbers["share"] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(("scale", "found"), [(1e-6, False), (1e-8, True)])
def test_diagnose_warns_where_float16_would_flush_much(scale: float, found: bool) -> None:
    history = make_history(
        Log2Bins(), 2, 10, lambda step, layer: noise(step, layer, scale if layer else 1e-2)
    )
    warned = [each for each in diagnose(history) if each.kind == "underflow"]
    if not found:
        assert warned == []
        return
    finding = only(history, "underflow")
    assert (finding.layer, finding.severity, finding.steps) == ("1.weight", "warning", (0, 9))
    shares = {
        name: max(float(history.record(i).underflow(getattr(torch, name))[1]) for i in range(10))
        for name in ("float16", "bfloat16", "float8_e5m2", "float8_e4m3fn")
    }
    assert finding.numbers == shares
    assert shares["float16"] > 0.95 > shares["bfloat16"] == 0
    assert f"float16 without a loss scale would flush {shares['float16']:.0%}" in finding.sentence


def test_diagnose_warns_of_a_loss_scale_too_high_for_float16() -> None:
    def gradient(step: int, layer: int) -> Tensor:
        x = noise(step, layer)
        x[0] = 2.0**18 if layer == 1 and step in (5, 6) else x[0]
        return x

    finding = only(make_history(Log2Bins(), 2, 40, gradient), "scale")
    assert (finding.severity, finding.layer, finding.steps) == ("warning", "1.weight", (5, 6))
    assert finding.numbers == {"abs_max": 2.0**18, "log2_highest_scale": -4}
    assert "the loss scale is 2^4 times too high" in finding.sentence


@pytest.mark.parametrize(("scale", "found"), [(2.0**-14, False), (2.0**-18, True)])
def test_diagnose_warns_of_a_loss_scale_too_low_for_float16(scale: float, found: bool) -> None:
    history = make_history(
        Log2Bins(), 2, 40, lambda step, layer: noise(step, layer, scale if step >= 20 else 1.0)
    )
    warned = [each for each in diagnose(history) if each.kind == "scale"]
    if not found:
        assert warned == []
        return
    finding = only(history, "scale")
    assert (finding.severity, finding.steps) == ("warning", (20, 39))
    assert finding.numbers["abs_max"] == history["abs_max"][20:].max()
    assert "the loss needs a scale, at most 2^" in finding.sentence


def test_diagnose_over_linear_bins_leaves_out_what_needs_magnitudes() -> None:
    history = make_history(LinearBins(10), 2, 10, stopped(0.8, 1e-9))
    assert [each.kind for each in history.diagnose()] == ["scale"]


def test_diagnose_reads_64_records_histograms_at_most_and_none_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history = make_history(Log2Bins(), 1, 200, noise)
    run = Evidence(history, 20, GRAD)
    read = run.sampled.steps.tolist()
    assert len(run.samples) == len(read) == len(set(read)) == 64
    assert (min(read), max(read)) == (0, 199)
    assert set(np.diff(read)) == {3, 4}
    found = history.diagnose()
    # 3,000 layers of 2,048 bins in 64 records would take 3 GB.
    monkeypatch.setattr(History, "record", None)
    assert history.diagnose() == found


def dense_shares(history: History, octaves: float) -> dict[str, Any]:
    """Share of stopped and of flushed elements by record and layer, from dense histograms."""
    records = [history.record(int(step)) for step in history.steps]
    shares = {
        name: np.stack([each.underflow(getattr(torch, name)).numpy() for each in records])
        for name in NARROW
    }
    stopped = []
    for record in records:
        size = np.abs(record.edges.numpy())
        below = (
            np.maximum(size[1:], size[:-1])
            <= np.nan_to_num(record.rms.numpy())[:, None] / 2**octaves
        )
        # Zeros are in the first positive bin.
        counts = (record.counts.numpy() * below).sum(1) - record.zeros.numpy() * below[:, 1024]
        stopped.append(counts / np.maximum((record.finite - record.zeros).numpy(), 1))
    return shares | {"stopped": np.stack(stopped)}


@pytest.mark.parametrize("seed", range(12))
def test_diagnose_reads_the_same_shares_off_sparse_histograms_as_off_dense_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_layers, n_records = 12, int(rng.choice([1, 2, 3]))
    scales = 10.0 ** rng.uniform(-41, 4, n_layers)
    factors, parts = 10.0 ** rng.uniform(-7, 0, n_layers), rng.integers(0, N, n_layers)

    def gradient(step: int, layer: int) -> Tensor:
        x = noise(step, layer, 1.0).double() * scales[layer]
        x[: parts[layer]] *= factors[layer]
        x[parts[layer] // 2 : parts[layer]] *= layer % 3
        x[-1] = torch.nan if layer % 5 == 4 else x[-1]
        return x * (layer != 11)

    history = make_history(Log2Bins(), n_layers, n_records, gradient, absent=[(0, 3)])
    octaves = float(rng.choice([0.5, 10.0, 130.0]))
    expected = dense_shares(history, octaves)
    found = history.diagnose(
        Thresholds(saturation_octaves=octaves, saturation_share=1e-9, underflow_share=1e-9)
    )
    for kind, share, names in (
        ("saturation", "stopped", ["share"]),
        ("underflow", "float16", NARROW),
    ):
        warned = [f for f in found if (f.kind, f.severity) == (kind, "warning")]
        got = {layer for f in warned for layer in (f.layer, *f.others)}
        columns = np.flatnonzero((expected[share] >= 1e-9).all(0)).tolist()
        assert got == {history.layers[column] for column in columns}
        for f in warned:
            column = history.layers.index(f.layer)
            assert f.numbers.get("layers", 1) == len(columns)
            for name in names:
                assert f.numbers[name] == expected.get(name, expected[share])[:, column].max()
