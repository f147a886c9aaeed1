"""The page without a pointer: where tab comes to, what keys do, and what a screen reader says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from histories import falling, make_history
from pages import DISTRIBUTION, MAP, Open, detail

import gradstat
from gradstat.record import GRAD, PARAM

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.integrations

LOG2 = gradstat.Log2Bins()
SERIES = "#map-series canvas"
RMS = "#detail-curve canvas >> nth=0"
HISTOGRAM = "#detail-histogram canvas"


@pytest.fixture(autouse=True)
def without_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradstat.report.page.diagnose", lambda history: [])


def tip(page: Page) -> list[str]:
    return page.locator("#tip").inner_text().splitlines()


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def focused(page: Page) -> str:
    return page.evaluate(
        """() => { const e = document.activeElement;
        return e.getAttribute("aria-label") ?? e.dataset.layer ?? e.innerText; }"""
    )


def test_tab_comes_to_every_control_and_each_has_a_name(open_report: Open) -> None:
    page = open_report(make_history(LOG2, 30, 20, kinds=(GRAD, PARAM)))
    names = []
    while len(names) < 60:
        press(page, "Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        names.append(focused(page))
    assert all(names)
    assert len(set(names)) == len(names)
    expected = [
        "What is shown",
        "What the colours show",
        "First step that is shown",
        "Last step that is shown",
        "Save map as SVG",
        "Save series as CSV",
        "Row below",
        "rms of 0.weight by step",
        "Distribution of 0.weight by step, as colour",
        "Filter by name",
        "rms, newest",
        # Of the rows the one that is selected.
        "0",
    ]
    assert [name for name in names if name in expected] == expected
    assert sum(name.isdigit() for name in names) == 1
    outlined = "getComputedStyle(document.activeElement).outlineStyle"
    page.locator("#filter").focus()
    press(page, "Tab")
    assert page.evaluate(outlined) == "solid"


def test_arrows_move_in_the_map_and_escape_goes_back(open_report: Open) -> None:
    page = open_report(make_history(LOG2, 4, 10))
    page.locator(MAP).focus()
    press(page, "ArrowUp")
    # The first key begins at the selected layer, at the step that is looked at.
    assert tip(page)[:2] == ["0.weight", "step 9"]
    press(page, "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft", "ArrowLeft")
    assert tip(page)[:2] == ["2.weight", "step 6"]
    said = page.locator(MAP).get_attribute("aria-valuetext")
    assert said.startswith("2.weight, step 6, rms ")
    assert page.locator(MAP).get_attribute("role") == "slider"
    press(page, "Enter")
    assert detail(page) == "2.weight"
    assert page.locator("#detail-when").inner_text() == "Histogram at step 6"
    press(page, "Home", "ArrowUp", "ArrowUp", "ArrowUp", "ArrowUp")
    assert tip(page)[:2] == ["0.weight", "step 0"]
    press(page, "End", "PageUp")
    assert tip(page)[:2] == ["0.weight", "step 0"]
    press(page, "Escape")
    assert page.locator("#tip").is_hidden()
    assert page.locator(MAP).get_attribute("aria-valuetext") is None
    assert detail(page) == "2.weight"
    press(page, "ArrowRight")
    assert tip(page)[:2] == ["2.weight", "step 6"]
    press(page, "Tab")
    assert page.locator("#tip").is_hidden()


def test_arrows_move_in_the_other_figures(open_report: Open) -> None:
    h = make_history(LOG2, 2, 10)
    page = open_report(h)
    page.locator(SERIES).focus()
    press(page, "ArrowLeft", "ArrowLeft")
    assert tip(page)[0] == "step 8"
    assert tip(page)[1].startswith("gradient norm: ")
    press(page, "Enter")
    assert page.locator("#detail-when").inner_text() == "Histogram at step 8"
    page.locator(RMS).focus()
    press(page, "ArrowLeft", "ArrowRight")
    assert tip(page)[:2] == ["0.weight", "step 9"]
    page.locator(DISTRIBUTION).focus()
    press(page, "ArrowLeft", "ArrowLeft")
    assert tip(page)[0] == "0.weight, step 7"
    assert page.locator("#detail-when").inner_text() == "Histogram at step 7"
    before = tip(page)[1]
    press(page, "ArrowDown")
    assert tip(page)[1] != before
    press(page, "Escape")
    assert page.locator("#detail-when").inner_text() == "Histogram at step 8"
    page.locator(HISTOGRAM).focus()
    press(page, "ArrowLeft")
    counts = gradstat.report.thin.sample(h, 8).counts[: gradstat.report.thin.sample(h, 8).rows[0]]
    # It begins at the fullest row.
    assert tip(page)[2].startswith(f"{counts.max()} elements")
    shown = [tip(page)[1]]
    press(page, "ArrowRight")
    shown.append(tip(page)[1])
    press(page, "Home")
    shown.append(tip(page)[1])
    ends = [[float(x.replace("e\u2212", "e-")) for x in each.split()[1::2]] for each in shown]
    assert ends[1] == pytest.approx([2 * x for x in ends[0]], rel=0.01)
    assert ends[2][0] < ends[0][0]


def test_keys_see_fewer_steps_and_all_again(open_report: Open) -> None:
    page = open_report(make_history(LOG2, 2, 40))
    first, last = page.locator("#zoom-first"), page.locator("#zoom-last")
    page.locator(MAP).focus()
    press(page, "ArrowLeft", "ArrowLeft", "ArrowLeft")
    press(page, "+")
    assert (first.input_value(), last.input_value()) == ("20", "39")
    press(page, "+")
    assert (first.input_value(), last.input_value()) == ("30", "39")
    press(page, "-", "-")
    assert (first.input_value(), last.input_value()) == ("0", "39")
    press(page, "+", "Escape")
    assert (first.input_value(), last.input_value()) == ("0", "39")
    first.fill("7")
    press(page, "Tab")
    assert page.locator("#map-hint").is_visible()
    page.locator(MAP).focus()
    press(page, "Home", "Home")
    assert tip(page)[1] == "step 7"
    page.locator("#zoom-all").focus()
    press(page, "Enter")
    assert first.input_value() == "0"
    # The other way round is meant as well.
    first.fill("30")
    press(page, "Tab")
    last.fill("10")
    press(page, "Tab")
    assert (first.input_value(), last.input_value()) == ("10", "30")


def test_arrows_move_in_the_table(open_report: Open) -> None:
    page = open_report(make_history(LOG2, 30, 5))
    page.locator("#rows tr").nth(0).focus()
    press(page, "ArrowDown", "ArrowDown")
    assert focused(page) == "2"
    press(page, "PageDown", "End", "ArrowDown")
    assert focused(page) == "29"
    press(page, "Home", "ArrowUp", "ArrowDown", " ")
    assert detail(page) == "1.weight"
    page.locator("#filter").fill("2")
    page.locator("#filter").focus()
    page.locator("#rows tr:visible").nth(0).focus()
    press(page, "ArrowDown")
    assert focused(page) == "12"
    page.locator("#filter").focus()
    press(page, "Escape")
    assert page.locator("#filter").input_value() == ""
    assert page.locator("#rows tr:visible").count() == 30


def test_parts_of_the_page_have_names_and_heads_of_columns_a_scope(open_report: Open) -> None:
    page = open_report(make_history(LOG2, 4, 30, falling))
    for region in ("Findings", "Magnitude by parameter and step", "Parameters"):
        assert page.get_by_role("region", name=region).count() == 1
    assert page.get_by_role("complementary", name="What is selected").count() == 1
    assert page.get_by_role("slider").count() == 5
    assert page.locator("#columns th:not([scope=col])").count() == 0
    assert page.locator("html").get_attribute("lang") == "en"
    for control in page.locator("button, input, select").all():
        name = control.evaluate("(e) => e.getAttribute('aria-label') || e.innerText.trim()")
        assert name
