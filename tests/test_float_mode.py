"""Counts and edges do not depend on `torch.set_flush_denormal`."""

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType

import pytest
import torch
from conftest import ROOT
from programs import run_python

import gradstat
from gradstat import LinearBins, Log2Bins
from gradstat.bins import Bins, keeps_subnormals

TINY = torch.tensor([1e-44, 2e-44, 5e-44, 7e-44, -3e-39, 1e-39, 4e-39, 0.0])

SMALL = TINY * 2.0**20


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    """Subnormals count as zero, as far as torch and the processor are concerned."""
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a processor that torch can make flush subnormals")
    try:
        yield
        # Whatever ran, the mode is as it was.
        assert float(torch.tensor(2.0**-120) * 2.0**-20) == 0
    finally:
        torch.set_flush_denormal(False)


def linear_edges() -> torch.Tensor:
    return LinearBins(3).edges(TINY[0], TINY[3])


def log2_edges() -> torch.Tensor:
    return Log2Bins().edges(torch.zeros(()), torch.zeros(()))


def known_edges() -> torch.Tensor:
    return gradstat.statistics(TINY, LinearBins(3, 1e-44, 7e-44), engine="reference").edges


def unscaled() -> torch.Tensor:
    return gradstat.statistics(SMALL, engine="reference").unscale(2.0**20).counts


@pytest.mark.parametrize("function", [linear_edges, log2_edges, known_edges, unscaled])
def test_edges_and_counts_are_the_same_where_torch_flushes_subnormals(
    function: Callable[[], torch.Tensor],
) -> None:
    expected = function()
    with flushing():
        got = function()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(3), LinearBins(5, nice=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_statistics_are_the_same_where_torch_flushes_subnormals(
    engine: str, dtype: torch.dtype, bins: Bins
) -> None:
    x = TINY.to(dtype)
    expected = gradstat.statistics(x, bins, engine=engine)
    with flushing():
        got = gradstat.statistics(x, bins, engine=engine)
    assert torch.equal(got.integers, expected.integers)
    assert torch.equal(got.floats, expected.floats)
    assert torch.equal(got.counts, expected.counts)
    assert int(got.zeros) < len(x)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_subnormal_range_holds_its_values_where_torch_flushes_subnormals(engine: str) -> None:
    with flushing():
        s = gradstat.statistics(TINY, LinearBins(3, 1e-44, 7e-44), engine=engine)
    assert (s.counts.tolist(), int(s.below), int(s.above)) == ([2, 0, 2], 2, 2)


# The helper threads that torch starts in this mode never leave it: not in the tests' own process.
THREADS = """
import torch, gradstat
torch.set_num_threads(2)
torch.set_flush_denormal(True)
x = torch.full((1 << 18,), 1.0)
assert float((x * 2).sum()) == 2.0 ** 19
x.view(torch.int32).fill_(7)
s = gradstat.statistics(x, gradstat.LinearBins(3), engine="reference")
print(int(s.zeros), float(s.max) == 7 * 2.0**-149, torch.get_num_threads())
"""


def test_reference_keeps_subnormals_of_large_tensors_where_torchs_threads_flush_them() -> None:
    done = run_python("-c", THREADS, check=True)
    assert done.stdout.split() == ["0", "True", "2"]


def test_keeps_subnormals_returns_to_the_callers_mode_after_an_error() -> None:
    @keeps_subnormals
    def fail() -> None:
        assert float(torch.tensor(2.0**-120) * 2.0**-20) != 0
        raise RuntimeError("as planned")

    with flushing(), pytest.raises(RuntimeError, match="as planned"):
        fail()


# What Python and Numba compile while subnormals are flushed is kept, and serves all processes.
COMPILED = """
import torch
torch.set_flush_denormal(FLUSHES)
import gradstat
x = torch.arange(8, dtype=torch.int32).view(torch.float32)
y = torch.arange(8, dtype=torch.int64).view(torch.float64)
for engine in ("reference", "cpu"):
    # Each dtype and each kind of bins has numbers of its own: all are in two of the four pairs.
    for values, bins in ((x, gradstat.Log2Bins()), (y, gradstat.LinearBins(3))):
        s = gradstat.statistics(values, bins, engine=engine)
        print(s.integers.tolist(), s.floats.view(torch.int64).tolist(), s.counts[s.counts > 0])
    q = gradstat.quantization(x, ("mxfp4_e2m1", "nvfp4"), engine=engine)
    print([(each.integers, each.floats.view(torch.int64)) for each in q.values()])
assert (float(torch.tensor(1e-41) * 1) == 0) == FLUSHES
"""


def test_what_is_first_compiled_where_torch_flushes_subnormals_is_right(tmp_path: Path) -> None:
    # A package that nobody has imported yet, with its own caches of Python and of Numba.
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gradstat", tmp_path / "gradstat", ignore=ignore)
    elsewhere = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "NUMBA_CACHE_DIR")
    environment = {**dict.fromkeys(elsewhere), "PYTHONPATH": str(tmp_path)}
    printed = []
    for flushes in ("True", "False"):  # it is compiled, then it is loaded
        code = COMPILED.replace("FLUSHES", flushes)
        done = run_python("-c", code, cwd=tmp_path, check=True, **environment)
        printed.append(done.stdout)
        suffixes = {path.suffix for path in (tmp_path / "gradstat").rglob("__pycache__/*")}
        assert {".pyc", ".nbi"} <= suffixes
    # What was compiled in the usual mode.
    usual = io.StringIO()
    with contextlib.redirect_stdout(usual):
        exec(COMPILED.replace("FLUSHES", "False"), {})
    assert printed == [usual.getvalue()] * 2


def constants(code: CodeType) -> Iterator[float]:
    """All numbers that Python has computed when it compiled a module."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from constants(each)
        else:
            several = each if isinstance(each, tuple | frozenset) else (each,)
            yield from (x for x in several if isinstance(x, float))


def test_constants_of_modules_are_normal_numbers() -> None:
    found = []
    # `rglob` does not follow the link to the kernels.
    for path in (*(ROOT / "gradstat").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")):
        # What other compilers read is float32.
        least = 2.0**-126 if {"engines", "kernels"} & set(path.parts) else 2.0**-1022
        code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
        found += [(path.name, x) for x in constants(code) if 0 < abs(x) < least]
    assert not found
