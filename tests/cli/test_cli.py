import csv
import importlib
import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from findings import noise
from histories import make_history
from programs import run_python
from torch import Tensor

import gradstat
from gradstat import History, LinearBins, Log2Bins
from gradstat.cli import main


def vanishing(step: int, layer: int) -> Tensor:
    return noise(step, layer, 10.0 ** (layer - 4))


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    make_history(Log2Bins(), 3, 25, noise).save(tmp_path / "healthy.npz")
    return tmp_path / "healthy.npz"


@pytest.fixture
def ill(tmp_path: Path) -> Path:
    make_history(Log2Bins(), 3, 25, vanishing).save(tmp_path / "ill.npz")
    return tmp_path / "ill.npz"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--version")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"gradstat {gradstat.__version__}\n"


def test_info_shows_versions_and_the_engine_of_each_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("info") == 0
    shown = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__.partition('+')[0])}", shown, re.M)
    assert re.search(r"^CPU tensors +cpu$", shown, re.M)
    assert re.search(r"^CUDA or ROCm tensors +triton; no such device here$", shown, re.M)
    assert shown.endswith("GRADSTAT_ENGINE is not set\n")
    monkeypatch.setenv("GRADSTAT_ENGINE", "reference")
    assert run("info") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^CPU tensors +reference$", shown, re.M)
    assert shown.endswith("GRADSTAT_ENGINE is 'reference'\n")


def test_info_shows_what_a_run_has_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = make_history(Log2Bins(), 2, 3)
    history.add_scalar("loss", 0, 0.25)
    history.save(tmp_path / "run.npz")
    assert run("info", str(tmp_path / "run.npz")) == 0
    shown = capsys.readouterr().out
    assert "3 records of 2 layers" in shown
    assert re.search(r"^loss +1 +0.25 +0.25", shown, re.M)


def test_info_names_each_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"Card {i}")
    assert run("info") == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^cuda:(\d) tensors \(Card (\d)\) +triton$", shown, re.M) == [
        ("0", "0"),
        ("1", "1"),
    ]


def test_diagnose_exits_with_1_only_for_something_severe(
    healthy: Path, ill: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("diagnose", healthy) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{healthy}: 25 records of 3 layers, steps 0 to 24, Log2Bins()\n")
    assert "severe" not in shown
    assert "note: scale" in shown
    assert run("diagnose", ill) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].startswith("severe: vanishing, steps 0 to 24: From 2.weight back to 0.weight")


