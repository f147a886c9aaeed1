"""A run that is thinned as it comes, and what of it a page is sent that has seen some."""

import base64
import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from histories import falling, make_history

import gradstat
from gradstat import History
from gradstat.bins import Bins
from gradstat.report import thin
from gradstat.report.live_run import Growing

LOG2 = gradstat.Log2Bins()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "_MAX_COLUMNS", 8)
    monkeypatch.setattr(thin, "_MIN_COLUMNS", 8)
    monkeypatch.setattr(thin, "_MAX_SAMPLES", 5)


def recorded(steps: int, bins: Bins = LOG2, layers: int = 3) -> History:
    def gradient(step: int, layer: int) -> torch.Tensor:
        x = falling(step, layer)
        x[: step % 3] = [0.0, math.nan, 0.0][layer % 3]
        return x

    return make_history(bins, layers, steps, gradient, absent=[(4, 1), (7, 0)])


def cut(history: History, start: int, stop: int) -> History:
    """Some of the records, and what was logged at their steps."""
    part = History(history.rows, history.bins)
    for step in history.steps[start:stop].tolist():
        part.append(step, history.packed(history.find(step)).data)
        part.add_scalar("loss", step, float(step % 7))
    return part


def arrays_of(told: dict[str, Any]) -> dict[str, np.ndarray]:
    data = base64.b64decode(told["data"])
    return {
        name: np.frombuffer(data, f"<{kind}", length, offset)
        for name, (kind, offset, length) in told["arrays"].items()
    }


class Page:
    """Adds up what it is sent, as the page's script does."""

    def __init__(self) -> None:
        self.version = 0
        self.n_whole = 0
        self.steps: list[list[int]] = []
        self.columns: dict[str, np.ndarray] = {}
        self.samples: dict[int, list[np.ndarray]] = {}
        self.newest: dict[str, np.ndarray] = {}

    def ask(self, growing: Growing, version: int) -> dict[str, Any]:
        told = json.loads(json.dumps(growing.since(self.version), allow_nan=False))
        self.version = version
        if "head" in told:
            self.n_whole += 1
            self.steps, self.columns, self.samples = [], {}, {}
        arrays, start, n = arrays_of(told), told["from"], len(told["steps"])
        self.steps = self.steps[:start] + told["steps"]
        layers = 3
        for name, rows in (
            *((x, layers) for x in ("level", "least", "most", "zeros", "nonfinite")),
            *((f"series{x}", len(told["series"])) for x in ("Mean", "Least", "Most", "Nonfinite")),
        ):
            new = arrays[name].reshape(rows, n)
            before = self.columns.get(name, np.empty((rows, 0)))
            self.columns[name] = np.concatenate([before[:, :start], new], 1)
        ends = np.cumsum(arrays["sampleRows"].reshape(-1, layers).sum(1))
        for at, step in enumerate(told["samples"]):
            row = slice(at * layers, (at + 1) * layers)
            counts = arrays["sampleCounts"][(ends[at - 1] if at else 0) : ends[at]]
            names = ("First", "Rows", "Finite", "Zeros", "Nonfinite")
            self.samples[step] = [counts, *(arrays[f"sample{x}"][row] for x in names)]
        self.samples = {step: self.samples[step] for step in told["kept"]}
        self.newest |= {k: v for k, v in arrays.items() if k.startswith("newest")}
        return told


