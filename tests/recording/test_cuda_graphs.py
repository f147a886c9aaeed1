"""Watch in CUDA graphs: what a replay measured becomes a record. Real graphs are in test_gpu.py.

Here a graph is imitated on the CPU: what is captured runs at once, and a replay measures the same
tensors again, into the same results.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from watching import assert_record, backward, make_model

import gradstat
from gradstat import History, LinearBins, Log2Bins
from gradstat.engines import cpu, together
from gradstat.recording.transfers import Transfer

pytestmark = pytest.mark.host("imitates a graph on the CPU")


class Plan(cpu.Plan):
    """Of an engine for devices, which returns tensors."""

    def run(self, tensors: Sequence[Tensor], *_: object) -> Tensor:
        return together(gradstat.statistics(tensors, self._bins), None)


class Graph:
    """An imitation of `torch.cuda.CUDAGraph`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._runs: list[tuple[Plan, Sequence[Tensor], Tensor]] = []
        monkeypatch.setattr("gradstat.engines.cpu.Plan", Plan)
        # From a device results are copied to the host, and the next replay does not change those.
        monkeypatch.setattr(
            "gradstat.recording.transfers.Transfer", lambda x: Transfer(torch.as_tensor(x).clone())
        )

    @contextmanager
    def capture(self) -> Iterator[None]:
        original = Plan.run

        def run(plan: Plan, tensors: Sequence[Tensor], *_: object) -> Tensor:
            result = original(plan, tensors)
            self._runs.append((plan, tensors, result))
            return result

        with self._monkeypatch.context() as patch:
            for module in ("cuda", "passes"):
                patch.setattr(f"gradstat.recording.{module}.is_capturing", lambda: True)
            patch.setattr("gradstat.recording.cuda.capturing_graph", lambda: self)
            patch.setattr(Plan, "run", run)
            yield

    def replay(self) -> None:
        for plan, tensors, result in self._runs:
            result[:] = plan.run(tensors)


def new_gradients(model: nn.Module) -> list[Tensor]:
    """What a replay would leave in the same memory."""
    weights = [model.get_parameter(name).grad for name in ("0.weight", "2.weight", "4.weight")]
    for gradient in weights:
        gradient.normal_()
    return [gradient.clone() for gradient in weights]


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(8, -1, 1)], ids=str)
def test_replayed_makes_a_record_of_each_replay(
    monkeypatch: pytest.MonkeyPatch, bins: Log2Bins | LinearBins, tmp_path: Path
) -> None:
    model, graph = make_model(), Graph(monkeypatch)
    with gradstat.watch(model, bins, every=2, path=tmp_path / "run") as w:
        backward(model)
        with graph.capture():
            backward(model)
        expected = {}
        for step in range(1, 6):
            expected[step] = new_gradients(model)
            graph.replay()
            w.replayed()
    # The captured pass itself is no record.
    assert w.history.steps.tolist() == [0, 2, 4]
    for step in (2, 4):
        assert_record(w.history.record(step), gradstat.statistics(expected[step], bins))
    assert History.load(tmp_path / "run").steps.tolist() == [0, 2, 4]


def test_replayed_counts_replays_as_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = make_model(), Graph(monkeypatch)
    with gradstat.watch(model, accumulation_steps=2) as w:
        with graph.capture():
            backward(model)
        for _ in range(4):
            gradients = new_gradients(model)
            graph.replay()
            w.replayed()
    assert w.history.steps.tolist() == [0, 1]
    assert_record(w.history.record(1), gradstat.statistics(gradients))


def test_replayed_takes_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = make_model(), Graph(monkeypatch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    what = ("grad", "param", "update", "activation", "grad_output")
    with gradstat.watch(model, what=what, when="step", optimizer=optimizer) as w:
        with graph.capture():
            backward(model)
            optimizer.step()
        graph.replay()
        w.replayed()
    assert len(w.history) == 1
    assert (w.history["numel"] > 0).all()


def test_replayed_needs_a_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = make_model(), Graph(monkeypatch)
    with gradstat.watch(model) as w:
        backward(model)
        with pytest.raises(RuntimeError, match=r"replayed\(\) needs .* captured under watch"):
            w.replayed()
        with graph.capture():
            backward(model)
        w.replayed()
    with pytest.raises(RuntimeError, match="captured under watch"):
        w.replayed()
    assert len(w.history) == 2


def test_capture_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = make_model(), Graph(monkeypatch)
    with gradstat.watch(model, what=("grad", "activation")) as w:
        with graph.capture(), pytest.raises(RuntimeError):
            model(torch.randn(8, 6)).sum().backward(torch.ones(3))
        backward(model)
    assert len(w.history) == 1
