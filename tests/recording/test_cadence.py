"""Watch in CUDA graphs on a device: replays make the records that eager passes would."""

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import sized
from torch import Tensor, nn

import gradstat
from gradstat import History, LinearBins, Log2Bins, Watch

pytestmark = pytest.mark.gpu


class Training:
    """A model and its optimizer, the same each time, and inputs that stay where they are.

    Args:
        n_passes: of a step.
    """

    def __init__(self, n_passes: int = 1) -> None:
        torch.manual_seed(20)
        layers = nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)
        self.model = nn.Sequential(*layers).cuda()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.inputs = [torch.zeros(16, 24, device="cuda") for _ in range(n_passes)]
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.n_calls = 0

    def load(self) -> None:
        """Other data for the next call."""
        generator = torch.Generator().manual_seed(self.n_calls)
        for x in self.inputs:
            x.copy_(torch.randn(x.shape, generator=generator) * 4.0 ** (self.n_calls % 5))
        self.n_calls += 1

    def one_pass(self, number: int, is_last: bool = False) -> None:
        y = self.model(self.inputs[number])
        nn.functional.smooth_l1_loss(y, torch.ones_like(y)).backward()
        if is_last:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)

    def step(self) -> None:
        for number in range(len(self.inputs)):
            self.one_pass(number, is_last=number == len(self.inputs) - 1)

    def warm_up(self) -> None:
        """Run a step on a stream of its own, as PyTorch asks for before a capture."""
        self.load()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)

    def captured(self) -> torch.cuda.CUDAGraph:
        """A graph of a step, after one to warm up."""
        self.warm_up()
        return capture(self.step)


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def assert_same(history: History, expected: History) -> None:
    assert history.steps.tolist() == expected.steps.tolist()
    for step in expected.steps.tolist():
        one, other = history.record(step), expected.record(step)
        assert torch.equal(one.integers, other.integers)
        assert torch.equal(one.counts, other.counts)
        assert one.floats.numpy().tobytes() == other.floats.numpy().tobytes()


KINDS = {
    "backward": {},
    "weights": {"what": ("grad", "param")},
    "outputs": {"what": ("grad", "activation", "grad_output")},
    "step": {"what": ("grad", "param", "update", "activation"), "when": "step"},
}


def options_of(training: Training, kind: str) -> dict[str, Any]:
    options = dict(KINDS[kind])
    if kind == "step":
        options["optimizer"] = training.optimizer
    return options


def captured_step(training: Training, watches: list[Watch], how: str) -> Callable[[], None]:
    """A step: a graph of it; of four passes, one of each pass, or one of the last pass alone."""
    if how == "whole steps":
        graphs = [capture(training.step)]
    else:
        last = capture(functools.partial(training.one_pass, 3, is_last=True))
        graphs = [capture(functools.partial(training.one_pass, i)) for i in range(3)] + [last]

    def run() -> None:
        for i, graph in enumerate(graphs):
            if how == "the last pass" and i < 3:
                training.one_pass(i)
            else:
                graph.replay()
                for w in watches:
                    w.replayed(graph if len(graphs) > 1 else None)

    return run


def record(
    training: Training, watched: list[dict[str, Any]], n_steps: int, how: str | None
) -> list[History]:
    """The histories of a first step and so many more.

    Args:
        training: whose steps they are.
        watched: options of each watch.
        n_steps: after the first one.
        how: they are captured; ``None``: they are not.
    """
    with ExitStack() as stack:
        watches = [
            stack.enter_context(gradstat.watch(training.model, **options)) for options in watched
        ]
        training.warm_up()
        run = training.step if how is None else captured_step(training, watches, how)
        for _ in range(n_steps):
            training.load()
            run()
    return [w.history for w in watches]


EVERY = 1, 3, 10  # of three watches at once
N_STEPS = sized(on_card=50, in_software=21)


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_makes_the_records_of_eager_steps(kind: str) -> None:
    histories = []
    for how in (None, "whole steps"):
        training = Training()
        options = options_of(training, kind)
        watched = [{"every": every, **options} for every in EVERY]
        histories.append(record(training, watched, N_STEPS, how))
    for every, expected, history in zip(EVERY, *histories, strict=True):
        assert expected.steps.tolist() == list(range(0, N_STEPS + 1, every))
        assert_same(history, expected)


def test_replayed_counts_from_the_first_step_of_a_run_that_is_resumed() -> None:
    options = {"every": 3, "first_step": 7}
    (eager,), (replayed,) = (
        record(Training(), [options], 12, how) for how in (None, "whole steps")
    )
    assert eager.steps.tolist() == [9, 12, 15, 18]
    assert_same(replayed, eager)


