"""The report of several kinds of rows: the control for which is shown, and what follows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from histories import append_rows, falling, make_history
from pages import DISTRIBUTION, MAP, Open, detail, hover, pixels, written

from gradstat import History, Log2Bins
from gradstat.diagnosis import Finding

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.integrations

LOG2 = Log2Bins()


def kinds_of_two_layers() -> History:
    """Gradients, parameters and updates of two weights, activations of their modules."""
    by_kind = {"grad": 1.0, "param": 4.0, "update": 1e-3, "activation": 1.0, "unit": 0.0}
    values = list(by_kind.values())
    return make_history(
        LOG2,
        ["0.weight", "1.weight"],
        6,
        lambda step, row: falling(step, row % 2) * values[row // 2],
        absent=[(5, 4)],
        kinds=by_kind,
    )


def shown_layers(page: Page) -> list[str]:
    return page.locator("#rows tr:visible td.text").all_inner_texts()


def test_page_of_one_kind_has_no_control_for_it(open_report: Open) -> None:
    page = open_report(make_history(LOG2))
    assert page.locator("#kind").is_hidden()
    page = open_report(kinds_of_two_layers().select("update"))
    assert page.locator("#kind").is_hidden()
    assert detail(page).endswith("\u00b7 update")
    assert "a parameter's update in" in page.locator("#map-hint").inner_text()


def test_control_shows_one_kind_in_map_table_and_detail(open_report: Open) -> None:
    h = kinds_of_two_layers()
    page = open_report(h)
    control = page.locator("#kind")
    assert control.locator("option").all_inner_texts() == [
        "Gradients", "Parameters", "Updates", "Activations", "Unit peaks",
    ]  # fmt: skip
    assert page.locator("#facts").inner_text().startswith("2 parameters")
    assert shown_layers(page) == ["0.weight", "1.weight"]
    page.locator("#rows tr").nth(1).click()
    before = pixels(page, MAP)
    control.select_option(label="Updates")
    assert detail(page) == "1.weight\u00a0\u00b7 update"
    assert shown_layers(page) == ["0.weight", "1.weight"]
    assert page.locator("tr.selected td.text").inner_text() == "1.weight"
    newest = page.locator("#rows tr:visible").nth(1).locator("td").nth(4).inner_text()
    assert newest == written(h["rms"][-1, 5])
    assert (pixels(page, MAP) != before).any()
    assert page.locator("#map-legend .swatch").all_inner_texts() == ["no update"]
    tip = hover(page, MAP, 0.999, 0.5 * 20 / (2 * 20 + 24)).splitlines()
    assert tip == ["0.weight\u00a0\u00b7 update", "step 5", "no update"]
    assert "|update|" in hover(page, DISTRIBUTION, 0.999, 0.4)
    numbers = page.locator("#detail-numbers").inner_text().splitlines()
    ratio = numbers[numbers.index("update / parameter") + 1]
    assert ratio == written(h.update_ratio()[-1, 1])
    control.select_option(label="Activations")
    assert page.locator("#facts").inner_text().startswith("2 modules")
    assert page.get_by_role("region", name="Modules").count() == 1
    assert "dead units\n100 %" in page.locator("#detail-numbers").inner_text()
    page.locator("#previous").click()
    assert detail(page) == "0.weight\u00a0\u00b7 activation"
    assert page.locator("#previous").is_disabled()
    control.select_option(label="Gradients")
    assert detail(page) == "0.weight"
    assert "update / parameter" not in page.locator("#detail-numbers").inner_text()


def test_control_keeps_to_the_module_the_order_and_the_filter(open_report: Open) -> None:
    names = ["a.weight", "b.weight", "a", "b"]
    whole = make_history(LOG2, names, 3, kinds=["grad"])
    h = History(
        ["a.weight", "b.weight", "activation/a", "activation/b"],
        LOG2,
        kinds=["grad"] * 2 + ["activation"] * 2,
    )
    for step in range(3):
        record = whole.record(step)
        append_rows(h, step, record.integers.numpy(), record.floats.numpy(), record.counts.numpy())
    page = open_report(h)
    page.get_by_role("button", name="rms, newest").click()
    page.get_by_role("button", name="rms, newest").click()
    assert shown_layers(page) == ["b.weight", "a.weight"]
    page.locator("#rows tr").nth(0).click()
    page.locator("#kind").select_option(label="Activations")
    assert detail(page) == "b\u00a0\u00b7 activation"
    assert shown_layers(page) == ["b", "a"]
    page.locator("#filter").fill("a")
    page.locator("#kind").select_option(label="Gradients")
    assert detail(page) == "b.weight"
    page.locator("#filter").fill("a.")
    page.locator("#kind").select_option(label="Activations")
    assert shown_layers(page) == []
    assert page.locator("#none").is_visible()


def test_finding_of_another_kind_is_found(
    open_report: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        Finding("dead", "severe", layer, (0, 5), {}, f"About {layer}.")
        for layer in ("update/1.weight", "1.weight")
    ]
    monkeypatch.setattr("gradstat.report.page.diagnose", lambda history: found)
    page = open_report(kinds_of_two_layers())
    # The worst first, whatever it is about.
    assert detail(page) == "1.weight\u00a0\u00b7 update"
    page.locator(".finding").nth(1).click()
    page.locator(".finding").nth(0).click()
    assert detail(page) == "1.weight\u00a0\u00b7 update"
    assert page.locator("#kind").input_value() == "2"
    assert page.locator("tr.selected td.text").inner_text() == "1.weight"
    page.locator(".finding").nth(1).click()
    assert detail(page) == "1.weight"
