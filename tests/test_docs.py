import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import gradstat
import gradstat.plot

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
LINK = re.compile(r"\]\(([^)\s#]+)[^)\s]*\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run_as_printed(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__main__"}
    text = page.read_text()
    for block in BLOCK.finditer(text):
        # Line numbers in a traceback are then those of the page.
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text())
    assert [each for each in links if "://" not in each and not (page.parent / each).exists()] == []


def test_readme_begins_with_the_quick_start_and_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text()
    code = BLOCK.search(readme)[1]
    script = (ROOT / "examples" / "quickstart.py").read_text()
    assert script.partition('"""\n\n')[2] == code

    exec(compile(code, "README.md", "exec"), {})
    printed = re.search(r"^```text\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)[1]
    (got, numbers), (expected, shown) = (
        (NUMBER.sub("_", text).split(), [float(x.replace(",", "")) for x in NUMBER.findall(text)])
        for text in (capsys.readouterr().out, printed)
    )
    assert got == expected
    # Another machine adds in another order.
    assert numbers == pytest.approx(shown, rel=0.1)
    assert (tmp_path / "gradients.png").stat().st_size > 0


SYMPTOMS = [
    "loss-is-nan",
    "loss-spiked",
    "it-does-not-learn",
    "narrow-types",
    "coming-from",
    "many-gpus",
    "what-it-costs",
]


@pytest.mark.parametrize("name", SYMPTOMS)
def test_page_of_a_symptom_is_short_and_begins_with_what_the_reader_has(name: str) -> None:
    lines = (ROOT / "docs" / f"{name}.md").read_text().splitlines()
    assert len(lines) <= 80
    assert lines[0].startswith("# ")
    assert lines[2].startswith(("You see ", "You have ", "You want "))


def test_readme_is_short_and_leads_to_each_symptom_in_its_first_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 200
    first_screen = "\n".join(lines[:24])
    assert [name for name in SYMPTOMS if f"](docs/{name}.md)" not in first_screen] == []


def test_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    listed = []
    module = ""
    for directive, name in re.findall(r"^\.\. (\w+):: ([\w.]+)", page, re.MULTILINE):
        if directive == "currentmodule":
            module = name
        else:
            listed.append(f"{module}.{name}")
    figures = [
        name
        for name, value in vars(gradstat.plot).items()
        if getattr(value, "__module__", "") == "gradstat.plot" and not name.startswith("_")
    ]
    public = [f"gradstat.{name}" for name in gradstat.__all__ if name != "__version__"]
    public += [f"gradstat.plot.{name}" for name in figures]
    others = [name for name in listed if name.startswith("gradstat.integrations.")]
    assert sorted(listed) == sorted(public + others)
    assert len(others) == 7
