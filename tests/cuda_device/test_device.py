"""The device in software itself: it shows what it should show, and computes what a GPU computes."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from conftest import IN_SOFTWARE, no_waiting
from torch import Tensor, nn

from cuda_device import device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not IN_SOFTWARE, reason="is about the CUDA device in software"),
]
Schedule = Callable[..., None]


def test_nothing_runs_before_somebody_waits(schedule: Schedule) -> None:
    schedule("lazy")
    x = torch.ones(1000, device="cuda")
    queued = device.pending()
    y = x + 1
    assert device.pending() > queued
    assert not torch.cuda.current_stream().query()
    assert y.sum().item() == 2000.0
    assert device.pending() == 0


def test_host_that_reads_too_early_reads_garbage(schedule: Schedule) -> None:
    def read(wait: bool) -> bool:
        x = torch.full((64,), 3.0, device="cuda")
        host = torch.zeros(64, pin_memory=True)
        host.copy_(x, non_blocking=True)
        if wait:
            torch.cuda.synchronize()
        return host.tolist() == [3.0] * 64

    schedule("lazy")
    assert read(wait=True)
    assert not read(wait=False)
    schedule("eager")
    assert read(wait=False)  # where all runs at once it does not show


def test_stream_that_does_not_wait_for_another_is_seen(schedule: Schedule) -> None:
    def consume(wait: bool) -> bool:
        stream, x = torch.cuda.Stream(), torch.zeros(64, device="cuda")
        torch.cuda.synchronize()
        x.fill_(5.0)
        if wait:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = (x * 2).tolist()
        torch.cuda.synchronize()
        return y == [10.0] * 64

    for name in ("lazy", "reverse"):
        schedule(name)
        assert consume(wait=True)
        assert not consume(wait=False)
    schedule("random")
    assert all(consume(wait=True) for _ in range(20))
    assert not all(consume(wait=False) for _ in range(20))


def test_memory_that_is_overwritten_while_it_is_read_is_seen(schedule: Schedule) -> None:
    def read(join: bool) -> bool:
        stream, x = torch.cuda.Stream(), torch.full((64,), 2.0, device="cuda")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = x + 1
        if join:
            torch.cuda.current_stream().wait_stream(stream)
        x.fill_(9.0)
        torch.cuda.synchronize()
        return y.tolist() == [3.0] * 64

    schedule("reverse")
    assert read(join=True)
    assert not read(join=False)
    schedule("lazy")
    assert read(join=False)  # oldest first hides it


def test_memory_that_is_freed_while_it_is_read_is_seen(schedule: Schedule) -> None:
    """The caching allocator gives it away, unless the stream that reads it was recorded."""

    def read(record: bool) -> tuple[bool, bool]:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        stream, x = torch.cuda.Stream(), torch.full((1000,), 2.0, device="cuda")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = x + 1
        if record:
            x.record_stream(stream)
        address = x.data_ptr()
        del x
        new = torch.full((1000,), 9.0, device="cuda")
        torch.cuda.synchronize()
        return new.data_ptr() == address, y.tolist() == [3.0] * 1000

    schedule("reverse")
    assert read(record=True) == (False, True)
    assert read(record=False) == (True, False)


def test_new_memory_is_garbage() -> None:
    assert not (torch.empty(1000, device="cuda") == 0).any()


def test_streams_with_equal_results_in_any_order(schedule: Schedule) -> None:
    layers = nn.Linear(20, 30), nn.GELU(), nn.LayerNorm(30), nn.Linear(30, 5)
    model, x = nn.Sequential(*layers), torch.randn(8, 20)
    model(x).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.cuda()
    for name in ("eager", "lazy", "reverse", "random"):
        schedule(name, 5)
        model.zero_grad()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x.cuda()).square().mean().backward()
        torch.cuda.current_stream().wait_stream(stream)
        for p, e in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad.cpu(), e)


def test_choice_is_noticed_where_two_streams_have_work(schedule: Schedule) -> None:
    def work(on_two: bool) -> bool:
        schedule("lazy")
        x = torch.ones(10, device="cuda")
        if on_two:
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.ones(10, device="cuda").add_(1)
        assert x.add_(1).sum().item() == 20.0
        torch.cuda.synchronize()
        return bool(device.runtime.device_had_choice())

    assert work(on_two=True)
    assert not work(on_two=False)


FORBIDDEN = {
    "device": lambda x, event: torch.cuda.synchronize(),
    "stream": lambda x, event: torch.cuda.current_stream().synchronize(),
    "item": lambda x, event: x.sum().item(),
    "query": lambda x, event: event.query(),
    "wait for what is outside": lambda x, event: torch.cuda.current_stream().wait_event(event),
    "copy of pageable memory": lambda x, event: torch.ones(10).to("cuda", non_blocking=True),
    "work that is not joined": lambda x, event: fork(x),
}


def fork(x: Tensor) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.mul_(1.0)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_capture_refuses_what_cuda_refuses(name: str, schedule: Schedule) -> None:
    schedule("lazy")
    x = torch.ones(10, device="cuda")
    (x + 1).sum().item()
    event = torch.cuda.current_stream().record_event()
    before = device.runtime.device_violations()
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph):
            x.add_(0.0)
            FORBIDDEN[name](x, event)

    with pytest.raises(RuntimeError):
        capture()
    if "pageable" not in name:  # that one PyTorch refuses
        assert device.runtime.device_violations() > before
    device.reset()
    assert (x + 1).tolist() == [2.0] * 10


def test_capture_on_another_stream_leaves_the_legacy_stream_alone(schedule: Schedule) -> None:
    """A stream of PyTorch's does not wait for the legacy stream: that one may be used meanwhile."""
    schedule("lazy")
    x, y = torch.ones(10, device="cuda"), torch.ones(10, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        x.add_(1)
        with torch.cuda.stream(torch.cuda.default_stream()):
            y.add_(1)
        graph.capture_end()
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([2.0] * 10, [2.0] * 10)


def test_graph_replays_on_new_data(schedule: Schedule) -> None:
    x, y = (torch.zeros(10, device="cuda") for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y.copy_(x * 3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.copy_(x * 3)
    for name in ("lazy", "reverse", "random", "eager"):
        schedule(name)
        for i in range(5):
            x.fill_(float(i))
            graph.replay()
            assert y.tolist() == [3.0 * i] * 10


def test_synchronisation_is_found_by_pytorch() -> None:
    x = torch.ones(10, device="cuda")
    with no_waiting():
        x.add_(1).mul_(2)
        for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero()):
            with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
                wait()


@triton.jit
def scale_sum_count(x_ptr, scaled_ptr, sums_ptr, counts_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    tl.store(scaled_ptr + offsets, x * 2 + 1, mask=mask)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(x))
    bins = tl.minimum(tl.maximum(((x + 4) * 8).to(tl.int32), 0), 63)
    counts = tl.histogram(bins, 64, mask=mask).to(tl.int64)
    tl.atomic_add(counts_ptr + tl.arange(0, 64), counts, mask=counts != 0, sem="relaxed")


def test_triton_kernel_equals_the_cpu() -> None:
    """Compiled as for a GPU, with Triton's own launcher, atomics, shared memory, a masked tail."""
    x = torch.randn(5000, device="cuda")
    scaled, counts = torch.empty_like(x), torch.zeros(64, dtype=torch.int64, device="cuda")
    sums = torch.empty(5, device="cuda")
    scale_sum_count[(5,)](x, scaled, sums, counts, 5000, 1024)
    host = x.cpu()
    assert torch.equal(scaled.cpu(), host * 2 + 1)
    padded = nn.functional.pad(host, (0, 120)).view(5, 1024)
    torch.testing.assert_close(sums.cpu(), padded.sum(1), rtol=1e-5, atol=1e-4)
    bins = ((host + 4) * 8).to(torch.int64).clamp(0, 63)
    assert torch.equal(counts.cpu(), torch.bincount(bins, minlength=64))


@triton.jit
def read_far(x_ptr, out_ptr, far):
    tl.store(out_ptr, tl.load(x_ptr + far))


def test_triton_kernel_out_of_bounds_is_an_error(schedule: Schedule) -> None:
    """The launch goes through; the next synchronisation fails, and all that follows."""
    schedule("lazy")
    # The caching allocator's blocks are 2 MB: what is read lies beyond the last one.
    x = torch.ones(1000, device="cuda")
    read_far[(1,)](x, x, 1 << 40)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="launch failure"):
            torch.cuda.synchronize()
    device.reset()
    assert (torch.ones(3, device="cuda") + 1).tolist() == [2.0] * 3


@triton.jit
def copy_once(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(y_ptr + offsets, x, mask=offsets < n)


def test_triton_kernel_is_not_loaded_in_a_capture(schedule: Schedule) -> None:
    schedule("lazy")
    x = torch.ones(100, device="cuda")
    y = torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph):
            copy_once[(1,)](x, y, 100, 128)

    with pytest.raises(RuntimeError):
        capture()
    device.reset()
    copy_once[(1,)](x, y, 100, 128)
    assert y.tolist() == [1.0] * 100


MODULES = {
    "LSTM": (lambda: nn.LSTM(8, 5), (4, 3, 8)),
    "LSTM without bias": (lambda: nn.LSTM(8, 5, bias=False), (4, 3, 8)),
    "GRU": (lambda: nn.GRU(8, 5), (4, 3, 8)),
    "GRU without bias": (lambda: nn.GRU(8, 5, bias=False), (4, 3, 8)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), (4, 3, 8)),
    "RMSNorm": (lambda: nn.RMSNorm(8), (4, 3, 8)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)),
        (2, 4, 9, 9),
    ),
    "sparse embedding": (lambda: nn.Embedding(10, 4, sparse=True), None),
}


