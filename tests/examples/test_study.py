import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from legibility import assert_legible
from matplotlib import image, pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from programs import run_python

from gradstat import History, LinearBins, Log2Bins

sys.path.insert(0, str(ROOT / "examples"))
import figures
import relu_vs_sigmoid as study
from claims import Verdict
from test_digits import example, write_idx

STUDY = ROOT / "examples" / "relu_vs_sigmoid.py"
LAYERS = [f"layer{i}.weight" for i in (1, 2, 3, 4)]
NETWORKS = ["ReLU", "sigmoid"]
FIGURES = [
    *("1_activations", "2_octaves", "2_ridge", "2_ridge_relu", "2_ridge_sigmoid", "3_loss"),
    *("4_mean", "5_log2", "5_magnitude"),
]
FILES = sorted(
    [f"{name}.png" for name in FIGURES]
    + [f"{n.lower()}_{kind}.npz" for n in NETWORKS for kind in ("every_step", "each_epoch")]
    + [f"{n.lower()}.html" for n in NETWORKS]
)


@dataclass(frozen=True)
class Finished:
    """A run of the script, and the folder that it wrote."""

    code: int
    stdout: str
    stderr: str
    out: Path

    def verdicts(self) -> list[tuple[str, str, str]]:
        """Verdict, claim and numbers of each claim that was printed."""
        pattern = r"^ *(held|NOT held|not asked)  (.+(?:\n {11}a share .+)?)\n {11}(.+)$"
        return re.findall(pattern, self.stdout, re.MULTILINE)

    def history(self, network: str, kind: str) -> History:
        return History.load(self.out / f"{network.lower()}_{kind}.npz")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Warnings of a script are errors.
STRICT = """
import runpy, sys, warnings
warnings.simplefilter("error")
del sys.argv[0]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WITHOUT_FIGURES = """
import sys, warnings
warnings.simplefilter("error")
sys.path[0] = sys.argv.pop(1)
import relu_vs_sigmoid as study
study.figures = lambda *_: []
sys.exit(study.main())
"""


def run_script(code: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    # What Triton is told about these tests is nothing to the script.
    return run_python("-c", code, *arguments, cwd=folder, TRITON_INTERPRET=None)


def run_study(folder: Path, *arguments: object) -> Finished:
    run = run_script(*arguments, "--out", "results", folder=folder)
    return Finished(run.returncode, run.stdout, run.stderr, folder / "results")


@pytest.fixture(scope="module")
def on_digits(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run_study(tmp_path_factory.mktemp("digits"), STRICT, STUDY, "--epochs", "10")


@pytest.fixture(scope="module")
def on_mnist(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    # Figures are those of the other run, and take the script most of its time.
    arguments = "--epochs", "1", "--data", "mnist", "--live"
    folder = tmp_path_factory.mktemp("mnist")
    return run_study(folder, WITHOUT_FIGURES, STUDY.parent, *arguments)


def test_every_claim_that_ten_epochs_can_answer_holds(on_digits: Finished) -> None:
    assert on_digits.code == 0, on_digits.stderr
    verdicts = on_digits.verdicts()
    assert [word for word, *_ in verdicts] == ["held"] * 5 + ["not asked"] + ["held"] * 2
    assert verdicts[5][2] == "needs 50 epochs"


def test_every_claim_that_one_epoch_of_mnist_can_answer_holds(on_mnist: Finished) -> None:
    assert on_mnist.code == 0, on_mnist.stderr
    verdicts = on_mnist.verdicts()
    asked = [numbers for word, _, numbers in verdicts if word == "held"]
    assert len(asked) == 3
    assert [numbers for word, _, numbers in verdicts if word != "held"] == [
        *["needs 10 epochs"] * 3,
        "needs 50 epochs",
        "is about --data digits",
    ]


def test_study_writes_its_figures_reports_and_histories_and_nothing_else(
    on_digits: Finished,
) -> None:
    assert names_in(on_digits.out) == FILES
    assert names_in(on_digits.out.parent) == ["results"]
    for figure in FIGURES:
        pixels = image.imread(on_digits.out / f"{figure}.png")
        assert min(pixels.shape[:2]) >= 400
        assert pixels[..., :3].std() > 0.01
    assert "Figures, reports and histories are in results/" in on_digits.stdout


@pytest.mark.parametrize("network", NETWORKS)
def test_histories_have_every_step_and_the_last_of_each_epoch(
    network: str, on_digits: Finished
) -> None:
    every_step = on_digits.history(network, "every_step")
    each_epoch = on_digits.history(network, "each_epoch")
    assert every_step.layers == each_epoch.layers == LAYERS
    assert every_step.steps.tolist() == list(range(400))
    assert each_epoch.steps.tolist() == list(range(10))
    assert every_step.bins == Log2Bins()
    assert each_epoch.bins == LinearBins(30, nice=True)
    for field in ("numel", "zeros", "min", "max", "std", "l1", "l2"):
        np.testing.assert_array_equal(each_epoch[field], every_step[field][39::40])
    sizes = [784 * 10, 100, 100, 100]
    assert (every_step["finite"] == sizes).all()
    for layer, size in zip(LAYERS, sizes, strict=True):
        assert (each_epoch.histograms(layer)[0].sum(1) == size).all()


def test_one_epoch_of_mnist_is_40_steps(on_mnist: Finished) -> None:
    for network in NETWORKS:
        assert len(on_mnist.history(network, "every_step")) == 40
        assert len(on_mnist.history(network, "each_epoch")) == 1


@pytest.mark.parametrize("network", NETWORKS)
def test_each_network_reports_its_progress(network: str, on_digits: Finished) -> None:
    bar = rf"{network}: 100%.*400/400 .*loss \d\.\d+, \|gradient\| layer 1 / layer 4 \d\.\d+"
    assert re.search(bar, on_digits.stderr)


def test_live_without_a_display_says_so_and_goes_on(on_mnist: Finished) -> None:
    message = "--live needs a display; there is none, so training goes on without a window\n"
    assert on_mnist.stdout.count(message) == 1


def test_live_ridge_is_redrawn_in_its_window(
    on_digits: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []
    monkeypatch.setattr(pyplot, "pause", pauses.append)
    pyplot.switch_backend("agg")
    monkeypatch.setattr(FigureCanvasAgg, "required_interactive_framework", "a window system")
    live = figures.LiveRidge()
    try:
        history = on_digits.history("sigmoid", "each_epoch")
        for _ in range(2):
            live("sigmoid", history)
        titles = [ax.get_title() for ax in pyplot.gcf().axes[:-1]]
        assert titles == [f"sigmoid  layer {i}" for i in (1, 2, 3, 4)]
        assert len(pauses) == 2
        pyplot.close("all")
        live("sigmoid", history)
        assert len(pauses) == 2
    finally:
        pyplot.close("all")


def test_every_figure_of_the_study_is_legible(
    on_digits: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = [
        {network: on_digits.history(network, kind) for network in NETWORKS}
        for kind in ("every_step", "each_epoch")
    ]
    losses = {
        network: np.linspace(2.4, end, 400) for network, end in zip(NETWORKS, (1, 2), strict=True)
    }
    drawn = dict(figures.figures(*histories, losses))
    assert sorted(drawn) == sorted(FIGURES)
    for figure in drawn.values():
        assert_legible(figure, monkeypatch)


def write_npz(folder: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.savez(folder / "data.npz", x=x, y=y)
    return folder / "data.npz"


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what takes the script most of its time."""
    monkeypatch.setattr(study, "figures", lambda *_: [])


