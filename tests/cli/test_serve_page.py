"""`gradstat serve` in Chromium: a run that another process writes, ends, is killed, is resumed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from histories import make_history
from pages import MAP, detail, hover, place
from serving import Look, Writer, commanded, facts, serving, wait_for

from gradstat import History, Log2Bins
from gradstat.diagnosis import Finding
from gradstat.record import GRAD, PARAM

pytestmark = pytest.mark.integrations


def test_new_records_appear_within_two_seconds_and_the_place_stays(
    write: Callable[..., Writer], look: Look, tmp_path: Path
) -> None:
    writer = write(tmp_path / "run")
    writer.train(30)
    with serving(tmp_path / "run") as server:
        page = look(server.address, height=500)
        wait_for(page, "Live, step 29")
        page.locator("#kind").select_option(label="Parameters")
        page.locator("#rows tr").nth(2).click()
        place_in_map = place(page, MAP, 0.6, 2.5 * 20 / (6 * 20 + 24))
        page.locator(MAP).click(position=place_in_map)
        page.locator("#zoom-first").fill("10")
        page.locator("#zoom-first").press("Enter")
        page.locator("#filter").fill("weight")
        page.get_by_role("button", name="rms, newest").click()
        page.locator("#rows tr").nth(5).scroll_into_view_if_needed()
        page.locator("#rows tr").nth(1).focus()

        def where() -> list[object]:
            return page.evaluate(
                """() => [Math.round(document.activeElement.getBoundingClientRect().top),
                document.activeElement.dataset.layer,
                document.querySelector("#detail-name").innerText, location.hash,
                document.querySelector("#detail-when").innerText,
                document.querySelector("#zoom-first").value,
                document.querySelector("#kind").value, document.querySelector("#filter").value,
                [...document.querySelectorAll("#rows tr")].map((r) => r.dataset.layer).join()]"""
            )

        page.wait_for_timeout(300)
        before = where()
        assert page.evaluate("scrollY") > 0
        assert "4.weight" in before[2]
        waits_s = []
        for steps in (1, 5, 60, 1, 1):
            newest = writer.train(steps)
            began_s = time.monotonic()
            wait_for(page, f"Live, step {newest},")
            waits_s.append(time.monotonic() - began_s)
            assert facts(page).startswith(
                f"6 parameters · {newest + 1} records, steps 0 to {newest}"
            )
            assert where() == before
        assert sorted(waits_s)[2] < 2
        assert page.evaluate("window.isTheSame")
        assert page.locator("#zoom-last").input_value() == str(newest)
        assert page.locator("#detail-newest").inner_text() == f"Newest record, step {newest}"
        page.locator("#zoom-all").click()
        tip = hover(page, MAP, 0.999, 0.5 * 20 / (6 * 20 + 24)).splitlines()
        history = History.load(tmp_path / "run")
        assert tip[1] == f"step {newest}"
        assert f"rms {history['rms'][-1, history.layers.index('param/0.weight')]:.3g}"[:7] in tip[2]


def test_page_follows_a_run_that_ends_is_killed_and_is_resumed(
    write: Callable[..., Writer], look: Look, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    with serving(path) as server:
        page = look(server.address)
        wait_for(page, f"Waiting for the run: {path} is not there yet.")
        assert page.locator("#empty").is_visible()
        assert page.locator("main").is_hidden()
        writer = write(path)
        wait_for(page, "Waiting for the run's first record.")
        writer.train(12)
        wait_for(page, "Live, step 11,")
        assert page.locator("#empty").is_hidden()
        writer.kill()
        page.locator("#rows tr").nth(3).click()
        chosen = detail(page)
        writer = write(path, 6)
        page.wait_for_function(
            "() => document.querySelector('#facts').innerText.includes('0 to 5')"
        )
        writer.train(4)
        wait_for(page, "Live, step 9,")
        assert facts(page).startswith("6 parameters · 10 records")
        writer.end()
        page.wait_for_timeout(1500)
        wait_for(page, "Live, step 9,")
        assert detail(page) == chosen
        found = [each.sentence for each in History.load(path).diagnose()]
        page.wait_for_function(
            "(found) => [...document.querySelectorAll('.finding .what')]"
            ".map((each) => each.innerText).join() === found.join()",
            arg=found,
        )
        shutil.rmtree(path)
        wait_for(page, "The run is no longer there")
        assert detail(page) == chosen
        writer = write(path)
        writer.train(3)
        wait_for(page, "Live, step 2,")
        assert facts(page).startswith("6 parameters · 3 records")
        assert detail(page) == chosen
        assert page.evaluate("window.isTheSame")


def test_page_says_that_the_server_has_stopped_and_goes_on_with_another(
    look: Look, tmp_path: Path
) -> None:
    make_history(Log2Bins(), 3, 5).save(tmp_path / "run.npz")
    with commanded(tmp_path / "run.npz") as address:
        page = look(address)
        wait_for(page, "Live, step 4,")
    wait_for(page, "The server has stopped; this is what it had.")
    make_history(Log2Bins(), 3, 9).save(tmp_path / "run.npz")
    with commanded(tmp_path / "run.npz", address.strip("/").split(":")[-1]):
        wait_for(page, "Live, step 8,")
        assert facts(page).startswith("3 parameters · 9 records")
        assert page.evaluate("window.isTheSame")
    # What is not answered is a message of the browser's own; a page that is closed asks no more.
    page.close()
    look.seen[:] = [each for each in look.seen if "ERR_" not in each]


def test_page_keeps_its_place_when_the_run_is_thinned(
    write: Callable[..., Writer], look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstat.report.thin._MAX_COLUMNS", 20)
    monkeypatch.setattr("gradstat.report.thin._MAX_SAMPLES", 8)
    writer = write(tmp_path)
    writer.train(8)
    with serving(tmp_path) as server:
        page = look(server.address)
        wait_for(page, "Live, step 7,")
        page.locator("#rows tr").nth(3).click()
        page.locator("#zoom-last").fill("6")
        page.locator("#zoom-last").press("Enter")
        chosen = detail(page)
        for newest in (15, 30, 70):
            while (step := writer.train(4)) < newest:
                pass
            wait_for(page, f"Live, step {step},")
        assert detail(page) == chosen
        assert int(page.locator("#zoom-last").input_value()) in range(6, 6 + 4)
        assert "4 records together" in page.locator("#map-hint").inner_text()


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What is found in each run, at once."""
    found: list[Finding] = []
    monkeypatch.setattr("gradstat.report.live_run.diagnose", lambda history: list(found))
    monkeypatch.setattr("gradstat.report.live_run._FINDINGS_S", 0.0)
    monkeypatch.setattr("gradstat.report.live_run._FINDINGS_SHARE", 1.0)
    return found


