"""Passes of small gradients are measured several at a time, and nothing else shows of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recording import (
    SCHEMES,
    WEIGHTS,
    assert_record,
    assert_same,
    backward,
    gradients,
    make_model,
)
from torch import nn

import gradstat
from gradstat import History, LinearBins, Log2Bins, deferred
from gradstat.bins import Bins
from gradstat.engines import cpu


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each launch has measured."""
    sizes: list[int] = []
    original = cpu.measure

    def measure(tensors: Any, *arguments: Any) -> Any:
        sizes.append(len(tensors))
        return original(tensors, *arguments)

    monkeypatch.setattr(cpu, "measure", measure)
    return sizes


def test_small_passes_are_measured_sixteen_at_a_time(launches: list[int]) -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        for _ in range(37):
            backward(model)
        assert launches == [48, 48]
        assert len(w.history) == 37
        assert launches == [48, 48, 15]


@pytest.mark.parametrize("bins", SCHEMES, ids=str)
def test_small_passes_have_the_records_that_they_would_have_alone(bins: Bins) -> None:
    model, expected = make_model(), []
    with gradstat.watch(model, bins, every=2) as w:
        for step in range(40):
            model.zero_grad()
            if step == 4:
                model[2].requires_grad_(False)
            backward(model)
            if step % 2 == 0:
                names = WEIGHTS if step < 4 else [WEIGHTS[0], WEIGHTS[2]]
                expected.append(gradients(model, names))
    assert w.history.steps.tolist() == list(range(0, 40, 2))
    for step, tensors in zip(w.history.steps, expected, strict=True):
        record = w.history.record(int(step))
        kept = record if len(tensors) == 3 else None
        if kept is None:
            assert int(record.numel[1]) == 0
        elif not (isinstance(bins, LinearBins) and bins.track):
            assert_record(kept, gradstat.statistics(tensors, bins))
        for row, tensor in zip((0, len(record) - 1), (tensors[0], tensors[-1]), strict=True):
            assert float(record.sum[row]) == float(gradstat.statistics(tensor).sum)


def test_small_and_large_passes_come_in_their_order() -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(400, 400)])
    with gradstat.watch(model) as w:
        for step in range(40):
            model.zero_grad()
            part = model[1] if step % 5 == 4 else model[0]
            part(torch.full((1, part.in_features), float(step))).sum().backward()
    assert w.history.steps.tolist() == list(range(40))
    largest = w.history["max"]
    assert [float(largest[s, int(s % 5 == 4)]) for s in range(40)] == list(range(40))


def test_small_pass_is_measured_before_its_gradient_changes() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        backward(model)
        expected = gradstat.statistics(gradients(model, WEIGHTS))
        for parameter in model.parameters():
            parameter.grad.zero_()
        assert_record(w.last, expected)


def test_small_passes_do_not_wait_for_longer_than_a_second(
    monkeypatch: pytest.MonkeyPatch, launches: list[int]
) -> None:
    now_s = [100.0]
    monkeypatch.setattr(deferred.time, "monotonic", lambda: now_s[0])
    model = make_model()
    with gradstat.watch(model):
        for _ in range(6):
            backward(model)
            now_s[0] += 0.6
    assert launches == [9, 9]


def test_small_passes_are_written_when_the_journal_is_due(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("gradstat.journal._INTERVAL_S", 0.0)
    model = make_model()
    with gradstat.watch(model, path=tmp_path / "run") as w:
        for n in range(1, 4):
            backward(model)
            assert len(History.load(tmp_path / "run")) == n
    assert_same(History.load(tmp_path / "run"), w.history)


@pytest.mark.parametrize(
    "options",
    [{"bins": LinearBins(6, track=True)}, {"sink": lambda step, record: None}],
    ids=["tracked", "sink"],
)
def test_passes_do_not_wait_where_the_next_needs_them(
    options: dict[str, Any], launches: list[int]
) -> None:
    model = make_model()
    with gradstat.watch(model, **options):
        for _ in range(3):
            backward(model)
    assert launches == [3, 3, 3]


def test_small_passes_of_several_dtypes_are_measured_at_once(launches: list[int]) -> None:
    model = nn.ModuleList([nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4)])
    with gradstat.watch(model) as w:
        for _ in range(2):
            model.zero_grad()
            y = model[0](torch.ones(1, 4, dtype=torch.bfloat16))
            model[1](y.float()).sum().backward()
            expected = [model[i].weight.grad.clone() for i in (0, 1)]
    assert launches == [2, 2]
    assert_record(w.last, gradstat.statistics(expected, Log2Bins()))


def test_small_pass_after_a_failed_one_is_clean() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        backward(model)
        with pytest.raises(RuntimeError):
            model(torch.randn(8, 6)).backward(torch.ones(3))
        backward(model)
    assert len(w.history) == 2
