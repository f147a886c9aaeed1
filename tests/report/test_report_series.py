"""The lines over the map: loss, norm and learning rate, their scales, and marks of findings."""

import math

import numpy as np
import pytest
import torch
from histories import falling, make_history
from pages import DISTRIBUTION, MAP, Open, detail, hover, pixels, written_in

import gradstat
from gradstat.report import thin

pytestmark = pytest.mark.integrations

LOG2 = gradstat.Log2Bins()
SERIES = "#map-series canvas"


def logged(steps: int = 40, at: int = 30) -> gradstat.History:
    def gradient(step: int, layer: int) -> torch.Tensor:
        return falling(step, layer) * (1e4 if step >= at else 1.0)

    history = make_history(LOG2, layers=3, steps=steps, gradient=gradient)
    for step in range(steps):
        history.add_scalar("loss", step, math.nan if step == 5 else 9.0 if step >= at else 1.0)
        history.add_scalar("lr", step, 0.1)
    return history


def test_series_show_loss_norm_and_rate_on_the_axis_of_the_map(open_report: Open) -> None:
    h = logged()
    page = open_report(h)
    tip = hover(page, SERIES, 0.999, 0.1).splitlines()
    norm = f"{h.norm()[-1]:.2e}".replace("e+0", "e")
    assert tip == ["step 39", "loss: 9.00", f"gradient norm: {norm}", "lr: 0.100"]
    # Where the columns of the map are.
    left, right = (hover(page, each, 0.6, 0.1).splitlines() for each in (SERIES, MAP))
    assert left[0] == right[1]


def test_series_mark_findings_that_lead_to_their_row_and_step(open_report: Open) -> None:
    h = logged()
    found = [each for each in h.diagnose() if each.severity != "note"]
    assert found[0].kind == "loss spike"
    page = open_report(h)
    box = page.locator(SERIES).bounding_box()
    assert box is not None
    shown = pixels(page, SERIES)
    marked = np.argwhere((abs(shown[-10:, :, :3].astype(int) - [154, 98, 0]) < 8).all(-1))
    assert len(marked)
    x = float(np.median(marked[:, 1])) / shown.shape[1]
    tip = hover(page, SERIES, x, 0.98)
    assert any(each.sentence in tip for each in found)
    page.locator(SERIES).click(position={"x": x * box["width"], "y": box["height"] - 5})
    assert detail(page) in {each.layer for each in found}


def test_series_of_a_run_without_scalars_is_its_norm(open_report: Open) -> None:
    page = open_report(make_history(LOG2, layers=3, steps=30))
    assert "gradient norm: " in hover(page, SERIES, 0.9, 0.3)


def test_series_take_the_rates_that_change() -> None:
    h = make_history(LOG2, layers=2, steps=8)
    for step in range(8):
        for group in range(6):
            h.add_scalar(f"lr/{group}", step, 0.1 * (step if group == 4 else 1))
            h.add_scalar("loss", step, -1.0 * step)
    series = thin.series(h, thin.columns(h))
    assert list(series) == ["loss", "gradient norm", "lr/4"]
    assert series["lr/4"].mean.tolist() == pytest.approx([0.1 * step for step in range(8)])
    assert series["loss"].least.tolist() == [-step for step in range(8)]


def drawn(page: object) -> list[str]:
    return written_in(page, "#map-series")


def test_series_that_is_constant_has_its_one_value(open_report: Open) -> None:
    h = make_history(LOG2, layers=2, steps=30)
    for step in range(30):
        h.add_scalar("lr", step, 1e-3)
    texts = drawn(open_report(h))
    assert texts[texts.index("lr") :] == ["lr", "0.001"]


def test_series_is_cut_off_where_it_spikes_and_the_value_is_written(open_report: Open) -> None:
    h = make_history(LOG2, layers=2, steps=200)
    for step in range(200):
        h.add_scalar("loss", step, 91_234.0 if step == 120 else 2 - step / 200)
    page = open_report(h)
    texts = drawn(page)
    loss = texts[: texts.index("gradient norm")]
    assert loss[0] == "loss"
    assert loss[-1] == "\u2191 91,200"
    assert {float(text) for text in loss[1:-1]} <= {1.0, 1.2, 1.4, 1.5, 1.6, 1.8, 2.0}
    # The rest of the line takes its height: it falls by most of 48 pixels.
    box = pixels(page, SERIES)[18:66, :, :3].astype(int)
    line = np.abs(box - [26, 100, 218]).sum(2) < 90
    columns = np.flatnonzero(line.any(0))
    first, last = (np.flatnonzero(line[:, column]).mean() for column in (columns[5], columns[-5]))
    assert last - first > 25