def test_page_opens_on_the_first_finding_once(
    look: Look, tmp_path: Path, found: list[Finding]
) -> None:
    with serving(tmp_path / "run.npz") as server:
        page = look(server.address)
        shown = []
        for steps, layer in ((4, None), (5, 2), (6, 1)):
            if layer is not None:
                found[:] = [Finding("spike", "severe", f"{layer}.weight", (1, 2), {}, f"{layer}!")]
            make_history(Log2Bins(), 3, steps).save(tmp_path / "run.npz")
            text = "Nothing stands out" if layer is None else f"{layer}!"
            page.locator("#findings", has_text=text).wait_for()
            shown.append(detail(page))
        assert shown == ["0.weight", "2.weight", "2.weight"]


def test_live_page_does_not_open_on_a_note(
    look: Look, tmp_path: Path, found: list[Finding]
) -> None:
    with serving(tmp_path / "run.npz") as server:
        page, shown = look(server.address), []
        for steps, severity in ((4, "note"), (6, "severe")):
            found[:] = [Finding("scale", severity, "2.weight", (1, 2), {}, f"{severity}!")]
            make_history(Log2Bins(), 3, steps).save(tmp_path / "run.npz")
            page.locator("#findings", has_text=f"{severity}!").wait_for()
            shown.append((detail(page), page.locator("#detail-when").inner_text()))
    newest = "Histogram at step 3"
    assert shown == [("0.weight", newest), ("2.weight", "Histogram at step 1")]


