"""A run logged offline, read back from the file that wandb would send."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from histories import make_history

import gradstat
from gradstat import History
from gradstat.integrations import wandb as viewer

pytestmark = [
    pytest.mark.integrations,
    # wandb leaves a temporary folder and a socket of its own to the garbage collector.
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    pytest.mark.filterwarnings(r"ignore:(?s).*unclosed <socket.*wandb"),
]
wandb = pytest.importorskip("wandb")

LOG2 = gradstat.Log2Bins()

Logged = Callable[..., "list[dict[str, Any]]"]


def records(path: Path) -> Iterator[Any]:
    """Records of a ``.wandb`` file: LevelDB's log format after 7 bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Logged:
    """Logs a history to an offline run and returns what each call of ``run.log`` wrote."""
    monkeypatch.setenv("WANDB_MODE", "offline")

    def log(history: History, **options: Any) -> list[dict[str, Any]]:
        return run(lambda run: viewer.log(history, run, **options))

    def run(use: Callable[[Any], object]) -> list[dict[str, Any]]:
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        with wandb.init(project="test", dir=tmp_path, settings=settings) as run:
            use(run)
        # Its other process may still be writing when the run is finished, not when it has ended.
        wandb.teardown()
        (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        logged.metrics = []
        rows = []
        for record in records(path):
            if record.WhichOneof("record_type") == "metric":
                logged.metrics.append(record.metric)
            if record.WhichOneof("record_type") == "history":
                row: dict[str, Any] = {}
                for item in record.history.item:
                    key, *below = item.nested_key or [item.key]
                    value = json.loads(item.value_json)
                    if below:
                        row.setdefault(key, {})[below[0]] = value
                    else:
                        row[key] = value
                rows.append(row)
        logged.files = path.parent / "files"
        return rows

    logged = log
    logged.run = run
    return log


def table(logged: Logged, name: str, group: str = "gradients") -> dict[str, Any]:
    (path,) = (logged.files / "media" / "table" / group).glob(f"{name}_*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("bins", [LOG2, gradstat.LinearBins(9, -0.5, 0.5)])
def test_log_keeps_every_count(logged: Logged, bins: gradstat.Log2Bins) -> None:
    h = make_history(bins, layers=2, steps=4)
    rows = [row for row in logged(h) if "gradients/step" in row][:4]
    assert [row["gradients/step"] for row in rows] == [0, 1, 2, 3]
    for step, row in enumerate(rows):
        for column, layer in enumerate(h.layers):
            histogram = row[f"gradients/histogram/{layer}"]
            assert histogram["_type"] == "histogram"
            counts, edges = h.histogram(layer, step)
            lefts = dict(zip(histogram["bins"], histogram["values"], strict=False))
            filled = {left: n for left, n in zip(edges[:-1], counts, strict=True) if n}
            assert {left: n for left, n in lefts.items() if left in filled} == filled
            assert sum(histogram["values"]) == h["finite"][step, column]


def test_log_sums_neighbours_over_512_buckets(logged: Logged) -> None:
    def gradient(step: int, layer: int) -> torch.Tensor:
        return torch.linspace(-1, 1, 20_000)

    h = make_history(gradstat.LinearBins(1300), 1, 1, gradient)
    histogram = logged(h)[0]["gradients/histogram/0.weight"]
    counts, edges = h.histogram("0.weight")
    assert histogram["values"] == np.add.reduceat(counts, np.arange(0, 1300, 3)).tolist()
    assert histogram["bins"] == [*edges[:-1:3].tolist(), edges[-1]]


def test_log_makes_one_chart_and_one_table_of_many_layers(logged: Logged) -> None:
    h = make_history(LOG2, layers=30, steps=3, absent=[(1, 4)])
    rows = logged(h)
    shown = {key for row in rows for key in row if not key.startswith("_")}
    histograms = {f"gradients/histogram/{layer}" for layer in h.layers}
    assert shown == {"gradients/step", "gradients/layers", "gradients/rms_table"} | histograms
    hidden = {metric.glob_name or metric.name for metric in logged.metrics if metric.options.hidden}
    assert {"gradients/step", "gradients/histogram/*"} <= hidden
    assert "gradients/histogram/4.weight" not in rows[1]
    chart = table(logged, "rms_table")
    assert chart["columns"] == ["step", "lineKey", "lineVal"]
    points = {(step, layer): value for step, layer, value in chart["data"]}
    assert len(points) == 3 * 30 - 1
    assert points[2, "7.weight"] == pytest.approx(np.log10(h["rms"][2, 7]))
    layers = table(logged, "layers")
    assert [row[0] for row in layers["data"]] == h.layers
    by_name = dict(zip(layers["columns"], layers["data"][7], strict=True))
    for name in ("mean", "std", "rms", "l2"):
        assert by_name[name] == pytest.approx(h[name][-1, 7])
    assert (by_name["numel"], by_name["nonfinite"], by_name["zero_fraction"]) == (50, 0, 0)


def test_log_gives_each_kind_a_group(logged: Logged) -> None:
    kinds = ("grad", "param", "update", "activation", "unit", "grad_output")
    groups = [
        "gradients",
        "parameters",
        "updates",
        "activations",
        "unit_peaks",
        "output_gradients",
    ]

    def value(step: int, row: int) -> torch.Tensor:
        # The first layer's weights are zero, its units all dead.
        return torch.tensor([0.0, 3.0, -4.0, 0.0]) * (row not in (2, 8)) * 10.0 ** -(row // 2)

    h = make_history(LOG2, ["a", "b"], 2, value, kinds=kinds)
    rows = logged(h)
    shown = {key for row in rows for key in row if not key.startswith("_")}
    assert shown == {"gradients/step", "updates/ratio_table", "activations/dead_units_table"} | {
        f"{group}/{name}"
        for group in groups
        for name in ("layers", "rms_table", "histogram/a", "histogram/b")
    }
    hidden = {metric.glob_name or metric.name for metric in logged.metrics if metric.options.hidden}
    assert {f"{group}/histogram/*" for group in groups} <= hidden
    assert [row[0] for row in table(logged, "layers", "updates")["data"]] == ["a", "b"]
    lines = table(logged, "rms_table", "updates")["data"]
    assert {layer for _, layer, _ in lines} == {"a", "b"}
    assert lines[0][2] == pytest.approx(np.log10(h["rms"][0, 4]))
    ratios = table(logged, "ratio_table", "updates")["data"]
    assert [row[:2] for row in ratios] == [[0, "b"], [1, "b"]]
    assert ratios[0][2] == pytest.approx(-1)
    dead = table(logged, "dead_units_table", "activations")["data"]
    assert {(layer, value) for _, layer, value in dead} == {("a", 1), ("b", 0.5)}


def test_log_draws_what_has_no_finite_value_nowhere_but_in_the_table(logged: Logged) -> None:
    def gradient(step: int, layer: int) -> torch.Tensor:
        return torch.full((3,), float("nan")) if layer else torch.zeros(2)

    rows = logged(make_history(LOG2, 2, 2, gradient))
    assert all("gradients/histogram/1.weight" not in row for row in rows)
    assert rows[0]["gradients/histogram/0.weight"]["values"] == [2]
    assert "gradients/rms_table" not in rows[-1]
    zero, nan = table(logged, "layers")["data"]
    assert (zero[4], zero[6:]) == (0, [1, 0])
    assert nan[-1] == 3


def test_log_thins_to_so_many_records(logged: Logged) -> None:
    h = make_history(LOG2, 1, 21)
    steps = [
        row["gradients/step"]
        for row in logged(h, max_records=3)
        if "gradients/histogram/0.weight" in row
    ]
    assert steps == [0, 10, 20]


def test_write_makes_an_offline_run(tmp_path: Path) -> None:
    done: list[int] = []
    h = make_history(LOG2, 2, 250)
    folder = viewer.write(h, tmp_path / "runs", "today", progress=done.append)
    assert folder.parent == tmp_path / "runs" / "wandb"
    (path,) = folder.glob("*.wandb")
    runs = [each.run for each in records(path) if each.WhichOneof("record_type") == "run"]
    assert {(run.project, run.display_name) for run in runs} == {("gradstat", "today")}
    steps = [each for each in records(path) if each.WhichOneof("record_type") == "history"]
    assert len(steps) == 100 + 1
    assert (len(done), sum(done)) == (100, 250)


def test_the_lines_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    page = (ROOT / "docs" / "viewers.md").read_text()
    (code,) = re.findall(r"^```py\n([^`]*wandb[^`]*)^```$", page, re.MULTILINE)
    model = torch.nn.Linear(2, 1)
    names = {"gradstat": gradstat, "model": model, "history": make_history(LOG2)}
    exec(code, names | {"train": lambda model: model(torch.ones(1, 2)).sum().backward()})
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert sum(each.WhichOneof("record_type") == "history" for each in records(path)) == 4 + 2


def test_write_leaves_a_run_that_is_going_on_alone(tmp_path: Path) -> None:
    settings = wandb.Settings(mode="offline", silent=True, console="off")
    with wandb.init(project="test", dir=tmp_path, settings=settings) as run:
        message = rf"write\(\) needs a process without a run; {run.id} is going on"
        with pytest.raises(ValueError, match=message):
            viewer.write(make_history(LOG2), tmp_path / "other", "today")
        run.log({"loss": 1.0})
    assert not (tmp_path / "other").exists()
    wandb.teardown()


def test_log_refuses_what_is_not_a_run() -> None:
    message = r"log\(\) needs a run of wandb\.init\(\); run is NoneType"
    with pytest.raises(TypeError, match=message):
        viewer.log(make_history(LOG2), None)
    with pytest.raises(ValueError, match=r"log\(\) needs a number of 1 or more; max_records is 0"):
        viewer.log(make_history(LOG2), None, max_records=0)


def test_log_keeps_what_was_logged_at_its_steps(logged: Logged) -> None:
    h = make_history(LOG2, layers=2, steps=3)
    for step, value in ((0, 1.5), (2, 0.25), (4, 2.0), (4, 3.0)):
        h.add_scalar("loss", step, value)
    found = {}
    for row in logged(h):
        if "scalars/loss" in row:
            found[row["gradients/step"]] = row["scalars/loss"]
    assert found == {0: 1.5, 2: 0.25, 4: 3.0}


def test_log_names_histograms_as_wandb_watch(logged: Logged) -> None:
    h = make_history(LOG2, ["a"], 2, kinds=("grad", "param"))
    shown = {key for row in logged(h, tags="kind") for key in row}
    assert {"gradients/a", "parameters/a", "gradients/step", "gradients/layers"} <= shown
    assert "gradients/histogram/a" not in shown
    with pytest.raises(ValueError, match="tags 'layer' or 'kind'; tags is 'x'"):
        viewer.log(h, None, tags="x")


def train(run: Any, **options: Any) -> History:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    with gradstat.watch(model, sink=viewer.writer(run, **options)) as w:
        for step in range(3):
            model.zero_grad()
            loss = model(torch.full((2, 4), 1.0 + step)).square().mean()
            loss.backward()
            w.log(loss=loss, tokens=step)
            if not options.get("commit", True):
                run.log({"mine": step}, step=step)
    return w.history


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without times and the names of files."""
    return [
        {key: value for key, value in row.items() if key[0] != "_" and not isinstance(value, dict)}
        | {key: value["values"] for key, value in row.items() if "histogram/" in key}
        | {key: ... for key in row if key.endswith(("/layers", "_table"))}
        for row in rows
    ]


def test_writer_logs_what_log_does(logged: Logged, tmp_path: Path) -> None:
    found: list[History] = []
    live = logged.run(lambda run: found.append(train(run)))
    hidden = {metric.glob_name or metric.name for metric in logged.metrics if metric.options.hidden}
    assert {"gradients/step", "gradients/histogram/*"} <= hidden
    shutil.rmtree(tmp_path / "wandb")
    assert comparable(live) == comparable(logged(found[0]))
    assert [row.get("scalars/tokens") for row in live] == [0, 1, 2, None]


def test_writer_adds_to_the_rows_of_others(logged: Logged) -> None:
    rows = logged.run(lambda run: train(run, commit=False))
    assert [(row["mine"], row["gradients/step"]) for row in rows] == [(0, 0), (1, 1), (2, 2)]
    assert all(row["scalars/loss"] > 0 for row in rows)


def test_writer_does_not_stop_a_training_whose_run_is_finished(logged: Logged) -> None:
    model, found = torch.nn.Linear(4, 1), []

    def use(run: Any) -> None:
        with gradstat.watch(model, sink=viewer.writer(run)) as w:
            for step in range(5):
                model(torch.ones(2, 4)).sum().backward()
                if step == 2:
                    run.finish()
        found.append(w.history)

    with pytest.warns(RuntimeWarning, match=r"wandb.writer\(\) has stopped writing") as caught:
        logged.run(use)
    assert len([each for each in caught if "stopped writing" in str(each.message)]) == 1
    assert len(found[0]) == 5


def test_writer_logs_all_of_a_watch_that_is_never_closed(tmp_path: Path) -> None:
    script = """
import sys, torch, wandb, gradstat
from gradstat.integrations import wandb as viewer
settings = wandb.Settings(mode="offline", silent=True, console="off", x_disable_stats=True)
run = wandb.init(project="test", dir=sys.argv[1], settings=settings)
model = torch.nn.Linear(4, 1)
w = gradstat.watch(model, sink=viewer.writer(run))
for step in range(3):
    model(torch.ones(2, 4)).sum().backward()
"""
    subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", script, str(tmp_path)], check=True
    )
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    steps, keys = [], set()
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            keys |= set(row)
            steps.append(row.get("gradients/step"))
    assert steps == ["0", "1", "2", None]
    assert {"gradients/layers", "gradients/rms_table"} <= keys


def test_writer_refuses_by_name() -> None:
    with pytest.raises(TypeError, match=r"writer\(\) needs a run of wandb.init\(\); run is None"):
        viewer.writer(None)
    with pytest.raises(ValueError, match="tags 'layer' or 'kind'; tags is 'x'"):
        viewer.writer(None, tags="x")
