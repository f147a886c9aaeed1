"""``docs/reading.md``: its commands run, and it names every finding and threshold."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from gradstat import Thresholds
from gradstat.cli import COMMANDS, main
from gradstat.diagnosis import FINDINGS

NUMBER = re.compile(r"\d[\d.]*\b")
PAGE = (ROOT / "docs" / "reading.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_commands_of_the_page_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for code in blocks("python"):
        exec(compile(code, "reading.md", "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    (expected,) = blocks("text")
    assert NUMBER.sub("N", printed[0]) == NUMBER.sub("N", expected.strip())
    # Another machine adds in another order.
    numbers = [[float(x) for x in NUMBER.findall(text)] for text in (printed[0], expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.1)

    used = set()
    for line in "".join(blocks("sh")).splitlines():
        program, command, *arguments = shlex.split(line)
        assert program == "gradstat"
        used.add(command)
        assert main([command, *arguments]) == (1 if command == "diagnose" else 0), line
        assert capsys.readouterr().out
    assert used == set(COMMANDS) - {"serve"}  # which goes on until Ctrl-C
    assert {"curves.png", "sigmoid.csv"} <= {path.name for path in tmp_path.iterdir()}
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["sigmoid.csv"]


@pytest.mark.integrations
def test_queries_of_the_page_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    duckdb = pytest.importorskip("duckdb")
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for code in blocks("python"):
        exec(compile(code, "reading.md", "exec"), namespace)
    namespace["history"].to_parquet("sigmoid.parquet")
    queries = "".join(blocks("sql")).splitlines()
    assert [len(duckdb.sql(query).fetchall()) for query in queries] == [36, 360, 360]


def test_page_has_a_section_for_each_finding_in_their_order() -> None:
    sections = re.findall(r"^### (.+)$", PAGE, re.MULTILINE)
    assert sections == list(FINDINGS)


def test_page_explains_each_threshold() -> None:
    for field in dataclasses.fields(Thresholds):
        assert f"`{field.name}" in PAGE, field.name
