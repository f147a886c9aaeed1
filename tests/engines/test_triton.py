"""What is special to the Triton engine: work items, plans, the sums of large items."""

import importlib
import pkgutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
import triton.language as tl
from conftest import CUDA, numpy_silent_as_a_gpu

from gradstat import LinearBins, Log2Bins, bins, kernels
from gradstat.engines import reference, triton_formats
from gradstat.engines import triton as triton_engine
from gradstat.formats import FORMATS
from gradstat.kernels import binning

DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] if CUDA else []


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> OrderedDict[object, triton_engine.Tables]:
    """An empty cache of plans."""
    empty: OrderedDict[object, triton_engine.Tables] = OrderedDict()
    monkeypatch.setattr(triton_engine, "_tables", empty)
    return empty


def assert_is_reference(tensors: list[torch.Tensor]) -> None:
    with numpy_silent_as_a_gpu():
        got, expected = (e.measure(tensors, Log2Bins()) for e in (triton_engine, reference))
    assert torch.equal(got.integers, expected.integers)
    assert torch.equal(got.counts, expected.counts)
    for name in ("min", "max", "l1", "l2", "std"):
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), rtol=1e-5, atol=0, equal_nan=True
        )
    assert ((got.sum - expected.sum).abs() <= 1e-6 * expected.l1).all()


def large_items() -> dict[str, torch.Tensor]:
    n, generator = triton_engine.MAX_ITEM, torch.Generator().manual_seed(20)
    x = torch.randn(n, generator=generator)
    first, spike, late = torch.zeros(n), torch.zeros(n), x.clone()
    first[0], spike[-1], late[:256] = 0.7, 1.9, 1e-30
    return {
        "normal": x,
        "the first value alone": first,
        "the last value alone": spike,
        "all but the first values large": late,
        "one in a hundred": x * (torch.rand(n, generator=generator) < 0.01),
        "far from zero": 1000 + 1e-3 * x,
        "a slope": torch.linspace(0, 1, n),
        "a step": torch.cat([torch.full((300,), 1000.0), torch.full((n - 300,), 1e-3)]),
        "growing": x * torch.logspace(-30, 30, n),
        "small": 1e-30 * x,
        "large": 1e30 * x,
        "positive": x.abs(),
    }


@pytest.mark.parametrize("name", large_items())
def test_sums_of_the_largest_items_are_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_engine, "MIN_ITEM", triton_engine.MAX_ITEM)
    x = large_items()[name].to(DEVICE)
    assert len(triton_engine.make_items([x], [0])[0]) == 1
    assert_is_reference([x])


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(40, 30, 3, 3)[:, :, :2, :2],
        torch.randn(30, 20, 7, 5, 3)[::2, :, ::3, :4, :2],
        torch.randn(3000, 8)[:, :5],
        torch.randn(20, 9000)[:, 1:8500],
        torch.randn(7, 1).expand(7, 500),
        torch.randn(3, 1, 2).expand(3, 40, 2).transpose(0, 2),
    ],
    ids=lambda x: f"{tuple(x.shape)}, {x.stride()}",
)
def test_strided_tensors_are_read_in_place(x: torch.Tensor) -> None:
    assert_is_reference([x.to(DEVICE) if CUDA else x])


def test_a_slice_of_many_small_rows_takes_few_items() -> None:
    x = torch.empty(512, 512, 3, 3)[:, :, :2, :2]
    items, _ = triton_engine.make_items([x], [0])
    assert len(items) <= 2 * x.numel() / triton_engine.MIN_ITEM
    assert items[:, 2].sum() == x.numel()
    assert items[:, 2].max() <= triton_engine.MAX_ITEM


@pytest.mark.parametrize("n", [0, 1, 1024, 1025, 4096, 5120, 5121, 7840, 8192, 70_000, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 1])
def test_a_rest_of_less_than_a_tile_is_shared_out(n: int, dtype: torch.dtype, start: int) -> None:
    x = torch.empty(n + 8, dtype=dtype)[start : start + n]
    items, ((_, first, end, numel),) = triton_engine.make_items([x], [0])
    addresses, lengths, aligned = items[:, 0], items[:, 2], items[:, 3]
    assert (first, end, numel) == (0, len(items), n)
    # One after the other, without a gap.
    ends = addresses + lengths * x.element_size()
    assert n == 0 or addresses[0] == x.data_ptr()
    assert addresses[1:].tolist() == ends[:-1].tolist()
    assert lengths.sum() == n
    tile = triton_engine.TILE_BYTES // x.element_size()
    assert (aligned % tile == 0).all()
    assert (lengths - aligned <= triton_engine.REST_ITEM).all()
    assert (addresses[aligned > 0] % triton_engine.ALIGNMENT == 0).all()


def test_groups_of_a_format_are_read_whole_where_they_are_aligned() -> None:
    form, n = FORMATS["mxfp8_e4m3"], triton_engine.TILE_BYTES // 2
    room = torch.empty(n + 8, dtype=torch.bfloat16)
    skip = -room.data_ptr() % triton_engine.ALIGNMENT // 2
    for start, aligned in ((skip, n), (skip + 1, 0)):
        x = room[start : start + n].view(-1, 32)
        items, _ = triton_formats._tables([tuple(x.shape)], np.zeros(1, int), [form], [x], [0])
        assert items[:, 3].sum() * triton_formats.group_columns([form]) == aligned


