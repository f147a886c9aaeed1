"""Names that contain what a terminal acts on."""

import io
from pathlib import Path

import pytest
import torch
from histories import make_history

from gradstat import Log2Bins
from gradstat.cli import main
from gradstat.util import escaped

# Clears the screen, sets the title, goes back, breaks the line, turns the direction, erases.
HOSTILE = "a\x1b[2J\x1b]0;title\x07\rb\nc\u202ed\u2028e\x9b1mf\x7f\u200bg\u2066h"
LAYERS = ["0.weight", f"{HOSTILE}.weight", "2.weight"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain.weight", "plain.weight"),
        ("größe 层 é", "größe 层 é"),
        ("a\x1b[2J", r"a\x1b[2J"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("a\u202eb", r"a\u202eb"),
        ("a\U000e0041", r"a\U000e0041"),
        ("a\udcffb", r"a\udcffb"),
        (Path("a\nb"), r"a\nb"),
    ],
)
def test_escaped_is_printable_and_leaves_letters_alone(text: object, shown: str) -> None:
    assert escaped(text) == shown


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    def gradient(step: int, layer: int) -> torch.Tensor:
        return torch.full((9,), [1.0, float("nan"), 1e-30][layer])

    path = tmp_path / "run\x1b[31m\r\u202e.npz"
    make_history(Log2Bins(), LAYERS, 25, gradient).save(path)
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["diagnose", "--all"],
        ["compare", "--all", "other"],
        ["tail", "--updates=1"],
        ["report", "-o"],
        ["export", "--to=csv", "folder\x1b"],
    ],
    ids=lambda command: command[0],
)
def test_commands_print_no_more_than_text(
    command: list[str],
    hostile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_history(Log2Bins(), LAYERS, 25).save(tmp_path / "other")
    rest = [*command[1:], "page\x1b.html"] if command[0] == "report" else command[1:]
    main([command[0], str(hostile), *rest])
    shown = capsys.readouterr()
    assert shown.err == ""
    assert all(line.isprintable() for line in shown.out.split("\n"))
    assert r"\x1b" in shown.out


@pytest.mark.parametrize("command", [["diagnose", "--all"], ["info"], ["tail", "--updates=1"]])
def test_commands_escape_what_an_ascii_terminal_cannot_show(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = make_history(Log2Bins(), ["größe.weight", "層"], 25, lambda *_: torch.zeros(9))
    history.add_scalar("verlust·層", 0, 1.0)
    history.save(tmp_path / "läufe")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    assert main([command[0], str(tmp_path / "läufe"), *command[1:]]) < 2
    shown = terminal.buffer.getvalue().decode("ascii")
    assert r"l\xe4ufe" in shown
    assert (r"\xb7\u5c64" if command == ["info"] else r"\u5c64") in shown
    # It is the caller's afterwards.
    assert terminal.errors == "strict"


@pytest.mark.parametrize("command", ["diagnose", "report", "tail"])
def test_errors_print_paths_as_text(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, damaged = tmp_path / "none\x1b[2J\n\u202e", tmp_path / "damaged\x1b[2J\n\u202e"
    damaged.write_text("no run")
    # tail waits for a run that is missing.
    for path in (damaged,) if command == "tail" else (missing, damaged):
        assert main([command, str(path)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.endswith("\n")
        assert shown.err[:-1].isprintable()
        assert r"\x1b[2J\n\u202e" in shown.err


@pytest.mark.parametrize("arguments", [["x\x1b[2J"], ["diagnose", "run", "--no\x1b[2J\n\u202e"]])
def test_errors_of_arguments_are_text(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    error = capsys.readouterr().err
    assert r"\x1b[2J" in error.replace("\\\\", "\\")
    assert all(line.isprintable() for line in error.split("\n"))
