"""Readers of histograms over a million bins take memory for a few layers at a time."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import append_rows
from watching import arrays

import gradstat
from gradstat import History, LinearBins, Log2Bins
from gradstat.cli import main
from gradstat.record import RecordLayout, Unpacked
from gradstat.results import FLOATS, INTEGERS, PACKED

BINS, LAYERS = 1 << 20, 200
# All dense histograms of one record take 1.6 GB, beside what Python and its libraries take.
MOST_BYTES = 3 << 29


def made_up(n_layers: int) -> History:
    """Each layer has one value in the first bin and two in the last."""
    integers = np.zeros((1, n_layers, len(INTEGERS)), np.int64)
    integers[..., :2] = 3
    floats = np.broadcast_to([0.0, 1.0, 2.0, 0.57, 2.0, 1.41, 0.0, 1.0], (1, n_layers, len(FLOATS)))
    history = History([f"{i}.weight" for i in range(n_layers)], LinearBins(BINS, 0.0, 1.0))
    ends, bins = 2 * np.arange(1, n_layers + 1), np.tile([0, BINS - 1], n_layers)
    none = np.empty((1, n_layers, 0, len(PACKED)))
    unpacked = Unpacked(integers, floats, none, ends, bins, np.tile([1, 2], n_layers))
    history.append(0, history.layout.pack_all(unpacked)[0])
    return history


def limit() -> None:
    # Of memory that is asked for, not of code: libraries take several GB of addresses.
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))


@pytest.mark.faults
@pytest.mark.host("measures the memory of a process")
@pytest.mark.parametrize("command", ["tail run.npz --updates 1", "report run.npz -o page.html"])
def test_commands_take_memory_for_few_layers_of_a_million_bins(
    command: str, tmp_path: Path
) -> None:
    made_up(LAYERS).save(tmp_path / "run.npz")
    assert (tmp_path / "run.npz").stat().st_size < 100_000
    done = subprocess.run(
        [sys.executable, "-m", "gradstat", *command.split()],
        cwd=tmp_path,
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        "tail run.npz --updates 1",
        "diagnose run.npz",
        "report run.npz -o page.html",
        "export run.npz --to csv tables",
        "export run.npz --to tensorboard tables",
        "export run.npz --to wandb tables",
    ],
)
def test_commands_read_filled_bins_alone(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(3).save(tmp_path / "run.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(History, "record", lambda *_: pytest.fail("all layers at once"))
    read, sizes = RecordLayout.dense, []

    def read_part(self: RecordLayout, data: bytes, rows: slice = slice(None)) -> np.ndarray:
        found = read(self, data, rows)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(RecordLayout, "dense", read_part)
    for viewer in ("tensorboard", "wandb"):
        if viewer in command:
            pytest.importorskip(viewer)
    assert main(command.split()) == 0
    assert sizes == []
    if "csv" in command:
        lines = (tmp_path / "tables" / "run.csv").read_text().splitlines()
        low, high = "[0.0, 0.9999990463256836]", "[9.5367431640625e-07, 1.0]"
        assert len(lines) == 1 + 3
        assert lines[-1].endswith(f'"{low}","{high}","[1, 2]"')


@pytest.mark.parametrize("command", ["report big.npz", "export big.npz --to csv tables"])
def test_three_thousand_layers_of_a_million_bins_take_seconds(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(3000).save(tmp_path / "big.npz")
    monkeypatch.chdir(tmp_path)
    began_s = time.monotonic()
    assert main(command.split()) == 0
    assert time.monotonic() - began_s < 8


def test_kurtosis_is_found_of_rows_with_many_filled_bins_and_with_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = [torch.linspace(-1, 1, n, dtype=torch.float64) ** 3 for n in (5, 4000, 7, 0, 9, 300)]
    for bins in (LinearBins(5000), LinearBins(5000, -0.5, 0.5), Log2Bins()):
        s = gradstat.statistics(x, bins)
        history = History([str(i) for i in range(6)], bins)
        append_rows(history, 0, *arrays(s))
        append_rows(history, 1, *arrays(s))
        monkeypatch.setattr("gradstat.history.records._CELLS", 1000)
        expected = s.kurtosis.expand(2, -1).numpy()
        assert history["kurtosis"] == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_history_parts_are_a_record_in_parts() -> None:
    history = made_up(3)
    seen = []
    for at, part in history.parts(-1):
        assert part.counts.nbytes <= 8 << 20
        assert part.counts[:, 0].tolist() == [1] * len(part)
        seen += history.layers[at]
    assert seen == history.layers
    few = History(["x", "y"], LinearBins(4))
    counts = np.arange(8).reshape(2, 4)
    append_rows(few, 3, np.zeros((2, 8), int), np.full((2, 8), np.nan), counts)
    ((at, part),) = few.parts(3)
    assert at == slice(0, 2)
    assert part.counts.equal(few.record(3).counts)