@pytest.mark.parametrize("how", ["each pass", "the last pass", "whole steps"])
def test_replayed_makes_the_records_of_eager_steps_of_four_passes(how: str) -> None:
    options = {"accumulation_steps": 4, "what": ("grad", "activation")}
    watched = [{"every": every, **options} for every in EVERY]
    histories = [record(Training(4), watched, N_STEPS, each) for each in (None, how)]
    for every, expected, history in zip(EVERY, *histories, strict=True):
        assert expected.steps.tolist() == list(range(0, N_STEPS + 1, every))
        assert_same(history, expected)


def test_replayed_counts_passes_outside_graphs_and_replays_of_several_graphs() -> None:
    histories = []
    for is_captured in (False, True):
        training = Training()
        options = {"every": 3, "what": ("grad", "activation"), "stream": "side"}
        with gradstat.watch(training.model, **options) as w:
            training.warm_up()
            graphs = [capture(training.step) for _ in range(2)] if is_captured else []
            for number in range(50):
                training.load()
                if not is_captured or number % 7 in (2, 3):
                    training.step()
                else:
                    graph = graphs[number % 2]
                    graph.replay()
                    w.replayed(graph)
                if number == 20 and is_captured:
                    graphs[0] = capture(training.step)
        histories.append(w.history)
    assert_same(histories[1], histories[0])


@pytest.mark.parametrize("is_read", [True, False])
def test_replayed_on_another_stream_than_the_replay(is_read: bool) -> None:
    histories = []
    for is_captured in (False, True):
        training, stream = Training(), torch.cuda.Stream()
        with gradstat.watch(training.model, what=("grad", "activation")) as w:
            training.warm_up()
            graph = capture(training.step) if is_captured else None
            stream.wait_stream(torch.cuda.current_stream())
            for _ in range(12):
                with torch.cuda.stream(stream):
                    training.load()
                    if graph is None:
                        training.step()
                    else:
                        graph.replay()
                if graph is not None:
                    w.replayed()
                if is_read:
                    assert w.history  # waits
            torch.cuda.current_stream().wait_stream(stream)
        histories.append(w.history)
    assert_same(histories[1], histories[0])


def test_replayed_divides_by_the_scale_of_the_replay() -> None:
    training, scales = Training(), (8.0, 2.0, 0.5)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)

    def step() -> None:
        training.optimizer.zero_grad(set_to_none=False)
        y = training.model(training.inputs[0])
        scaler.scale(nn.functional.smooth_l1_loss(y, torch.ones_like(y))).backward()

    training.step = step
    with gradstat.watch(training.model, scaler=scaler) as w:
        graph = training.captured()
        expected = []
        for scale in scales:
            scaler.update(scale)
            graph.replay()
            w.replayed()
            weights = training.model[0].weight, training.model[2].weight
            expected.append(gradstat.statistics([p.grad / scale for p in weights]).to("cpu"))
    for number, each in enumerate(expected, 1):
        assert torch.equal(w.history.record(number).counts, each.counts)


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(8, -1e4, 1e4)], ids=repr)
def test_a_replay_that_is_not_due_measures_nothing(bins: Log2Bins | LinearBins) -> None:
    training = Training()
    what = ("grad", "param", "update", "activation", "grad_output")
    options = {"what": what, "when": "step", "optimizer": training.optimizer}
    with gradstat.watch(training.model, bins, every=4, **options) as w:
        graph = training.captured()
        ((launches, _),) = w._recorder._captured.of(graph).passes
        for number in range(1, 10):
            training.load()
            graph.replay()
            w.replayed()
            counted = [
                row.sum() > 0
                for each in launches
                for row in each.result[len(each.rows) * 16 :].view(len(each.rows), -1)
            ]
            assert all(counted) if number % 4 == 0 else not any(counted)


def test_replays_that_nobody_told_of_are_found_out() -> None:
    histories, n_warnings = [], []
    for forgotten in ((), (3, 17)):
        training = Training()
        with (
            warnings.catch_warnings(record=True) as caught,
            gradstat.watch(training.model, every=5) as w,
        ):
            warnings.simplefilter("always")
            graph = training.captured()
            for number in range(1, 33):
                training.load()
                graph.replay()
                if number not in forgotten:
                    w.replayed()
                assert w.history  # waits
        assert all("once after each replay" in str(each.message) for each in caught)
        n_warnings.append(len(caught))
        histories.append(w.history)
    assert n_warnings == [0, 2]
    assert histories[0].steps.tolist() == [0, 5, 10, 15, 20, 25, 30]
    # What came due before it was found out was measured, and is not there any more.
    assert histories[1].steps.tolist() == [0, 10, 15, 25, 30]
    for step in histories[1].steps.tolist():
        assert torch.equal(histories[1].record(step).counts, histories[0].record(step).counts)


