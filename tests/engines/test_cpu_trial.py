"""What is compiled is compared with `reference` once, and not used where it differs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import gradstat
from gradstat import LinearBins, Log2Bins
from gradstat.bins import Bins
from gradstat.engines import cpu
from gradstat.engines.cpu import compiling, formats
from gradstat.engines.cpu.formats import work as format_work
from gradstat.record import RecordLayout

RIGHT = [torch.tensor([1, 2]), torch.tensor([1.0, float("nan")])]
WRONG = [[torch.tensor([1, 3]), RIGHT[1]], [RIGHT[0], torch.tensor([1.0001, float("nan")])]]


def entry(directory: Path | None) -> Callable[..., None]:
    """A function as Numba compiles it, with its cache in a directory, that does nothing."""

    def work(*_: object) -> None: ...

    function: Any = work
    function.stats, function.py_func = SimpleNamespace(cache_path=directory), work
    function.overloads = {"void()": SimpleNamespace(entry_point=work)}
    return work


def trusted(directory: Path | None, results: list[torch.Tensor], calls: list[str]) -> bool:
    def measure() -> list[torch.Tensor]:
        calls.append("measured")
        return results

    return compiling.passes_trial(entry(directory), "numbers", measure, lambda: RIGHT)


def test_what_agrees_is_tried_once_where_there_is_a_cache(tmp_path: Path) -> None:
    calls: list[str] = []
    assert [trusted(tmp_path, RIGHT, calls) for _ in range(3)] == [True] * 3
    assert calls == ["measured"]
    (note,) = tmp_path.iterdir()
    assert torch.__version__ in note.name


@pytest.mark.parametrize("directory", [None, Path(__file__) / "none"], ids=["none", "unwritable"])
def test_what_agrees_is_tried_in_each_process_without_a_cache(directory: Path | None) -> None:
    calls: list[str] = []
    assert [trusted(directory, RIGHT, calls) for _ in range(2)] == [True] * 2
    assert calls == ["measured"] * 2


@pytest.mark.parametrize("wrong", WRONG, ids=["integers", "floats"])
def test_what_differs_is_not_trusted_and_a_warning_names_the_versions(
    wrong: list[torch.Tensor], tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=f"numbers wrongly with NumPy {np.__version__}"):
            assert not trusted(tmp_path, wrong, [])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All that is compiled for float64, float16's formats and edges does nothing."""
    known: tuple[Any, ...] = cpu._is_trusted, cpu._are_edges_trusted, formats._is_trusted
    wrong, work_on, formats_on = entry(None), cpu.work.work_on, format_work.work_on
    monkeypatch.setattr(
        cpu.work,
        "work_on",
        lambda dtype, *more: wrong if dtype.itemsize == 8 else work_on(dtype, *more),
    )
    monkeypatch.setattr(
        format_work, "work_on", lambda dtype: wrong if dtype.itemsize == 2 else formats_on(dtype)
    )
    monkeypatch.setattr(cpu.work, "fill_edges", lambda: wrong)
    monkeypatch.setattr(cpu, "_plans", {})
    for each in known:
        each.cache_clear()
    yield
    for each in known:
        each.cache_clear()


SCHEMES = [Log2Bins(), LinearBins(7), LinearBins(7, nice=True), LinearBins(7, -1.0, 1.0)]


@pytest.mark.usefixtures("broken")
@pytest.mark.filterwarnings("ignore:the CPU engine computes:RuntimeWarning")
@pytest.mark.parametrize("bins", SCHEMES, ids=str)
def test_reference_measures_what_is_compiled_wrong(bins: Bins, generator: torch.Generator) -> None:
    x = torch.randn(3, 50, generator=generator)
    tensors = [x.double(), x, x[0].double() * 1e300, x.t().double()]
    got = cpu.measure(tensors, bins)
    expected = gradstat.statistics(tensors, bins, engine="reference")
    assert torch.equal(got.integers, expected.integers)
    assert torch.equal(got.counts, expected.counts)
    torch.testing.assert_close(got.floats, expected.floats, rtol=1e-5, atol=1e-9)
    data = cpu.Plan(tensors, bins).run(tensors)
    assert data is not None
    recorded = RecordLayout(len(tensors), 0, bins.bins).statistics(data, bins)
    assert torch.equal(recorded.integers, got.integers)
    assert torch.equal(recorded.counts, got.counts)
    assert torch.equal(recorded.floats.nan_to_num(), got.floats.nan_to_num())


@pytest.mark.usefixtures("broken")
def test_reference_measures_formats_and_edges_that_are_compiled_wrong() -> None:
    x = torch.arange(-8.0, 9.0).half()
    with pytest.warns(RuntimeWarning, match=r"narrow formats of torch\.float16 wrongly"):
        got = gradstat.quantization(x, "mxfp4_e2m1", engine="cpu")
    expected = gradstat.quantization(x, "mxfp4_e2m1", engine="reference")
    assert torch.equal(got.integers, expected.integers)
    with pytest.warns(RuntimeWarning, match="edges wrongly"):
        counts, edges = gradstat.histogram(x.float(), 5)
    assert torch.equal(edges, gradstat.statistics(x.float(), 5, engine="reference").edges)
    assert int(counts.sum()) == 17