@pytest.mark.parametrize("name", MODULES)
def test_operators_equal_the_cpu(name: str) -> None:
    """Those with kernels that CUDA alone has, or that go another way there."""
    make, shape = MODULES[name]
    module = make()
    x = torch.tensor([3, 5, 3]) if shape is None else torch.randn(shape)
    results = []
    for m, given in ((module, x), (copy.deepcopy(module).cuda(), x.cuda())):
        out: Any = m(given)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        results.append([p.grad.to_dense().cpu() for p in m.parameters()])
    for got, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_matrix_product_with_another_type_of_result() -> None:
    a = torch.randn(4, 4, device="cuda", dtype=torch.bfloat16)
    wide = torch.mm(a, a, out_dtype=torch.float32)
    assert torch.equal(wide.cpu(), torch.mm(a.float(), a.float()).cpu())


def test_operator_remembers_the_shapes_of_each_kind_of_arguments() -> None:
    """Results follow every argument that their shape, strides or type depend on."""
    x = torch.arange(24.0).view(2, 3, 4)
    kinds = [
        lambda x: x.sum(),
        lambda x: x.sum(0),
        lambda x: x.sum(1, keepdim=True),
        lambda x: x + 1,
        lambda x: x.int() + 1,
        lambda x: x.int() + 1.5,
        lambda x: x.transpose(0, 2) * 2,
        lambda x: x.half() * x[0, 0, 0],
        lambda x: torch.cat([x, x[:1]]),
        lambda x: torch.cat([x, x], 2),
        lambda x: torch.arange(3, device=x.device) + x.numel(),
        lambda x: torch.arange(5, device=x.device),
        lambda x: torch.full((2, 3), 7, device=x.device),
    ]
    for kind in [*kinds, *reversed(kinds)]:
        got, expected = kind(x.cuda()), kind(x)
        assert (got.dtype, got.stride()) == (expected.dtype, expected.stride())
        assert torch.equal(got.cpu(), expected)


