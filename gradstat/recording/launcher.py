"""`Launcher`: measures tensors of several layers in one launch."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from gradstat.bins import Bins, LinearBins
from gradstat.ops import choose_engine, known_range
from gradstat.recording.arrivals import Launch, divide
from gradstat.recording.cuda_graphs import Cadence
from gradstat.recording.streams import Computed, stream_of


class Launcher:
    """Measures tensors of some layers in one launch.

    Args:
        bins: scheme.
        kinds: of all layers.
        engine: name, or ``None``.
        cadence: which replays of a captured launch measure.
    """

    def __init__(self, bins: Bins, kinds: list[str], engine: str | None, cadence: Cadence) -> None:
        self._cadence = cadence
        self._bins, self._kinds, self._engine = bins, kinds, engine
        self._is_linear = isinstance(bins, LinearBins)
        self._engines: dict[str, ModuleType] = {}  # by device type

    def measure(self, tensors: dict[int, Tensor], scales: Mapping[str, Computed]) -> Launch:
        """Start to measure; nothing waits for the result.

        Args:
            tensors: by layer, measurable and on one device.
            scales: of each kind that has one; `Log2Bins` need them only in the end.
        """
        low = high = None
        if self._is_linear:
            for kind, scale in scales.items():
                scaled = [i for i in tensors if self._kinds[i] == kind]
                if scaled:
                    divided = divide([tensors[i] for i in scaled], scale.get())
                    tensors = tensors | dict(zip(scaled, divided, strict=True))
            scales = {}
            device = next(iter(tensors.values())).device
            low, high = known_range(self._bins, device, len(tensors))
        listed = list(tensors.values())
        device = listed[0].device
        engine = self._engines.get(device.type)
        if engine is None:
            engine = self._engines[device.type] = choose_engine(self._engine, listed[0])
        if hasattr(engine, "measure_rows"):
            rows = engine.measure_rows(listed, self._bins, low, high)
            return Launch(tuple(tensors), rows, None, scales)
        due = self._cadence.flag(device)
        options = {} if due is None else {"due": due}
        result = engine.measure(listed, self._bins, low, high, **options)
        rows = result.integers, result.floats, result.counts
        return Launch(tuple(tensors), rows, stream_of(device), scales)
