"""The map of many rows: their order, their names, and what its colours show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from histories import falling, make_history
from pages import MAP, Open, detail, hover, pixels, written_in

import gradstat
from gradstat.diagnosis import Finding
from gradstat.report import thin

pytestmark = pytest.mark.integrations

LOG2 = gradstat.Log2Bins()
BLOCK = ("attn.weight", "attn.bias", "norm1.weight", "norm1.bias")
NAMES = [
    "embed.weight",
    *(f"blocks.{i}.{each}" for i in range(30) for each in BLOCK),
    "head.weight",
]
DISTURBED = NAMES.index("blocks.7.attn.weight")


def of_blocks(step: int, layer: int) -> torch.Tensor:
    """Rows of four magnitudes in turn; one of them is a hundred times larger in step 12."""
    generator = torch.Generator().manual_seed(100 * step + layer)
    n = 8 if "norm" in NAMES[layer] or "bias" in NAMES[layer] else 64
    x = torch.randn(n, generator=generator) * 10.0 ** -(layer % 4)
    return 100 * x if (step, layer) == (12, DISTURBED) else x


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    found = [Finding("spike", "warning", NAMES[DISTURBED], (12, 12), {}, "It is larger.")]
    monkeypatch.setattr("gradstat.report.page.diagnose", lambda history: found)
    return found


def test_rows_of_a_role_are_together_and_have_its_name(
    open_report: Open, found: list[Finding]
) -> None:
    page = open_report(make_history(LOG2, NAMES, 20, of_blocks))
    assert page.locator("#order").input_value() == "role"
    shown = written_in(page, "#map-plot")
    roles = [f"blocks.*.{each}" for each in BLOCK]
    names = ["embed.weight", *roles, "head.weight"]
    assert [text for text in shown if text in names] == names
    # From one row to the next one down, as the keys go.
    page.locator("#rows tr").nth(0).click()
    page.locator(MAP).focus()
    order = []
    for _ in range(33):
        page.keyboard.press("ArrowDown")
        order.append(page.locator("#tip b").inner_text())
    assert order == [
        NAMES[0],
        *(f"blocks.{i}.attn.weight" for i in range(30)),
        *(f"blocks.{i}.attn.bias" for i in range(2)),
    ]
    page.locator(".finding").click()
    page.locator("#order").select_option("depth")
    page.wait_for_url("**order=depth*")
    page.locator(MAP).focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    assert page.locator("#tip b").inner_text() == NAMES[DISTURBED + 1]
    assert not set(roles) & set(written_in(page, "#map-plot"))


def test_row_of_a_finding_has_its_name_and_is_reached_by_it(
    open_report: Open, found: list[Finding]
) -> None:
    page = open_report(make_history(LOG2, NAMES, 20, of_blocks))
    page.locator("#rows tr").nth(0).click()
    assert detail(page) == NAMES[0]
    shown = written_in(page, "#map-plot")
    assert NAMES[DISTURBED] in shown
    assert "blocks.8.attn.weight" not in shown
    # Its label is beside its row, somewhere in the group.
    box = page.locator(MAP).bounding_box()
    reached = set()
    for y in range(4, int(box["height"]), 6):
        page.locator(MAP).hover(position={"x": 60, "y": y})
        if page.locator("#tip").is_visible():
            tip = page.locator("#tip").inner_text().splitlines()
            if tip[1:] == ["warning: spike"]:
                page.locator(MAP).click(position={"x": 60, "y": y})
                reached.add((detail(page), page.locator("#detail-when").inner_text()))
                break
    assert reached == {(NAMES[DISTURBED], "Histogram at step 12")}


def test_colour_of_change_shows_the_row_that_was_disturbed(
    open_report: Open, found: list[Finding]
) -> None:
    history = make_history(LOG2, NAMES, 20, of_blocks)
    page = open_report(history)
    page.locator("#colour").select_option("change")
    assert page.locator("#map-title").inner_text() == "Change by parameter and step"
    drawn = pixels(page, MAP)[:, :, :3]
    distance = np.abs(drawn - [253, 231, 37]).sum(2)
    yellow = distance < distance.min() + 5
    rows, columns = np.nonzero(yellow)
    at = {"x": columns.mean() / drawn.shape[1], "y": rows.mean() / drawn.shape[0]}
    tip = hover(page, MAP, at["x"], at["y"]).splitlines()
    assert tip[:2] == [NAMES[DISTURBED], "step 12"]
    rms = np.sort(history["rms"][:, DISTURBED])[10]
    assert tip[-1].startswith(f"median of all columns {rms:#.3g} ")
    # Nothing else is as far from its usual value.
    assert np.ptp(columns) < 0.06 * drawn.shape[1]
    assert np.ptp(rows) < 20
    legend = page.locator("#map-legend canvas").get_attribute("aria-label")
    assert "as a multiple of its median, \u00f7" in legend


@pytest.mark.parametrize("width", [400, 1400])
def test_scale_of_change_has_even_numbers_and_the_median(
    open_report: Open, found: list[Finding], width: int
) -> None:
    def far(step: int, layer: int) -> torch.Tensor:
        return of_blocks(step, layer) * (4 if (step, layer) == (12, DISTURBED) else 1)

    page = open_report(make_history(LOG2, NAMES, 20, far), width)
    page.locator("#colour").select_option("change")
    _, *ticks = written_in(page, "#map-legend")
    at = ticks.index("median")
    assert len(ticks) >= 3
    powers = [int(np.log2(int(tick[1:].replace(",", "")))) for tick in ticks if tick != "median"]
    up, down = powers[at:], powers[:at]
    step = up[0]
    assert up == [step * (i + 1) for i in range(len(up))]
    assert down[::-1] == [step * (i + 1) for i in range(len(down))]


def test_name_in_the_table_goes_on_in_another_line_after_a_part(open_report: Open) -> None:
    names = ["encoder.layers.11.self_attention.query.weight", "head.weight"]
    page = open_report(make_history(LOG2, names, 3), 400)
    name = page.locator("#rows tr td.text bdi").nth(0)
    assert name.inner_text() == names[0]
    lines = name.evaluate("""(name) => [...name.childNodes].filter((n) => n.data).map((n) => {
        const range = document.createRange();
        range.selectNode(n);
        return range.getClientRects().length; })""")
    assert len(lines) == 6
    assert max(lines) == 1
    assert name.bounding_box()["height"] > 20


def test_few_rows_and_rows_without_roles_are_by_depth(open_report: Open) -> None:
    page = open_report(make_history(LOG2, [f"{i}.weight" for i in range(60)], 3))
    assert page.locator("#order").is_hidden()
    page = open_report(make_history(LOG2, NAMES[:13], 3))
    assert page.locator("#order").input_value() == "depth"
    assert [text for text in written_in(page, "#map-plot") if "." in text] == NAMES[:13]


@pytest.mark.parametrize("width", [400, 1400])
def test_a_name_that_is_too_long_is_cut_in_the_middle(open_report: Open, width: int) -> None:
    names = [f"{'encoder.' * 6}{part}.{'out.' * 8}weight" for part in ("first", "second", "third")]
    page = open_report(make_history(LOG2, [*names, "a.bias"], 3), width)
    cut = [text for text in written_in(page, "#map-plot") if "…" in text]
    assert len(cut) == 3
    for text in cut:
        head, tail = text.split("…")
        head = head.lstrip("0123456789 ")
        assert len(head) >= 3
        assert any(name.startswith(head) and name.endswith(tail) for name in names)
        assert abs(len(head) - len(tail)) <= 4


def test_samples_have_the_steps_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "_MAX_SAMPLES", 4)
    h = make_history(LOG2, 2, 30, falling)
    spread = [0, 10, 19, 29]
    assert [each.step for each in thin.samples(h)] == spread
    assert [each.step for each in thin.samples(h, [7, 10, 7])] == [0, 7, 10, 19, 29]
    # No more of them than are spread, the most important first.
    assert [each.step for each in thin.samples(h, [9, 8, 7, 6, 5])] == [0, 6, 7, 8, 9, 10, 19, 29]
