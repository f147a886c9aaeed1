"""Sinks that write for viewers while a run goes on."""

import os
import sys

import pytest
import torch
from programs import run_python

import gradstat
from gradstat import History
from gradstat.recording.transfers import RunWriter


class Kept(RunWriter):
    """Keeps what it would write; fails from a step on."""

    def __init__(self, fails_from: float = float("inf")) -> None:
        super().__init__("kept.writer()")
        self.fails_from, self.said = fails_from, []

    def start(self, history: History, first_step: int | None) -> None:
        self.said.append(("start", tuple(history.layers)))

    def write_record(self, record: History, step: int) -> None:
        if step >= self.fails_from:
            raise OSError("no space left")
        assert record.steps.tolist() == [step]
        self.said.append((step, record["l2"][0].tolist()))

    def write_scalar(self, name: str, step: int, value: float) -> None:
        self.said.append((step, name, value))

    def end(self, history: History) -> None:
        self.said.append(("end", len(history)))


def train(writer: RunWriter, steps: int = 3) -> History:
    model = torch.nn.Linear(2, 1, bias=False)
    with gradstat.watch(model, sink=writer) as w:
        for step in range(steps):
            model.zero_grad()
            model(torch.tensor([[3.0, 4.0]])).sum().backward()
            w.log(loss=float(step))
    return w.history


def test_run_writer_is_told_of_all_in_order() -> None:
    writer = Kept()
    train(writer)
    said = writer.said
    assert (said[0], said[-1]) == (("start", ("weight",)), ("end", 3))
    assert [each for each in said[1:-1] if len(each) == 2] == [(n, [5.0]) for n in range(3)]
    assert [each for each in said if len(each) == 3] == [(n, "loss", float(n)) for n in range(3)]


def test_run_writer_that_fails_warns_once_and_stops_no_training() -> None:
    writer = Kept(fails_from=1)
    with pytest.warns(RuntimeWarning, match="kept.writer.. has stopped writing") as caught:
        h = train(writer, 5)
    assert "OSError: no space left" in str(caught[0].message)
    assert len(caught) == 1
    assert len(h) == 5
    # On a device a record arrives after what was logged with it.
    assert all(each[0] in ("start", 0) for each in writer.said if len(each) == 2)
    assert len(writer.said) < 1 + 5 + 5


def test_run_writer_is_for_one_run_and_needs_one() -> None:
    writer = Kept()
    with pytest.raises(RuntimeError, match="needs a watch, as in watch"):
        writer(0, gradstat.statistics([torch.ones(2)]))
    with gradstat.watch(torch.nn.Linear(2, 1), sink=writer, when="call"):
        message = r"a sink of its own; sink is a kept.writer\(\) that writes another run"
        with pytest.raises(ValueError, match=message):
            train(writer)
    train(writer)
    assert [each[0] for each in writer.said].count("end") == 2


def test_run_writer_that_cannot_begin_warns_and_stops_no_training() -> None:
    class Closed(Kept):
        def start(self, history: History, first_step: int | None) -> None:
            raise OSError("no such place")

    writer = Closed()
    with pytest.warns(RuntimeWarning, match="stopped writing.*OSError: no such place"):
        h = train(writer)
    assert len(h) == 3
    assert writer.said == []


@pytest.mark.host("it forks")
def test_run_writer_writes_nothing_in_a_forked_process() -> None:
    script = """
import os
import torch, gradstat
from test_run_writer import Kept
writer, model = Kept(), torch.nn.Linear(2, 1)
w = gradstat.watch(model, sink=writer, when="call")
w.log(loss=1.0)
child = os.fork()
if child == 0:
    w.log(loss=2.0)
    w.close()
    os._exit(len(writer.said))
_, status = os.waitpid(child, 0)
w.close()
print(os.waitstatus_to_exitcode(status), len(writer.said))
"""
    done = run_python("-c", script, check=True, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.stdout.split() == ["2", "3"]