def test_a_plan_is_made_once_and_again_for_another_shape(
    plans: OrderedDict[object, object],
) -> None:
    x = torch.randn(60, device=DEVICE)
    for view in (x, x.view(6, 10), x):
        triton_engine.measure([view], Log2Bins())
    assert len(plans) == 1
    for view in (x[:50], x.view(6, 10)[:, :5], x[::2]):
        triton_engine.measure([view], Log2Bins())
    assert len(plans) == 4


def test_plans_of_more_than_their_bytes_are_dropped_the_oldest_first(
    plans: OrderedDict[object, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    xs = [torch.randn(60, device=DEVICE) for _ in range(4)]
    triton_engine.measure(xs[:1], Log2Bins())
    (one,) = plans.values()
    monkeypatch.setattr(triton_engine, "MAX_TABLE_BYTES", 2 * one.table_bytes)
    for x in xs:
        triton_engine.measure([x], Log2Bins())
    assert [key[1] for key in plans] == [(xs[2].data_ptr(),), (xs[3].data_ptr(),)]


def test_a_tensor_without_storage_is_refused() -> None:
    x = torch.ones(3, device=DEVICE)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"needs tensors with values; tensors\[1\] has no storage"):
        triton_engine.measure([torch.ones(2, device=DEVICE), x], Log2Bins())


def test_more_bins_than_a_program_holds_take_the_reference_engine() -> None:
    x = torch.randn(1000, device=DEVICE)
    for n in (triton_engine.MAX_BINS, triton_engine.MAX_BINS + 1):
        got, expected = (e.measure([x], LinearBins(n)) for e in (triton_engine, reference))
        assert torch.equal(got.counts, expected.counts)


@pytest.mark.parametrize("name", ["LOG2_SHIFT", "LOG2_MAGNITUDES", "LOG2_FINITE"])
def test_kernels_have_the_log2_bins_of_python(name: str) -> None:
    assert getattr(binning, name).value == getattr(bins, name)


def test_constants_of_kernels_are_equal_to_themselves() -> None:
    # Before each launch on a device, which the interpreter does not make, Triton compares them
    # with what they were when the kernel was compiled.
    names = [f"gradstat.kernels.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    values = [x for name in names for x in vars(importlib.import_module(name)).values()]
    constants = [x.value for x in values if isinstance(x, tl.constexpr)]
    assert float("inf") in constants
    assert all(x == x for x in constants)


@pytest.mark.parametrize("kind", ["no range", "known range", "automatic range"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_read_and_write_nothing_where_the_flag_is_zero(
    kind: str, dtype: torch.dtype
) -> None:
    ends = (-1.0, 1.0) if kind == "known range" else ()
    bins = Log2Bins() if kind == "no range" else LinearBins(8, *ends)
    xs = [torch.randn(n, device=DEVICE).to(dtype) for n in (0, 5, 20_000)]
    (group,) = triton_engine.find_tables(xs, xs[0].device, triton_engine.make_items).groups
    if CUDA:
        group.items[:, 0] = 0  # the address of no element
    shapes = [((3, 8), torch.int64), ((3, 8), torch.float64), ((3, bins.bins), torch.int64)]
    sevens = [torch.full(shape, 7, dtype=dtype, device=DEVICE) for shape, dtype in shapes]
    ranges = torch.full((3, 2), 7.0, device=DEVICE)
    due = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    known = ranges if kind == "known range" else None
    kernels = triton_engine.kernels_for(xs[0].device, dtype, bins)
    triton_engine.summarise(group, kernels, tuple(sevens), known, due)
    if kind == "automatic range":
        triton_engine.count_again(group, kernels, tuple(sevens), ranges, due)
    assert all(bool((x == 7).all()) for x in (*sevens, ranges))


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.float16, torch.float64]])
@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(8), LinearBins(8, -1.0, 1.0)], ids=repr)
def test_a_plan_measures_new_values_at_the_same_addresses_and_at_others(
    bins: Log2Bins | LinearBins, dtypes: list[torch.dtype]
) -> None:
    def make(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        values = [torch.randn(n, generator=generator) for n in (5, 3000, 1)]
        return [x.to(DEVICE, dtype) for x in values for dtype in dtypes]

    xs = make(0)
    plan = triton_engine.Plan(xs, bins)
    for seed in range(4):
        if seed == 2:
            xs = make(seed)
        for x, new in zip(xs, make(seed), strict=True):
            x.copy_(new)
        expected = reference.measure(xs, bins)
        integers, floats, counts = triton_engine.split(plan.run(xs), len(xs), bins.bins)
        assert torch.equal(integers.view_as(expected.integers), expected.integers)
        assert torch.equal(counts.view_as(expected.counts), expected.counts)
        torch.testing.assert_close(
            floats.view_as(expected.floats), expected.floats, rtol=1e-5, atol=1e-6, equal_nan=True
        )


@pytest.mark.parametrize("n_before", [0, 3, 10**6])
@pytest.mark.parametrize(("period", "first"), [(1, 0), (4, 3), (12, 3), (10**12, 0)])
def test_flags_are_set_as_passes_are_due(period: int, first: int, n_before: int) -> None:
    counter = triton_engine.PassCounter(torch.device(DEVICE), period)
    flags = []
    for _ in range(26):
        flags.append(int(counter.flag(n_before, first)))
        counter.count()
    passes = range(n_before, n_before + 26)
    assert flags == [n % period == first for n in passes]
