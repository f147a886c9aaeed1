"""What only a CUDA device can show."""

import pytest
import torch

import gradstat
from gradstat import LinearBins, Log2Bins

pytestmark = pytest.mark.gpu

SCHEMES = [Log2Bins(), LinearBins(30), LinearBins(30, nice=True), LinearBins(64, -1.0, 1.0)]


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(20)
    shapes = [(1000, 999), (7,), (64, 3, 7, 7), (0,), (300_000,)]
    xs = [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]
    return [*xs, xs[0].half(), xs[0].bfloat16(), xs[0][:, ::2], xs[0].t(), xs[4][1:]]


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_results_are_the_same_bit_for_bit_from_run_to_run(bins: Log2Bins | LinearBins) -> None:
    xs = gradients()
    first = gradstat.statistics(xs, bins)
    for _ in range(5):
        again = gradstat.statistics(xs, bins)
        assert torch.equal(again.integers, first.integers)
        assert torch.equal(again.counts, first.counts)
        assert torch.equal(again.floats.nan_to_num(7.0), first.floats.nan_to_num(7.0))


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_statistics_never_waits_for_the_device(bins: Log2Bins | LinearBins) -> None:
    xs = gradients()
    gradstat.statistics(xs, bins)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradstat.statistics(xs, bins)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_statistics_can_be_captured_and_replayed(bins: Log2Bins | LinearBins) -> None:
    xs = gradients()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradstat.statistics(xs, bins)  # compiles, and uploads the table of work items
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradstat.statistics(xs, bins)
    for x in xs[:5]:
        x.mul_(0.5).add_(0.1)
    graph.replay()
    expected = gradstat.statistics(xs, bins, engine="reference")
    assert torch.equal(captured.integers, expected.integers)
    assert torch.equal(captured.counts, expected.counts)


def test_statistics_run_on_the_current_stream() -> None:
    x = torch.zeros(1 << 20, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        x.fill_(1.0)
        s = gradstat.statistics(x)
    stream.synchronize()
    assert int(s.zeros) == 0


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_watch_on_a_side_stream_sees_gradients_before_they_change(
    bins: Log2Bins | LinearBins,
) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4))).cuda()
    x = torch.randn(64, 512, device="cuda")
    with (
        gradstat.watch(model, bins, bucket_bytes=1, stream="side") as w,
        gradstat.watch(model, bins, engine="reference") as expected,
    ):
        for _ in range(3):
            model.zero_grad(set_to_none=False)
            model(x).square().mean().backward()
            for parameter in model.parameters():
                parameter.grad.fill_(7.0)
    for step in range(3):
        assert torch.equal(w.history.record(step).integers, expected.history.record(step).integers)
        assert torch.equal(w.history.record(step).counts, expected.history.record(step).counts)


def test_a_training_step_with_watch_can_be_captured() -> None:
    model = torch.nn.Linear(300, 200).cuda()
    x = torch.randn(64, 300, device="cuda")

    def step() -> gradstat.Statistics:
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        return gradstat.statistics([p.grad for p in model.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()  # gradients have other addresses here than in the warm-up
    for _ in range(100):  # other plans come and go
        gradstat.statistics(torch.randn(1000, device="cuda"))
    x.normal_()
    graph.replay()
    expected = gradstat.statistics([p.grad for p in model.parameters()], engine="reference")
    assert torch.equal(captured.integers, expected.integers)
    assert torch.equal(captured.counts, expected.counts)
