"""What leaves the page: a link to a view, figures as pictures, and their numbers."""

from __future__ import annotations

import csv
import io
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs
from xml.etree import ElementTree

import pytest
import torch
from histories import falling, make_history
from pages import DISTRIBUTION, MAP, Open, detail, eventually, hover, place

import gradstat
from gradstat.record import GRAD, PARAM
from gradstat.report import thin

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.integrations

LOG2 = gradstat.Log2Bins()
SVG = "{http://www.w3.org/2000/svg}"


def view(page: Page) -> dict[str, str]:
    page.wait_for_timeout(200)
    found = parse_qs(page.evaluate("location.hash.slice(1)"), keep_blank_values=True)
    return {name: value for name, (value,) in found.items()}


def test_link_restores_the_view(open_report: Open, browser: Browser) -> None:
    h = make_history(LOG2, ["a&b=#1.weight", "größe.weight", "2.weight"], 20, kinds=(GRAD, PARAM))
    page = open_report(h)
    assert view(page) == {}
    page.locator("#kind").select_option(label="Parameters")
    page.locator("#rows tr").nth(1).click()
    page.locator(MAP).click(position=place(page, MAP, 0.6, 0.5 * 20 / (3 * 20 + 24)))
    page.locator("#zoom-first").fill("5")
    page.locator("#zoom-first").press("Enter")
    page.locator("#filter").fill("weight")
    page.get_by_role("button", name="rms, newest").click()
    page.get_by_role("button", name="rms, newest").click()
    step = page.locator("#detail-when").inner_text().split()[-1]
    assert view(page) == {
        "layer": "a&b=#1.weight",
        "kind": "parameter",
        "step": step,
        "steps": "5-",
        "filter": "weight",
        "sort": "rms, newest",
    }

    def shown(page: Page = page) -> list[str]:
        return [
            detail(page),
            page.locator("#detail-when").inner_text(),
            page.locator("#zoom-first").input_value(),
            page.locator("#kind").input_value(),
            page.locator("#filter").input_value(),
            *page.locator("#rows tr:visible td.text").all_inner_texts(),
            page.locator("th.sorted").get_attribute("aria-sort"),
        ]

    before = shown()
    # In another window.
    other = browser.new_page()
    other.goto(page.url)
    assert shown(other) == before
    other.close()
    assert before[0] == "a&b=#1.weight\u00a0\u00b7 parameter"
    page.evaluate("location.hash = ''")
    eventually(lambda: shown() != before)
    page.go_back()
    eventually(lambda: shown() == before)


@pytest.mark.parametrize(
    "link",
    [
        "layer=none&step=99999999&steps=7-3",
        "layer=%ZZ&kind=x&sort=nothing&steps=-&step=-1",
        "steps=900-999",
        "sort=rms by step, own log scale",
        "layer=__proto__&steps=1-2-3&filter=%3Cb%3E",
    ],
)
def test_link_that_asks_for_what_is_not_there_shows_what_is(open_report: Open, link: str) -> None:
    page = open_report(make_history(LOG2, 3, 20))
    page.evaluate("(link) => { location.hash = link; }", link)
    page.wait_for_timeout(100)
    assert detail(page).endswith(".weight")
    hover(page, MAP, 0.9, 0.3)
    # Where none of the steps are there, all are shown.
    ends = [page.locator(f"#zoom-{end}").input_value() for end in ("first", "last")]
    assert ends == (["1", "2"] if "1-2-3" in link else ["0", "19"])


def test_page_inside_another_one_works_without_a_link(browser: Browser, tmp_path: Path) -> None:
    make_history(LOG2, 3, 20).report(tmp_path / "inner.html")
    seen: list[str] = []
    page = browser.new_page()
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.set_content("<iframe style='width: 1300px; height: 800px'></iframe>")
    text = (tmp_path / "inner.html").read_text(encoding="utf-8")
    page.locator("iframe").evaluate("(frame, text) => { frame.srcdoc = text; }", text)
    inner = page.frame_locator("iframe")
    inner.locator("#rows tr").nth(2).click()
    page.wait_for_timeout(300)
    assert inner.locator("#detail-name").inner_text() == "2.weight"
    page.close()
    assert seen == []


