"""Models, histories and comparisons for the tests of `watch` and `History`."""

from typing import Any

import numpy as np
import torch
from histories import append_rows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradstat
from gradstat import History, LinearBins, Log2Bins, Statistics
from gradstat.bins import Bins
from gradstat.history import FIELDS
from gradstat.results import FLOATS, INTEGERS

SCHEMES = [
    Log2Bins(),
    LinearBins(6, -0.05, 0.05),
    LinearBins(6),
    LinearBins(6, nice=True),
]


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


WEIGHTS = ["0.weight", "2.weight", "4.weight"]


def backward(model: nn.Module, n: int = 8) -> None:
    loss: Tensor = model(torch.randn(n, 6)).square().mean()
    loss.backward()


def gradients(model: nn.Module, names: list[str]) -> list[Tensor]:
    """Copies of the gradients of some parameters."""
    parameters = dict(model.named_parameters())
    return [parameters[name].grad.clone() for name in names]


def train(model: nn.Module, n_steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(n_steps):
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def n_hooks(model: nn.Module) -> int:
    per_parameter = [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in model.parameters()]
    per_module = [
        (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        for m in model.modules()
    ]
    return sum(len(hooks) for group in per_parameter + per_module for hooks in group if hooks)


def n_step_hooks(optimizer: torch.optim.Optimizer) -> int:
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return sum(len(each) for each in hooks)


def assert_record(record: Statistics, expected: Statistics) -> None:
    assert record.bins == expected.bins
    assert torch.equal(record.integers, expected.integers)
    assert record.floats.numpy().tobytes() == expected.floats.numpy().tobytes()
    assert torch.equal(record.counts, expected.counts)


def is_absent(record: Statistics) -> list[bool]:
    """Whether each layer has a row of no values."""
    for row in record:
        present = int(row.numel) > 0
        assert present or (row.integers.eq(0).all() and row.floats.isnan().all())
        assert present or row.counts.eq(0).all()
    return [int(row.numel) == 0 for row in record]


class Fails(torch.autograd.Function):
    """The identity, whose gradient cannot be computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("no gradient")


LAYERS = ["first.weight", "second.weight"]


def arrays(s: Statistics) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return s.integers.numpy(), s.floats.numpy(), s.counts.numpy()


def absent(bins: Bins) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of one layer without a gradient."""
    floats = np.full((1, len(FLOATS)), np.nan)
    return np.zeros((1, len(INTEGERS)), int), floats, np.zeros((1, bins.bins), int)


def make_history(
    bins: Bins, generator: torch.Generator, n_steps: int = 3
) -> tuple[History, list[Statistics]]:
    """A history at the steps 0, 2, 4 ... and the record of each."""
    history = History(LAYERS, bins)
    records = []
    for step in range(n_steps):
        tensors = [torch.randn(n, generator=generator) * 10.0**-step for n in (100, 7)]
        records.append(gradstat.statistics(tensors, bins))
        append_rows(history, 2 * step, *arrays(records[-1]))
    return history, records


def assert_same(one: History, other: History) -> None:
    assert one.layers == other.layers
    assert one.bins == other.bins
    assert one.steps.dtype == other.steps.dtype == np.int64
    assert one.steps.tolist() == other.steps.tolist()
    for field in FIELDS:
        assert one[field].dtype == other[field].dtype
        assert one[field].tobytes() == other[field].tobytes()
    for layer in one.layers:
        for mine, theirs in zip(one.histograms(layer), other.histograms(layer), strict=True):
            assert mine.shape == theirs.shape
            assert mine.tobytes() == theirs.tobytes()
