"""CUDA streams: what one has computed, used on another; other devices have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


def stream_of(device: torch.device) -> torch.Stream | None:
    """The current stream of a CUDA device."""
    if device.type != "cuda":
        return None
    # In a fifth of the time of torch.cuda.current_stream().
    return torch.accelerator.current_stream(device)


def take_over(tensors: Iterable[Tensor], stream: torch.Stream | None) -> None:
    """Let the current stream use what another one computes.

    It waits for all that the other stream has to do so far. The tensors' memory is given to no
    other tensor before the current stream has done what it has to do by then.

    Args:
        tensors: on that stream's device.
        stream: that computes them.
    """
    if stream is None:
        return
    current = torch.accelerator.current_stream(stream.device)
    if current != stream:
        current.wait_stream(stream)
        for x in tensors:
            x.record_stream(current)


class Computed(NamedTuple):
    """A tensor, and the stream that computes it."""

    x: Tensor
    stream: torch.Stream | None

    @classmethod
    def now(cls, x: Tensor) -> Computed:
        """A tensor that the current stream computes."""
        return cls(x, stream_of(x.device))

    def get(self) -> Tensor:
        """The tensor, for the current stream."""
        take_over([self.x], self.stream)
        return self.x


class SideStream:
    """A stream of each CUDA device on which to measure beside the one that computes gradients."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._busy: set[torch.device] = set()

    @contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        """Run what follows on the side stream of a CUDA device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._busy.add(device)
        with torch.cuda.stream(self._streams[device]):
            yield

    def join(self) -> None:
        """Let the current streams wait for what runs beside them: then gradients may change."""
        for device in self._busy:
            torch.cuda.current_stream(device).wait_stream(self._streams[device])

    def forget(self) -> None:
        """Wait no more for what runs so far."""
        self._busy.clear()
