"""What only a CUDA device can show."""

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT, no_waiting, sized

import gradstat
from gradstat import LinearBins, Log2Bins

pytestmark = pytest.mark.gpu

SCHEMES = [Log2Bins(), LinearBins(30), LinearBins(30, nice=True), LinearBins(64, -1.0, 1.0)]


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(20)
    n = sized(on_card=1000, in_software=90)
    shapes = [(n, n - 1), (7,), (64, 3, 7, 7), (0,), (300 * n,)]
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
    with no_waiting():
        gradstat.statistics(xs, bins)


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
    x = torch.zeros(sized(on_card=1 << 20, in_software=9000), device="cuda")
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
    n = sized(on_card=512, in_software=100)
    model = torch.nn.Sequential(*(torch.nn.Linear(n, n) for _ in range(4))).cuda()
    x = torch.randn(64, n, device="cuda")
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


@pytest.mark.parametrize("stream", ["current", "side"])
def test_watch_sees_outputs_before_they_change(stream: str) -> None:
    n, wide = sized(on_card=512, in_software=40), sized(on_card=2048, in_software=300)
    layers = [torch.nn.Linear(n, wide), torch.nn.ReLU(inplace=True), torch.nn.Linear(wide, n)]
    model = torch.nn.Sequential(*layers * 3).cuda()
    x = torch.randn(64, n, device="cuda")
    what = ("grad", "activation", "grad_output")
    with (
        gradstat.watch(model, what=what, stream=stream) as w,
        gradstat.watch(model, what=what, engine="reference") as expected,
    ):
        for _ in range(3):
            model(x).square().mean().backward()
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


def warm_up(step: Callable[[], object], n: int = 3) -> None:
    """Run what is to be captured on a stream of its own, as PyTorch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(n):
            step()
    torch.cuda.current_stream().wait_stream(stream)


# What is captured: each scheme's kernels. Where: by each hook, on each stream, with one scheme.
CAPTURED = [(bins, "backward", "side") for bins in SCHEMES[:-1]]
CAPTURED += itertools.product(SCHEMES[-1:], ("backward", "step", "call"), ("current", "side"))


@pytest.mark.parametrize(("bins", "when", "stream"), CAPTURED, ids=repr)
def test_watch_in_a_captured_step_records_each_replay(
    bins: Log2Bins | LinearBins, when: str, stream: str
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.ReLU(), torch.nn.Linear(200, 9))
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
    options = {"optimizer": optimizer} if when == "step" else {}
    x = torch.randn(64, 300, device="cuda")
    with gradstat.watch(model, bins, when=when, stream=stream, **options) as w:

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            if when == "call":
                w.measure()
            optimizer.step()

        warm_up(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        assert len(w.history) == 3
        gradients = {}
        for number in range(3, 8):
            x.normal_()
            graph.replay()
            w.replayed()
            gradients[number] = [model[i].weight.grad.clone() for i in (0, 2)]
    assert w.history.steps.tolist() == list(range(8))
    for number, tensors in gradients.items():
        record = w.history.record(number)
        if isinstance(bins, Log2Bins) or bins.low is not None:
            expected = gradstat.statistics(tensors, bins, engine="reference").to("cpu")
            assert torch.equal(record.integers, expected.integers)
            assert torch.equal(record.counts, expected.counts)
        assert record.numel.tolist() == [60000, 1800]


def test_watch_in_a_captured_step_measures_formats() -> None:
    names = ["float8_e4m3fn", "float8_e5m2_amax", "mxfp8_e4m3", "nvfp4"]
    model = torch.nn.Sequential(torch.nn.Linear(70, 33), torch.nn.ReLU(), torch.nn.Linear(33, 9))
    model.cuda()
    x = torch.randn(16, 70, device="cuda")

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(x).square().mean().backward()

    with gradstat.watch(model, formats=names) as w:
        warm_up(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(100):  # other plans come and go
            gradstat.quantization(torch.randn(100, device="cuda"), names)
        x.normal_()
        graph.replay()
        w.replayed()
    assert w.history.steps.tolist() == [0, 1, 2, 3]
    gradients = [model[i].weight.grad for i in (0, 2)]
    expected = gradstat.quantization(gradients, names, engine="reference")
    for name in names:
        found = w.history.quantization(name)
        for field in ("underflow", "saturated", "nonzero", "blocks", "empty_blocks"):
            assert found[field][-1].tolist() == getattr(expected[name], field).tolist(), field
        assert found["snr"][-1].tolist() == pytest.approx(expected[name].snr.tolist(), rel=1e-5)


def test_watch_in_a_captured_step_records_every_kind() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.ReLU(), torch.nn.Linear(200, 9))
    model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(64, 300, device="cuda")
    what = ("grad", "param", "update", "activation", "grad_output")
    with gradstat.watch(model, what=what, when="step", optimizer=optimizer) as w:

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            optimizer.step()

        warm_up(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        before = model[0].weight.detach().clone()
        graph.replay()
        w.replayed()
    change = gradstat.statistics(model[0].weight.detach() - before, engine="reference").to("cpu")
    assert torch.equal(w.history.select("update").record(-1)[0].counts, change.counts)
    assert (w.history["numel"] > 0).all()


# PyTorch's own, also without a watch: the graphed parts keep what they accumulate into alive.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
def test_watch_records_each_pass_of_graphed_callables() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU()).cuda()
    x = torch.randn(8, 30, device="cuda")
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    with gradstat.watch(model) as w:
        for _ in range(3):
            model.zero_grad()
            graphed(torch.randn(8, 30, device="cuda")).square().mean().backward()
            expected = gradstat.statistics(model[0].weight.grad.clone(), engine="reference")
            assert torch.equal(w.last.counts[0], expected.counts.cpu())
    assert len(w.history) == 3


def test_documented_lines_for_graphs_run() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    code = re.search(r"## CUDA graphs.*?^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    model = torch.nn.Linear(8, 4).cuda()
    static_input = torch.randn(16, 8, device="cuda")

    def train_step() -> None:
        model.zero_grad()
        model(static_input).square().mean().backward()

    names = {"gradstat": gradstat, "torch": torch, "model": model, "static_input": static_input}
    names |= {"train_step": train_step, "loader": torch.randn(5, 16, 8)}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        exec(code, names)
    assert names["w"].history.steps.tolist() == list(range(6))
