"""Weights that grow while the loss no longer falls: told before it breaks."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from findings import N, diagnose
from histories import make_history
from torch import nn

import gradstat
from gradstat import Finding, History, Log2Bins, Thresholds
from gradstat.diagnosis.divergence import Reached
from gradstat.diagnosis.evidence import Evidence
from gradstat.record import ACTIVATION, GRAD, PARAM, UPDATE

STEPS, AT = 160, 100
Series = Callable[[int], float]


def grown(step: int) -> float:
    """By 1 % a step from one on: 1.37-fold in 32."""
    return 1.01 ** max(step - AT, 0)


def flat(step: int) -> float:
    return 1.0


def falling(step: int) -> float:
    return 0.99**step


def run(
    weights: Series = grown,
    losses: Series | None = flat,
    steps: int = STEPS,
    kinds: tuple[str, ...] = (GRAD, PARAM, ACTIVATION),
    every: int = 1,
    pace: Series = lambda step: 1e-3,
    rate: Series | None = None,
) -> History:
    """Three layers; the outputs of one grow with its weights, squared."""

    def row(record: int, at: int) -> torch.Tensor:
        step = record * every
        of = {GRAD: 1e-2, PARAM: weights(step), ACTIVATION: weights(step) ** (2 * (at % 3 == 1))}
        of[UPDATE] = pace(step) * weights(step)
        generator = torch.Generator().manual_seed(1000 * record + at)
        return of[kinds[at // 3]] * torch.randn(N, generator=generator)

    made = make_history(Log2Bins(), 3, steps, row, kinds=kinds)
    history = History(made.rows, made.bins)
    for record in made.records:
        history.append(record.step * every, made.packed(record).data)
    for step in range(0, steps * every, every):
        if losses is not None:
            wavers = math.exp(0.05 * np.random.default_rng(step).standard_normal())
            history.add_scalar("loss", step, losses(step) * wavers)
        if rate is not None:
            history.add_scalar("lr", step, rate(step))
    return history


def ahead(history: History) -> list[Finding]:
    return [each for each in diagnose(history) if each.kind == "instability ahead"]


def test_instability_is_ahead_where_weights_grow_and_the_loss_does_not_fall() -> None:
    (finding,) = ahead(run())
    assert finding.severity == "warning"
    # 10 % in 32 steps take ten of them, the median of eight four more, three the others in a row.
    assert AT + 10 <= finding.steps[0] <= AT + 22
    assert finding.steps[1] == STEPS - 1
    assert finding.numbers["first_step"] == finding.steps[0]
    assert finding.numbers["times"] == pytest.approx(1.01**32, rel=0.05)
    assert finding.numbers["output"] == pytest.approx(1.02**32, rel=0.1)
    assert finding.layer.startswith("param/")
    assert f"from step {finding.steps[0]} on the weights grow" in finding.sentence
    assert "1.weight's activation grew" in finding.sentence


MOVING = (GRAD, PARAM, UPDATE)


def large(step: int) -> float:
    """3 % of the weights, from one step on."""
    return 0.03 if step >= AT else 1e-3


def test_instability_is_ahead_where_steps_are_large_and_the_loss_does_not_fall() -> None:
    (finding,) = ahead(run(flat, kinds=MOVING, pace=large))
    # Four of eight values have the median, and three more come in a row.
    assert finding.steps == (AT + 4 + 3, STEPS - 1)
    assert finding.numbers["pace"] == pytest.approx(0.03, rel=0.1)
    assert f"from step {AT + 7} on each step changes the weights much" in finding.sentence
    assert "A step changes the weights by 0.03 of their size" in finding.sentence
    others = diagnose(run(flat, kinds=MOVING, pace=large), weights_pace=0.04)
    assert [each.kind for each in others] == ["jump"]


def rising(step: int) -> float:
    """40-fold by step 149, 50-fold by step 158."""
    return 1.025**step


def early(step: int) -> float:
    """A change of 0.3 %, then less: the largest for their rate are the first ones."""
    return 3e-3 if step < 20 else 1e-3


RISING = {"weights": flat, "kinds": MOVING, "pace": early, "rate": rising}


def test_instability_is_ahead_where_steps_are_small_only_as_gradients_are() -> None:
    history = run(**RISING)  # type: ignore[arg-type]
    (finding,) = ahead(history)
    # Of the first steps the median of eight counts, and at 37 times their rate they are a tenth.
    assert 147 <= finding.steps[0] <= 154
    assert finding.numbers["possible_pace"] == pytest.approx(3e-3 * rising(159 - 4), rel=0.1)
    assert "as large for its learning rate as earlier ones" in finding.sentence
    # Without its beginning the record knows nothing of such steps.
    assert ahead(history.between(20)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"rate": flat},
        {"losses": falling},
        # It bore a tenth of that.
        {"pace": lambda step: 0.018 if 90 <= step < 110 else early(step)},
        {"rate": lambda step: rising(min(step, 120))},
        {"rate": None},
        {"pace": lambda step: 0.015 if step < 2 else 1e-3},  # as of averages that begin at zero
    ],
    ids=["same rate", "falls", "tried", "not so high", "no rate", "first steps"],
)
def test_instability_is_silent_about_a_rate_that_rises(options: dict[str, Any]) -> None:
    assert ahead(run(**(RISING | options))) == []


@pytest.mark.parametrize(
    "options",
    [
        {"losses": falling},  # what is learned
        {"weights": flat, "losses": falling, "kinds": MOVING, "pace": large},
        {"weights": flat, "kinds": MOVING, "pace": lambda step: 0.5 * large(step)},
        {"losses": lambda step: 2.5 if step >= AT else 1.0},  # it does not look well any more
        {"weights": flat},
        {"weights": lambda step: 1.002**step},  # 7 % in 32 steps
        {"losses": None},
        {"kinds": (GRAD, ACTIVATION)},
        {"steps": 64, "weights": lambda step: 1.01**step},
        # What grows as much from record to record, but each is of the tenth step.
        {"weights": lambda step: 1.001**step, "every": 10},
    ],
    ids=[
        "falls",
        "large steps, falls",
        "small steps",
        "risen",
        "flat",
        "slow",
        "no loss",
        "no weights",
        "short",
        "every tenth",
    ],
)
def test_instability_is_silent(options: dict[str, Any]) -> None:
    assert ahead(run(**options)) == []


def test_instability_is_told_where_the_loss_has_fallen_for_a_few_records() -> None:
    (shown,) = ahead(run())
    # Of the newest eight losses four are low: so is their median, half-way.
    (wavers,) = ahead(run(losses=lambda step: 0.5 if step >= STEPS - 5 else 1.0))
    assert wavers.steps == (shown.steps[0], STEPS - 4)
    assert ahead(run(losses=lambda step: 0.5 if step >= STEPS - 14 else 1.0)) == []


def test_instability_that_has_passed_is_not_told() -> None:
    passed = run(weights=lambda step: grown(min(step, AT + 25)), steps=STEPS + 80)
    assert ahead(passed) == []


def test_instability_is_told_with_what_came_of_it() -> None:
    history = run(losses=lambda step: 5.0 if step >= 140 else 1.0)
    spike, finding = (e for e in diagnose(history) if e.kind in ("loss spike", "instability ahead"))
    assert (spike.kind, spike.steps[0]) == ("loss spike", 140)
    # It was there before the spike, and is no consequence of it.
    assert finding.after == ""
    assert finding.steps[0] < 140 - 10
    assert finding.steps[1] <= 145


def test_instability_begins_at_another_growth() -> None:
    assert diagnose(run(), weights_growth=2.0) == []


def alerts(losses: Series) -> list[tuple[int, str]]:
    """What `alert=` tells of weights that grow from step 60 on, and at which step."""
    torch.manual_seed(0)
    model = nn.Linear(50, 4)
    told: list[tuple[int, str]] = []
    step = 0
    alert = lambda finding: told.append((step, finding.kind))  # noqa: E731 (of this step)
    with gradstat.watch(model, what=("grad", "param"), alert=alert) as w:
        for step in range(150):
            model(torch.randn(8, 50)).mean().backward()
            w.log(loss=losses(step))
            model.zero_grad()
            _ = w.history  # waits, where a device measures
            with torch.no_grad():
                model.weight *= 1.01 if step >= 60 else 1.0
    return told


def wavering(step: int, deviation: float = 0.01) -> float:
    return 1 + deviation * float(np.random.default_rng(step).standard_normal())


def test_alert_tells_of_instability_once_while_it_lasts() -> None:
    told = alerts(wavering)
    assert [(kind, at in range(70, 94)) for at, kind in told] == [("instability ahead", True)]


def alerts_of_steps(
    n_steps: int, prepare: Callable[[int, nn.Parameter, dict[str, Any]], None]
) -> list[Finding]:
    """What alerts tell of steps whose gradient and learning rate a function sets before each."""
    torch.manual_seed(0)
    model = nn.Linear(50, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    told: list[Finding] = []
    options = {"what": ("grad", "update"), "when": "step", "optimizer": optimizer}
    with gradstat.watch(model, alert=told.append, **options) as w:  # type: ignore[arg-type]
        for step in range(n_steps):
            prepare(step, model.weight, optimizer.param_groups[0])
            optimizer.step()
            w.log(loss=wavering(step))
            _ = w.history
    return told


def test_alert_tells_of_instability_where_steps_are_large() -> None:
    def prepare(step: int, weight: nn.Parameter, group: dict[str, Any]) -> None:
        # There and back again: the weights do not grow.
        weight.grad = torch.randn(4, 50) if step % 2 == 0 else -weight.grad
        group["lr"] *= 1.02

    told = alerts_of_steps(150, prepare)
    assert [finding.kind for finding in told] == ["instability ahead"]
    assert told[0].numbers["pace"] > 0.02


def test_alert_knows_of_steps_before_the_newest_records() -> None:
    noise = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) / 200**0.5

    def prepare(step: int, weight: nn.Parameter, group: dict[str, Any]) -> None:
        group["lr"] *= 1.025 if step else 1.0
        # There and back again, by gradients that are the smaller the higher the rate.
        weight.grad = early(step) * (-1) ** step / group["lr"] * weight.detach().norm() * noise

    told = alerts_of_steps(180, prepare)
    assert [finding.kind for finding in told] == ["instability ahead"]
    assert told[0].numbers["possible_pace"] > 0.1


@pytest.mark.parametrize(
    ("losses", "is_asked"),
    [
        (wavering, True),
        # Medians of eight differ by more than a tenth by chance.
        (lambda step: wavering(step, 0.3), True),
        (lambda step: 0.98**step * wavering(step), False),
        (lambda step: 1 - 0.02 * step, False),
    ],
    ids=["flat", "noisy", "falls", "falls below zero"],
)
def test_alert_asks_whether_instability_is_ahead_where_no_loss_falls(
    losses: Series, is_asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def find(run: Evidence, thresholds: Thresholds, reached: Reached) -> list[Finding]:
        asked.append(int(run.steps[-1]))
        return []

    monkeypatch.setattr("gradstat.diagnosis.alerts.find_instability", find)
    alerts(losses)
    # From the fifth eighth record after 60 on, each eighth one.
    assert [step for step in asked if step >= 95] == [*range(95, 150, 8)] * is_asked
