"""The page's scripts: modules, which a page holds as one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT
from histories import make_history
from pages import MAP, detail, hover, place

from gradstat import Log2Bins
from gradstat.record import GRAD, PARAM
from gradstat.report import page as report_page

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Browser, Route

SCRIPTS = {path.name: path.read_text() for path in (ROOT / "gradstat" / "report").glob("*.js")}
ENTRIES = ["main.js", "live.js", "list.js"]
IMPORT = re.compile(r'^import \{ ([\w, ]+) \} from "\./(\w+\.js)";$', re.MULTILINE)
TOP_LEVEL = r"(?:async )?(?:function\*?|class|const|let) (\w+)"


def bundled(entry: str) -> list[str]:
    """The modules of a page, in their order; each begins with a line of its own."""
    bundle = report_page._bundle(entry)
    at = {name: bundle.find(text.splitlines()[0]) for name, text in SCRIPTS.items()}
    return sorted((name for name in SCRIPTS if at[name] >= 0), key=at.__getitem__)


def test_every_script_is_in_a_page() -> None:
    assert {name for entry in ENTRIES for name in bundled(entry)} == set(SCRIPTS)


@pytest.mark.parametrize("entry", ENTRIES)
def test_module_comes_after_those_that_it_imports(entry: str) -> None:
    order = bundled(entry)
    assert order[-1] == entry
    for name in order:
        imports = IMPORT.findall(SCRIPTS[name])
        assert len(imports) == SCRIPTS[name].count("\nimport "), name
        for names, imported in imports:
            assert imported in order[: order.index(name)], name
            exported = re.findall(f"^export {TOP_LEVEL}", SCRIPTS[imported], re.MULTILINE)
            assert set(names.split(", ")) <= set(exported), name


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_two_modules_of_a_page_have_a_name_in_common(entry: str) -> None:
    names = re.findall(f"^{TOP_LEVEL}", report_page._bundle(entry), re.MULTILINE)
    assert len(names) == len(set(names)) > 5


@pytest.mark.integrations
def test_page_works_with_its_modules_apart(browser: Browser, tmp_path: Path) -> None:
    # A name that a module uses and does not import is in the page's one scope all the same.
    make_history(Log2Bins(), 8, 20, kinds=(GRAD, PARAM)).report(tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text()
    before, after = text.split(report_page._bundle("main.js"))
    text = f'{before}import "./main.js";{after}'.replace("'unsafe-inline'", "'unsafe-inline' *")
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    errors: list[str] = []

    def answer(route: Route) -> None:
        name = route.request.url.rsplit("/", 1)[1]
        kind = "text/javascript" if name in SCRIPTS else "text/html"
        route.fulfill(body=SCRIPTS.get(name, text), content_type=kind)

    page.route("http://run/**", answer)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto("http://run/page")
    page.locator("#kind").select_option(label="Parameters")
    page.locator(MAP).click(position=place(page, MAP, 0.6, 0.2))
    for canvas in page.locator(".plot canvas:first-child, td.spark canvas").all():
        canvas.hover()
        canvas.focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")
    hover(page, MAP, 0.6, 0.1)
    page.locator(MAP).press("+")
    page.get_by_role("button", name="rms, newest").click()
    page.locator("#filter").fill("1")
    for save in page.locator(".save button").all():
        save.click()
    page.wait_for_timeout(200)
    assert detail(page).endswith("parameter")
    assert "filter=1" in page.url
    page.close()
    assert errors == []
