"""One tensor: by size, by dtype, by distribution."""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from answers import SCHEMES, truth
from contestants import GRADSTAT, HISTOGRAMS, PEERS, PROTOTYPES, READ, Contestant
from torch import Tensor

from gradstat import Statistics
from gradstat.engines import cpu

K, M = 1 << 10, 1 << 20


class Case(NamedTuple):
    suite: str
    elements: int
    dtype: str = "float32"
    distribution: str = "Gaussian"

    def __str__(self) -> str:
        count = f"{self.elements // M} M" if self.elements >= M else f"{self.elements // K} K"
        return f"{count} {self.dtype} {self.distribution}"


LARGE = Case("sizes", 16 * M)
CASES = [
    *(Case("sizes", n) for n in (1 * K, 32 * K, 1 * M)),
    LARGE,
    *(Case("dtypes", 16 * M, dtype) for dtype in ("bfloat16", "float16")),
    *(Case("distributions", 16 * M, "float32", name) for name in ("lognormal", "zeros", "one bin")),
]
# Where the peers would take minutes, only gradstat and the read run.
HUGE = Case("sizes", 64 * M)


@functools.lru_cache(maxsize=2)  # the case at hand and the one that it is compared with
def make(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(20)
    n = case.elements
    if case.distribution == "zeros":
        x = torch.zeros(n)
    elif case.distribution == "one bin":  # of both schemes
        x = 0.3 + 0.001 * torch.rand(n, generator=generator)
    else:
        x = torch.randn(n, generator=generator)
        if case.distribution == "lognormal":  # over 20 octaves, of both signs
            octaves = torch.rand(n, generator=generator).mul_(20).sub_(20)
            x = octaves.exp2_().copysign_(x)
        else:
            x.mul_(0.1)
    return x.to(getattr(torch, case.dtype))


@functools.lru_cache(maxsize=1)
def expected(case: Case) -> dict[str, Statistics]:
    return {name: truth(make(case), bins) for name, bins in SCHEMES.items()}


def run(case: Case, contestant: Contestant, race: Callable[..., None], benchmark: Any) -> None:
    x = make(case)
    contestant.check(contestant.call(x), x, expected(case))
    others = {g.name: functools.partial(g.call, x) for g in GRADSTAT if g is not contestant}
    if contestant in GRADSTAT and case.elements == LARGE.elements and case != LARGE:
        others[str(LARGE)] = functools.partial(contestant.call, make(LARGE))
    benchmark.group = str(case)
    race(
        functools.partial(contestant.call, x),
        others,
        suite=case.suite,
        contestant=contestant.name,
        elements=case.elements,
        bytes=x.nbytes,
        dtype=case.dtype,
        distribution=case.distribution,
    )


# By case first: the data of one are made once.
@pytest.mark.parametrize("contestant", [*PROTOTYPES, *GRADSTAT, *PEERS, READ], ids=lambda c: c.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensor(
    case: Case, contestant: Contestant, race: Callable[..., None], benchmark: Any
) -> None:
    run(case, contestant, race, benchmark)


HISTOGRAM_SIZES = [Case("histograms", n) for n in (100, 10_000, 10_000_000)]


@pytest.mark.parametrize("contestant", [*HISTOGRAMS, *PEERS[1:]], ids=lambda c: c.name)
@pytest.mark.parametrize("case", HISTOGRAM_SIZES, ids=str)
def test_histogram(
    case: Case, contestant: Contestant, race: Callable[..., None], benchmark: Any
) -> None:
    """`gradstat.histogram`, the same from `statistics`, and what others have for it."""
    x = make(case)
    contestant.check(contestant.call(x), x, expected(case))
    benchmark.group = f"{case.elements:,} values"
    others = {c.name: functools.partial(c.call, x) for c in HISTOGRAMS if c is not contestant}
    race(
        functools.partial(contestant.call, x),
        others,
        suite=case.suite,
        contestant=contestant.name,
        elements=case.elements,
        bytes=x.nbytes,
    )


@pytest.mark.parametrize("contestant", [*GRADSTAT, READ], ids=lambda c: c.name)
def test_huge_tensor(contestant: Contestant, race: Callable[..., None], benchmark: Any) -> None:
    run(HUGE, contestant, race, benchmark)


@pytest.mark.parametrize("contestant", GRADSTAT, ids=lambda c: c.name)
def test_memory(contestant: Contestant, race: Callable[..., None], benchmark: Any) -> None:
    """Beside a tensor of any size, under 1 MB: results, work table, partials, counters."""
    x = make(HUGE)
    contestant.call(x)  # what is compiled stays
    cpu._scratches.clear()
    tracemalloc.start()
    contestant.call(x)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Counters are tensors, which it does not see.
    peak_bytes += sum(memory.nbytes for *_, memory in cpu._scratches)
    assert peak_bytes <= 1 << 20
    benchmark.group = "memory beside 64 M float32"
    race(
        functools.partial(contestant.call, x),
        {},
        suite="memory",
        contestant=contestant.name,
        peak_bytes=peak_bytes,
    )
