"""Layers that are watched and never have a gradient."""

import pytest
import torch
from findings import noise
from histories import make_history

import gradstat
from gradstat import Log2Bins


def absent(history: gradstat.History) -> list[gradstat.Finding]:
    return [each for each in history.diagnose() if each.kind == "no gradient"]


def test_diagnose_notes_layers_that_never_get_a_gradient() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.frozen(self.used(x))

    torch.manual_seed(20)
    model = Model()
    with gradstat.watch(model) as w:
        for _ in range(30):
            model(torch.randn(4, 3)).square().mean().backward()
    (finding,) = absent(w.history)
    assert (finding.severity, finding.layer, finding.steps) == ("note", "unused.weight", (0, 29))
    assert finding.numbers == {"layers": 2.0}
    assert finding.sentence == (
        "unused.weight has no gradient in any of 30 records, nor does 1 other: frozen, or the "
        "loss does not depend on it."
    )


def test_diagnose_is_silent_of_layers_that_have_a_gradient_now_and_then() -> None:
    missing = [(step, 1) for step in range(30) if step != 17]
    assert absent(make_history(Log2Bins(), 3, 30, noise, missing)) == []
    # A few records say nothing, nor does a run without any gradient.
    assert absent(make_history(Log2Bins(), 2, 2, noise, [(0, 1), (1, 1)])) == []
    everything = [(step, layer) for step in range(30) for layer in range(2)]
    assert absent(make_history(Log2Bins(), 2, 30, noise, everything)) == []
    (one,) = absent(make_history(Log2Bins(), 2, 30, noise, [(step, 0) for step in range(30)]))
    assert "in any of 30 records: frozen" in one.sentence


@pytest.mark.parametrize(("kept", "severity"), [((0, 4), "warning"), ((4,), "note")])
def test_diagnose_warns_of_layers_that_are_not_in_the_optimizer(
    kept: tuple[int, ...], severity: str
) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear
    model = torch.nn.Sequential(
        linear(4, 4), torch.nn.ReLU(), linear(4, 4), torch.nn.ReLU(), linear(4, 2)
    )
    optimizer = torch.optim.Adam([p for at in kept for p in model[at].parameters()])
    options = {"when": "step", "optimizer": optimizer}
    with gradstat.watch(model, what=("grad", "update"), **options) as w:
        for _ in range(30):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    (finding,) = absent(w.history)
    assert finding.severity == severity
    assert ("it is not in the optimizer" in finding.sentence) == (severity == "warning")
    assert {finding.layer, *finding.others} == {
        f"{at}.weight" for at in (0, 2, 4) if at not in kept
    }
