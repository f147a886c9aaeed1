"""Numbers that a run logs at its passes: which pass each belongs to, and its way to the host."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from math import isfinite
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradstat.recording.cuda import Schedule
from gradstat.recording.options import LOOKS, Replaced
from gradstat.recording.shards import local_part
from gradstat.recording.torch_internals import is_capturing
from gradstat.recording.transfers import Delivery, Transfer

# Values that came together: names, steps, and the values, or what they are on their way in.
_Entry: TypeAlias = tuple[list[str], list[int], list[float] | Transfer]


class ScalarLog:
    """Gives each value its step, and keeps it once it is on the host."""

    # A value belongs to the pass that has just ended, unless that one has a value of this name:
    # then to the coming one. So it does not matter whether it is logged before or after a pass.

    def __init__(
        self,
        schedule: Schedule,
        delivery: Delivery,
        replaced: Replaced,  # is asked now and then, as no pass may come any more
    ) -> None:
        self._schedule, self._delivery = schedule, delivery
        self._replaced, self._n_calls = replaced, 0
        self.broken_step = -1  # of the newest value that is not finite
        self._passes: dict[str, int] = {}  # that each name's last value belongs to
        self._n_before = schedule.n_passes  # passes before the first value
        self.pending: deque[_Entry] = deque()  # on their way

    def add(self, values: Mapping[str, float | Tensor]) -> None:
        self._n_calls += 1
        if self._n_calls % LOOKS == 0:
            self._replaced.look()
        names, numbers = [], []
        on_devices: dict[torch.device, dict[str, Tensor]] = {}
        for name, value in values.items():
            if type(value) is not float:
                value = _checked(name, value)
            if isinstance(value, Tensor):
                on_devices.setdefault(value.device, {})[name] = value
            else:
                names.append(name)
                numbers.append(value)
        for device, tensors in on_devices.items():
            wide = torch.float32 if device.type == "mps" else torch.float64
            with torch.no_grad():
                # In memory of its own: the values may be changed in place afterwards.
                source = torch.stack([value.detach().to(wide) for value in tensors.values()])
            self.pending.append((list(tensors), self._steps_of(tensors), Transfer(source)))
        steps = self._steps_of(names)
        if names and self.pending:
            self.pending.append((names, steps, numbers))
        else:
            self._keep(names, steps, numbers)
        self._delivery.tell()

    def collect(self, wait: bool) -> None:
        """Keep values in their order: those that have arrived, or all."""
        while self.pending:
            names, steps, values = self.pending[0]
            if not isinstance(values, list):
                if not values.has_arrived(wait):
                    return
                values = values.host.tolist()
            self.pending.popleft()
            self._keep(names, steps, values)

    def _keep(self, names: Iterable[str], steps: Iterable[int], values: Iterable[float]) -> None:
        for name, step, value in zip(names, steps, values, strict=True):
            if not isfinite(value):
                self.broken_step = step
            self._delivery.keep(name, step, value)

    def _steps_of(self, names: Iterable[str]) -> list[int]:
        """The steps that new values of these names belong to."""
        schedule, passes, steps = self._schedule, self._passes, []
        last = schedule.n_told + schedule.n_missed - 1
        for name in names:
            newest = passes.get(name, self._n_before - 1)
            passes[name] = max(last + (newest >= last), newest)
            steps.append(passes[name] // schedule.accumulation_steps)
        return steps


def log_rates(optimizer: Optimizer, scalars: ScalarLog, hooks: object) -> RemovableHandle:
    """Log ``lr``, or ``lr/0``, ``lr/1`` and so on, at each step, as long as the hooks are there."""
    # The hook is the optimizer's, and must not keep alive what it logs to.
    log_of, hooks_of = weakref.ref(scalars), weakref.ref(hooks)

    def on_step(optimizer: Optimizer, *_: Any) -> None:  # noqa: ANN401 (what step() is given)
        log, groups = log_of(), optimizer.param_groups
        if log is None or hooks_of() is None or is_capturing():
            return
        names = ["lr"] if len(groups) == 1 else [f"lr/{i}" for i in range(len(groups))]
        rates = zip(names, map(_rate_of, groups), strict=True)
        log.add({name: rate for name, rate in rates if rate is not None})

    handle: RemovableHandle = optimizer.register_step_pre_hook(on_step)
    return handle


def _rate_of(group: Mapping[str, Any]) -> float | Tensor | None:
    """A group's learning rate; ``None`` where it has none, as an Adafactor that finds its own."""
    rate = group.get("lr")
    if type(rate) is float:  # as most are
        return rate
    if isinstance(rate, Tensor) and rate.numel() == 1:
        return rate.reshape(())  # optimizers take one of any shape
    return float(rate) if isinstance(rate, Real) else None


def _checked(name: str, value: object) -> float | Tensor:
    """A number, or a tensor of one on another device; anything else is refused."""
    if isinstance(value, Tensor):
        if value.dim() or value.is_complex() or value.is_meta:
            raise ValueError(
                f"log() needs numbers or 0-dim tensors; {name} is a tensor of shape "
                f"{tuple(value.shape)} and {value.dtype} on {value.device}"
            )
        if not value.is_cpu and is_capturing():
            raise RuntimeError(
                f"log() needs a call outside the capture of a CUDA graph; {name} is on "
                f"{value.device}"
            )
        value = value if type(value) is Tensor else local_part(value)
        return value.item() if value.is_cpu else value
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"log() needs numbers or 0-dim tensors; {name} is {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"log() needs numbers that float64 holds; {name} is beyond") from error
