"""What only the CPU engine has: threads, forks, Numba's cache, float32 sums, narrow counters."""

import functools
import math
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import programs
import pytest
import torch

import gradstat
from gradstat import LinearBins, Log2Bins, Statistics
from gradstat.bins import Bins
from gradstat.engines import cpu, reference
from gradstat.engines.cpu import compiling
from gradstat.engines.cpu import formats as cpu_formats
from gradstat.engines.cpu import threads as torch_threads
from gradstat.engines.cpu.compiling import CAME, NEXT
from gradstat.engines.cpu.threads import run_together
from gradstat.engines.cpu.work import MAX_SHARED_BINS
from gradstat.record import RecordLayout

measure = functools.partial(gradstat.statistics, engine="cpu")

SHARED = 1 << 19  # elements: enough that several threads take part


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_identical(got: Statistics, expected: Statistics) -> None:
    assert torch.equal(got.integers, expected.integers)
    assert torch.equal(got.counts, expected.counts)
    torch.testing.assert_close(got.floats, expected.floats, rtol=0, atol=0, equal_nan=True)


def assert_agrees_with_the_reference(tensors: list[torch.Tensor], bins: Bins) -> None:
    got, expected = measure(tensors, bins), gradstat.statistics(tensors, bins, engine="reference")
    assert torch.equal(got.integers, expected.integers)
    assert torch.equal(got.counts, expected.counts)
    for name in ("min", "max", "low", "high"):
        assert torch.equal(getattr(got, name).nan_to_num(), getattr(expected, name).nan_to_num())
    for name in ("l1", "l2", "std"):
        torch.testing.assert_close(
            getattr(got, name), getattr(expected, name), rtol=1e-5, atol=0, equal_nan=True
        )
    assert bool(((got.sum - expected.sum).abs() <= 1e-6 * expected.l1).all())


def run_python(code: str, *, cwd: Path, **environment: str) -> str:
    """Output of a program in a process of its own."""
    return programs.run_python("-c", code, cwd=cwd, check=True, **environment).stdout


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(30)], ids=str)
def test_measure_is_safe_from_several_threads(bins: Bins, generator: torch.Generator) -> None:
    lists = [
        [torch.randn(n, generator=generator), torch.randn(3, generator=generator)]
        for n in (1, 40_000, SHARED, SHARED + 1)
    ]
    expected = [measure(tensors, bins) for tensors in lists]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            calls = [(i, pool.submit(measure, lists[i], bins)) for i in [0, 1, 2, 3] * 25]
            for i, call in calls:
                assert_identical(call.result(), expected[i])
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(7), LinearBins(90_000, -1, 1)], ids=repr)
@pytest.mark.parametrize("names", [("_scratches", "_rooms"), ()], ids=["contended", "free"])
def test_plan_makes_records_of_what_measure_counts(
    bins: Bins, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    class Contended(list[object]):
        """Another thread has always just taken the last one."""

        def __bool__(self) -> bool:
            return True

        def append(self, _: object) -> None: ...

    for name in names:
        monkeypatch.setattr(cpu, name, Contended())
    for n in (6, 1, 3):  # what one call has left is nothing to the next
        tensors = [torch.randn(10**i, generator=generator) for i in range(n)]
        tensors[0] = tensors[0].double()
        plan, layout = cpu.Plan(tensors, bins), RecordLayout(n, 0, bins.bins)
        for _ in range(2):
            tensors = [x * 2 for x in tensors]
            data = plan.run(tensors)
            assert layout.fits(data)
            assert_identical(layout.statistics(data, bins), measure(tensors, bins))


@pytest.mark.parametrize("n_bins", [2, 70_000])
@pytest.mark.parametrize("numel", [3, 2**32 + 3])
def test_pack_makes_what_record_layout_makes(numel: int, n_bins: int) -> None:
    rows = torch.zeros(3 * (16 + n_bins), dtype=torch.int64)
    integers, counts = rows[:24].view(3, 8), rows[48:].view(3, n_bins)
    floats = rows[24:48].view(torch.float64).view(3, 8)
    integers[1, 0], counts[1, -1], counts[2, 0] = numel, numel, 7
    floats[:] = torch.arange(24.0, dtype=torch.float64).view(3, 8)
    layout = RecordLayout(3, 0, n_bins)
    expected = layout.pack(integers.numpy(), floats.numpy(), None, counts.numpy())
    assert cpu.pack(rows, 0, 3, n_bins, 0) == expected
    assert not rows.any()


def test_plan_after_a_refusal_starts_afresh() -> None:
    x = torch.arange(10.0)
    empty = torch.empty(10)
    plan = cpu.Plan([x, empty], Log2Bins())
    empty.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no storage"):
        plan.run([x, empty])
    data = cpu.Plan([x, x], Log2Bins()).run([x, x])
    assert RecordLayout(2, 0, 2048).dense(data).sum(1).tolist() == [10, 10]


# Rows of units, channels, one unit, and enough for several threads, which have a part each.
PEAK_SHAPES = [((5, 3), -1), ((2, 3, 4, 5), 1), ((7,), 0), ((1, 3, 400_000), 1), ((1027, 1030), 1)]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", gradstat.ops.DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "unit"), PEAK_SHAPES, ids=str)
def test_unit_peaks_are_those_of_the_reference(
    shape: tuple[int, ...],
    unit: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    monkeypatch.setattr(cpu, "_FEW", 0)
    x = torch.randn(shape, generator=generator).to(dtype)
    unit %= x.dim()
    wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)
    channels_last = x.movedim(unit, -1).contiguous().movedim(-1, unit)
    for layout in (x, wide[..., ::2], channels_last, -x.abs(), torch._neg_view(x)):
        expected = reference.unit_peaks(layout, unit)
        assert torch.equal(cpu.unit_peaks(layout, unit), expected)
    for special in (math.nan, -math.inf, -0.0, torch.finfo(dtype).smallest_normal / 2):
        y = torch.full_like(x, -0.0)
        y[(-1,) * x.dim()] = special
        expected = reference.unit_peaks(y, unit)
        assert bool(expected[-1].isnan()) == math.isnan(special)
        torch.testing.assert_close(
            cpu.unit_peaks(y, unit), expected, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(7), LinearBins(7, -1, 1)], ids=repr)
