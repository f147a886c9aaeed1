"""The report in a real browser: what it shows, what a pointer and the keyboard do."""

import math
import re

import numpy as np
import pytest
import torch
from findings import noise
from histories import falling, make_history, repeat_record
from pages import DISTRIBUTION, MAP, Open, detail, eventually, hover, pixels, place, written
from torch import Tensor

import gradstat
from gradstat.report import thin

pytestmark = pytest.mark.integrations

LOG2 = gradstat.Log2Bins()
BROKEN = [229, 53, 43]


# The least and the most: what one layer or one step lacks shows with both.
@pytest.mark.parametrize("bins", [LOG2, gradstat.LinearBins(30), gradstat.LinearBins(9, -0.5, 0.5)])
@pytest.mark.parametrize(("layers", "steps"), [(1, 1), (60, 30)])
def test_page_opens_without_an_error(
    open_report: Open, bins: gradstat.Log2Bins, layers: int, steps: int
) -> None:
    page = open_report(make_history(bins, layers, steps, absent=[(0, 0)]))
    assert page.locator("#rows tr").count() == layers
    facts = f"{layers} parameter{'s' * (layers > 1)} · {steps} record{'s' * (steps > 1)}, step"
    assert page.locator("#facts").inner_text().startswith(facts)


def test_page_shows_the_findings_and_goes_to_their_layer(open_report: Open) -> None:
    h = make_history(LOG2, layers=8, steps=20)
    page = open_report(h)
    findings = h.diagnose()
    items = page.locator(".finding")
    assert items.locator(".what").all_inner_texts() == [each.sentence for each in findings]
    assert items.locator(".badge").all_inner_texts() == [each.severity for each in findings]
    other = next(i for i, each in enumerate(findings) if each.layer != findings[0].layer)
    items.nth(other).click()
    assert detail(page) == findings[other].layer


