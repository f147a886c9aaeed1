"""`Watch.log` and learning rates: each value belongs to its step, and holds nothing else."""

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import no_waiting
from torch import Tensor, nn

import gradstat
from gradstat import Watch


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    return model, torch.optim.SGD(model.parameters(), 0.1)


def loss_of(model: nn.Module) -> Tensor:
    device = next(model.parameters()).device
    loss: Tensor = model(torch.ones(2, 4, device=device)).square().mean()
    return loss


def listed(w: Watch, name: str) -> list[tuple[int, float]]:
    steps, values = w.history.scalar(name)
    return list(zip(steps.tolist(), values.tolist(), strict=True))


@pytest.mark.parametrize("when", ["backward", "step"])
def test_learning_rates_go_on_when_nobody_keeps_the_watch(when: str, tmp_path: Path) -> None:
    model, optimizer = make()
    gradstat.watch(model, optimizer=optimizer, when=when, path=tmp_path)
    for _ in range(4):
        loss_of(model).backward()
        optimizer.step()
        gc.collect()
    del model, optimizer
    gc.collect()
    history = gradstat.History.load(tmp_path)
    assert len(history) == 4
    assert history.scalar("lr")[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("when", ["backward", "step", "call"])
@pytest.mark.parametrize("every", [1, 3])
def test_log_gives_a_value_to_its_step(is_before: bool, when: Any, every: int) -> None:
    model, optimizer = make()
    w = gradstat.watch(model, every=every, when=when, optimizer=optimizer)
    for step in range(5):
        if is_before:
            w.log(loss=torch.tensor(float(step)), tokens=10 * step)
        loss_of(model).backward()
        if when == "call":
            w.measure()
        optimizer.step()
        optimizer.zero_grad()
        if not is_before:
            w.log(loss=torch.tensor(float(step)), tokens=10 * step)
    assert w.history.scalars == (
        ["loss", "tokens", "lr"] if is_before else ["lr", "loss", "tokens"]
    )
    assert listed(w, "loss") == [(step, float(step)) for step in range(5)]
    assert listed(w, "tokens") == [(step, 10.0 * step) for step in range(5)]
    assert listed(w, "lr") == [(step, 0.1) for step in range(5)]
    assert w.history.steps.tolist() == list(range(0, 5, every))


def test_log_keeps_the_values_of_all_passes_of_a_step() -> None:
    model, optimizer = make()
    w = gradstat.watch(model, accumulation_steps=2, optimizer=optimizer)
    for at in range(6):
        w.log(loss=at)
        loss_of(model).backward()
        if at % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert listed(w, "loss") == [(at // 2, float(at)) for at in range(6)]
    assert listed(w, "lr") == [(step, 0.1) for step in range(3)]


def test_log_takes_any_single_number() -> None:
    model, _ = make()
    w = gradstat.watch(model)
    loss = loss_of(model)
    values = [loss, nn.Parameter(torch.tensor(2.0)), torch.tensor(3), torch.tensor(True)]
    values += [
        np.float32(0.5),
        np.int64(7),
        math.nan,
        -math.inf,
        2**40,
        torch.tensor(1.5).bfloat16(),
    ]
    for value in values:
        w.log(x=value)
    got = w.history.scalar("x")[1]
    np.testing.assert_array_equal(
        got, got, [x.item() if isinstance(x, Tensor) else float(x) for x in values]
    )


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("a", TypeError, "numbers or 0-dim tensors; x is 'a'"),
        (True, TypeError, "x is True"),
        (None, TypeError, "x is None"),
        ([1.0], TypeError, r"x is \[1.0\]"),
        (torch.ones(1), ValueError, r"x is a tensor of shape \(1,\) and torch.float32 on cpu"),
        (torch.tensor(1j), ValueError, r"x is a tensor of shape \(\) and torch.complex64"),
        (torch.ones((), device="meta"), ValueError, "on meta"),
        (10**400, ValueError, "numbers that float64 holds; x is beyond"),
    ],
    ids=lambda each: repr(each)[:40],
)
def test_log_refuses_what_is_no_number_and_keeps_nothing(
    value: Any, error: type[Exception], message: str
) -> None:
    w = gradstat.watch(make()[0])
    with pytest.raises(error, match=rf"log\(\) needs .*{message}"):
        w.log(loss=1.0, x=value)
    assert w.history.scalars == []


def test_log_holds_no_graph_and_sees_the_value_of_its_moment() -> None:
    model, _ = make()
    w = gradstat.watch(model)
    loss = loss_of(model)
    expected = loss.item()
    w.log(loss=loss)
    with torch.no_grad():
        loss.mul_(2)
    held = weakref.ref(loss)
    del loss
    gc.collect()
    assert held() is None
    assert listed(w, "loss") == [(0, expected)]


@pytest.mark.parametrize("when", ["backward", "step"])
def test_watch_takes_optimizers_without_a_rate_and_with_one_in_a_vector(when: Any) -> None:
    class Still(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    model, _ = make()
    optimizer = Still(model.parameters(), {})
    w = gradstat.watch(model, optimizer=optimizer, when=when)
    # Adafactor has None where it finds its rate itself.
    for group in ({}, {"lr": None}, {"lr": torch.tensor([0.5])}, {"lr": "auto"}, {"lr": 0.25}):
        optimizer.param_groups[0].update(group)
        loss_of(model).backward()
        optimizer.step()
    assert listed(w, "lr") == [(2, 0.5), (4, 0.25)]


def test_watch_keeps_the_learning_rate_of_each_group() -> None:
    model, _ = make()
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())]
    optimizer = torch.optim.Adam(groups[:1])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    w = gradstat.watch(model, optimizer=optimizer)
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        scheduler.step()
    assert [value for _, value in listed(w, "lr")] == pytest.approx([0.1, 0.05, 0.025])
    optimizer.add_param_group(groups[1])
    loss_of(model).backward()
    optimizer.step()
    assert listed(w, "lr/1") == [(3, pytest.approx(0.2))]
    w.close()
    optimizer.step()
    assert listed(w, "lr/1") == [(3, pytest.approx(0.2))]