def test_calls_that_are_alike_share_a_plan_and_no_memory(
    bins: Bins, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    plans: dict[object, cpu.Plan] = {}
    monkeypatch.setattr(cpu, "_plans", plans)
    xs = torch.randn(2, 3, 40, generator=generator)
    first = measure(list(xs[0]), bins)
    (plan,) = plans.values()
    second = measure(list(xs[1]), bins)
    assert list(plans.values()) == [plan]
    for s, x in ((first, xs[0]), (second, xs[1])):
        assert_identical(s, measure([*x, x[:0]], bins)[:3])
    # Another dtype, other strides and other sizes are other work.
    for others in (xs[0].half(), xs.view(3, 80)[:, ::2], xs[0, :, :39]):
        assert_agrees_with_the_reference(list(others), bins)
    assert len(plans) == 5


def test_plans_of_calls_are_few_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: dict[object, cpu.Plan] = {}
    monkeypatch.setattr(cpu, "_plans", plans)
    for n in range(40):
        measure(torch.ones(n))
    # What was asked for last is kept.
    assert len(plans) == 16
    assert not [key for key in plans if repr(torch.Size([23])) in repr(key)]
    assert [key for key in plans if repr(torch.Size([24])) in repr(key)]
    measure([torch.ones(1)] * 2000)
    assert len(plans) == 16


def test_measure_takes_new_scratch_when_another_thread_took_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Contended(list[object]):
        def __bool__(self) -> bool:
            return True

    x = torch.ones(5)
    monkeypatch.setattr(cpu, "_scratches", Contended())
    assert int(measure(x).finite) == 5


@pytest.mark.usefixtures("two_threads")
def test_measure_works_in_autograds_hooks_and_threads(generator: torch.Generator) -> None:
    results: dict[str, Statistics] = {}

    def train(name: str, x: torch.Tensor) -> None:
        x.register_hook(lambda gradient: results.__setitem__(name, measure(gradient)))
        (x * x).sum().backward()

    inputs = {str(i): torch.randn(SHARED, generator=generator) for i in range(4)}
    threads = [
        threading.Thread(target=train, args=(name, x.clone().requires_grad_()))
        for name, x in inputs.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, x in inputs.items():
        assert_identical(results[name], measure(2 * x))


# Other threads do not come along into a forked child, where OpenMP would wait for them.
FORKED = """
import multiprocessing, torch, gradstat

torch.set_num_threads(2)
x = torch.arange(1 << 19).float()

def count(_):
    return gradstat.statistics(x, engine="cpu").counts.tolist()

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return gradstat.statistics(x * i, engine="cpu").l1

here = count(0)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(count, range(4)) == [here] * 4
assert count(0) == here
loader = torch.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork")
assert [float(row) for row in loader] == [float((x.double() * i).sum()) for i in range(4)]
assert count(0) == here
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_measure_works_after_a_fork_and_in_a_data_loader(tmp_path: Path) -> None:
    assert run_python(FORKED, cwd=tmp_path).endswith("done\n")


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(30), LinearBins(5000)], ids=str)
def test_measure_does_not_depend_on_the_number_of_threads(
    bins: Bins, generator: torch.Generator
) -> None:
    tensors = [torch.randn(n, generator=generator) + 1 for n in (SHARED, 3, 100_000, SHARED + 1)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results += [measure(tensors, bins) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_identical(result, results[0])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(30)], ids=str)
def test_measure_keeps_subnormals_that_torch_flushes(bins: Bins) -> None:
    x = (torch.arange(SHARED, dtype=torch.float64) % 999 * 1e-43 - 4e-41).float()
    expected = measure(x, bins)
    assert int(expected.zeros) < SHARED // 100
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a processor that torch can make flush subnormals")
    try:
        got = measure(x, bins)
        # The caller's mode is as it was: this product is subnormal.
        assert float(torch.tensor(2.0**-120) * 2.0**-20) == 0
    finally:
        torch.set_flush_denormal(False)
    assert_identical(got, expected)


MEMORY = """
import torch, gradstat
from pathlib import Path

torch.set_num_threads(2)

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10

for dtype in (torch.bfloat16, torch.float32, torch.float64):
    x = torch.ones(3000, 4000, dtype=dtype)[:, ::2]
    y = x.t()[1:].expand(2, -1, -1)
    for bins in (gradstat.Log2Bins(), gradstat.LinearBins(30)):
        gradstat.statistics([x[:, :3], y[:3]], bins, engine="cpu")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = peak_bytes()
        gradstat.statistics([x, y], bins, engine="cpu")
        print(peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_measure_needs_under_a_megabyte_beside_the_tensors(tmp_path: Path) -> None:
    growths = [int(growth) for growth in run_python(MEMORY, cwd=tmp_path).split()]
    assert len(growths) == 3 * 2
    assert max(growths) < 1 << 20


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("n", [MAX_SHARED_BINS, MAX_SHARED_BINS + 1, 100_000])
def test_measure_counts_more_bins_than_its_private_counters(
    n: int, generator: torch.Generator
) -> None:
    x = torch.randn(SHARED, generator=generator)
    x[::99] = float("nan")
    # Two bins that all threads count in, were they to share this tensor.
    crowded = torch.tensor([0.0, 1.0]).repeat(SHARED)
    assert_agrees_with_the_reference([x, x[:50], x[::3], crowded], LinearBins(n))
    assert_agrees_with_the_reference([x, x[:50], x[::3]], LinearBins(n, -1.0, 1.0))


@pytest.mark.parametrize("n", [(1 << 15) - 1, 1 << 15, (1 << 16) + 1])
def test_measure_agrees_where_it_begins_to_divide_a_tensor(
    n: int, generator: torch.Generator
) -> None:
    x = torch.randn(n, generator=generator)
    x[: n // 2] *= 1e-20
    for bins in (Log2Bins(), LinearBins(30), LinearBins(7, -0.5, 0.5)):
        assert_agrees_with_the_reference([x, x.double() * 1e-200, x.half()], bins)


def test_measure_reads_negated_views_while_others_are_copied(generator: torch.Generator) -> None:
    # The copy of each must live until all are read; freed, the next one would take its place.
    parts = [torch.randn(5000, generator=generator) * 10.0**i for i in range(6)]
    views = [torch.complex(part, part).conj().imag for part in parts]
    assert all(view.is_neg() for view in views)
    assert_agrees_with_the_reference(views, Log2Bins())
    for row, part in zip(measure(views), parts, strict=True):
        magnitudes = float(part.double().abs().sum())
        assert float(row.sum) == pytest.approx(-float(part.double().sum()), abs=1e-6 * magnitudes)


is_x86 = platform.machine().lower() in ("x86_64", "amd64")
CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()


# What torch has started in that mode keeps it for good, and is to have no share.
FLUSHING = """
import torch, gradstat
from gradstat.engines.cpu import threads

threads.os.sched_getaffinity = lambda _: range(4)
threads._granted_cpus = lambda: 4
torch.set_num_threads(1)
x = (torch.arange(1 << 20, dtype=torch.float64) % 999 * 1e-43 - 4e-41).float()

def measure():
    return gradstat.statistics(x, engine="cpu"), gradstat.quantization(x, "bfloat16", engine="cpu")

expected = measure()
assert torch.set_flush_denormal(True)
torch.set_num_threads(4)
(x + 1.0).sum()  # starts threads
torch.set_flush_denormal(False)
assert int((x * 1.0 == 0).sum()) > 100_000  # they flush
for _ in range(9):
    for got, each in zip(measure(), expected, strict=True):
        assert torch.equal(got.integers, each.integers), (got.integers, each.integers)
        assert torch.equal(got.floats, each.floats), (got.floats, each.floats)
print("done")
"""


@pytest.mark.skipif(not is_x86, reason="needs a processor that torch can make flush subnormals")
def test_measure_keeps_subnormals_where_threads_of_torch_flush_them(tmp_path: Path) -> None:
    assert run_python(FLUSHING, cwd=tmp_path) == "done\n"


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs, and to place threads")
def test_torchs_threads_share_the_work(generator: torch.Generator) -> None:
    x = torch.randn(8 * SHARED, generator=generator)
    plan = cpu.Plan([x], Log2Bins())
    (table,) = plan._tables
    came = []

    def run(entry: Callable[[int], None], address: int, threads: int) -> None:
        run_together(entry, address, threads)
        came.append((table._table[CAME], table._table[NEXT]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "run_together", run)
        shared = plan.run([x])
    assert came == [(2, 64 + 2)]  # each has asked once more than there was
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_threads._team, "call", None)  # torch without OpenMP
        assert plan.run([x]) == shared
    assert len(came) == 1


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs, and to place threads")
def test_count_threads_is_no_more_than_the_thread_may_use_cpus(two_threads: None) -> None:
    assert torch_threads.count_threads(9) == 2
    assert torch_threads.count_threads(1) == 1
    os.sched_setaffinity(0, {min(CPUS)})
    try:
        assert torch_threads.count_threads(9) == 1
    finally:
        os.sched_setaffinity(0, CPUS)


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(30)], ids=str)
def test_no_more_threads_work_than_may(
    bins: Bins, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4 * SHARED, generator=generator)
    expected, formats = measure(x, bins), gradstat.quantization(x, "nvfp4", engine="cpu")
    before = torch.get_num_threads()
    for module in (cpu, cpu_formats):
        monkeypatch.setattr(module, "count_threads", lambda most: min(most, 2))
    torch.set_num_threads(8)
    try:
        for _ in range(5):
            assert_identical(measure(x, bins), expected)
            again = gradstat.quantization(x, "nvfp4", engine="cpu")
            assert torch.equal(again.integers, formats.integers)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ({}, math.inf),
    ],
)
def test_count_threads_respects_what_a_container_may_use(
    files: dict[str, str], cpus: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(torch_threads, "_CGROUP", tmp_path)
    granted = torch_threads._granted_cpus.__wrapped__
    assert granted() == cpus
    monkeypatch.setattr(torch_threads, "_granted_cpus", granted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(range(64)))
    assert torch_threads.count_threads(100) == min(cpus, 64)


# The caller frees the tensor right after: a helper that still reads it would end the process.
INTERRUPTED = """
import itertools, random, signal, time, torch, gradstat

torch.set_num_threads(2)
gradstat.statistics(torch.ones(1 << 20))
random.seed(0)

class Interrupt(Exception):
    pass

def interrupt(signum, frame):
    raise Interrupt

signal.signal(signal.SIGALRM, interrupt)
interrupts = 0
while interrupts < 100:
    try:
        y = torch.ones(9 << 20)  # over 32 MB, which leave the process as soon as they are freed
        signal.setitimer(signal.ITIMER_REAL, random.uniform(20e-6, 1e-3))
        gradstat.statistics(y)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupt:
        interrupts += 1
    y = None
print(int(gradstat.statistics(torch.ones(1 << 20)).finite))
"""


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs, and to place threads")
def test_measure_survives_interrupts(tmp_path: Path) -> None:
    assert run_python(INTERRUPTED, cwd=tmp_path).split() == [str(1 << 20)]


OLDEST = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}