def test_compiled_function_runs() -> None:
    layer = torch.compile(nn.Linear(4, 4).cuda())
    layer(torch.ones(2, 4, device="cuda")).relu().sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_random_numbers_repeat() -> None:
    def draw() -> list[Tensor]:
        torch.manual_seed(3)
        generator = torch.Generator("cuda").manual_seed(4)
        made = [torch.randn(5, device="cuda"), torch.randperm(5, device="cuda")]
        return [*made, torch.rand(5, device="cuda", generator=generator)]

    first, second = draw(), draw()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(torch.randn(5, device="cuda"), first[0])


@pytest.mark.parametrize("name", ["lazy", "random"])
def test_threads_do_not_block_each_other(name: str, schedule: Schedule) -> None:
    """Allocators, commands that need Python's lock, and waits, in five threads at once."""
    schedule(name)
    done = []

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for i in range(30):
                x = torch.full((1000 + number * 17 + i,), 1.0, device="cuda", requires_grad=True)
                (x * 2).sum().backward()
                x.record_stream(torch.cuda.default_stream())
                host = torch.empty(x.shape, pin_memory=True).copy_(x.grad, non_blocking=True)
                event = stream.record_event()
                del x
                if i % 3 == 0:
                    while not event.query():
                        pass
                    assert host[0] == 2.0
        done.append(number)

    threads = [threading.Thread(target=work, args=[n], daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    work(9)
    for thread in threads:
        thread.join(120)
    assert sorted(done) == [0, 1, 2, 3, 9]
