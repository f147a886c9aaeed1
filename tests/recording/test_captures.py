"""Watches beside the capture of a CUDA graph that is not theirs: they leave it whole."""

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradstat
from gradstat import History, Watch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def collect_when_told() -> Iterator[None]:
    """Collect reference cycles where a test says so alone, and not among what stays loaded."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()


def make_model() -> nn.Module:
    return nn.Linear(8, 4).cuda()


def train(model: nn.Module, w: Watch, n_steps: int = 3) -> None:
    """Leave records and losses on their way."""
    for _ in range(n_steps):
        loss = model(torch.randn(4, 8, device="cuda")).square().mean()
        w.log(loss=loss)
        loss.backward()


def assert_captures(meanwhile: Callable[[], object], stream: torch.cuda.Stream) -> None:
    """A graph is whole whatever goes on while it is captured, and pinned memory is to be had."""
    x = torch.zeros(3, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        x += 1
        meanwhile()
        x += 1
    graph.replay()
    for n in range(1, 9):
        assert torch.ones(n * 512, device="cuda").to("cpu", non_blocking=True).numel() == n * 512
        assert torch.empty(n * 512, pin_memory=True).is_pinned()
    assert x.tolist() == [2.0] * 3


def leave_cycle(**options: Any) -> None:
    """Leave a watched model, in a reference cycle, to the garbage collection."""
    model = make_model()
    model.itself = [model]
    train(model, gradstat.watch(model, **options))


@pytest.mark.parametrize("option", ["path", "sink", "alert", None])
def test_watch_collected_during_a_capture_hands_on_its_records(
    option: str | None, tmp_path: Path
) -> None:
    steps: list[int] = []
    options = {
        "path": {"path": tmp_path / "run"},
        "sink": {"sink": lambda step, _: steps.append(step)},
        "alert": {"alert": print},
        None: {},
    }
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        leave_cycle(**options[option])
    assert_captures(gc.collect, stream)
    if option == "path":
        history = History.load(tmp_path / "run")
        assert history.steps.tolist() == [0, 1, 2]
        assert len(history.scalar("loss")[0]) == 3
    if option == "sink":
        assert steps == [0, 1, 2]


@pytest.mark.parametrize(
    "read",
    [lambda w: w.history, lambda w: w.last, Watch.close],
    ids=["history", "last", "close"],
)
def test_watch_read_by_another_thread_leaves_a_capture_whole(
    read: Callable[[Watch], object], tmp_path: Path
) -> None:
    model, stream = make_model(), torch.cuda.Stream()
    w = gradstat.watch(model, path=tmp_path / "run")
    with torch.cuda.stream(stream):
        train(model, w)
    errors: list[BaseException] = []

    def read_or_fail() -> None:
        try:
            read(w)
        except BaseException as error:
            errors.append(error)

    def in_a_thread() -> None:
        thread = threading.Thread(target=read_or_fail)
        thread.start()
        thread.join()

    assert_captures(in_a_thread, torch.cuda.Stream())
    assert errors == []
    w.close()
    assert len(w.history) == len(History.load(tmp_path / "run")) == 3


@pytest.mark.parametrize("has_arrived", [True, False])
def test_records_given_up_during_a_capture_of_their_stream_spoil_no_pinned_memory(
    has_arrived: bool,
) -> None:
    model, stream = make_model(), torch.cuda.Stream()
    w = gradstat.watch(model)
    with torch.cuda.stream(stream):
        train(model, w)
    if has_arrived:
        assert len(w.history) == 3
    watches = [w]
    del w, model

    def give_up() -> None:
        watches.clear()
        gc.collect()

    assert_captures(give_up, stream)


def test_records_are_in_ordinary_memory() -> None:
    model = make_model()
    seen: list[gradstat.Statistics] = []
    with gradstat.watch(model, sink=lambda _, s: seen.append(s)) as w:
        train(model, w)
    assert len(seen) == 3
    for each in (*seen, w.last):
        assert not any(x.is_pinned() for x in (each.integers, each.floats, each.counts))