@pytest.mark.skipif(not is_x86, reason="needs a processor of x86")
def test_float16_is_widened_without_an_instruction_for_it(tmp_path: Path) -> None:
    code = """
import numpy as np, torch
from gradstat.engines.cpu.compiling import compile_entry, pointer, target
from gradstat.engines.cpu.partials import real

def widen(source, target, n):
    x, y = pointer(source, np.int16), pointer(target, np.float32)
    for j in range(n):
        y[j] = real(x[j])

every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
found, expected = torch.empty(1 << 16), every.view(torch.float16).float()
compiled = compile_entry(widen, "test", "void(int64, int64, int64)")
compiled(every.data_ptr(), found.data_ptr(), 1 << 16)
assert "+f16c" not in target()[2].split(",")
assert torch.equal(found.isnan(), expected.isnan())
known = ~expected.isnan()
assert torch.equal(found.view(torch.int32)[known], expected.view(torch.int32)[known])
print("done")
"""
    output = run_python(code, cwd=tmp_path, NUMBA_CACHE_DIR=str(tmp_path), **OLDEST)
    assert output == "done\n"


# Half a minute to compile all of it for another processor.
@pytest.mark.slow
@pytest.mark.skipif(not is_x86, reason="needs a processor of x86")
def test_measure_takes_float16_without_an_instruction_for_it(tmp_path: Path) -> None:
    code = """
import numpy as np, torch, gradstat
every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
for bins in (gradstat.Log2Bins(), gradstat.LinearBins(30), gradstat.LinearBins(30, -1e-5, 1.0)):
    for x in (torch.ones(3), every):
        got = gradstat.statistics(x, bins, engine="cpu")
        expected = gradstat.statistics(x, bins, engine="reference")
        assert torch.equal(got.integers, expected.integers)
        assert torch.equal(got.counts, expected.counts)
        torch.testing.assert_close(got.floats, expected.floats, rtol=1e-5, atol=1e-3)
print("done")
"""
    output = run_python(code, cwd=tmp_path, NUMBA_CACHE_DIR=str(tmp_path), **OLDEST)
    assert output == "done\n"


