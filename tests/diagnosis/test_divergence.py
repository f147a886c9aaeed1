"""The learning rate as the cause of a loss that rises for good."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from findings import diagnose, noise
from histories import make_history
from torch import nn

import gradstat
from gradstat import Finding, History, Log2Bins
from gradstat.record import GRAD, PARAM, UPDATE

STEPS, AT = 120, 80
Series = Callable[[int], float]


def run(losses: Series, rate: Series) -> History:
    """Three layers whose weights a step changes by the rate times their size."""

    def row(step: int, at: int) -> torch.Tensor:
        sizes = (1e-2, 1.0, rate(step))
        return noise(0 if at // 3 == 1 else step, at, sizes[at // 3])

    history = make_history(Log2Bins(), 3, STEPS, row, kinds=(GRAD, PARAM, UPDATE))
    for step in range(STEPS):
        wavers = math.exp(0.05 * np.random.default_rng(step).standard_normal())
        history.add_scalar("loss", step, losses(step) * wavers)
        history.add_scalar("lr", step, rate(step))
    return history


def leap(step: int) -> float:
    return 0.04 if step >= AT else 1e-3


def rising(step: int) -> float:
    return 1.0 if step <= AT else 5.0


def test_divergence_names_a_rate_that_leapt_before_the_loss() -> None:
    history = run(rising, leap)
    finding = diagnose(history)[0]
    assert (finding.kind, finding.severity) == ("divergence", "severe")
    assert finding.steps == (AT, STEPS - 1)
    assert finding.numbers["first_step"] == AT
    assert finding.numbers["rises"] == AT + 1
    assert (finding.numbers["rate"], finding.numbers["times"]) == (0.04, 40)
    assert finding.numbers["pace"] == pytest.approx(0.04, rel=0.3)
    assert f"rose 40-fold at step {AT}, from 0.001 to 0.04" in finding.sentence
    assert "where 0.001 is usual" in finding.sentence
    assert finding.layer.startswith("update/")
    # What the rate explains is no spike or jump of its own.
    assert [each.kind for each in diagnose(history)] == ["divergence"]


def test_divergence_names_a_rate_that_rose_step_by_step() -> None:
    history = run(rising, lambda step: 1e-3 * 1.02**step)
    finding = only_divergence(history)
    at = int(finding.numbers["first_step"])
    assert abs(at - AT) <= 1
    assert f"had risen to {1e-3 * 1.02**at:.3g} by then, from 0.001 at step 0." in finding.sentence


def only_divergence(history: History) -> Finding:
    (finding,) = (each for each in diagnose(history) if each.kind == "divergence")
    return finding


def test_divergence_needs_a_cause() -> None:
    kinds = [each.kind for each in diagnose(run(rising, lambda step: 1e-3))]
    assert kinds == ["loss spike"]
    # A rate that has always been so, and a schedule that begins anew long before.
    anew = run(rising, lambda step: 1e-5 if step in range(20, 40) else 1e-3)
    assert [each.kind for each in diagnose(anew)] == ["loss spike"]


def test_divergence_is_not_what_one_batch_did_while_steps_were_as_usual() -> None:
    history = run(lambda step: 1.0 if step <= AT else 1e5, lambda step: 1e-3)
    assert [each.kind for each in diagnose(history)] == ["loss spike"]
    assert "look at the batch" in diagnose(history)[0].sentence
    # Nor does a step that has grown leave it at that, or a loss that rises little by little.
    grown = run(
        lambda step: 1.0 if step <= AT else 1e5, lambda step: 1e-3 * 2.0 ** max(0, step - AT + 4)
    )
    assert diagnose(grown)[0].kind == "divergence"
    slow = run(lambda step: 1.5 ** max(0, step - AT), lambda step: 1e-3)
    assert diagnose(slow)[0].kind == "divergence"


def test_divergence_from_the_start_needs_neither_a_rate_nor_updates() -> None:
    history = run(lambda step: 1.0 + min(step, 40) / 10, lambda step: 1e-3).select(GRAD)
    finding = only_divergence(history)
    assert finding.steps == (0, STEPS - 1)
    assert "Most likely steps are too large" in finding.sentence
    # The same from the middle on, or a half as far.
    for rises in (lambda t: 1 + max(0, t - AT) / 10, lambda t: 1 + min(t, 40) / 40):
        found = diagnose(run(rises, lambda step: 1e-3).select(GRAD))
        assert "divergence" not in [each.kind for each in found]


def test_divergence_needs_a_loss_that_does_not_come_back() -> None:
    history = run(lambda step: 5.0 if step in (AT + 1, AT + 2) else 1.0, leap)
    finding, ahead = diagnose(history)
    assert (finding.kind, finding.severity) == ("loss spike", "warning")
    assert (ahead.kind, ahead.after) == ("instability ahead", f"loss spike at step {AT}")
    assert f"The learning rate rose 40-fold at step {AT}" in finding.sentence
    assert finding.numbers["first_step"] == AT
    assert "look at the batch" not in finding.sentence


def test_divergence_is_not_a_loss_that_is_nan_at_once() -> None:
    history = run(lambda step: math.nan if step > AT else 1.0, lambda step: 1e-3 * 1.02**step)
    assert [each.kind for each in diagnose(history)] == ["loss spike"]


def test_diagnose_tells_a_rate_that_leaps_above_all_before_it() -> None:
    finding, ahead = diagnose(run(lambda step: 1.0, leap))
    assert (finding.kind, finding.steps) == ("jump", (AT, STEPS - 1))
    assert "above all that it was before" in finding.sentence
    assert (ahead.kind, ahead.after) == ("instability ahead", f"jump at step {AT}")
    # A cosine that begins anew, and a warm-up from almost nothing.
    assert diagnose(run(lambda step: 1.0, lambda step: 0.01 ** (1 + step % 40 / 40))) == []
    assert diagnose(run(lambda step: 1.0, lambda step: 0.01 * min(1.0, (step + 1) / 50))) == []


@pytest.mark.parametrize("rate", [3.0, 30.0, 1e4])
def test_divergence_of_a_real_training_comes_before_its_consequences(rate: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    what = ("grad", "update", "activation")
    with gradstat.watch(model, what=what, when="step", optimizer=optimizer) as w:
        for _ in range(40):
            x = torch.randn(32, 8)
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            w.log(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    first = diagnose(w.history)[0]
    assert first.kind == "divergence"
    assert f"The learning rate, {rate:.3g}, is too high." in first.sentence
    assert first.numbers["pace"] > 0.1
    for each in diagnose(w.history)[1:]:
        assert each.after.startswith("divergence") or each.severity != "severe", str(each)


def test_divergence_needs_no_more_than_the_loss_and_the_rate() -> None:
    finding = only_divergence(run(rising, leap).select(GRAD))
    assert "pace" not in finding.numbers
    assert "weights" not in finding.sentence