def test_diagnose_takes_thresholds(ill: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--threshold", "vanishing_severe=1e-3", "--threshold", "window=5")
    assert run("diagnose", ill, *arguments) == 0
    assert "warning: vanishing" in capsys.readouterr().out
    milder = ("--threshold", "vanishing_ratio=1e-3", "--threshold", "vanishing_severe=1e-3")
    assert run("diagnose", ill, *milder) == 0
    assert "vanishing" not in capsys.readouterr().out


def test_diagnose_prints_json(ill: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diagnose", ill, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    expected = History.load(ill).diagnose()
    assert [(f["kind"], f["layer"], f["steps"], f["numbers"], f["sentence"]) for f in found] == [
        (f.kind, f.layer, list(f.steps), f.numbers, f.sentence) for f in expected
    ]


def test_diagnose_prints_null_for_what_json_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rising(step: int, layer: int) -> Tensor:
        return noise(step, layer, 1.0).double() * (1e-200 if step < 15 else 1e200)

    make_history(Log2Bins(), 2, 25, rising).save(tmp_path / "run.npz")
    run("diagnose", tmp_path / "run.npz", "--json")
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    (spike,) = (each for each in found if each["kind"] == "gradient spike")
    assert spike["numbers"]["times"] is None


def test_diagnose_sums_up_layers_that_show_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_history(LinearBins(3), 9, 25, lambda *_: torch.zeros(4)).save(tmp_path / "dead.npz")
    assert run("diagnose", tmp_path / "dead.npz") == 1
    shown = capsys.readouterr().out
    assert shown.count("severe: dead") == 1
    assert "8 other layers." in shown
    assert "8.weight" not in shown
    assert run("diagnose", tmp_path / "dead.npz", "--all") == 1
    shown = capsys.readouterr().out
    assert shown.count("severe: dead") == 1
    assert "7.weight, 8.weight." in " ".join(shown.split())


def test_diagnose_shows_three_of_a_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = make_history(LinearBins(3), 1, 260, lambda step, layer: torch.ones(4))
    for step in range(260):
        history.add_scalar(
            "loss", step, 1.0 + step % 3 / 100 + 9 * (step % 40 in (20, 21) and step > 50)
        )
    history.save(tmp_path / "spikes.npz")
    assert run("diagnose", tmp_path / "spikes.npz") == 0
    shown = capsys.readouterr().out
    assert shown.count("warning: loss spike") == 3
    assert "\n  and 2 more like it (--all shows them)\n" in shown
    assert run("diagnose", tmp_path / "spikes.npz", "--all") == 0
    assert capsys.readouterr().out.count("warning: loss spike") == 5


def test_export_writes_a_table_into_a_new_directory(
    ill: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "tables"
    assert run("export", ill, "--to", "csv", folder) == 0
    assert capsys.readouterr().out == f"{folder / 'ill.csv'}\n"
    with (folder / "ill.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["layer"] for row in table] == History.load(ill).layers * 25


@pytest.mark.integrations
def test_export_writes_parquet(ill: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run("export", ill, "--to", "parquet", tmp_path) == 0
    assert parquet.read_table(tmp_path / "ill.parquet").num_rows == 75


@pytest.mark.integrations
def test_export_writes_a_run_of_tensorboard(ill: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert run("export", ill, "--to", "tensorboard", tmp_path / "runs") == 0
    (file,) = (tmp_path / "runs" / "ill").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    assert run("export", ill, "--to", "tensorboard", tmp_path / "runs") == 2
    assert list((tmp_path / "runs" / "ill").iterdir()) == [file]


@pytest.mark.integrations
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
def test_export_writes_an_offline_run_of_wandb(
    ill: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    assert run("export", ill, "--to", "wandb", tmp_path / "runs") == 0
    folder = Path(capsys.readouterr().out.removesuffix("\n"))
    assert folder.parent == tmp_path / "runs" / "wandb"
    assert list(folder.glob("*.wandb"))


@pytest.mark.parametrize(
    ("package", "name"), [("tensorboard", "TensorBoard"), ("wandb", "Weights & Biases")]
)
def test_export_says_which_viewer_is_missing(
    package: str,
    name: str,
    ill: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in [package, *(each for each in sys.modules if each.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"gradstat.integrations.{package}", raising=False)
    monkeypatch.delattr(f"gradstat.integrations.{package}", raising=False)
    assert run("export", ill, "--to", package, tmp_path / "runs") == 2
    message = f"gradstat needs {name} here: pip install {package}"
    assert capsys.readouterr().err == f"gradstat export: error: {message}\n"


def test_report_writes_a_page_named_after_the_run(
    ill: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("report", ill) == 0
    assert capsys.readouterr().out == "ill.html\n"
    assert "<h1>ill</h1>" in Path("ill.html").read_text(encoding="utf-8")
    assert run("report", ill, "-o", tmp_path / "page.html") == 0
    assert (tmp_path / "page.html").read_bytes() == Path("ill.html").read_bytes()


def test_export_gives_a_target_the_run_its_name_and_a_progress_bar(
    ill: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = []

    def to_csv(history: History, path: Path, progress: Callable[[int], object]) -> None:
        progress(len(history))
        given.append((len(history), path))

    monkeypatch.setattr("gradstat.tables.to_csv", to_csv)
    assert run("export", ill, "--to", "csv", tmp_path) == 0
    assert given == [(25, tmp_path / "ill.csv")]
    assert capsys.readouterr().out == f"{tmp_path / 'ill.csv'}\n"


def test_export_says_which_package_is_missing(
    ill: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run("export", ill, "--to", "parquet", tmp_path) == 2
    message = 'to_parquet() needs pyarrow: pip install "gradstat[tables]"'
    assert capsys.readouterr().err == f"gradstat export: error: {message}\n"


def test_help_lists_every_command_and_explains_run(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["diagnose"], ["export"], ["report"], ["compare"], ["tail"]):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert "RUN" in shown
        names = arguments or ["info", "diagnose", "export", "report", "compare", "tail"]
        assert all(re.search(rf"\b{name}\b", shown) for name in names)


def test_commands_read_a_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(3, 2)
    with gradstat.watch(model, path=tmp_path / "run"):
        for _ in range(4):
            model(torch.rand(5, 3)).square().sum().backward()
    assert run("diagnose", tmp_path / "run") == 0
    assert "4 records of 1 layer, steps 0 to 3" in capsys.readouterr().out
    assert run("export", tmp_path / "run", "--to", "csv", tmp_path) == 0
    assert (tmp_path / "run.csv").read_text().count("\n") == 5
    assert run("tail", tmp_path / "run", "--updates", "1") == 0
    assert f"{tmp_path / 'run'}: step 3" in capsys.readouterr().out


def test_command_runs_as_a_module_and_stops_when_nobody_reads(ill: Path) -> None:
    done = run_python("-m", "gradstat", "diagnose", ill, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "")
    assert "severe: vanishing" in done.stdout
    with subprocess.Popen(
        [sys.executable, "-m", "gradstat", "diagnose", str(ill), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


def test_tail_ends_cleanly_with_ctrl_c(ill: Path) -> None:
    # A shell that starts its jobs in the background has them ignore Ctrl-C.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from gradstat.cli import main; sys.exit(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, "tail", str(ill)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == f"{ill}: step 24\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert errors == ""
    assert process.returncode == 0


def test_import_of_gradstat_leaves_the_command_and_its_packages_out() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); assert 'gradstat' not in before; "
        "import gradstat; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'pandas', 'pyarrow', 'tqdm', 'matplotlib', 'numba', 'triton'}), "
        "[name for name in ('cli', 'screens', 'tables', 'rules') if f'gradstat.{name}' in "
        "sys.modules])"
    )
    assert run_python("-c", code, cwd=ROOT, check=True).stdout == "[] []\n"


def test_the_command_of_the_package_is_main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["gradstat"].partition(":")
    assert getattr(importlib.import_module(module), name) is main
