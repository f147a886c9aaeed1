"""Modules of which many units are zero for whole batches."""

from collections.abc import Callable

import pytest
import torch
from findings import diagnose, noise, only
from histories import make_history
from torch import Tensor, nn

import gradstat
from gradstat import History, Log2Bins

L, BATCH, UNITS = 3, 32, 200
Output = Callable[[int, torch.Generator], Tensor]


def putting_out(output: Output, steps: int = 60) -> History:
    """A run whose module 1 returns ``output(step, generator)``, ``(batch, units)``."""

    def row(step: int, at: int) -> Tensor:
        if at % L != 1:
            return noise(step, at)
        x = output(step, torch.Generator().manual_seed(step))
        return x if at < L else x.abs().amax(0)

    return make_history(Log2Bins(), L, steps, row, kinds=("activation", "unit"))


def with_dead(share: float, batch: int = BATCH) -> Output:
    """ReLU units that are on for a third of the inputs, but for a share of them that never is."""

    def output(step: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(batch, UNITS, generator=generator).sub(0.43).relu()
        x[:, : round(share * UNITS)] = 0
        return x

    return output


@pytest.mark.parametrize(
    ("share", "severity"),
    [(0.0, None), (0.65, None), (0.75, "warning"), (0.85, "warning"), (0.95, "severe")],
)
def test_diagnose_finds_modules_with_many_dead_units(share: float, severity: str | None) -> None:
    history = putting_out(with_dead(share))
    if severity is None:
        assert diagnose(history) == []
        return
    finding = only(history, "dead units")
    assert [finding] == diagnose(history)
    assert (finding.severity, finding.layer, finding.steps) == (severity, "unit/1.weight", (0, 59))
    assert finding.numbers == {"share": share, "units": UNITS}
    assert f"{share * UNITS:.0f} of 200 units or more of 1.weight are zero" in finding.sentence
    assert diagnose(history, dead_units_share=0.99, dead_units_severe=0.99) == []


def test_diagnose_finds_that_all_units_are_dead() -> None:
    history = putting_out(with_dead(1.0))
    history.modules["1.weight"] = "ReLU"
    finding = only(history, "dead units")
    assert (finding.severity, finding.numbers["share"]) == ("severe", 1)
    assert finding.sentence.startswith("All 200 units of 1.weight (ReLU) are zero")


def test_diagnose_is_not_severe_about_dead_units_that_have_come_back() -> None:
    history = putting_out(
        lambda step, generator: with_dead(0.95 if step < 40 else 0.0)(step, generator)
    )
    finding = only(history, "dead units")
    assert (finding.severity, finding.steps) == ("warning", (0, 39))


def test_diagnose_wants_units_to_be_dead_in_each_record_of_a_window() -> None:
    history = putting_out(
        lambda step, generator: with_dead(0.0 if step % 20 == 7 else 0.95)(step, generator)
    )
    assert diagnose(history) == []
    assert diagnose(putting_out(with_dead(0.95), 19)) == []
    assert diagnose(putting_out(with_dead(0.95), 20)) != []


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_diagnose_does_not_take_a_small_batch_for_dead_units(batch: int) -> None:
    def sparse(step: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(batch, UNITS, generator=generator)
        return x * (torch.rand(batch, UNITS, generator=generator) < 0.05)

    history = putting_out(sparse)
    assert history.dead_units()[:, 1].min() > 0.7
    assert diagnose(history) == []


def test_diagnose_lets_a_batch_choose_few_of_many_units() -> None:
    def one_hot(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(UNITS, (BATCH,), generator=generator)
        return nn.functional.one_hot(chosen, UNITS).float()

    history = putting_out(one_hot)
    assert history.dead_units()[:, 1].min() > 0.8
    assert diagnose(history) == []

    def collapsed(step: int, generator: torch.Generator) -> Tensor:
        return one_hot(step, generator)[:, :1].new_ones(BATCH, 1) * torch.eye(UNITS)[3]

    assert only(putting_out(collapsed), "dead units").severity == "severe"


def test_diagnose_lets_a_module_be_unused() -> None:
    history = make_history(
        Log2Bins(),
        L,
        40,
        noise,
        absent=[(step, row) for step in range(40) for row in range(2 * L) if step % 4],
        kinds=("activation", "unit"),
    )
    assert diagnose(history) == []
    assert putting_out(with_dead(0.95)).select("unit").diagnose()[0].kind == "dead units"


def watched(model: nn.Module, *what: str) -> History:
    torch.manual_seed(0)
    dark = torch.rand(64) < 0.1
    with gradstat.watch(model, what=("activation", *what)) as w:
        for _ in range(25):
            model(torch.randn(32, 8, 8) * dark.view(8, 8)).square().mean().backward()
            model.zero_grad()
    return w.history


def test_diagnose_finds_dead_units_of_a_real_network_and_not_its_dark_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    history = watched(model, "grad")
    assert history.dead_units()[:, 0].min() > 0.8
    assert diagnose(history) == []
    with torch.no_grad():
        model[1].bias[:38] = -100.0
    finding = only(watched(model, "grad"), "dead units")
    assert (finding.layer, finding.severity) == ("unit/2", "severe")
    assert finding.numbers == {"share": 38 / 40, "units": 40}


def test_diagnose_does_not_know_an_input_without_parameters() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    assert only(watched(model), "dead units").layer == "unit/0"