@pytest.mark.parametrize("high", [1.1, 1.3, 1.9, 2.9, 4.1, 7.7, 9.9])
def test_scale_of_a_series_has_two_numbers_or_more(open_report: Open, high: float) -> None:
    h = make_history(LOG2, layers=2, steps=30)
    for step in range(30):
        h.add_scalar("loss", step, 1.01 + (high - 1.01) * step / 29)
    texts = drawn(open_report(h))
    assert 3 <= len(texts[: texts.index("gradient norm")]) <= 6


def test_series_over_decades_is_logarithmic_and_says_so(open_report: Open) -> None:
    h = make_history(LOG2, layers=2, steps=60)
    for step in range(60):
        h.add_scalar("loss", step, 10.0 ** (2 - step / 15))
    texts = drawn(open_report(h))
    assert texts[0] == "loss, log scale"
    assert texts[1 : texts.index("gradient norm")] == ["0.1", "1", "10", "100"]


def test_norm_of_what_is_not_finite_is_a_gap_and_a_mark(open_report: Open) -> None:
    def gradient(step: int, layer: int) -> torch.Tensor:
        x = falling(step, layer)
        if step in (12, 13) and layer == 1:
            x[0] = math.nan
        return torch.full_like(x, math.inf) if step == 20 else x

    h = make_history(LOG2, layers=2, steps=30, gradient=gradient)
    norm = thin.series(h, thin.columns(h))["gradient norm"]
    broken = [12, 13, 20]
    assert np.flatnonzero(np.isnan(norm.mean)).tolist() == broken
    assert np.flatnonzero(norm.nonfinite).tolist() == broken
    np.testing.assert_allclose(norm.mean[:12], h.norm()[:12], rtol=1e-6)
    page = open_report(h)
    red = np.abs(pixels(page, SERIES)[:66, :, :3].astype(int) - [229, 53, 43]).sum(2) < 30
    assert red.any()
    tips = {hover(page, SERIES, x, 0.2) for x in np.linspace(0.2, 0.95, 40)}
    assert "step 12\ngradient norm: \u2013, NaN or infinite" in tips


def test_distribution_ends_where_a_per_mille_does(open_report: Open) -> None:
    x = torch.cat([torch.linspace(1.0, 4.0, 20_000), torch.full((3,), 2.0**-50)])
    page = open_report(make_history(LOG2, 1, 4, lambda step, layer: x))
    texts = written_in(page, "#detail-distribution")
    powers = [int(text[2:].replace("\u2212", "-")) for text in texts if text.startswith("2^")]
    assert min(powers) >= -2
    assert hover(page, DISTRIBUTION, 0.9, 0.3).splitlines()[-1] == (
        "3 smaller than 2^0, below the axis"
    )


def test_texts_of_the_series_do_not_touch(open_report: Open) -> None:
    h = make_history(LOG2, layers=2, steps=60)
    for step in range(60):
        for name, value in (("loss", 2.0 - step / 60), ("loss/b", 1e-7 * step), ("lr", 0.1)):
            h.add_scalar(name, step, value)
    boxes = """(canvas) => {
        const kept = [];
        const real = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
          if (this.canvas === canvas) {
            const m = this.measureText(text);
            kept.push([text, x - m.actualBoundingBoxLeft, y - m.actualBoundingBoxAscent,
                       x + m.actualBoundingBoxRight, y + m.actualBoundingBoxDescent]);
          }
          real.call(this, text, x, y);
        };
        dispatchEvent(new Event("resize"));
        return new Promise((done) =>
          requestAnimationFrame(() => requestAnimationFrame(() => done(kept)))); }"""
    for width in (400, 1400):
        kept = open_report(h, width).locator(SERIES).evaluate(boxes)
        assert len(kept) > 6
        for i, (one, a0, b0, a1, b1) in enumerate(kept):
            for other, c0, d0, c1, d1 in kept[:i]:
                apart = a0 > c1 or c0 > a1 or b0 > d1 or d0 > b1
                assert apart, (one, other)