def check_run_on_file(data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(data), "--epochs", "2", "--batch-size", "20", "--out", str(out)]
    assert study.main(arguments) == 0
    history = History.load(out / "relu_every_step.npz")
    assert len(history) == 6
    assert history["numel"][0].tolist() == [60, 100, 100, 100]
    printed = Finished(0, *capsys.readouterr(), out).verdicts()
    assert {word for word, *_ in printed} == {"not asked"}
    assert printed[0][2] == "is about --data digits and mnist"


@pytest.mark.usefixtures("without_figures")
def test_study_runs_on_an_npz_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    check_run_on_file(write_npz(tmp_path, *example(n=50)), out, capsys)
    assert names_in(out) == [name for name in FILES if not name.endswith(".png")]


@pytest.mark.usefixtures("without_figures")
def test_study_runs_on_an_idx_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_run_on_file(write_idx(tmp_path, *example(n=50)), tmp_path / "out", capsys)


@pytest.mark.usefixtures("without_figures")
def test_study_does_not_ask_the_claims_of_other_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--epochs", "1", "--batch-size", "2500", "--data", "mnist", "--out", str(tmp_path)]
    assert study.main(arguments) == 0
    printed = Finished(0, *capsys.readouterr(), tmp_path).verdicts()
    assert [numbers for _, _, numbers in printed[:-1]] == ["is about batches of 128"] * 7


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(("held", "code"), [(True, 0), (None, 0), (False, 1)])
def test_study_fails_when_a_claim_does_not_hold(
    held: bool | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = [Verdict("a claim", True, ""), Verdict("another", held, "")]
    monkeypatch.setattr(study, "judge", lambda *_: verdicts)
    data = write_npz(tmp_path, *example(n=50))
    assert study.main(["--data", str(data), "--epochs", "1", "--out", str(tmp_path)]) == code


def damaged(folder: Path) -> str:
    path = folder / "data.npz"
    path.write_bytes(b"PK\3\4" + bytes(100))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda p: ["--data", "cifar"], "load() needs digits, mnist or a file; source is 'cifar'"),
        (lambda p: ["--data", damaged(p)], "load() needs an .npz file with the arrays x and y; "),
        (lambda p: ["--epochs", "0"], "--epochs needs a number of 1 or more"),
        (lambda p: ["--epochs", "-3"], "--epochs needs a number of 1 or more"),
        (lambda p: ["--epochs", "ten"], "argument --epochs: invalid int value: 'ten'"),
        (lambda p: ["--batch-size", "0"], "--batch-size needs a number of 1 or more"),
        (lambda p: ["--seed", "-1"], "--seed needs a number of 0 or more"),
        (lambda p: ["--data", "mnist", "--device", "abacus"], "abacus"),
        (lambda p: ["--size", "3"], "unrecognized arguments: --size 3"),
    ],
)
def test_study_refuses_bad_arguments_and_writes_nothing(
    arguments: Callable[[Path], list[str]],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        study.main([*arguments(tmp_path), "--out", str(out)])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1]
    assert printed.out == ""
    assert not out.exists()


def test_study_refuses_a_folder_that_is_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_npz(tmp_path, *example(n=50))
    with pytest.raises(SystemExit) as stopped:
        study.main(["--data", str(data), "--out", str(data)])
    assert stopped.value.code == 2
    assert str(data) in capsys.readouterr().err.splitlines()[-1]


def test_quick_start_prints_what_is_wrong(tmp_path: Path) -> None:
    run = run_script(STRICT, STUDY.with_name("quickstart.py"), folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(
        "severe: vanishing, steps 0 to 99: From 10.weight back to 0.weight the gradient shrinks"
    )
    assert names_in(tmp_path) == ["gradients.png"]