def test_page_says_that_another_run_has_its_address(look: Look, tmp_path: Path) -> None:
    for name, layers in (("a", 2), ("b", 3)):
        make_history(Log2Bins(), layers, 5).save(tmp_path / f"{name}.npz")
    with commanded(tmp_path / "a.npz") as address:
        page = look(address)
        page.locator("#facts", has_text="2 parameters").wait_for()
    with commanded(tmp_path / "b.npz", address.strip("/").rpartition(":")[2]):
        wait_for(page, "Another run has this address now")
        assert facts(page).startswith("2 parameters")
    # What is not answered is a message of the browser's own; a page that is closed asks no more.
    page.close()
    look.seen[:] = [each for each in look.seen if "ERR_" not in each]


def test_two_browsers_see_the_same(
    write: Callable[..., Writer], look: Look, tmp_path: Path
) -> None:
    writer = write(tmp_path)
    writer.train(5)
    with serving(tmp_path) as server:
        pages = [look(server.address) for _ in range(2)]
        for page in pages:
            wait_for(page, "Live, step 4,")
        newest = writer.train(7)
        for page in pages:
            wait_for(page, f"Live, step {newest},")
        assert facts(pages[0]) == facts(pages[1])


def test_list_shows_runs_side_by_side(look: Look, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    hostile = "<img src=x onerror=alert(1)>"
    for name in ("a", hostile):
        make_history(Log2Bins(), 3, 6).save(folder / f"{name}.npz")
    with serving(folder) as server:
        page = look(server.address)
        page.wait_for_selector("#runs tr:nth-child(2)")
        assert sorted(page.locator("#runs a").all_inner_texts()) == sorted(["a", hostile])
        assert page.locator("img").count() == 0
        page.get_by_label("a side by side", exact=True).check()
        page.get_by_label(f"{hostile} side by side").check()
        frames = [page.frame_locator("iframe").nth(i) for i in range(2)]
        for frame in frames:
            frame.locator("#rows tr").nth(2).wait_for()
        frames[0].locator("#rows tr").nth(1).click()
        page.wait_for_function(
            "() => [...document.querySelectorAll('iframe')].every((each) => "
            "each.contentDocument.querySelector('#detail-name').innerText === '1.weight')"
        )
        # A link has them; another run comes by itself.
        make_history(Log2Bins(), 3, 6).save(folder / "b.npz")
        page.wait_for_selector("#runs tr:nth-child(3)")
        assert page.locator("iframe").count() == 2
        again = look(page.url)
        again.wait_for_selector("iframe >> nth=1")
        page.get_by_label("a side by side", exact=True).uncheck()
        assert page.locator("iframe").count() == 1
        page.get_by_role("link", name="a", exact=True).click()
        wait_for(page, "Live, step 5,")


def test_pages_side_by_side_open_on_one_row_and_align_their_maps(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {"a": "0.weight", "b": "a.much.longer.name.of.a.module.5.weight"}
    for run, last in named.items():
        names = ["1.weight", "2.weight", last]
        history = make_history(Log2Bins(), names, 25, kinds=(GRAD, PARAM))
        history.save(tmp_path / f"{run}.npz")

    def diagnose(history: History) -> list[Finding]:
        kind, name = ("param/", "2.weight") if named["a"] in history.layers else ("", "1.weight")
        return [Finding("spike", "severe", f"{kind}{name}", (11, 12), {}, "It is larger." * 40)]

    monkeypatch.setattr("gradstat.report.live_run.diagnose", diagnose)
    monkeypatch.setattr("gradstat.report.thin._MAX_SAMPLES", 5)
    with serving(tmp_path / "a.npz", tmp_path / "b.npz") as server:
        page = look(server.address)
        page.wait_for_selector("iframe >> nth=1")
        frames = [page.frame_locator("iframe").nth(i) for i in range(2)]
        for frame in frames:
            frame.locator(".finding").first.wait_for()
        # Both on what was found first, at its very step.
        for frame in frames:
            frame.locator("#detail-when", has_text="Histogram at step 11").wait_for()
        first, second = (frame.locator("#detail-name").inner_text() for frame in frames)
        assert first == second in ("2.weight\u00a0\u00b7 parameter", "1.weight")
        tops, columns = [], []
        for frame in frames:
            canvas = frame.locator("#map-plot canvas").first
            outer = page.locator("iframe").nth(len(tops)).bounding_box()
            box = canvas.bounding_box()
            tops.append(box["y"] - outer["y"])
            canvas.hover(position={"x": 0.7 * box["width"], "y": 10})
            columns.append(frame.locator("#tip div").first.inner_text())
        assert tops[0] == tops[1]
        assert columns[0] == columns[1]
        # A row that only one run has leaves the other at the same kind.
        frames[1].locator("#kind").select_option(label="Gradients")
        frames[1].locator("#rows tr").nth(2).click()
        frames[1].locator("#detail-name", has_text="longer").wait_for()
        frames[0].locator("#detail-name", has_text="1.weight").wait_for()
        assert frames[0].locator("#kind").input_value() == "0"


def test_runs_that_are_given_are_side_by_side(look: Look, tmp_path: Path) -> None:
    make_history(Log2Bins(), 3, 6).save(tmp_path / "a.npz")
    with serving(tmp_path / "a.npz", tmp_path / "b") as server:
        page = look(server.address)
        page.wait_for_selector("iframe >> nth=1")
        first, second = (page.frame_locator("iframe").nth(i) for i in range(2))
        first.locator("#rows tr").nth(2).wait_for()
        second.locator("#live", has_text="Waiting for the run").wait_for()
        page.get_by_label("b side by side").uncheck()
        page.wait_for_timeout(2500)
        assert page.locator("iframe").count() == 1


def test_waiting_page_becomes_the_list_of_a_directory(look: Look, tmp_path: Path) -> None:
    with serving(tmp_path / "runs") as server:
        page = look(server.address)
        wait_for(page, "Waiting for the run")
        (tmp_path / "runs").mkdir()
        make_history(Log2Bins(), 3, 6).save(tmp_path / "runs" / "a.npz")
        page.wait_for_selector("#runs a")
        shutil.rmtree(tmp_path / "runs")
        # Nothing is there again.
        page.wait_for_selector("#live")


@pytest.mark.parametrize("value", [float("nan"), 0.0, float("inf")])
def test_page_shows_a_run_without_a_number(look: Look, tmp_path: Path, value: float) -> None:
    history = make_history(Log2Bins(), 3, 4, lambda step, layer: torch.full((5,), value))
    history.save(tmp_path / "run.npz")
    with serving(tmp_path / "run.npz") as server:
        page = look(server.address)
        wait_for(page, "Live, step 3,")
        tip = hover(page, MAP, 0.7, 0.3)
        assert ("rms 0" if value == 0 else "5 NaN or infinite") in tip


def test_page_says_what_cannot_be_read(look: Look, tmp_path: Path) -> None:
    path = tmp_path / "<b>run.npz"
    path.write_bytes(b"no run")
    with serving(path) as server:
        page = look(server.address)
        wait_for(page, "The run cannot be read: History.load() needs a file that")
        assert "<b>run.npz" in page.locator("#live").inner_text()
        History(["weight"], Log2Bins()).save(path)
        wait_for(page, "Waiting for the run's first record.")


def test_page_of_localhost_works_and_of_another_name_does_not(look: Look, tmp_path: Path) -> None:
    make_history(Log2Bins(), 3, 4).save(tmp_path / "run.npz")
    with serving(tmp_path / "run.npz") as server:
        page = look(server.address.replace("127.0.0.1", "localhost"))
        wait_for(page, "Live, step 3,")
        assert look.seen == []
        answered = page.goto(server.address.replace("127.0.0.1", "rebound.localhost"))
        assert answered.status == 403
        page.close()
    look.seen.clear()  # the browser's own messages of it
