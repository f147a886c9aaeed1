"""`watch(alert=...)`: what is severe is told at once, and once."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradstat
from gradstat import Finding, Watch


class Run:
    """A small network whose gradients and losses are as told."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.told: list[tuple[int, Finding]] = []
        self.model = nn.Linear(50, 4)
        self.step = 0
        self.watch: Watch = gradstat.watch(self.model, alert=self.alert, **options)

    def alert(self, finding: Finding) -> None:
        self.told.append((self.step, finding))

    def train(self, steps: int, factor: float = 1.0, loss: float | None = None) -> None:
        for _ in range(steps):
            x = torch.randn(8, 50)
            output: Tensor = self.model(x).mean() * factor
            output.backward()
            if loss is not None:
                self.watch.log(loss=loss * math.exp(0.05 * float(torch.randn(()))))
            self.model.zero_grad()
            _ = self.watch.history  # waits, where a device measures
            self.step += 1

    @property
    def kinds(self) -> list[tuple[int, str]]:
        return [(step, finding.kind) for step, finding in self.told]


def test_alert_is_silent_while_all_is_well() -> None:
    run = Run(what=("grad", "activation"))
    run.train(100, loss=1.0)
    assert run.told == []


def test_alert_tells_of_nan_at_once_and_again_when_it_had_cleared() -> None:
    run = Run()
    run.train(20)
    run.train(3, math.nan)
    run.train(5)
    run.train(2, math.nan)
    assert run.kinds == [(20, "non-finite"), (28, "non-finite")]
    assert run.told[0][1].steps == (20, 20)


def test_alert_tells_of_a_loss_spike_as_it_is_logged() -> None:
    run = Run(what=("grad", "activation"))
    run.train(40, loss=1.0)
    run.train(15, loss=9.0)
    run.train(60, loss=1.0)
    assert run.kinds == [(40, "loss spike")]
    run.train(3, loss=9.0)
    assert run.kinds == [(40, "loss spike"), (115, "loss spike")]


def test_alert_tells_of_a_loss_that_is_not_finite() -> None:
    run = Run()
    run.train(15, loss=1.0)
    run.train(2, loss=math.nan)
    assert run.kinds == [(15, "loss spike")]
    assert "is nan at step 15" in run.told[0][1].sentence


def test_alert_tells_of_a_gradient_spike_and_an_explosion() -> None:
    run = Run(what=("grad", "activation"))
    run.train(40)
    run.train(2, 30.0)
    run.train(40)
    run.train(5, 1e7)
    assert [kind for _, kind in run.kinds[:2]] == ["gradient spike", "gradient spike"]
    assert [step for step, _ in run.kinds[:2]] == [40, 82]
    assert run.kinds[2][1] == "exploding"
    assert run.told[2][1].severity == "severe"


def test_alert_lets_a_scaler_try_its_scale() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    run = Run(scaler=scaler)
    run.train(60)
    run.train(3, math.inf)
    run.train(20)
    assert run.told == []
    run.train(6, math.inf)
    assert [kind for _, kind in run.kinds] == ["non-finite"]


@pytest.mark.parametrize("weight", [0.0, math.nan])
def test_alert_sees_weights_that_are_all_zero_or_nan_without_a_warning(weight: float) -> None:
    run = Run(what="param")
    nn.init.constant_(run.model.weight, weight)
    run.train(60)
    assert run.kinds == [(0, "non-finite")] * math.isnan(weight)


def test_alert_may_stop_the_training() -> None:
    class StopError(Exception):
        pass

    def stop(finding: Finding) -> None:
        raise StopError(str(finding))

    run = Run()
    run.train(20)
    run.watch.close()
    w = gradstat.watch(run.model, alert=stop)

    def train() -> None:
        (run.model(torch.randn(8, 50)).mean() * math.nan).backward()
        _ = w.history

    with pytest.raises(StopError, match="severe: non-finite"):
        train()
    assert len(w.history) == 1


def test_watch_refuses_an_alert_that_is_no_function() -> None:
    with pytest.raises(TypeError, match=r"watch\(\) needs a function; alert is 'print'"):
        gradstat.watch(nn.Linear(2, 2), alert="print")  # type: ignore[arg-type]
