"""Results on their way from a device to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Transfer:
    """Tensors on their way to the host, or arrays that are there.

    Args:
        tensors: on one device.
    """

    __slots__ = ("_event", "_tensors")

    def __init__(self, tensors: tuple[Any, ...]) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if not isinstance(tensors[0], Tensor):
            return
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

    def arrays(self) -> tuple[Any, ...]:
        """The same as arrays, once they are there."""
        if isinstance(self._tensors[0], Tensor):
            self._tensors = tuple([x.numpy() for x in self._tensors])
        return self._tensors


def _copy_to_pinned(x: Tensor) -> Tensor:
    pinned = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(x, non_blocking=True)