def test_page_says_when_nothing_was_found(
    open_report: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstat.report.page.diagnose", lambda history: [])
    page = open_report(make_history(LOG2))
    assert page.locator("#findings p:visible").inner_text() == "Nothing stands out in this run."


def test_map_tells_the_numbers_of_a_cell(open_report: Open) -> None:
    h = make_history(LOG2, layers=4, steps=10)
    page = open_report(h)
    tip = hover(page, MAP, 0.999, 0.5 * 20 / (4 * 20 + 24)).splitlines()
    assert tip[:2] == ["0.weight", "step 9"]
    rms = h["rms"][9, 0]
    assert tip[2] == f"rms {written(rms)} (2^{math.log2(rms):.1f})".replace("-", "\u2212")
    assert tip[3] == "zeros 0 %"


def test_map_says_how_it_was_thinned(open_report: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "_MAX_COLUMNS", 3)
    monkeypatch.setattr(thin, "_MAX_SAMPLES", 4)
    h = make_history(LOG2, layers=2, steps=10)
    page = open_report(h)
    assert "a column is 3 or 4 records together" in page.locator("#map-hint").inner_text()
    assert "those of 4 of 10 records" in page.locator("#footer").inner_text()
    tip = hover(page, MAP, 0.999, 0.1).splitlines()
    assert tip[1] == "steps 6 to 9, 4 records together"
    ends = h["rms"][6:, 0].min(), h["rms"][6:, 0].max()
    assert re.findall(r"[\d.]+(?= \()", tip[3]) == [written(end) for end in ends]


def test_map_colours_what_is_not_finite(open_report: Open) -> None:
    def gradient(step: int, layer: int) -> torch.Tensor:
        x = falling(step, layer)
        x[0] = math.nan if (step, layer) == (2, 1) else 1.0
        return x

    page = open_report(make_history(LOG2, 3, 4, gradient))
    rows = [(20 * i + 10) / (3 * 20 + 24) for i in range(3)]
    drawn = pixels(page, MAP)[:, :, :3]
    tips = {x: hover(page, MAP, x, rows[1]) for x in (0.3, 0.5, 0.7, 0.9)}
    for x, tip in tips.items():
        here, above = (drawn[int(row * len(drawn)), int(x * drawn.shape[1])] for row in rows[1::-1])
        assert (here.tolist() == BROKEN) == ("step 2" in tip) == ("1 NaN or infinite" in tip)
        assert above.tolist() != BROKEN
    assert any("step 2" in tip for tip in tips.values())
    assert page.locator("#map-legend .swatch").all_inner_texts() == ["NaN or infinity"]


def test_click_on_the_map_shows_the_layer(open_report: Open) -> None:
    page = open_report(make_history(LOG2, layers=4, steps=10))
    page.locator(MAP).click(position=place(page, MAP, 0.7, 2.5 * 20 / (4 * 20 + 24)))
    assert detail(page) == "2.weight"
    assert page.locator("tr.selected td.text").inner_text() == "2.weight"
    page.locator("#next").click()
    assert detail(page) == "3.weight"
    assert page.locator("#next").is_disabled()


def test_table_follows_pointer_and_keyboard(open_report: Open) -> None:
    h = make_history(LOG2, layers=5, steps=10)
    page = open_report(h)
    rows = page.locator("#rows tr")
    rows.nth(3).click()
    assert detail(page) == "3.weight"
    rows.nth(3).press("ArrowDown")
    page.keyboard.press("Enter")
    assert detail(page) == "4.weight"
    assert rows.nth(2).locator("td").nth(4).inner_text() == written(h["rms"][-1, 2])
    tip = hover(page, "#rows tr >> nth=1 >> canvas", 0.999, 0.5).splitlines()
    assert tip[:2] == ["1.weight", "step 9"]


def test_table_sorts_and_filters(open_report: Open) -> None:
    page = open_report(make_history(LOG2, layers=12, steps=3))

    def shown() -> list[str]:
        return page.locator("#rows tr:visible td.text").all_inner_texts()

    names = [f"{i}.weight" for i in range(12)]
    assert shown() == names
    page.get_by_role("button", name="rms, newest").click()
    assert shown() == names
    page.get_by_role("button", name="rms, newest").click()
    assert shown() == names[::-1]
    page.locator("#filter").fill("1.W")
    assert shown() == ["11.weight", "1.weight"]
    page.locator("#filter").fill("bias")
    assert shown() == []
    assert page.locator("#none").is_visible()


@pytest.mark.parametrize("column", ["rms, newest", "Zeros", "Elements"])
def test_table_sorts_what_is_undefined_last(open_report: Open, column: str) -> None:
    def gradient(step: int, layer: int) -> torch.Tensor:
        x = torch.arange(float(layer + 3)) * (layer + 1)
        return torch.full_like(x, math.nan) if layer % 3 == 1 else x

    page = open_report(make_history(LOG2, layers=9, steps=3, gradient=gradient))
    at = page.locator("th").all_inner_texts().index(column)
    for up in (False, True):
        page.get_by_role("button", name=column, exact=True).click()
        cells = [row.locator("td").nth(at).inner_text() for row in page.locator("#rows tr").all()]
        known = [float(cell.rstrip(" %").replace(",", "")) for cell in cells if cell != "\u2013"]
        assert known == sorted(known, reverse=not up)
        assert cells[len(known) :] == ["\u2013"] * (len(cells) - len(known))
        assert len(known) == (9 if column == "Elements" else 6)


def test_distribution_tells_the_counts_of_a_record(
    open_report: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstat.report.page.diagnose", lambda history: [])
    h = make_history(LOG2, layers=1, steps=6, gradient=lambda step, layer: torch.ones(step + 1))
    page = open_report(h)
    # All of them are 1: one octave, over the whole height.
    tip = hover(page, DISTRIBUTION, 0.999, 0.5).splitlines()
    assert tip == [
        "0.weight, step 5",
        "|gradient| 1.00 to 2.00",
        "6 elements, 100 % of the finite ones",
    ]
    assert page.locator("#detail-when").inner_text() == "Histogram at step 5"
    tip = hover(page, DISTRIBUTION, 0.3, 0.5).splitlines()
    step = int(tip[0].split()[-1])
    assert tip[2].startswith(f"{step + 1} element")
    assert page.locator("#detail-when").inner_text() == f"Histogram at step {step}"
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()
    assert page.locator("#detail-when").inner_text() == "Histogram at step 5"


def test_distribution_of_linear_bins_tells_what_is_outside(open_report: Open) -> None:
    x = torch.tensor([0.0, 0.1, 0.2, 0.6, 3.0, 4.0, math.inf])
    h = make_history(gradstat.LinearBins(2, 0.0, 1.0), 1, 2, lambda step, layer: x)
    tip = hover(open_report(h), DISTRIBUTION, 0.9, 0.7).splitlines()
    assert tip[1:] == [
        "0 to 0.500",
        "3 elements, 50.0 % of the finite ones",
        "1 of 6 finite elements are zero",
        "2 outside the range of the bins",
        "1 NaN or infinite",
    ]


def test_page_writes_layer_names_as_text(open_report: Open) -> None:
    name = '</script><img src=x onerror="alert(1)">'
    page = open_report(make_history(LOG2, layers=[name, "b"], steps=3))
    assert page.locator("#rows tr td.text").all_inner_texts() == [name, "b"]
    assert page.locator("img").count() == 0
    assert name in hover(page, MAP, 0.9, 0.1)


def test_page_keeps_the_direction_of_text_around_a_name(open_report: Open) -> None:
    names = ["\u05e9\u05db\u05d1\u05d4.0", "evil\u202e\u2069name", "\u0637\u0628\u0642\u0629"]
    shown = f"\u2068{names[0]}\u2069", r"evil\u202e\u2069name", f"\u2068{names[2]}\u2069"
    # What follows a name is to the right of what comes before it.
    places = """(item) => {
        const [text, range] = [item.firstChild, document.createRange()];
        return ["elements of", "are zero"].map((words) => {
            const at = text.data.indexOf(words);
            range.setStart(text, at);
            range.setEnd(text, at + words.length);
            return range.getBoundingClientRect().left; }); }"""
    for dead, name in enumerate(shown):

        def measured(step: int, layer: int, dead: int = dead) -> Tensor:
            return torch.zeros(3) if layer == dead else noise(step, layer)

        page = open_report(make_history(LOG2, names, 25, measured))
        sentence = page.locator(".finding .what", has_text="are zero")
        assert name in sentence.inner_text()
        before, after = sentence.evaluate(places)
        assert before < after
    assert hover(page, MAP, 0.9, 0.1).splitlines()[0] == shown[0]


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_page_follows_the_colour_scheme(open_report: Open, scheme: str, is_dark: bool) -> None:
    page = open_report(make_history(LOG2, steps=4), scheme=scheme)
    style = "getComputedStyle(document.body)"
    ground, ink = page.evaluate(f"[{style}.backgroundColor, {style}.color]")
    brightness = [sum(map(int, re.findall(r"\d+", colour))) for colour in (ground, ink)]
    assert (brightness[0] < brightness[1]) == is_dark
    before = pixels(page, "#detail-curve canvas >> nth=0")
    assert len(np.unique(before)) > 3
    page.emulate_media(color_scheme="light" if is_dark else "dark")
    eventually(lambda: (pixels(page, "#detail-curve canvas >> nth=0") != before).any())


@pytest.mark.parametrize("width", [320, 360, 800, 1400])
def test_page_fits_its_window(open_report: Open, width: int) -> None:
    names = [f"model.layers.{i}.self_attention.query_projection.weight" for i in range(12)]
    page = open_report(make_history(LOG2, layers=names, steps=10), width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#rows tr").nth(7).click()
    assert detail(page) == names[7]
    top = page.locator("#detail").bounding_box()["y"]
    assert 0 <= top < 900


@pytest.mark.parametrize("width", [360, 600, 768, 900, 1024, 1080, 1152, 1280, 1400])
def test_table_has_room_for_names(open_report: Open, width: int) -> None:
    names = [f"model.layers.{i}.self_attention.query_projection.weight" for i in range(12)]
    page = open_report(make_history(LOG2, layers=names, steps=10), width=width)
    name = page.locator("#rows tr >> nth=0 >> td.text").bounding_box()
    assert name["width"] >= (100 if width < 600 else 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def _unwell(step: int, layer: int) -> Tensor:
    """Gradients with more findings than a page shows before it is asked for all."""
    if layer == 0:
        return torch.zeros(3)
    x = noise(step, layer)
    if layer == 1 and step == 20:
        x[3] = torch.nan
    grown = {2: 16.0 ** max(step - 17, 0), 3: 1e-12, 4: 1e6 if step == 10 else 1.0}
    return x * grown.get(layer, 1.0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_on_paper_is_whole_and_light(open_report: Open, scheme: str) -> None:
    history = make_history(LOG2, 200, 25, _unwell)
    page = open_report(history, scheme=scheme)
    page.emulate_media(media="print", color_scheme=scheme)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    found = page.locator(".finding")
    assert found.count() == len(history.diagnose()) > 6
    assert all(each.is_visible() for each in found.all())
    assert page.locator(".more").is_hidden()
    assert (
        page.locator("input:visible, select:visible, .save:visible, .buttons:visible").count() == 0
    )
    assert page.locator("td.spark canvas").count() == 200
    style = "(item) => { const s = getComputedStyle(item); return [s.breakInside, s.overflow]; }"
    assert page.locator("#rows tr >> nth=0").evaluate(style)[0] == "avoid"
    assert found.first.evaluate(style)[0] == "avoid"
    for card in page.locator(".card").all():
        assert card.evaluate(style)[1] == "visible"
        assert card.evaluate("(item) => item.scrollHeight <= item.clientHeight + 1")
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert max(map(int, re.findall(r"\d+", ink))) < 100


def test_page_of_500_layers_opens_in_two_seconds(open_report: Open) -> None:
    record = make_history(LOG2, 500, 1, lambda step, layer: torch.exp2(-torch.arange(40.0)))
    page = open_report(repeat_record(record, 250))
    frames = """() => new Promise((done) =>
        requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"""
    # Milliseconds since the page was asked for.
    assert page.evaluate(frames) < 2000
    page.locator(MAP).click(position=place(page, MAP, 0.7, 0.5))
    assert detail(page) in {f"{i}.weight" for i in range(240, 260)}


def test_map_shows_layers_by_depth(open_report: Open) -> None:
    h = make_history(LOG2, layers=3, steps=5)
    h.depth = np.array([1, 2, 0])
    page = open_report(h)
    rows = [re.findall(r"\d\.weight", text) for text in page.locator("#rows tr").all_inner_texts()]
    assert rows == [["2.weight"], ["0.weight"], ["1.weight"]]
