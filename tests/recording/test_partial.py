"""A pass that does not end leaves what it has measured as a last, partial record."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradstat
from gradstat import Watch

ALL = ("grad", "activation")


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), 0.1)


class StopError(Exception):
    pass


def train(stop: str, when: Any = "backward", what: Any = ALL, *, set_to_none: bool = True) -> Watch:
    """Three steps, of which the third stops somewhere."""
    model, optimizer = make()
    w = gradstat.watch(model, what=what, when=when, optimizer=optimizer)
    with pytest.raises(StopError), w:
        run(w, model, optimizer, stop, set_to_none)
    return w


def run(
    w: Watch, model: nn.Module, optimizer: torch.optim.Optimizer, stop: str, set_to_none: bool
) -> None:
    for step in range(3):
        x = torch.randn(5, 3)
        if step == 2 and stop == "forward":
            model.get_parameter("0.weight").data.fill_(math.nan)
        loss = model(x).square().sum()
        w.log(loss=loss)
        if not math.isfinite(loss.item()):
            raise StopError
        optimizer.zero_grad(set_to_none=set_to_none)
        if step == 2 and stop == "before backward":
            raise StopError
        if step == 2 and stop == "within backward":
            model.get_parameter("0.weight").register_hook(_stop)
        loss.backward()
        if step == 2 and stop == "before step":
            raise StopError
        optimizer.step()
    raise StopError


def _stop(_: object) -> None:
    raise StopError


@pytest.mark.parametrize("when", ["backward", "step"])
def test_close_keeps_the_forward_pass_that_made_a_loss_nan(when: Any) -> None:
    w = train("forward", when)
    history = w.history
    assert history.steps.tolist() == [0, 1, 2]
    assert history.partial_step == 2
    activations = [i for i, kind in enumerate(history.kinds) if kind == "activation"]
    assert history["nan"][2, activations].tolist() == [20, 20, 5]
    assert history["numel"][2, : activations[0]].tolist() == [0, 0]
    assert history.scalar("loss")[0].tolist() == [0, 1, 2]
    first = history.diagnose()[0]
    assert (first.kind, first.layer, first.steps[0]) == ("non-finite", "activation/0", 2)


@pytest.mark.parametrize("what", ["grad", ALL, ("grad", "update")], ids=str)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_close_keeps_a_backward_before_the_step_that_never_came(
    what: Any, set_to_none: bool
) -> None:
    w = train("before step", "step", what, set_to_none=set_to_none)
    history = w.history
    assert history.steps.tolist() == [0, 1, 2]
    assert history.partial_step == 2
    gradients = [i for i, kind in enumerate(history.kinds) if kind == "grad"]
    assert (history["numel"][2, gradients] > 0).all()
    updates = [i for i, kind in enumerate(history.kinds) if kind == "update"]
    assert (history["numel"][2, updates] == 0).all()


@pytest.mark.host("gives gradients memory of NumPy's")
def test_close_knows_new_gradients_in_the_memory_of_the_last_ones() -> None:
    model, optimizer = make()
    memory = {p: np.ones(p.shape, np.float32) for p in model.parameters()}

    def run() -> None:
        for step in range(2):
            for p, array in memory.items():
                p.grad = torch.from_numpy(array)
            if step == 1:
                raise StopError
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(StopError), gradstat.watch(model, when="step", optimizer=optimizer) as w:
        run()
    assert w.history.steps.tolist() == [0, 1]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("when", ["backward", "step"])
@pytest.mark.parametrize("what", ["grad", ("grad", "param")], ids=str)
def test_close_keeps_no_record_of_nothing(what: Any, when: Any, set_to_none: bool) -> None:
    w = train("never", when, what, set_to_none=set_to_none)
    assert w.history.steps.tolist() == [0, 1, 2]
    assert w.history.partial_step is None
    # The gradients are those of a step that was measured, or were set to zero.
    w = train("before backward", when, what, set_to_none=set_to_none)
    assert w.history.steps.tolist() == [0, 1]
    assert w.history.partial_step is None


def test_close_keeps_what_a_backward_has_measured_before_it_failed() -> None:
    history = train("within backward", "backward", "grad").history
    assert history.steps.tolist() == [0, 1, 2]
    assert history.partial_step == 2
    assert history["numel"][2].tolist() == [0, 4]


def test_close_keeps_a_whole_backward_as_a_whole_record() -> None:
    w = train("before step", "backward", "grad")
    assert w.history.steps.tolist() == [0, 1, 2]
    assert w.history.partial_step is None


@pytest.mark.parametrize("logs", [True, False])
def test_close_without_an_exception_keeps_a_pass_whose_loss_is_not_finite(logs: bool) -> None:
    model, _ = make()
    w = gradstat.watch(model, what=ALL)
    for step in range(3):
        loss = model(torch.randn(5, 3) / (step < 2 or math.nan)).square().sum()
        if logs:
            w.log(loss=loss)
        if not math.isfinite(loss.item()):
            break
        loss.backward()
    w.close()
    assert w.history.steps.tolist() == ([0, 1, 2] if logs else [0, 1])
    assert w.history.partial_step == (2 if logs else None)


def test_close_in_a_clean_up_keeps_what_an_exception_has_stopped() -> None:
    model, _ = make()
    w = gradstat.watch(model, what=ALL)
    with pytest.raises(StopError):
        fail_and_close(w, model)
    assert w.history.partial_step == 0


def fail_and_close(w: Watch, model: nn.Module) -> None:
    try:
        model(torch.randn(5, 3))
        raise StopError
    finally:
        w.close()


def test_a_failed_pass_leaves_nothing_where_the_run_goes_on() -> None:
    model, _ = make()
    w = gradstat.watch(model, what=ALL)
    model(torch.full((5, 3), math.nan))
    for _ in range(2):
        model(torch.randn(5, 3)).sum().backward()
    w.close()
    assert w.history.partial_step is None
    assert w.history.steps.tolist() == [0, 1]