def assert_same(one: Page, other: Page) -> None:
    assert one.steps == other.steps
    for name, values in other.columns.items():
        np.testing.assert_array_equal(one.columns[name], values, err_msg=name)
    assert list(one.samples) == list(other.samples)
    for step, parts in other.samples.items():
        for mine, theirs in zip(one.samples[step], parts, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    for name, values in other.newest.items():
        np.testing.assert_array_equal(one.newest[name], values)


def whole(growing: Growing) -> Page:
    page = Page()
    page.ask(growing, 0)
    return page


@pytest.mark.parametrize("sizes", [[1] * 40, [40], [3, 1, 0, 17, 2, 9, 8], [0, 39, 1]])
@pytest.mark.usefixtures("few")
def test_growing_is_the_same_however_the_run_comes(sizes: list[int]) -> None:
    history, ends = recorded(40), np.cumsum(sizes)
    growing = Growing(cut(history, 0, sizes[0]), 100)
    for number, (start, stop) in enumerate(pairwise(ends), 101):
        growing.add(cut(history, start, stop), number)
    # 8 records in each of 5 columns.
    sums = thin.Sums.of(history).together(np.arange(0, 40, 8))
    page = whole(growing)
    assert page.steps == sums.steps.tolist()
    for name in ("level", "least", "most", "zeros", "nonfinite"):
        expected = getattr(sums.columns(), name)
        np.testing.assert_allclose(page.columns[name], expected, rtol=1e-6, err_msg=name)
    assert list(page.samples) == [0, 16, 32, 39]
    sample = thin.sample(history, 32)
    np.testing.assert_array_equal(page.samples[32][0], sample.counts)


@pytest.mark.usefixtures("few")
def test_pages_that_ask_at_any_time_have_the_same(generator: torch.Generator) -> None:
    history, version = recorded(60), 1000
    pages = [Page() for _ in range(3)]
    growing, start = Growing(cut(history, 0, 1), version), 1
    while start < 60:
        stop = min(60, start + int(torch.randint(1, 4, (), generator=generator)))
        version += 1
        growing.add(cut(history, start, stop), version)
        start = stop
        for number, page in enumerate(pages):
            if version % (number + 1) == 0 or start == 60:
                page.ask(growing, version)
                assert_same(page, whole(growing))
    # Everything is sent at first, and when the run was thinned: at 9, 17 and 33 records.
    assert pages[0].n_whole == 4


@pytest.mark.usefixtures("few")
def test_growing_sends_what_is_new_alone() -> None:
    history = recorded(60)
    growing = Growing(cut(history, 0, 50), 1)
    page = Page()
    page.ask(growing, 1)
    growing.add(cut(history, 50, 51), 2)
    told = page.ask(growing, 2)
    # The column that is not full yet, and the newest record's histograms.
    assert told["from"] == 6
    assert told["steps"] == [[48, 50]]
    assert told["samples"] == [50]
    assert "head" not in told
    told = page.ask(growing, 2)
    assert (told["steps"], told["samples"], told["from"]) == ([], [], 7)
    assert "newestRms" not in told["arrays"]


def test_growing_sends_columns_whose_loss_comes_late() -> None:
    history = recorded(6)
    growing, page = Growing(cut(history, 0, 6), 1), Page()
    page.ask(growing, 1)
    late = History(history.rows, history.bins)
    late.add_scalar("loss", 5, 100.0)
    growing.add(late, 2)
    told = page.ask(growing, 2)
    assert told["from"] == 5
    assert_same(page, whole(growing))
    late = History(history.rows, history.bins)
    late.add_scalar("lr", 2, 1.0)
    growing.add(late, 3)
    # There is another line.
    assert "head" in page.ask(growing, 3)
    assert_same(page, whole(growing))


@pytest.mark.parametrize("bins", [LOG2, gradstat.LinearBins(30), gradstat.LinearBins(4, -1.0, 1.0)])
def test_growing_of_a_short_run_is_as_the_report(bins: Bins) -> None:
    history = recorded(9, bins)
    growing = Growing(cut(history, 0, 4), 1)
    growing.add(cut(history, 4, 9), 2)
    page, columns, samples = whole(growing), thin.columns(history), thin.samples(history)
    for name in ("level", "least", "most", "zeros", "nonfinite"):
        np.testing.assert_array_equal(page.columns[name], getattr(columns, name))
    assert list(page.samples) == [each.step for each in samples]
    for sample, parts in zip(samples, page.samples.values(), strict=True):
        np.testing.assert_array_equal(parts[0], sample.counts)


def test_growing_of_no_records_is_empty() -> None:
    history = History(["a", "b", "c"], LOG2)
    history.add_scalar("loss", 0, 1.0)
    growing = Growing(history, 1)
    assert growing.n_records == 0
    page = whole(growing)
    assert (page.steps, page.samples) == ([], {})
    growing.add(cut(recorded(1), 0, 1), 2)
    page = whole(growing)
    assert page.steps == [[0, 0]]


def test_sums_of_parts_are_those_of_the_whole() -> None:
    x = 1e-320  # squares of it are zero, of 1e300 infinite
    values = [[x, 0.0], [1e300], [1e300] * 3]
    history = make_history(
        LOG2, 1, 3, lambda step, _: torch.tensor(values[step], dtype=torch.float64)
    )
    parts = [thin.Sums.of(cut(history, a, b)) for a, b in ((0, 1), (1, 3))]
    both = parts[0].followed_by(parts[1])
    for added, of_all in zip(both, thin.Sums.of(history), strict=True):
        np.testing.assert_array_equal(added, of_all)
    columns = both.together(np.array([0, 1])).columns()
    expected = [math.log2(x) - 0.5, math.log2(1e300)]
    np.testing.assert_allclose(columns.level[0], expected, rtol=1e-5)


@pytest.mark.usefixtures("few")
def test_samples_that_findings_name_stay_however_long_the_run_becomes() -> None:
    h = recorded(40)
    growing = Growing(cut(h, 0, 8), 1)
    page = Page()
    page.ask(growing, 1)
    assert list(page.samples) == [0, 2, 4, 6, 7]
    growing.take_findings(cut(h, 0, 8), [{"at": 5}, {"at": 4}], 2)
    told = page.ask(growing, 2)
    # The page has one of them already.
    assert told["samples"] == [5]
    assert list(page.samples) == [0, 2, 4, 5, 6, 7]
    for version, (start, stop) in enumerate(((8, 20), (20, 33), (33, 40)), start=3):
        growing.add(cut(h, start, stop), version)
        page.ask(growing, version)
        assert {4, 5} <= set(page.samples)
        assert_same(page, whole(growing))
    for step, parts in page.samples.items():
        np.testing.assert_array_equal(parts[0], thin.sample(h, step).counts)
    growing.take_findings(h, [{"at": 5}], 6)
    page.ask(growing, 6)
    assert 4 not in page.samples
    assert 5 in page.samples
