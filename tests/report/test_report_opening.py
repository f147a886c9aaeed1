"""What the page opens on, what a finding leads to, and what fits and is named."""

import math

import pytest
import torch
from histories import falling, make_history
from pages import Open, detail, written_in

import gradstat
from gradstat.diagnosis import Finding
from gradstat.record import GRAD, PARAM, UPDATE

pytestmark = pytest.mark.integrations

LOG2 = gradstat.Log2Bins()


def breaking(step: int, layer: int) -> torch.Tensor:
    """NaN in the third row from step 7 on."""
    return torch.full((9,), math.nan) if layer == 2 and step >= 7 else falling(step, layer)


def when(page: object) -> str:
    return page.locator("#detail-when").inner_text()


def test_page_opens_on_the_first_finding_and_its_step(
    open_report: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        Finding("dead", "severe", "update/1.weight", (5, 20), {}, "One."),
        Finding("spike", "warning", "1.weight", (0, 20), {"first_step": 11.0}, "Another."),
    ]
    monkeypatch.setattr("gradstat.report.page.diagnose", lambda history: found)
    page = open_report(make_history(LOG2, 2, 30, kinds=(GRAD, PARAM, UPDATE)))
    assert detail(page) == "1.weight\u00a0\u00b7 update"
    assert when(page) == "Histogram at step 5"
    page.locator(".finding").nth(1).click()
    assert (detail(page), when(page)) == ("1.weight", "Histogram at step 11")
    # Another layer is shown at its newest step.
    page.locator("#previous").click()
    assert (detail(page), when(page)) == ("0.weight", "Histogram at step 29")


def test_finding_shows_the_step_that_it_names_however_the_run_is_thinned(
    open_report: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstat.report.thin._MAX_SAMPLES", 8)
    monkeypatch.setattr("gradstat.report.thin._MIN_SAMPLES", 8)
    page = open_report(make_history(LOG2, 4, 30, breaking))
    assert detail(page) == "2.weight"
    assert when(page) == "Histogram at step 7"


def test_layer_of_nothing_but_nan_has_no_norm(open_report: Open) -> None:
    page = open_report(make_history(LOG2, 4, 30, breaking))
    numbers = page.locator("#detail-numbers").evaluate(
        "(dl) => Object.fromEntries([...dl.querySelectorAll('dt')].map("
        "(dt) => [dt.textContent, dt.nextSibling.textContent]))"
    )
    assert numbers["l2 norm"] == numbers["rms"] == "\u2013"
    assert numbers["NaN"] == "9"


def test_selected_layer_is_not_cut_on_a_laptop(open_report: Open) -> None:
    names = ["encoder.layers.11.self_attention.output_projection.weight"]
    page = open_report(make_history(LOG2, names, 30, kinds=(GRAD, PARAM, UPDATE)), 1400)
    page.locator("#kind").select_option("2")
    inner, outer = page.locator("#detail").evaluate("(e) => [e.scrollHeight, e.clientHeight]")
    assert inner <= outer


@pytest.mark.parametrize("width", [360, 390, 1400])
def test_labels_of_the_map_tell_layers_apart(open_report: Open, width: int) -> None:
    names = [
        f"model.transformer.h.{i}.{part}.c_proj.weight" for i in range(4) for part in ("a", "b")
    ]
    page = open_report(make_history(LOG2, names, 4), width)
    shown = written_in(page, "#map-plot")
    assert len(set(shown[:8])) == 8
    assert "step" in shown
    rows = page.locator("td.text").evaluate_all(
        "(cells) => cells.map((c) => [c.scrollWidth, c.clientWidth])"
    )
    assert all(inner <= outer for inner, outer in rows)


def test_canvases_have_a_role_and_a_label(open_report: Open) -> None:
    page = open_report(make_history(LOG2, 4, 30, breaking))
    canvases = page.locator("canvas").evaluate_all(
        "(all) => all.map((c) => [c.getAttribute('role'), c.getAttribute('aria-label'),"
        " c.getAttribute('aria-hidden')])"
    )
    named = [label for role, label, hidden in canvases if role in ("img", "slider") and not hidden]
    assert all(named)
    assert "Distribution of 2.weight by step, as colour" in named
    assert "Histogram at step 7. 9 NaN or infinite" in named
    others = [each for each in canvases if each[0] not in ("img", "slider")]
    assert all(role == "presentation" and hidden == "true" for role, _, hidden in others)
