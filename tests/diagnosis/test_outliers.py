"""A kurtosis of activations that grows."""

import torch
from findings import noise
from histories import make_history

from gradstat import Finding, Log2Bins
from gradstat.record import ACTIVATION, GRAD


def found(growth: float, kind: str = ACTIVATION, steps: int = 80) -> list[Finding]:
    def gradient(step: int, row: int) -> torch.Tensor:
        x = noise(step, row)
        if row == 1:
            x[:4] *= 1 + growth * step / steps
        return x

    history = make_history(Log2Bins(), 3, steps, gradient, kinds=[kind])
    return [finding for finding in history.diagnose() if finding.kind == "outliers"]


def test_diagnose_notes_outputs_in_which_a_few_features_grow() -> None:
    (finding,) = found(20.0)
    assert (finding.severity, finding.layer, finding.steps) == (
        "note",
        "activation/1.weight",
        (0, 79),
    )
    assert finding.numbers["kurtosis"] > 4 * finding.numbers["before"]
    assert finding.numbers["kurtosis"] > 20
    assert "kurtosis of 1.weight's output grew steadily" in finding.sentence


def test_diagnose_notes_no_outliers_where_they_do_not_grow_or_are_no_outputs() -> None:
    assert found(0.0) == []
    assert found(2.0) == []
    assert found(20.0, GRAD) == []
    assert found(20.0, steps=4) == []
