"""Activations in which a few elements grow far beyond the others, by their kurtosis."""

from __future__ import annotations

import numpy as np

from gradstat.diagnosis.findings import Finding
from gradstat.diagnosis.run import MAX_SAMPLES, Run, median
from gradstat.thresholds import Thresholds
from gradstat.util import evenly_spread

_PARTS = 4  # of a run; kurtosis must grow from each to the next
_LEAST = 20.0  # a normal distribution has 3


def find_outliers(run: Run, thresholds: Thresholds) -> list[Finding]:
    """Outputs whose kurtosis grows steadily over the run."""
    if len(run.history) < _PARTS * 2:
        return []
    at = evenly_spread(len(run.history), MAX_SAMPLES)
    kurtosis = run.history.at(at.tolist())["kurtosis"][:, run.columns]
    parts = np.stack([median(part) for part in np.array_split(kurtosis, _PARTS)])
    grew = (np.diff(parts, axis=0) > 0).all(0) & (parts[-1] >= _LEAST)
    grew &= parts[-1] >= thresholds.outliers_growth * parts[0]
    return [
        Finding(
            "outliers",
            "note",
            run.layers[column],
            (int(run.steps[0]), int(run.steps[-1])),
            {"kurtosis": float(parts[-1, column]), "before": float(parts[0, column])},
            f"The kurtosis of {run.names[column]}'s output grew steadily, from "
            f"{parts[0, column]:.3g} to {parts[-1, column]:.3g}, where a normal distribution has "
            f"3: a few features become far larger than the others, which narrow types round away.",
        )
        for column in np.flatnonzero(grew).tolist()
    ]
