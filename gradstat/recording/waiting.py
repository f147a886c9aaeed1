"""`Waiting`: tensors that wait to be measured together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from gradstat.recording.streams import SideStream, stream_of, take_over

Place = torch.Stream | torch.device
# Takes the tensors of a bucket by layer, in the layers' order.
Measure = Callable[[dict[int, Tensor]], None]


class Waiting:
    """Buckets of tensors, each measured at once.

    A bucket belongs to one stream of one device: it is measured there when it is full, and waits
    for no other stream.

    Args:
        bucket_bytes: size of a full bucket.
        side: where buckets are measured; ``None`` for where they are computed.
    """

    def __init__(self, bucket_bytes: int, side: SideStream | None) -> None:
        self._bucket_bytes, self._side = bucket_bytes, side
        if side is not None:
            side.forget()
        self._buckets: dict[Place, dict[int, Tensor]] = {}
        self._n_bytes: dict[Place, int] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not any(self._buckets.values())

    def replace(self, index: int, x: Tensor, measure: Measure, *, at_once: bool) -> None:
        """Add a tensor of a layer in place of the one that waits, if any.

        Args:
            index: of the layer.
            x: detached; the current stream computes it.
            measure: for buckets that are to be measured now.
            at_once: whether the tensor may change as soon as this returns.
        """
        for place in self._buckets:
            if index in self._buckets[place]:
                del self._buckets[place][index]
        self._add(_place_of(x), index, x, measure, at_once)

    def join(self, index: int, x: Tensor, measure: Measure, *, at_once: bool) -> None:
        """Add a tensor of a layer to those that wait; arguments as of `replace`."""
        place = _place_of(x)
        if index in self._buckets.get(place, ()):
            self._measure_bucket(place, measure)
        self._add(place, index, x, measure, at_once)

    def measure_all(self, measure: Measure) -> None:
        """Measure all; afterwards the tensors may change, on the current streams."""
        for place in list(self._buckets):
            self._measure_bucket(place, measure)
        if self._side is not None:
            self._side.join()

    def _add(self, place: Place, index: int, x: Tensor, measure: Measure, at_once: bool) -> None:
        if place not in self._buckets:
            self._buckets[place], self._n_bytes[place] = {}, 0
        self._buckets[place][index] = x
        n_bytes = self._n_bytes[place] = self._n_bytes[place] + x.nbytes
        if at_once or n_bytes >= self._bucket_bytes:
            self._measure_bucket(place, measure)
            if at_once and self._side is not None:
                self._side.join()

    def _measure_bucket(self, place: Place, measure: Measure) -> None:
        tensors = dict(sorted(self._buckets.pop(place).items()))
        del self._n_bytes[place]
        if not tensors:  # another bucket has what replaced them
            return
        if isinstance(place, torch.device):
            measure(tensors)
            return
        with nullcontext() if self._side is None else self._side.beside(place.device):
            take_over(tensors.values(), place)
            measure(tensors)


def _place_of(x: Tensor) -> Place:
    device = x.device
    return device if x.is_cpu else stream_of(device) or device
