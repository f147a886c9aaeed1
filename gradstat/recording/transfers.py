"""Results between a device and the host, and between one pass and the next."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat.results import Statistics


class Transfer:
    """Tensors on their way to the host.

    Args:
        tensors: on one device.
    """

    __slots__ = ("_event", "_tensors")

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            # PyTorch's cache of pinned blocks does not reuse one before its copy is over.
            self._tensors = tuple(_copy_to_pinned(x) for x in tensors)
            # Of the tensors' device, which need not be the current one.
            stream = torch.cuda.current_stream(tensors[0].device)
            self._event = stream.record_event()
        elif not tensors[0].is_cpu:
            self._tensors = tuple(x.cpu() for x in tensors)

    def has_arrived(self, wait: bool) -> bool:
        """Whether they are there, which they are after waiting."""
        if self._event is None or self._event.query():  # type: ignore[no-untyped-call]
            return True
        if wait:
            self._event.synchronize()
        return wait

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """The same as NumPy arrays, once they are there."""
        return tuple([x.numpy() for x in self._tensors])


class Ranges:
    """Where the newest result of each layer is, for ``LinearBins(track=True)``."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[Statistics, int]] = {}

    def knows(self, index: int, device: torch.device) -> bool:
        """Whether there is a result of a layer, on a device."""
        return index in self._rows and self._rows[index][0].floats.device == device

    def previous(self, indices: tuple[int, ...]) -> Statistics | None:
        """The newest results of layers, all known or none, in the order of their indices."""
        rows = [self._rows[index] for index in indices if index in self._rows]
        if not rows:
            return None
        first = rows[0][0]
        if len(first) == len(rows) and all(
            result is first and row == at for at, (result, row) in enumerate(rows)
        ):
            return first
        # They were measured in other buckets than now.
        return Statistics(
            first.bins,
            torch.stack([result.integers[row] for result, row in rows]),
            torch.stack([result.floats[row] for result, row in rows]),
            torch.stack([result.counts[row] for result, row in rows]),
        )

    def remember(self, indices: tuple[int, ...], result: Statistics) -> None:
        """Keep a result whose rows are of those layers."""
        for row, index in enumerate(indices):
            self._rows[index] = (result, row)

    def overwrite(self, indices: tuple[int, ...], result: Statistics) -> None:
        """Copy a result over the newest ones, where there are any."""
        for row, index in enumerate(indices):
            if index in self._rows:
                kept, at = self._rows[index]
                kept.floats[at].copy_(result.floats[row])


def _copy_to_pinned(x: Tensor) -> Tensor:
    pinned = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(x, non_blocking=True)
