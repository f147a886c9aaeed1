"""Gradients that are well, and what `diagnose` finds in a history."""

from typing import Any

import torch
from torch import Tensor

from gradstat import Finding, History, Thresholds

N = 400  # elements of a layer


def noise(step: int, layer: int, scale: float = 1e-2) -> Tensor:
    """A healthy gradient."""
    generator = torch.Generator().manual_seed(1000 * step + layer)
    return scale * torch.randn(N, generator=generator)


def diagnose(history: History, **thresholds: Any) -> list[Finding]:
    """Findings that are no mere notes."""
    found = history.diagnose(Thresholds(**thresholds))
    return [finding for finding in found if finding.severity != "note"]


def only(history: History, kind: str, **thresholds: Any) -> Finding:
    """The one finding of a kind."""
    (finding,) = (each for each in diagnose(history, **thresholds) if each.kind == kind)
    assert str(finding).startswith(f"{finding.severity}: {kind}, step")
    assert finding.layer in history.layers
    # A spike that no row has caused names none.
    if finding.numbers.get("moved") != 0:
        assert finding.layer.rpartition("/")[2] in finding.sentence
    assert finding.sentence.endswith(".")
    return finding
