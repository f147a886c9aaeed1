"""`SideStream`: measuring beside the stream that computes gradients, so that the two overlap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A stream of each CUDA device for what is measured."""

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
        """Let the current streams wait for what was run beside them: then gradients may change."""
        for device in self._busy:
            torch.cuda.current_stream(device).wait_stream(self._streams[device])

    def forget(self) -> None:
        """Wait no more for what was run so far."""
        self._busy.clear()