def test_drag_shows_the_steps_that_it_spans(open_report: Open) -> None:
    page = open_report(make_history(LOG2, 3, 50))
    for canvas, y in ((MAP, 0.3), ("#map-series canvas", 0.3), (DISTRIBUTION, 0.4)):
        box = page.locator(canvas).bounding_box()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + y * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + y * box["height"], steps=4)
        assert page.locator("#band").is_visible()
        page.mouse.up()
        assert page.locator("#band").is_hidden()
        ends = [int(page.locator(f"#zoom-{end}").input_value()) for end in ("first", "last")]
        assert 15 < ends[0] < 28
        assert 30 < ends[1] < 43
        first = hover(page, MAP, 0.25, 0.3).splitlines()[1]
        assert int(first.split()[-1]) in range(ends[0], ends[0] + 6)
        page.locator("#zoom-all").click()
        assert page.locator("#zoom-all").is_disabled()
    # Escape lets go of what is dragged.
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.4 * box["height"], steps=4)
    page.keyboard.press("Escape")
    assert page.locator("#band").is_hidden()
    page.mouse.up()
    assert page.locator("#zoom-all").is_disabled()


def saved(page: Page, folder: Path, figure: str, kind: str) -> Path:
    with page.expect_download() as download:
        page.locator(f"#save-{figure} button", has_text=kind).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def table(path: Path) -> list[dict[str, str]]:
    with io.StringIO(path.read_bytes().decode(), newline="") as text:
        return list(csv.DictReader(text))


def test_numbers_are_saved_as_csv(open_report: Open, tmp_path: Path) -> None:
    names = ['quoted "a", b', "1.weight"]
    h = make_history(LOG2, names, 6, absent=[(5, 1)])
    h.add_scalar("loss", 2, 0.25)
    page = open_report(h)
    rows = table(saved(page, tmp_path, "map", "CSV"))
    assert [row["layer"] for row in rows] == [name for name in names for _ in range(6)]
    assert [float(row["rms"] or "nan") for row in rows] == pytest.approx(
        h["rms"].T.ravel().tolist(), rel=1e-5, nan_ok=True
    )
    assert rows[-1]["rms"] == ""
    rows = table(saved(page, tmp_path, "series", "CSV"))
    assert [(r["series"], r["first step"], r["mean"]) for r in rows if r["mean"]][:1] == [
        ("loss", "2", "0.25")
    ]
    page.locator("#rows tr").nth(0).click()
    rows = table(saved(page, tmp_path, "histogram", "CSV"))
    sample = thin.sample(h, 5)
    counts = sample.counts[: sample.rows[0]]
    assert [int(row["count"]) for row in rows] == counts[counts > 0].tolist()
    low = 2.0 ** (sample.first[0] - 127)
    assert float(rows[0]["least magnitude"]) == low
    assert {row["step"] for row in table(saved(page, tmp_path, "distribution", "CSV"))} == set(
        map(str, range(6))
    )
    (row, absent) = table(saved(page, tmp_path, "layers", "CSV"))
    assert float(row["rms"]) == h["rms"][5, 0]
    assert absent["rms"] == ""


def test_numbers_of_linear_bins_are_saved(open_report: Open, tmp_path: Path) -> None:
    h = make_history(gradstat.LinearBins(4, -1.0, 1.0), 1, 2)
    rows = table(saved(open_report(h), tmp_path, "histogram", "CSV"))
    counts, edges = h.histogram("0.weight", int(rows[0]["step"]))
    got = [(float(row["from"]), float(row["to"]), int(row["count"])) for row in rows]
    expected = [each for each in zip(edges[:-1], edges[1:], counts, strict=True) if each[2]]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-7)


def broken(step: int, layer: int) -> torch.Tensor:
    return torch.full((3,), [math.nan, 0.0, 1.0][layer]) if step == 2 else falling(step, layer)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("figure", ["map", "rms", "distribution", "histogram"])
def test_figure_is_saved_as_svg_and_png(
    open_report: Open, tmp_path: Path, figure: str, scheme: str
) -> None:
    h = make_history(LOG2, ["<a & b>", "1.weight", "2.weight"], 12, broken)
    page = open_report(h, scheme=scheme)
    page.locator("#rows tr").nth(0).click()
    path = saved(page, tmp_path, figure, "SVG")
    assert path.name == f"A-run-{figure}.svg"
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert any("<a & b>" in text for text in texts)
    assert "step" in texts or figure == "histogram"
    ground = next(root.iter(f"{SVG}rect")).attrib
    assert ground["fill"] == {"light": "#ffffff", "dark": "#171a1f"}[scheme]
    assert not any("NaN" in value for each in root.iter() for value in each.attrib.values())
    if figure == "map":
        assert {"NaN or infinity", "all zero"} <= set(texts)
        (image,) = root.iter(f"{SVG}image")
        assert image.attrib["href"].startswith("data:image/png;base64,")
    else:
        assert len(list(root.iter(f"{SVG}rect"))) > 3 or figure == "rms"
    # It is drawn by itself, and the picture has twice its size.
    size = [int(root.attrib[name]) for name in ("width", "height")]
    data = saved(page, tmp_path, figure, "PNG").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert list(struct.unpack(">II", data[16:24])) == pytest.approx([2 * x for x in size], abs=2)
