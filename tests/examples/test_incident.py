"""The example tells its story in few lines: what, when, which layer first."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

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