def test_calls_of_replayed_without_a_replay_make_no_records() -> None:
    training = Training()
    with gradstat.watch(training.model) as w:
        graph = training.captured()
        for number in range(3):
            graph.replay()
            w.replayed()
            w.replayed()
            with pytest.warns(RuntimeWarning, match="once after each replay"):
                assert len(w.history) == number + 2
        training.step()
    assert w.history.steps.tolist() == [0, 1, 2, 3, 4]


def test_the_first_record_may_be_of_a_replay() -> None:
    training = Training()
    with gradstat.watch(training.model):
        training.warm_up()  # loads the kernels
    with gradstat.watch(training.model, every=2) as w:
        graph = capture(training.step)
        for _ in range(3):
            graph.replay()
            w.replayed()
        for _ in range(2):
            training.step()
        graph.replay()
        w.replayed()
        graph.replay()
        w.replayed()
    assert w.history.steps.tolist() == [0, 2, 4, 6]
    assert (w.history["numel"] == [960, 320]).all()


def test_graphs_may_be_replayed_after_close() -> None:
    models = []
    for is_closed in (False, True):
        training = Training()
        w = gradstat.watch(training.model, every=2)
        graph = training.captured()
        if is_closed:
            w.close()
            del w
        others = []
        for _ in range(9):
            training.load()
            graph.replay()
            # Whatever watch has freed is of others now, and the graph must not write to it.
            others += [torch.full((n,), 7, device="cuda") for n in (1, 2, 6, 512, 16 * 2048)]
        assert all(bool((x == 7).all()) for x in others)
        models.append([p.detach().clone() for p in training.model.parameters()])
    assert all(map(torch.equal, *models))


def test_replayed_needs_a_graph_that_was_captured_under_watch() -> None:
    training = Training()
    other = capture(lambda: training.inputs[0].add_(1.0))
    with gradstat.watch(training.model) as w:
        graph = training.captured()
        graph.replay()
        with pytest.raises(RuntimeError, match="captured under watch"):
            w.replayed(other)
        w.replayed(graph)
        assert len(w.history) == 2
        del graph
        with pytest.raises(RuntimeError, match="captured under watch"):
            w.replayed()


@pytest.mark.parametrize("is_captured_at_once", [False, True])
def test_a_capture_that_fails_counts_nothing(is_captured_at_once: bool) -> None:
    training = Training()

    def fail() -> None:
        training.step()
        training.model(training.inputs[0])
        raise ValueError("no graph")

    what = ("grad", "activation")
    with gradstat.watch(training.model, every=2, what=what, bucket_bytes=1) as w:
        training.warm_up()
        with pytest.raises(ValueError, match="no graph"):
            capture(fail)
        if not is_captured_at_once:
            training.step()
        graph = capture(training.step)
        n_passes = w._recorder.schedule.n_passes
        for _ in range(5):
            training.load()
            graph.replay()
            w.replayed()
    assert w.history.steps.tolist() == list(range(0, n_passes + 5, 2))
    assert w.history["numel"].min() > 0


class Forked(nn.Module):
    """Two layers, of which the first runs on a stream of its own beside the second."""

    def __init__(self) -> None:
        super().__init__()
        self.beside, self.here = nn.Linear(24, 48), nn.Linear(24, 48)
        self.stream = torch.cuda.Stream()

    def forward(self, x: Tensor) -> Tensor:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            beside = self.beside(x)
        here = self.here(x)
        current.wait_stream(self.stream)
        beside.record_stream(current)
        return beside + here


# AccumulateGrad warns of streams that differ, of which this model has some on purpose.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
def test_streams_beside_each_other_see_the_same_flag() -> None:
    histories = []
    for how in (None, "whole steps"):
        training = Training()
        training.model = Forked().cuda()
        training.inputs = [torch.zeros(400, 24, device="cuda")]  # each output has a launch
        training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.05)
        options = {"every": 2, "what": ("grad", "activation", "grad_output")}
        histories += record(training, [options], 6, how)
    assert_same(histories[1], histories[0])
