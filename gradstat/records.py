"""`Record`: what one pass measured, on its way to a `History`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat.bins import Bins, LinearBins, widen
from gradstat.history import History
from gradstat.statistics import FLOATS, INTEGERS, Statistics
from gradstat.transfers import Transfer

Rows = tuple[NDArray[Any], ...]  # integers, floats and counts of some layers
Launch = tuple[tuple[int, ...], Statistics]  # the layer of each row, and the rows


class Part(NamedTuple):
    """Rows on their way from one device.

    Args:
        indices: the layer of each row.
        result: integers, floats and counts, and maybe of others too.
        first: its first row among them.
        sources: what they are copied from, which is kept until they have arrived: the copy may run
            on another stream than the one that the memory belongs to.
    """

    indices: tuple[int, ...]
    result: Transfer
    first: int
    sources: list[Statistics]

    def arrays(self) -> Rows:
        """Its rows, once they have arrived."""
        end = self.first + len(self.indices)
        return tuple(each[self.first : end] for each in self.result.arrays())


def send(launches: Sequence[Launch]) -> list[Part]:
    """Start the results of launches on their way to the host, those of each device together."""
    groups: dict[object, list[Launch]] = {}
    for at, launch in enumerate(launches):
        device = launch[1].counts.device
        groups.setdefault(at if _is_host(device) else device, []).append(launch)
    return [_join(group) for group in groups.values()]


def _join(launches: list[Launch]) -> Part:
    indices, source = launches[0]
    fields: tuple[Tensor, ...] = (source.integers, source.floats, source.counts)
    if len(launches) > 1:
        indices = tuple(index for each, _ in launches for index in each)
        several = zip(*((s.integers, s.floats, s.counts) for _, s in launches), strict=True)
        fields = tuple(torch.cat(each) for each in several)
    return Part(indices, Transfer(fields), 0, [result for _, result in launches])


def split(layers: Iterable[tuple[int, ...]], launch: Launch) -> list[Part]:
    """Start the result of a launch over several passes on its way to the host.

    Args:
        layers: of each pass, whose rows follow one another.
        launch: of them all.

    Returns:
        A part for each pass.
    """
    whole = _join([launch])
    parts, first = [], 0
    for indices in layers:
        parts.append(Part(indices, whole.result, first, whole.sources))
        first += len(indices)
    return parts


def _is_host(device: torch.device) -> bool:
    """Whether results are where they are to be sent, so that joining them only costs time."""
    return device.type == "cpu"


class Record(NamedTuple):
    """What one pass measured; what is over `Log2Bins` is still to be divided by the scales."""

    step: int
    history: History
    parts: list[Part]
    scales: dict[str, Transfer]

    def has_arrived(self, wait: bool) -> bool:
        """Whether it is there, which it is after waiting."""
        for part in self.parts:
            if not part.result.has_arrived(wait):
                return False
        return all(scale.has_arrived(wait) for scale in self.scales.values())

    def rows(self, outputs: frozenset[int]) -> Rows:
        """Integers ``(L, 8)``, floats ``(L, 8)``, counts ``(L, bins)`` of all layers in order.

        Args:
            outputs: layers whose rows are put together; of others the last one counts.
        """
        n_layers, bins = len(self.history.layers), self.history.bins
        if len(self.parts) == 1 and self.parts[0].indices == tuple(range(n_layers)):
            integers, floats, counts = self.parts[0].arrays()
        else:
            integers = np.zeros((n_layers, len(INTEGERS)), dtype=np.int64)
            floats = np.full((n_layers, len(FLOATS)), np.nan)
            counts = np.zeros((n_layers, bins.bins), dtype=np.int64)
            seen: Counter[int] = Counter()
            for part in self.parts:
                arrays = part.arrays()
                for joins, at, rows in _turns(part.indices, seen, outputs):
                    new: Rows = tuple(each[at] for each in arrays)
                    if joins:
                        before = integers[rows], floats[rows], counts[rows]
                        new = _arrays(as_statistics(bins, before).merge(as_statistics(bins, new)))
                    integers[rows], floats[rows], counts[rows] = new
        for kind, scale in self.scales.items():
            rows = [i for i, each in enumerate(self.history.kinds) if each == kind]
            if isinstance(bins, LinearBins) or not rows:
                continue
            scaled = as_statistics(bins, (integers[rows], floats[rows], counts[rows]))
            unscaled = scaled.unscale(torch.from_numpy(scale.arrays()[0]).double())
            integers[rows], floats[rows], counts[rows] = _arrays(unscaled)
        return integers, floats, counts


def _turns(
    layers: tuple[int, ...], seen: Counter[int], outputs: frozenset[int]
) -> Iterable[tuple[bool, list[int], list[int]]]:
    """Rows in turns, in each of which no layer comes twice.

    Returns:
        Of each turn whether its rows join those before, where they are, and their layers.
    """
    turns: dict[tuple[int, bool], list[int]] = {}
    for at, layer in enumerate(layers):
        joins = seen[layer] > 0 and layer in outputs
        turns.setdefault((seen[layer], joins), []).append(at)
        seen[layer] += 1
    return [(joins, at, [layers[i] for i in at]) for (_, joins), at in turns.items()]


def as_statistics(bins: Bins, rows: Rows) -> Statistics:
    """The same without a copy."""
    return Statistics(bins, *(torch.from_numpy(each) for each in rows))


def _arrays(statistics: Statistics) -> Rows:
    return statistics.integers.numpy(), statistics.floats.numpy(), statistics.counts.numpy()


def divide(gradients: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Unscaled copies, by the arithmetic of `torch.amp.GradScaler`; in float32 at least."""
    wide = [x.float() if x.itemsize < 4 else x for x in gradients]
    inverse = widen(scale.to(wide[0].device, non_blocking=True)).reciprocal().float()
    return list(torch._foreach_mul(wide, inverse))


def unit_peaks(x: Tensor) -> Tensor | None:
    """Largest magnitude of each unit: of each channel of images, of each feature otherwise.

    Args:
        x: ``(N, C, ...)`` of four dimensions or more, or ``(..., C)``.

    Returns:
        ``(C,)``, NaN for a unit with a NaN; ``None`` where there is no batch of units.
    """
    if x.dim() < 2 or x.numel() == 0:
        return None
    unit = 1 if x.dim() >= 4 else x.dim() - 1
    others = [dim for dim in range(x.dim()) if dim != unit]
    # Ten times faster on a CPU than torch.linalg.vector_norm, and without a copy of magnitudes.
    return torch.maximum(x.amax(others), -x.amin(others))