@pytest.mark.parametrize(
    ("bins", "n"), [(Log2Bins(), 1 << 25), (LinearBins(30), 1 << 21), (LinearBins(88), 1 << 21)]
)
def test_measure_counts_more_than_its_counters_hold(bins: Bins, n: int) -> None:
    """Two values in turn: each counter, of 16 bits for linear bins, sees one of them only."""
    x = torch.tensor([0.0, 1.0], dtype=torch.bfloat16).repeat(n // 2)
    counts = measure(x, bins).counts
    assert counts[counts > 0].tolist() == [n // 2, n // 2]


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(30)], ids=str)
def test_measure_counts_beyond_32_bits(bins: Bins) -> None:
    n = (1 << 32) + 6
    s = measure(torch.tensor([0.0, 1.0]).expand(n, 2), bins)
    assert s.counts[s.counts > 0].tolist() == [n, n]
    assert (int(s.finite), int(s.zeros), float(s.sum)) == (2 * n, n, n)


def exact_std(x: torch.Tensor) -> float:
    values = [Fraction(value) for value in x.double().tolist()]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance)


def test_std_is_right_where_the_mean_dominates(generator: torch.Generator) -> None:
    one = torch.full((4096,), 41 / 7)
    one[0] *= 1.0635
    far = -torch.full((4096,), 41 / 7)
    far[9] *= 1.89
    close = 1 + torch.randn(20_000, generator=generator, dtype=torch.float64) / 1e12
    for x in (one, far, close, one.bfloat16(), one.half()):
        assert float(measure(x).std) == pytest.approx(exact_std(x), rel=1e-9, abs=0)


