"""The report of a run with narrow formats: what is thinned, and the map coloured by them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import MAP, Open, hover, pixels

import gradstat
from gradstat import History
from gradstat.report import thin
from gradstat.report.live_run import Growing

FORMATS = ("float8_e5m2", "nvfp4")


def recorded(steps: int = 6) -> History:
    """Gradients of two layers, which shrink, and activations; the second layer's are zero once."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 33), torch.nn.Linear(33, 5))
    with gradstat.watch(model, what=("grad", "activation"), formats=FORMATS) as w:
        for step in range(steps):
            model.zero_grad()
            loss = model(torch.randn(8, 40)).square().mean() * 10.0 ** (-2 * step)
            (loss * 0 if step == 4 else loss).backward()
    return w.history


def test_columns_have_what_formats_do_to_each_record() -> None:
    h = recorded()
    columns = thin.columns(h)
    rows = len(h.layers)
    for f, name in enumerate(FORMATS):
        found = h.quantization(name)
        snr = columns.snr.reshape(rows, 2, -1)[:, f]
        lost = columns.lost.reshape(rows, 2, -1)[:, f]
        has_values = found["nonzero"].T > 0
        np.testing.assert_allclose(snr[has_values], found["snr"].T[has_values], atol=1e-4)
        np.testing.assert_allclose(lost[has_values], found["underflow"].T[has_values], rtol=1e-6)
        assert np.isnan(snr[~has_values]).all()
    assert not has_values[h.kinds.index("unit")].any()


def test_columns_of_several_records_are_those_of_all_their_values() -> None:
    x = [torch.randn(32, 32) * scale for scale in (1.0, 1e-6, 1e30)]
    model = torch.nn.Linear(32, 32, bias=False)
    with gradstat.watch(model, when="call", formats=FORMATS) as w:
        for each in x:
            model.weight.grad = each.clone()
            w.measure()
    columns = thin.Sums.of(w.history).together(np.array([0, 2])).columns()
    for f, name in enumerate(FORMATS):
        first, second, third = gradstat.quantization(x, name)
        together = first.merge(second)
        assert columns.snr[f, 0] == pytest.approx(float(together.snr), abs=1e-3)
        assert columns.lost[f, 0] == pytest.approx(float(together.underflow))
        assert columns.snr[f, 1] == pytest.approx(float(third.snr), abs=1e-3)


def test_growing_run_has_the_same_formats() -> None:
    h = recorded()
    growing = Growing(h.between(end=2), 1)
    growing.add(h.between(2), 2)
    told, columns = growing.since(0), thin.columns(h)
    assert told["head"]["formats"] == list(FORMATS)
    assert told["arrays"]["snr"][2] == columns.snr.size
    assert told["arrays"]["lost"][2] == columns.lost.size


@pytest.mark.integrations
def test_map_is_coloured_by_what_a_format_does(open_report: Open, tmp_path: Path) -> None:
    h = recorded()
    page = open_report(h)
    options = page.locator("#colour option").all_inner_texts()
    assert options == [
        "rms",
        "change",
        *("SNR in float8_e5m2", "to zero in float8_e5m2"),
        *("SNR in nvfp4", "to zero in nvfp4"),
    ]
    by_rms = pixels(page, MAP)
    page.locator("#colour").select_option(label="SNR in float8_e5m2")
    by_snr = pixels(page, MAP)
    assert (by_rms != by_snr).any()
    assert page.locator("#map-title").inner_text() == "Signal-to-noise ratio in float8_e5m2"
    assert "error that float8_e5m2 would make, in dB" in page.locator("#map-hint").inner_text()
    said = page.locator(MAP).get_attribute("aria-label")
    assert "the SNR in float8_e5m2 of a parameter's gradient" in said
    tip = hover(page, MAP, 0.99, 0.1)
    found = h.quantization("nvfp4")
    assert f"nvfp4: {found['snr'][-1, 0]:.1f} dB" in tip
    assert "float8_e5m2: 0.0 dB, 100 % to zero" in tip

    page.locator("#colour").select_option(label="to zero in float8_e5m2")
    legend = page.locator("#map-legend canvas").get_attribute("aria-label")
    assert legend.endswith("gradient to zero in float8_e5m2, 0 % to 100 %")
    page.wait_for_url("**colour=zero*")
    link = page.evaluate("location.hash")
    page.evaluate("location.hash = ''")
    page.wait_for_url("**#")
    assert page.locator("#colour").input_value() == ""
    page.evaluate("(link) => { location.hash = link; }", link)
    page.wait_for_url("**colour=zero*")
    assert page.locator("#colour").input_value() == "zero float8_e5m2"
    assert (pixels(page, MAP) != by_rms).any()

    with page.expect_download() as download:
        page.locator("#save-map button", has_text="CSV").click()
    download.value.save_as(tmp_path / "map.csv")
    with (tmp_path / "map.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["nvfp4 SNR in dB"]) == pytest.approx(found["snr"][0, 0], abs=1e-3)


@pytest.mark.integrations
def test_page_without_formats_has_no_colours_of_them(open_report: Open) -> None:
    model = torch.nn.Linear(4, 2)
    with gradstat.watch(model) as w:
        model(torch.ones(1, 4)).sum().backward()
    page = open_report(w.history)
    assert page.locator("#colour option").all_inner_texts() == ["rms", "change"]
    assert page.locator("#map-title").inner_text() == "Magnitude by parameter and step"


@pytest.mark.integrations
def test_legend_says_where_there_is_no_error_and_where_nothing_is_measured(
    open_report: Open,
) -> None:
    model = torch.nn.Linear(8, 2).bfloat16()
    with gradstat.watch(model, what=("grad", "activation"), formats="bfloat16") as w:
        model(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    page = open_report(w.history)
    page.locator("#colour").select_option(label="SNR in bfloat16")
    legend = page.locator("#map-legend")
    assert legend.inner_text().split("\n") == ["exact"]
    assert legend.locator("canvas").is_hidden()
    page.locator("#kind").select_option(label="Unit peaks")
    assert legend.inner_text().split("\n") == ["not measured"]
    page.locator("#colour").select_option(label="rms")
    assert legend.locator("canvas").is_visible()
