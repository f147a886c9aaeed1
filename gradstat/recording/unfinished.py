"""`Unfinished`: what a pass has measured so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gradstat.recording.arrivals import Launch, Part
from gradstat.recording.streams import Computed
from gradstat.recording.waiting import Waiting


@dataclass(slots=True)
class Unfinished:
    """What is there of a pass that has not ended, or of one to come.

    Args:
        waiting: tensors that wait to be measured.
        is_recording: whether the pass has begun.
        scales: what values are multiplied by, by their kind.
        scaled_in: the run of autograd in which each was taken.
        peaks: of units, by layer, shape and device.
        launches: what is measured already.
        parts: of the record, on their way already.
    """

    waiting: Waiting
    is_recording: bool = False
    scales: dict[str, Computed] = field(default_factory=dict)
    scaled_in: dict[str, int] = field(default_factory=dict)
    peaks: dict[tuple[int, torch.Size, torch.device], Computed] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
