"""The benchmarks that need a GPU must not break while there is none."""

import json
import os
import re
from pathlib import Path

import pytest
from conftest import CUDA, ROOT
from legibility import assert_legible
from matplotlib.patches import Rectangle
from programs import run_python

SUITE = ROOT / "bench" / "gpu_suite.py"
WATCHED = "gradstat.watch"
# The same with the interpreter that the tests have.
INTERPRETED = """
import runpy, sys, warnings
import faster_interpreter
faster_interpreter.install()
warnings.simplefilter("ignore")  # NumPy's, of NaN and infinities that the kernels expect
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# `make test-cuda` runs it on the CUDA device in software, through graphs and compiled networks.
def test_gpu_suite_goes_through_in_a_dry_run(tmp_path: Path) -> None:
    command, environment = [SUITE, "--dry-run", "--out", tmp_path], {}
    if not CUDA:
        path = os.pathsep.join([str(ROOT / "bench"), str(ROOT / "tests")])
        environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
        command[:0] = ["-c", INTERPRETED]
    done = run_python(*command, check=True, **environment)
    document = json.loads((tmp_path / "dry-run.json").read_text())
    rows = document["benchmarks"]
    assert {row["suite"] for row in rows} == {"tensors", "lists", "training"}
    modes = {"eager", "compiled", "graphed"} if CUDA else {"eager"}
    watched = {(row["network"], row["mode"]) for row in rows if row["contestant"] == WATCHED}
    assert watched == {(network, mode) for network in ("MLP", "GPT-2 small") for mode in modes}
    # No time is told.
    assert {row["median"] for row in rows} == {1.0}
    assert "median" not in done.stdout
    assert (tmp_path / "dry-run.png").stat().st_size > 0
    table = (tmp_path / "dry-run.md").read_text()
    assert "nothing was measured" in table if CUDA else "nothing is predicted" in table


@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
def test_gpu_suite_says_that_there_is_no_gpu_and_what_it_would_run(tmp_path: Path) -> None:
    done = run_python(SUITE, "--out", tmp_path)
    assert done.returncode == 1
    assert "There is no CUDA device here, so nothing was measured" in done.stdout
    assert "a training step of MLP and of GPT-2 small" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_call_of_the_triton_engine_costs_the_host_little() -> None:
    # The sizes that are looked at, and the least of fewer rounds.
    code = "import host; host.TENSORS, host.ROUNDS = (4, 148, 300), 200; host.main()"
    done = run_python("-c", code, check=True, PYTHONPATH=str(ROOT / "bench"))
    times = {int(n): float(us) for n, us in re.findall(r"(\d+) tensors: +([\d.]+) us", done.stdout)}
    # The targets are 60 us a call and 0.3 us a tensor; the rest is room for other machines.
    assert times[148] <= 120
    assert (times[300] - times[4]) / 296 <= 0.6


def test_merging_of_ranks_is_measured(tmp_path: Path) -> None:
    sizes = ["--ranks", "3", "--layers", "4", "--records", "30"]
    command = ROOT / "bench" / "merge.py", tmp_path / "run", *sizes
    run_python(*command, check=True)
    done = run_python(*command, check=True)
    assert re.search(r"^[0-9.]+ s, [0-9]+ MB at most$", done.stdout, re.MULTILINE)


def test_pages_have_the_figures_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import report

    pages = report.pages(ROOT / "bench" / "results")
    names = {str(path.relative_to(ROOT)) for path in pages}
    assert {"README.md", "docs/what-it-costs.md", "bench/results/xeon/tables.md"} <= names
    assert [path for path, text in pages.items() if path.read_text() != text] == []


def test_summary_takes_the_least_favourable_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import report

    assert report.times(20.99) == "20 times as long"
    assert report.times(3.39) == "3.3 times as long"
    assert report.more([1.0223, 1.0554]) == "+2.2 to 5.5 %"
    assert report.more([1.25, 1.34]) == "+25 to 34 %"
    assert report.more([1.96, 2.16]) == "2.0 to 2.2 times"
    machines = [report.read(ROOT / "bench" / "results" / at) for at in (".", "xeon")]
    both, one, other = (report.summary_table(m) for m in (machines, machines[:1], machines[1:]))
    assert "| 20 times as long |" in both
    assert "| 31 times as long |" in one
    assert "| 31 times as long |" not in both
    assert "+2.1 to 5.5 %" in both
    assert "+2.1 %" in one
    assert "+5.5 %" in other


@pytest.mark.parametrize("suite", ["tensors", "lists", "training"])
def test_plots_of_the_results_have_points_and_no_texts_over_each_other(
    suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import plot

    figure = plot.PLOTS[suite](plot.load(ROOT / "bench" / "results", suite))
    assert_legible(figure, monkeypatch)
    assert not any(isinstance(patch, Rectangle) for ax in figure.axes for patch in ax.patches)
    (key,) = figure.legends
    names = [text.get_text() for text in key.get_texts()]
    assert any(name.startswith("gradstat") for name in names)
    assert not any("prototype" in name for name in names)
    plot.plt.close(figure)
