"""Runs too long to be in memory: the same findings, read some records and rows at a time."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import begin_journal, falling, make_history
from torch import nn

import gradstat
from gradstat import History, Log2Bins
from gradstat.diagnosis import FINDINGS, evidence, usual
from gradstat.history import file
from gradstat.history.records import Records
from gradstat.record import Record

STEPS = 140


class Net(nn.Module):
    """Layers of many kinds: dead, outside the optimizer, without a gradient, saturated."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(m for _ in range(3) for m in (nn.Linear(16, 16), nn.Tanh())),
            nn.Linear(16, 64),
            nn.ReLU(),
            nn.Linear(64, 4),
        )
        self.frozen = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.zero = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.frozen(self.layers(x))
        return out + 0 * self.zero


def train(*, is_scheduled: bool) -> History:
    """A run in which much goes wrong."""
    torch.manual_seed(0)
    model = Net()
    weights = torch.randn(16, 4)
    with torch.no_grad():
        model.layers[0].weight *= 8.0
        model.layers[6].bias -= 40.0
    moved = [p for name, p in model.named_parameters() if not name.startswith("frozen")]
    optimizer = torch.optim.SGD(moved, lr=1e-2)
    formats = ("float8_e4m3fn", "mxfp4_e2m1")
    with gradstat.watch(
        model, what="all", when="step", optimizer=optimizer, formats=formats
    ) as watching:
        for step in range(STEPS):
            x = torch.randn(24 if step % 50 else 4, 16)
            loss = (model(x) - x @ weights).square().mean()
            if step in (70, 71):
                loss = loss * 1e4
            if step == 90:
                loss = loss * float("nan")
            optimizer.zero_grad()
            loss.backward()
            if step == 90:
                for p in moved:
                    p.grad = None if p.grad is None else torch.full_like(p.grad, 1e-4)
            if step == 105:
                with torch.no_grad():
                    model.layers[2].weight *= 30.0
            optimizer.param_groups[0]["lr"] = 0.1 if step == 120 else 1e-2
            optimizer.step()
            # Rates that are not known from the start on.
            rate = {"lr": optimizer.param_groups[0]["lr"]} if is_scheduled and step > 20 else {}
            watching.log(loss=loss.item(), **rate)
    return watching.history


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A network this small gains nothing from a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def eventful() -> History:
    return train(is_scheduled=True)


@pytest.fixture(params=[1, 2000])
def few_cells(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "_CELLS", request.param)
    monkeypatch.setattr(evidence, "_SERIES", 2 * request.param)


def whole(history: History) -> list[gradstat.Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "_CELLS", 1 << 40)
        patch.setattr(evidence, "_SERIES", 1 << 40)
        return history.diagnose()


def same(found: list[gradstat.Finding], expected: list[gradstat.Finding]) -> bool:
    """Whether findings are equal; NaN is."""
    return repr([vars(each) for each in found]) == repr([vars(each) for each in expected])


def test_the_run_shows_much(eventful: History) -> None:
    kinds = {each.kind for each in eventful.diagnose()}
    assert len(kinds) >= 10, sorted(set(FINDINGS) - kinds)


@pytest.mark.parametrize("is_scheduled", [True, False])
def test_diagnose_finds_the_same_some_records_at_a_time(
    is_scheduled: bool, eventful: History, few_cells: None
) -> None:
    history = eventful if is_scheduled else train(is_scheduled=False)
    assert same(history.diagnose(), whole(history))


@pytest.mark.parametrize("kind", ["grad", "activation"])
def test_diagnose_of_one_kind_finds_the_same_some_records_at_a_time(
    kind: str, eventful: History, few_cells: None
) -> None:
    history = eventful.select(kind)
    assert same(history.diagnose(), whole(history))


def test_diagnose_reads_no_field_of_all_records(
    eventful: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_layers = len(eventful.layers)
    monkeypatch.setattr(evidence, "_CELLS", 50 * n_layers)
    monkeypatch.setattr(evidence, "_SERIES", 50 * n_layers)
    most = 0
    column = Records.column

    def counted(records: Records, field: str) -> np.ndarray:
        nonlocal most
        most = max(most, len(records))
        return column(records, field)

    monkeypatch.setattr(Records, "column", counted)
    eventful.diagnose()
    # 64 records are looked at more closely, and two windows before something began.
    assert 50 <= most <= 70


def long_run(path: Path, n_records: int) -> History:
    """A directory of records that come again and again."""
    history = make_history(Log2Bins(), 20, 10, falling)
    journal = begin_journal(path, history)
    records = [history.packed(record).data for record in history.records]
    for step in range(n_records):
        journal.add(Record(step, 0.0, records[step % 10]))
    journal.flush()
    found = History.load(path)
    found.verify()
    return found


def peak_of_diagnosing(history: History) -> int:
    tracemalloc.start()
    history.diagnose()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_diagnose_of_a_longer_run_takes_hardly_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "_CELLS", 10_000)
    monkeypatch.setattr(evidence, "_SERIES", 10_000)
    monkeypatch.setattr(usual, "_CELLS", 500)
    histories = [long_run(tmp_path / str(n), n) for n in (1000, 3000)]
    few, many = map(peak_of_diagnosing, histories)
    # Less than a single field of all records.
    assert many - few < 2000 * 20 * 8


@pytest.mark.parametrize("in_memory", [0, 4_000])
def test_spool_keeps_records_in_a_file(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_IN_MEMORY", in_memory)
    history = make_history(Log2Bins(), 3, 12, falling)
    spool, kept = file.Spool(), []
    for start in range(0, 12, 3):
        kept += spool.keep(history.records[start : start + 3])
    assert any(isinstance(each, file.StoredRecord) for each in kept)
    assert any(isinstance(each, Record) for each in kept) == (in_memory > 0)
    assert [(each.step, each.time_s, each.data) for each in kept] == history.records
    assert spool.keep(kept[-3:]) == kept[-3:]
