"""The Triton engine and the order of work on a device: tables and tensors that come and go."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor

import gradstat
from gradstat import LinearBins, Log2Bins, Statistics
from gradstat.engines import triton as triton_engine

pytestmark = pytest.mark.gpu

SCHEMES = [Log2Bins(), LinearBins(30), LinearBins(30, nice=True), LinearBins(64, -1.0, 1.0)]


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> OrderedDict[object, triton_engine.Tables]:
    """An empty cache of plans."""
    empty: OrderedDict[object, triton_engine.Tables] = OrderedDict()
    monkeypatch.setattr(triton_engine, "_tables", empty)
    return empty


def assert_is_measured(got: Statistics, tensors: list[Tensor]) -> None:
    """Compare with the engine of the CPU."""
    expected = gradstat.statistics([x.cpu() for x in tensors], got.bins)
    assert torch.equal(got.integers.cpu(), expected.integers)
    assert torch.equal(got.counts.cpu(), expected.counts)


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_statistics_of_a_list_on_several_streams_at_once(bins: Log2Bins | LinearBins) -> None:
    xs = [torch.randn(n, device="cuda") for n in (3000, 1, 700)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for number in range(6):
        stream = streams[number % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(gradstat.statistics(xs, bins))
            torch.full((3, bins.bins), 7, device="cuda")
    torch.cuda.synchronize()
    for result in results:
        assert_is_measured(result, xs)


def test_plans_are_dropped_while_their_tables_are_still_queued(
    plans: OrderedDict[object, triton_engine.Tables], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_engine, "MAX_TABLE_BYTES", 500)
    base = torch.randn(4000, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    measured = []
    for n in range(1, 40):
        views = [base[n : 90 * n], base[:n]]
        for stream in streams:  # the second uses what the first has uploaded
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                measured.append((gradstat.statistics(views), views))
    assert len(plans) < 10
    torch.cuda.synchronize()
    for got, views in measured:
        assert_is_measured(got, views)


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_dtypes_in_one_list_are_measured_in_order_on_a_stream(bins: Log2Bins | LinearBins) -> None:
    wide = torch.randn(3, 700, dtype=torch.float64, device="cuda")
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.float32]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        xs = [x.to(dtype) for dtype in dtypes for x in (wide[0], wide[:, ::2])]
        got = gradstat.statistics(xs, bins)
        copies = [x.clone() for x in xs]
        for x in xs:
            x.fill_(7.0)
        del xs, x
        for dtype in dtypes:  # in memory that is free now
            torch.full((700,), 7.0, dtype=dtype, device="cuda")
    stream.synchronize()
    assert_is_measured(got, copies)