def hard_sums(generator: torch.Generator) -> Iterator[torch.Tensor]:
    """What float32 sums could get wrong: cancelling, growing, and losing small values."""
    noise = torch.randn(30_000, generator=generator)
    for octaves in range(8):
        yield noise + 10.0**octaves
        yield noise.abs() * torch.tensor([1.0, -1.0]).repeat(15_000) + 10.0**-octaves
    for magnitude in (2.0**-149, 2.0**-126, 2.0**-64, 2.0**-40, 2.0**57, 2.0**63, 2.0**126):
        yield noise.clamp(-1.9, 1.9) * magnitude
        giant = noise * magnitude * 2.0**-20
        giant[7777] = magnitude
        yield giant
    # Every addition rounds the same way: 128 of them are 1.9e-6 off.
    yield torch.tensor([0.0, 1.9702529907226562]).repeat(15_000)
    yield torch.tensor([1 / 3, -1 / 7]).repeat(15_000)


@pytest.mark.parametrize("nonfinite", [False, True])
def test_measure_keeps_its_promise_where_float32_sums_are_hard(
    nonfinite: bool, generator: torch.Generator
) -> None:
    for x in hard_sums(generator):
        if nonfinite:
            x[::101] = float("nan")
            x[5] = float("inf")
        for bins in (Log2Bins(), LinearBins(30)):
            assert_agrees_with_the_reference([x, x.double(), x.bfloat16()], bins)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_measure_counts_any_bit_pattern(dtype: torch.dtype, generator: torch.Generator) -> None:
    """NaN of every payload and sign, subnormals, both zeros."""
    words = torch.randint(-(1 << 15), 1 << 15, (100_000,), generator=generator).to(torch.int16)
    x = words.view(dtype)
    x = torch.cat([x, torch.full((9000,), -0.0, dtype=dtype), -x[:3].abs() * 0])
    for bins in (Log2Bins(), LinearBins(30, -1.0, 2.0), LinearBins(200, -1.0, 2.0)):
        got, expected = (measure(x, bins), gradstat.statistics(x, bins, engine="reference"))
        assert torch.equal(got.integers, expected.integers)
        assert torch.equal(got.counts, expected.counts)


