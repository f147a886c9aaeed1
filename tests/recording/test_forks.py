"""Forks and readers beside a thread that trains."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from watching import assert_same, backward, make_model

import gradstat
from gradstat import History

FORKS = """
import atexit, os, sys, threading, time, warnings, torch, gradstat
from contextlib import nullcontext

torch.set_num_threads(1)
model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(30)])
received = []
w = gradstat.watch(model, path=sys.argv[1], sink=lambda step, record: received.append(step))
# PyTorch cannot run a backward pass in a process that was forked within one of the same model.
ends, between = threading.Event(), threading.Lock()

def step():
    model(torch.ones(2, 4)).sum().backward()
    model.zero_grad()

def train():
    while not ends.is_set():
        with between:
            step()

def wait_for(child):
    for _ in range(1000):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, status
            return
        time.sleep(0.02)
    os.kill(child, 9)
    raise AssertionError("a forked process hangs")

def train_in_child():
    n, n_received = len(w.history), len(received)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            step()
    assert len(w.history) == n + 3, (len(w.history), n)
    assert [each.category for each in warned] == [RuntimeWarning], warned
    assert "forked process" in str(warned[0].message)
    assert len(received) == n_received

step()  # imports what is imported by the first one
thread = threading.Thread(target=train, daemon=True)
sys.setswitchinterval(1e-4)
thread.start()
for n in range(20):
    time.sleep(0.001 * (n % 7))
    with between if n % 2 else nullcontext():
        child = os.fork()
    if child == 0:
        if n % 2:
            train_in_child()
        # What exit() calls, without taking the interpreter apart, which takes seconds.
        atexit._run_exitfuncs()
        os._exit(0)
    wait_for(child)
ends.set()
thread.join()
w.close()
steps = w.history.steps.tolist()
assert steps == received == list(range(len(steps)))
assert gradstat.History.load(sys.argv[1]).steps.tolist() == steps
"""


@pytest.mark.faults
@pytest.mark.host("a forked process has no CUDA device")
def test_watch_forked_while_another_thread_trains(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=80,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.faults
@pytest.mark.parametrize("options", [{}, {"capacity": 20}], ids=["all", "capacity"])
def test_watch_history_can_be_read_by_a_thread_beside_training(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model, ends = make_model(), threading.Event()
    torch.manual_seed(0)
    failures: list[BaseException] = []

    def go_on_reading() -> None:
        try:
            while not ends.is_set():
                history = w.history
                history.save(tmp_path / "run.npz")
                if len(saved := History.load(tmp_path / "run.npz")):
                    saved.diagnose()
                    history.diagnose()
                    history.report(tmp_path / "run.html")
                    history.to_csv(tmp_path / "run.csv")
        except BaseException as error:
            failures.append(error)

    with gradstat.watch(model, path=tmp_path / "run", **options) as w:
        reader = threading.Thread(target=go_on_reading)
        reader.start()
        for _ in range(1500):
            backward(model)
            if failures:
                break
        ends.set()
        reader.join()
    assert failures == []
    written = History.load(tmp_path / "run")
    assert written.steps.tolist() == list(range(1500))
    if not options:
        assert_same(written, w.history)


def test_watch_refuses_to_be_entered_again() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        backward(model)
    w.close()
    with pytest.raises(RuntimeError, match=r"^with needs a watch that is not closed"), w:
        pass
    assert len(w.history) == 1


def test_measure_refuses_a_closed_watch() -> None:
    model = make_model()
    w = gradstat.watch(model, when="call")
    backward(model)
    w.measure()
    w.close()
    message = r"^measure\(\) needs a watch that is not closed; watch\(\) again$"
    with pytest.raises(RuntimeError, match=message):
        w.measure()
    assert len(w.history) == 1
