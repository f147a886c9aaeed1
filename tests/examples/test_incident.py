"""The example tells its story in few lines: what, when, which layer first."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from legibility import assert_legible, drawn_texts

sys.path.insert(0, str(ROOT / "examples"))
import incident


def test_incident_tells_what_happened_when_and_in_which_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["incident.py", "-o", str(tmp_path / "incident.png")])
    incident.main()
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 15
    assert f"loss spike, steps {incident.AT + 1} to" in shown
    assert f"First to leave its usual range was {incident.LAYER}'s update" in shown
    assert "1 step before" in shown
    assert (tmp_path / "incident.png").stat().st_size > 10_000


def test_picture_of_the_incident_shows_loss_step_and_first_mover(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history = incident.train(steps=200)
    (finding,) = [each for each in history.diagnose() if each.severity != "note"]
    figure = incident.draw(history, finding)
    assert_legible(figure, monkeypatch)
    texts = [text for text, _ in drawn_texts(figure, monkeypatch)]
    assert f"step {incident.AT + 1}: the loss spikes" in texts
    assert f"step {incident.AT}: {incident.LAYER} moves first" in texts
    above, below = figure.axes
    assert above.get_xlim()[0] < incident.AT < above.get_xlim()[1] == below.get_xlim()[1]
    colored = [line for line in below.lines if line.get_color() != incident.panels.GREY]
    assert len(colored) == 1
