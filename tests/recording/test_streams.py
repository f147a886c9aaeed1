"""Watch and work on several CUDA streams: it waits for what it reads, and what it reads stays."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from watching import SCHEMES

import gradstat
from gradstat import Statistics
from gradstat.bins import Bins

pytestmark = pytest.mark.gpu

OUTPUTS = ("grad", "activation", "grad_output")


class OnStream(nn.Module):
    """A layer on a stream of its own, which the streams around it wait for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.stream = layer, torch.cuda.Stream()

    def forward(self, x: Tensor) -> Tensor:
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        x.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            y: Tensor = self.layer(x)
        outside.wait_stream(self.stream)
        y.record_stream(outside)
        return y


class Branches(nn.Module):
    """Layers side by side, each on a stream of its own."""

    def __init__(self, n: int, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OnStream(nn.Linear(size, size)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


def make_model() -> nn.Sequential:
    """Large outputs, measured at once, and small ones, which wait."""
    layers = [OnStream(nn.Linear(64, 300)), nn.ReLU(), nn.Linear(300, 64), Branches(3, 64)]
    return nn.Sequential(*layers, OnStream(nn.ReLU()), nn.Linear(64, 4)).cuda()


class Expected:
    """Copies of what a watch should measure, each made on the stream that computes it."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[tuple[str, str], Tensor] = {}
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(self._on_gradient(name))
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(self._on_output(name))

    def _on_gradient(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            self.rows["grad", name] = parameter.grad.clone()

        return hook

    def _on_output(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            self.rows["activation", name] = output.detach().clone()

            def see(gradient: Tensor) -> None:
                self.rows["grad_output", name] = gradient.clone()

            if output.requires_grad:
                output.register_hook(see)

        return hook

    def take(self, history: gradstat.History) -> Statistics:
        """The statistics of a history's rows, in order, and none of the copies any more."""
        torch.cuda.synchronize()
        tensors = []
        for kind, name in history.rows:
            if kind == "unit":
                tensors.append(self.rows["activation", name].abs().amax(0))
            else:
                tensors.append(self.rows[kind, name])
        self.rows.clear()
        return gradstat.statistics([x.cpu() for x in tensors], history.bins)


def assert_records(w: gradstat.Watch, expected: Sequence[Statistics]) -> None:
    assert len(w.history) == len(expected)
    for step, each in enumerate(expected):
        record = w.history.record(step)
        assert record.numel.tolist() == each.numel.tolist()
        assert torch.equal(record.integers, each.integers)
        assert torch.equal(record.counts, each.counts)


@pytest.mark.parametrize("stream", ["current", "side"])
@pytest.mark.parametrize("bucket_bytes", [1, 30_000, 25 << 20])
@pytest.mark.parametrize("what", ["grad", OUTPUTS], ids=["grad", "outputs"])
def test_watch_waits_for_layers_on_streams_of_their_own(
    what: str | tuple[str, ...], bucket_bytes: int, stream: str
) -> None:
    model = make_model()
    copies, expected = Expected(model), []
    with gradstat.watch(model, what=what, bucket_bytes=bucket_bytes, stream=stream) as w:
        for _ in range(3):
            model(torch.randn(32, 64, device="cuda")).square().mean().backward()
            # Their memory goes to what the layers' streams compute next.
            model.zero_grad()
            for part in model.modules():
                if isinstance(part, OnStream):
                    with torch.cuda.stream(part.stream):
                        for parameter in part.parameters():
                            torch.full_like(parameter, 7.0)
            expected.append(copies.take(w.history))
    assert_records(w, expected)


class Fails(torch.autograd.Function):
    """The identity, whose gradient cannot be computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ArithmeticError


@pytest.mark.parametrize("stream", ["current", "side"])
@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("when", ["backward", "step"])
def test_watch_forgets_a_backward_that_fails_on_the_devices_thread(
    when: str, is_reentrant: bool, stream: str
) -> None:
    model = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 20)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"optimizer": optimizer} if when == "step" else {}
    copies, expected = Expected(model), []

    def fail(x: Tensor) -> Tensor:
        return model(Fails.apply(model(x)))

    with gradstat.watch(model, what=OUTPUTS, when=when, stream=stream, **options) as w:
        for _ in range(10):
            x = torch.randn(24, 20, device="cuda", requires_grad=True)
            y = checkpoint(fail, x, use_reentrant=True) if is_reentrant else fail(x)
            with pytest.raises(ArithmeticError):
                y.sum().backward()
            optimizer.zero_grad()
            # At once: the device's thread may not yet have let go of the pass before.
            model(torch.randn(24, 20, device="cuda")).square().mean().backward()
            optimizer.step()
            expected.append(copies.take(w.history))
    assert_records(w, expected)


def change(weight: Tensor) -> None:
    weight.grad.fill_(7.0)


def test_watch_on_a_side_stream_is_done_with_parameters_before_the_step() -> None:
    model = nn.Linear(300, 200).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    what = ("grad", "param", "update")
    copies, expected = Expected(model), []
    options = {"optimizer": optimizer, "stream": "side", "bucket_bytes": 1}
    with gradstat.watch(model, what=what, when="step", **options) as w:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 300, device="cuda")).square().mean().backward()
            before = copies.rows["param", "weight"] = model.weight.detach().clone()
            optimizer.step()
            copies.rows["update", "weight"] = model.weight.detach() - before
            expected.append(copies.take(w.history))
    assert_records(w, expected)


def test_watch_on_a_side_stream_is_done_with_parts_of_a_buffer_when_its_hook_returns() -> None:
    model = nn.Linear(300, 200).cuda()
    buffer = torch.zeros(model.weight.numel() + 7, device="cuda")
    copies, expected = Expected(model), []
    with gradstat.watch(model, stream="side") as w:
        model.weight.register_post_accumulate_grad_hook(change)
        for _ in range(3):
            buffer.zero_()
            model.weight.grad = buffer[7:].view_as(model.weight)
            model(torch.randn(8, 300, device="cuda")).square().mean().backward()
            expected.append(copies.take(w.history))
    assert_records(w, expected)


def test_watch_on_a_side_stream_is_done_with_gradients_of_ddp_when_its_hook_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As under DistributedDataParallel(static_graph=True), which needs a second process.
    monkeypatch.setattr("gradstat.recording.watch._is_changed_in_backward", lambda _: True)
    model = nn.Linear(300, 200).cuda()
    copies, expected = Expected(model), []
    with gradstat.watch(model, stream="side") as w:
        model.weight.register_post_accumulate_grad_hook(change)
        for _ in range(3):
            model.zero_grad()
            model(torch.randn(8, 300, device="cuda")).square().mean().backward()
            expected.append(copies.take(w.history))
    assert_records(w, expected)


def test_watch_on_a_side_stream_is_done_with_a_reentrant_checkpoint_at_its_end() -> None:
    model = nn.Linear(300, 200).cuda()
    copies, expected = Expected(model), []

    with gradstat.watch(model, stream="side") as w:
        for _ in range(3):
            model.zero_grad()
            x = torch.randn(8, 300, device="cuda", requires_grad=True)
            outside = x * 2
            outside.register_hook(lambda _: change(model.weight))
            checkpoint(model, outside, use_reentrant=True).square().mean().backward()
            expected.append(copies.take(w.history))
    assert_records(w, expected)


@pytest.mark.parametrize("stream", ["current", "side"])
def test_watch_in_a_captured_step_is_done_with_every_kind_before_it_changes(stream: str) -> None:
    layers = [nn.Linear(300, 200), nn.ReLU(inplace=True), nn.Linear(200, 90)]
    model = nn.Sequential(*layers).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 300, device="cuda")
    what = ("grad", "param", "update", *OUTPUTS[1:])
    copies, expected = Expected(model), []
    options = {"optimizer": optimizer, "stream": stream, "bucket_bytes": 1}
    with gradstat.watch(model, what=what, when="step", **options) as w:

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            for name in ("0.weight", "2.weight"):
                copies.rows["param", name] = model.get_parameter(name).detach().clone()
            optimizer.step()
            for name in ("0.weight", "2.weight"):
                before = copies.rows["param", name]
                copies.rows["update", name] = model.get_parameter(name).detach() - before

        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            step()
        torch.cuda.current_stream().wait_stream(warm_up)
        expected.append(copies.take(w.history))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        captured = copies.rows
        for _ in range(3):
            x.normal_()
            graph.replay()
            w.replayed()
            copies.rows = dict(captured)
            expected.append(copies.take(w.history))
    assert_records(w, expected)


@pytest.mark.parametrize("stream", ["current", "side"])
@pytest.mark.parametrize("bucket_bytes", [1, 25 << 20])
def test_watch_measures_gradients_that_are_freed_at_once(bucket_bytes: int, stream: str) -> None:
    model = nn.Sequential(*(nn.Linear(60, 60) for _ in range(5))).cuda()
    copies, expected = Expected(model), []

    def free(weight: Tensor) -> None:
        weight.grad = None
        torch.full_like(weight, 7.0)  # in that memory, if it is free

    with gradstat.watch(model, bucket_bytes=bucket_bytes, stream=stream) as w:
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(free)
        for _ in range(3):
            model(torch.randn(24, 60, device="cuda")).square().mean().backward()
            for weight in model.parameters():
                torch.full_like(weight, 7.0)
            expected.append(copies.take(w.history))
    assert_records(w, expected)


# Each scheme divides in its own way, whatever the stream.
@pytest.mark.parametrize(
    ("bins", "stream"), [*((bins, "side") for bins in SCHEMES), (SCHEMES[0], "current")], ids=repr
)
def test_watch_divides_by_the_scale_that_a_pass_had(bins: Bins, stream: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=1)
    copies, expected, scale = Expected(model), [], 8.0
    options = {"stream": stream, "bucket_bytes": 30_000}
    with gradstat.watch(model, bins, what=("grad",), scaler=scaler, **options) as w:
        for _ in range(4):
            scaler.scale(model(torch.randn(32, 64, device="cuda")).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            for gradient in copies.rows.values():
                gradient.div_(scale)
            expected.append(copies.take(w.history))
            scale *= 2.0
    assert scaler.get_scale() == scale
    assert_records(w, expected)


@pytest.mark.parametrize("stream", ["current", "side"])
def test_watch_closed_with_work_queued_has_all_records(stream: str, tmp_path: Path) -> None:
    model = make_model()
    copies, expected, seen = Expected(model), [], []
    options = {"what": OUTPUTS, "stream": stream, "path": tmp_path / "run"}
    w = gradstat.watch(model, sink=lambda step, record: seen.append(step), **options)
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(32, 64, device="cuda")).square().mean().backward()
        expected.append(copies.rows)
        copies.rows = {}
    model(torch.randn(32, 64, device="cuda"))  # a pass that never ends
    w.close()
    assert seen == [0, 1, 2]
    for each in range(3):
        copies.rows = expected[each]
        expected[each] = copies.take(w.history)
    assert_records(w, expected)
    loaded = gradstat.History.load(tmp_path / "run")
    assert np.array_equal(loaded["numel"], w.history["numel"])


@pytest.mark.parametrize(
    ("end", "stream"),
    [("", "current"), ("", "side"), ("w.close()", "side"), ("del w, model", "side")],
)
def test_interpreter_exits_with_work_queued(end: str, stream: str, tmp_path: Path) -> None:
    script = f"""
import torch, gradstat
torch.manual_seed(20)
model = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.ReLU()).cuda()
w = gradstat.watch(model, what=("grad", "activation"), stream="{stream}", path="run")
for _ in range(3):
    model.zero_grad()
    model(torch.randn(32, 64, device="cuda")).sum().backward()
model(torch.randn(32, 64, device="cuda"))
{end}
"""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert gradstat.History.load(tmp_path / "run").steps.tolist() == [0, 1, 2]
