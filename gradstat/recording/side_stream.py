"""`SideStream`: measuring beside the stream that computes gradients, so that the two overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """A stream of each CUDA device for what is measured; other devices have none."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._busy: set[torch.device] = set()

    @contextmanager
    def beside(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Run what follows on the side stream, after what the current stream has to do so far.

        Args:
            tensors: of one device, which are read.
        """
        device = tensors[0].device
        if device.type != "cuda":
            yield
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side = self._streams[device]
        side.wait_stream(torch.cuda.current_stream(device))
        self._busy.add(device)
        with torch.cuda.stream(side):
            yield
        for x in tensors:
            # Its memory is not given to another tensor before it has been read.
            x.record_stream(side)

    def join(self) -> None:
        """Let the current streams wait for what was run beside them: then gradients may change."""
        for device in self._busy:
            torch.cuda.current_stream(device).wait_stream(self._streams[device])
        self._busy.clear()