# The function that is compiled soonest, in two processes that reach the compiler together.
AT_ONCE = """
import multiprocessing
from gradstat.engines import cpu, reference

def find(barrier, edges):
    barrier.wait()
    assert cpu._are_edges_trusted()
    edges.put(cpu._edges(0.0, 3.0, 3).tolist())

context = multiprocessing.get_context("fork")
for _ in range(2):  # they compile, then they load
    barrier, edges = context.Barrier(2), context.SimpleQueue()
    processes = [context.Process(target=find, args=(barrier, edges)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
        print(edges.get())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_processes_that_compile_at_once_do_not_harm_each_other(tmp_path: Path) -> None:
    found = run_python(AT_ONCE, cwd=tmp_path, NUMBA_CACHE_DIR=str(tmp_path))
    assert found.splitlines() == ["[0.0, 1.0, 2.0, 3.0]"] * 4
    files = [path.suffix for path in tmp_path.rglob("*.*") if path.is_file()]
    assert sorted(files) == [".agrees", ".nbc", ".nbi"]


def test_a_long_compilation_is_announced_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(*arguments: object, **options: object) -> Callable[..., object]:
        time.sleep(0.1)
        return lambda function: function

    monkeypatch.setattr(compiling, "_njit", slow)
    for seconds, is_terminal, times in ((0.01, True, 1), (0.01, False, 0), (60.0, True, 0)):
        monkeypatch.setattr(compiling, "_SLOW_SECONDS", seconds)
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        compiling.compile_entry(lambda: None, "any", "void()")
        assert capsys.readouterr().err.count("compiling") == times
