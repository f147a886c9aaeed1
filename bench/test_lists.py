"""All gradients of a model in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from answers import SCHEMES, check_composite, check_statistics, composite, truth
from shapes import GPT2_SMALL, MLP, RESNET50, Shape
from torch import Tensor

import gradstat
from gradstat import Statistics
from gradstat.engines import cpu

MODELS = {"MLP": MLP, "ResNet-50": RESNET50, "GPT-2 small": GPT2_SMALL}
SIZES = {"MLP": (4, 8_140), "ResNet-50": (161, 25_557_032), "GPT-2 small": (148, 124_439_808)}

Call = Callable[[], Any]


@functools.lru_cache(maxsize=1)
def make(model: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(20)
    return [torch.randn(shape, generator=generator).mul_(0.01) for shape in MODELS[model]]


@functools.cache
def expected(model: str, scheme: str) -> list[Statistics]:
    return [truth(x, SCHEMES[scheme]) for x in make(model)]


def one_call(model: str, scheme: str) -> Call:
    call = functools.partial(gradstat.statistics, make(model), SCHEMES[scheme])
    for result, row in zip(call(), expected(model, scheme), strict=True):
        check_statistics(result, row)
    return call


def engine_alone(model: str, scheme: str) -> Call:
    """Without the checks of the arguments and the choice of the engine."""
    return functools.partial(cpu.measure, make(model), SCHEMES[scheme])


def one_tensor(model: str, scheme: str) -> Call:
    """As many bytes in one tensor."""
    x = torch.cat([x.reshape(-1) for x in make(model)])
    call = functools.partial(gradstat.statistics, x, SCHEMES[scheme])
    check_statistics(call(), functools.reduce(Statistics.merge, expected(model, scheme)))
    return call


def composite_per_tensor(model: str) -> Call:
    def call() -> list[tuple[Any, ...]]:
        return [composite(x) for x in make(model)]

    for result, row in zip(call(), expected(model, "linear"), strict=True):
        check_composite(result, row, torch.float32)
    return call


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", MODELS)
def test_list(model: str, scheme: str, race: Callable[..., None], benchmark: Any) -> None:
    call = one_call(model, scheme)
    others = {"one tensor": one_tensor(model, scheme), "engine": engine_alone(model, scheme)}
    _race(race, benchmark, model, f"gradstat {scheme}", call, others)


@pytest.mark.parametrize("model", MODELS)
def test_composite(model: str, race: Callable[..., None], benchmark: Any) -> None:
    others = {f"gradstat {scheme}": one_call(model, scheme) for scheme in SCHEMES}
    _race(race, benchmark, model, "torch composite", composite_per_tensor(model), others)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_engine(scheme: str, race: Callable[..., None], benchmark: Any) -> None:
    call = engine_alone("MLP", scheme)
    _race(race, benchmark, "MLP", f"engine {scheme}", call, {})


@pytest.mark.parametrize("model", MODELS)
def test_shapes(model: str) -> None:
    shapes: list[Shape] = MODELS[model]
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes)) == SIZES[model]


def _race(
    race: Callable[..., None],
    benchmark: Any,
    model: str,
    contestant: str,
    call: Call,
    others: dict[str, Call],
) -> None:
    benchmark.group = model
    tensors = make(model)
    race(
        call,
        others,
        suite="lists",
        contestant=contestant,
        elements=sum(x.numel() for x in tensors),
        bytes=sum(x.nbytes for x in tensors),
        tensors=len(tensors),
    )
