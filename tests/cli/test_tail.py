"""``gradstat tail``: the newest record of a run, and again when there is another."""

import math
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from findings import noise
from histories import make_history, write_steps
from tables_of_text import rows
from torch import Tensor

from gradstat import History, Log2Bins
from gradstat.cli import commands
from gradstat.history.journal import Journal


def test_newest_shows_the_last_record_with_zeros_and_what_is_not_finite() -> None:
    def gradient(step: int, layer: int) -> Tensor:
        x = noise(step, layer)
        if step == 2 and layer == 0:
            x[:100] = 0
            x[100:103] = torch.tensor([math.nan, math.inf, -math.inf])
        return x

    history = make_history(Log2Bins(), 3, 3, gradient, absent=[(2, 2)])
    text = commands.newest("run", history)
    assert text.startswith("run: step 2\n")
    record, table = history.record(), rows(text)
    for at, layer in enumerate(("0.weight", "1.weight")):
        assert float(table[layer][0]) == pytest.approx(float(record.rms[at]), rel=0.05)
        assert float(table[layer][1]) == pytest.approx(float(record.abs_max[at]), rel=0.05)
    assert table["0.weight"][2:] == ["25%", "3"]
    assert table["1.weight"][2:] == ["0%", "0"]
    assert table["2.weight"] == ["-", "-", "-", "no", "gradient"]
    assert "severe: non-finite, step 2" in text


def test_tail_prints_each_new_record_of_a_file_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.npz"
    History(["0.weight"], Log2Bins()).save(path)

    def train() -> None:
        for steps in (1, 2):
            time.sleep(0.3)
            make_history(Log2Bins(), 1, steps, noise).save(path)

    trainer = threading.Thread(target=train)
    trainer.start()
    commands.follow(path, 0.02, updates=2)
    trainer.join()
    shown = capsys.readouterr().out
    assert shown.startswith(f"{path} has no records yet\n")
    assert re.findall(r": step (\d+)$", shown, re.M) == ["0", "1"]


def test_tail_reads_only_what_was_written_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = make_history(Log2Bins(), 1, 3, noise)
    journal = Journal(tmp_path, history)
    ends = []
    for step in range(3):
        journal.add(history.packed(history.find(step)))
        journal.flush()
        ends.append((tmp_path / "00000000.gradstat").stat().st_size)
    with (tmp_path / "00000000.gradstat").open("r+b") as file:
        file.seek(ends[0] + 500)
        file.write(b"not read")
    commands.follow(tmp_path, 0.02, updates=1)
    assert f"{tmp_path}: step 2" in capsys.readouterr().out
    # The last one alone is cut off.
    with (tmp_path / "00000000.gradstat").open("r+b") as file:
        file.truncate(ends[2] - 1)
    with pytest.raises(ValueError, match="its record of step 1 has another checksum"):
        commands.follow(tmp_path, 0.02, updates=1)


@pytest.mark.parametrize("name", ["run", "run.npz"])
def test_tail_waits_for_a_run_that_is_not_there_yet(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    history = make_history(Log2Bins(), 1, 1, noise)

    def train() -> None:
        time.sleep(0.3)
        if path.suffix:
            history.save(path)
        else:
            path.mkdir()
            time.sleep(0.1)
            write_steps(Journal(path, history), history, 0)

    trainer = threading.Thread(target=train)
    trainer.start()
    commands.follow(path, 0.02, updates=1)
    trainer.join()
    shown = capsys.readouterr().out
    assert shown.startswith(f"{path} is not there yet\n")
    assert f"\n{path}: step 0\n" in shown


@pytest.mark.parametrize("is_only_begun", [True, False])
def test_tail_waits_for_a_directory_to_have_records(
    is_only_begun: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if is_only_begun:
        (tmp_path / "00000000.gradstat").write_bytes(b"")
    history = make_history(Log2Bins(), 1, 1, noise)
    journal = None if is_only_begun else Journal(tmp_path, history)

    def train() -> None:
        time.sleep(0.3)
        write_steps(journal or Journal(tmp_path, history, 0), history, 0)

    trainer = threading.Thread(target=train)
    trainer.start()
    commands.follow(tmp_path, 0.02, updates=1)
    trainer.join()
    assert capsys.readouterr().out.startswith(f"{tmp_path} has no records yet\n{tmp_path}: step 0")


def test_tail_redraws_in_place_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_history(Log2Bins(), 1, 1, noise).save(tmp_path / "run.npz")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    commands.follow(tmp_path / "run.npz", 0.02, updates=1)
    assert capsys.readouterr().out.startswith(f"\x1b[H\x1b[2J{tmp_path / 'run.npz'}: step 0")