def test_watch_keeps_a_learning_rate_that_is_a_tensor() -> None:
    model, _ = make()
    optimizer = torch.optim.AdamW(model.parameters(), torch.tensor(0.25), foreach=False)
    w = gradstat.watch(model, optimizer=optimizer)
    loss_of(model).backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(0.5)
    loss_of(model).backward()
    optimizer.step()
    assert listed(w, "lr") == [(0, 0.25), (1, 0.5)]


def test_watch_lets_an_optimizer_outlive_it() -> None:
    model, optimizer = make()
    w = gradstat.watch(model, optimizer=optimizer)
    held = weakref.ref(w.history)
    del w, model
    gc.collect()
    optimizer.step()
    del optimizer
    gc.collect()
    assert held() is None


def test_log_stays_when_steps_are_skipped() -> None:
    model, optimizer = make()
    w = gradstat.watch(model, when="step", optimizer=optimizer)
    for step in range(4):
        w.log(loss=step)
        loss_of(model).backward()
        if step != 1:  # as a scaler does
            optimizer.step()
    assert listed(w, "loss") == [(0, 0.0), (1, 1.0), (1, 2.0), (2, 3.0)]


# PyTorch's own, of what lies on both sides of a break of the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_log_works_in_a_compiled_step() -> None:
    model, _ = make()
    w = gradstat.watch(model)

    def step() -> Tensor:
        loss = loss_of(model)
        w.log(loss=loss)
        return loss

    compiled = torch.compile(step, backend="eager")
    for _ in range(3):
        compiled().backward()
    assert [at for at, _ in listed(w, "loss")] == [0, 1, 2]


@pytest.mark.gpu
def test_log_of_device_tensors_waits_for_nothing() -> None:
    model, _ = make()
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), torch.tensor(0.25).cuda(), capturable=True)
    w = gradstat.watch(model, optimizer=optimizer)
    losses: list[Tensor] = []

    def train(steps: int) -> None:
        for _ in range(steps):
            loss = loss_of(model)
            losses.append(loss.detach().clone())
            w.log(loss=loss, tokens=3)
            with torch.no_grad():
                loss.add_(1)
            loss.backward()
            optimizer.step()

    train(1)  # compiles
    with no_waiting():
        train(5)
    assert listed(w, "loss") == [(step, float(loss)) for step, loss in enumerate(losses)]
    assert listed(w, "tokens") == [(step, 3.0) for step in range(6)]
    assert listed(w, "lr") == [(step, 0.25) for step in range(6)]
