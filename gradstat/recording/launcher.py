"""`Launcher`: measures tensors of several layers in one launch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from gradstat.bins import LinearBins, widen
from gradstat.format_ops import measure_formats
from gradstat.formats import parse_format
from gradstat.history import History
from gradstat.ops import choose_engine
from gradstat.quantized import PACKED, packed
from gradstat.record import UNIT
from gradstat.recording.arrivals import Launch
from gradstat.recording.cuda_graphs import Cadence
from gradstat.recording.streams import Computed, stream_of
from gradstat.recording.torch_internals import multiplied


class Launcher:
    """Measures tensors of some layers in one launch.

    Args:
        history: whose layers they are, with F narrow formats, measured in each replay.
        engine: name, or ``None``.
        cadence: which replays of a captured launch measure the rest.
    """

    def __init__(self, history: History, engine: str | None, cadence: Cadence) -> None:
        self._engine, self._cadence = engine, cadence
        self._bins, self._kinds = history.bins, history.kinds
        self._formats = [parse_format("watch", name) for name in history.formats]
        self._is_linear = isinstance(history.bins, LinearBins)
        self._engines: dict[str, ModuleType] = {}  # by device type

    def measure(self, tensors: dict[int, Tensor], scales: Mapping[str, Computed]) -> Launch:
        """Start to measure; nothing waits for the result.

        Args:
            tensors: by layer, measurable and on one device.
            scales: by kind; with `Log2Bins` the values are divided by them on the host.
        """
        # Of scaled gradients, as they would be cast.
        quantized = self._quantized(tensors) if self._formats else ()
        if self._is_linear:
            for kind, scale in scales.items():
                scaled = [i for i in tensors if self._kinds[i] == kind]
                if scaled:
                    divided = _divide([tensors[i] for i in scaled], scale.get())
                    tensors = tensors | dict(zip(scaled, divided, strict=True))
            scales = {}
        listed = list(tensors.values())
        device = listed[0].device
        engine = self._engines.get(device.type)
        if engine is None:
            engine = self._engines[device.type] = choose_engine(self._engine, listed[0])
        if hasattr(engine, "measure_rows"):
            rows = engine.measure_rows(listed, self._bins)
            return Launch(tuple(tensors), (*rows, *(x.numpy() for x in quantized)), None, scales)
        due = self._cadence.flag(device)
        options = {} if due is None else {"due": due}
        result = engine.measure(listed, self._bins, **options)
        rows = result.integers, result.floats, result.counts, *quantized
        return Launch(tuple(tensors), rows, stream_of(device), scales)

    def _quantized(self, tensors: Mapping[int, Tensor]) -> tuple[Tensor]:
        """What the formats would do to the tensors, ``(L, F, 10)``; NaN for peaks of units.

        Peaks would not be cast. They come together, as rows of a kind do.
        """
        cast = [x for i, x in tensors.items() if self._kinds[i] != UNIT]
        if not cast:
            shape = len(tensors), len(self._formats), len(PACKED)
            return (next(iter(tensors.values())).new_full(shape, math.nan, dtype=torch.float64),)
        fields = packed(*measure_formats(cast, self._formats, engine=self._engine))
        if n_peaks := len(tensors) - len(cast):
            first = [self._kinds[i] for i in tensors].index(UNIT)
            peaks = fields.new_full((n_peaks, *fields.shape[1:]), math.nan)
            parts = fields[:first], peaks, fields[first:]
            fields = torch.cat([part for part in parts if len(part)])
        return (fields,)


def _divide(gradients: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Unscaled copies, by the arithmetic of `torch.amp.GradScaler`; in float32 at least."""
    wide = [x.float() if x.itemsize < 4 else x for x in gradients]
    inverse = widen(scale.to(wide[0].device, non_blocking=True)).reciprocal().float()
    return multiplied(wide, inverse)
