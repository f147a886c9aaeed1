"""`watch`: hooks on a model that measure its gradients during backward, into a `History`."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradstat.bins import Bins, LinearBins, Log2Bins
from gradstat.history import History
from gradstat.ops import check_bins, check_engine, is_measurable, known_range, measure
from gradstat.statistics import FLOATS, INTEGERS, Statistics

Selector = str | Callable[[str, nn.Parameter], bool]


def watch(
    model: nn.Module,
    bins: Bins | None = None,
    every: int = 1,
    *,
    parameters: Selector | None = None,
    accumulation_steps: int = 1,
    bucket_bytes: int = 25 << 20,
    engine: str | None = None,
) -> Watch:
    """Measure a model's gradients during backward.

    One record per backward pass. Nothing waits for the device until the record is read, and
    nothing about the training changes.

    Args:
        model: the model; watch it after moving, sharding or wrapping it.
        bins: `Log2Bins` (default) or `LinearBins`.
        every: record every so many steps, from the first one.
        parameters: which parameters: a regular expression searched for in their names, or a
            function of name and parameter. By default all but biases.
        accumulation_steps: backward passes per optimizer step. The last of each is recorded, when
            the gradient is whole.
        bucket_bytes: gradients measured in one launch; the default leaves them in a GPU's cache.
        engine: as in `statistics`.

    Returns:
        The running Watch: a context manager, or to be closed with ``close()``.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number below 1, an unknown engine, no parameter that is selected and needs a
            gradient.

    Example:
        >>> import torch, gradstat
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        >>> with gradstat.watch(model) as w:
        ...     for _ in range(3):
        ...         model(torch.randn(8, 4)).mean().backward()
        >>> w.history
        History(3 steps, 2 layers, Log2Bins())
    """
    bins = check_bins("watch", Log2Bins() if bins is None else bins)
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch() needs a torch.nn.Module; model is {type(model).__name__}")
    numbers = {
        "every": every,
        "accumulation_steps": accumulation_steps,
        "bucket_bytes": bucket_bytes,
    }
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"watch() needs an integer; {name} is {number!r}")
        if number < 1:
            raise ValueError(f"watch() needs a number of 1 or more; {name} is {number}")
    check_engine("watch", engine)
    selected = _select(model, parameters)
    return Watch(selected, bins, every, accumulation_steps, bucket_bytes, engine)


class Watch:
    """Running hooks; made by `watch`.

    Args:
        parameters: by name.
        bins: scheme of the histograms.
        every: see `watch`.
        accumulation_steps: see `watch`.
        bucket_bytes: see `watch`.
        engine: see `watch`.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        bins: Bins,
        every: int,
        accumulation_steps: int,
        bucket_bytes: int,
        engine: str | None,
    ) -> None:
        self.bins = bins
        self._every, self._accumulation_steps = every, accumulation_steps
        self._bucket_bytes, self._engine = bucket_bytes, engine
        self._history = History(list(parameters), bins)
        self._backwards = 0
        self._task = -1  # the autograd graph task that is being recorded; -1 for none
        self._recording = False
        self._buckets: dict[torch.device, _Bucket] = {}
        self._parts: list[_Part] = []
        self._pending: deque[_Record] = deque()
        self._previous: dict[tuple[int, ...], Statistics] = {}
        self._handles: list[RemovableHandle] = []
        self._frozen: list[tuple[int, nn.Parameter]] = []
        for index, parameter in enumerate(parameters.values()):
            self._install(index, parameter)

    @property
    def history(self) -> History:
        """All records so far; waits for those still on their way from the device."""
        self._collect(wait=True)
        return self._history

    @property
    def last(self) -> Statistics:
        """The newest record, shape ``(L,)``, on the CPU; waits for it.

        Raises:
            KeyError: there is none yet.
        """
        return self.history.record(-1)

    def close(self) -> None:
        """Take the hooks off the model; `history` stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._frozen.clear()
        self._drop_unfinished()

    def __enter__(self) -> Watch:
        """The watch itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _install(self, index: int, parameter: nn.Parameter) -> None:
        if parameter.requires_grad:
            hook = partial(self._on_gradient, index)
            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._handles.append(handle)
        else:
            self._frozen.append((index, parameter))

    def _on_gradient(self, index: int, parameter: Tensor) -> None:
        """Put a gradient that has just been accumulated into its device's bucket."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._begin(task)
        gradient = parameter.grad
        if not self._recording or gradient is None:
            return
        if gradient.layout == torch.sparse_coo:
            gradient = gradient.coalesce().values()
        if not is_measurable(gradient):
            return
        bucket = self._buckets.get(gradient.device)
        if bucket is None:
            bucket = self._buckets[gradient.device] = _Bucket({})
        bucket.gradients[index] = gradient
        bucket.n_bytes += gradient.nbytes
        if bucket.n_bytes >= self._bucket_bytes:
            self._measure(bucket)

    def _begin(self, task: int) -> None:
        """First gradient of a backward pass; what an aborted pass left behind is dropped."""
        self._drop_unfinished()
        self._task = task
        step, micro_step = divmod(self._backwards, self._accumulation_steps)
        self._recording = micro_step == self._accumulation_steps - 1 and step % self._every == 0
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        """End of the backward pass, called by autograd."""
        for bucket in self._buckets.values():
            self._measure(bucket)
        if self._recording:
            self._pending.append(_Record(self._backwards // self._accumulation_steps, self._parts))
        self._parts = []
        self._task, self._recording = -1, False
        self._backwards += 1
        self._collect(wait=False)
        if self._frozen:
            frozen, self._frozen = self._frozen, []
            for index, parameter in frozen:
                self._install(index, parameter)

    def _drop_unfinished(self) -> None:
        self._task, self._recording = -1, False
        self._buckets.clear()
        self._parts = []

    def _measure(self, bucket: _Bucket) -> None:
        """One launch over a bucket; its results start on their way to the host."""
        if not bucket.gradients:
            return
        indices = tuple(sorted(bucket.gradients))
        gradients = [bucket.gradients[index] for index in indices]
        bucket.clear()
        with torch.no_grad():
            previous = self._previous.get(indices)
            ends = known_range(self.bins, gradients[0].device, len(gradients), previous)
            result = measure(gradients, self.bins, *ends, self._engine)
        if isinstance(self.bins, LinearBins) and self.bins.track:
            self._previous[indices] = result
        self._parts.append(_Part(indices, result))

    def _collect(self, wait: bool) -> None:
        """Move records that have arrived into the history, oldest first."""
        while self._pending and self._pending[0].arrived(wait):
            record = self._pending.popleft()
            rows = record.rows(len(self._history.layers), self.bins.bins)
            self._history.append(record.step, *rows)


@dataclass
class _Bucket:
    """Gradients on one device that wait to be measured together, by index of their layer."""

    gradients: dict[int, Tensor]
    n_bytes: int = 0

    def clear(self) -> None:
        self.gradients.clear()
        self.n_bytes = 0


class _Part:
    """The result of one launch, on its way to the host.

    Args:
        indices: layer of each row.
        result: Statistics on the device.
    """

    def __init__(self, indices: tuple[int, ...], result: Statistics) -> None:
        self.indices = indices
        arrays = (result.integers, result.floats, result.counts)
        self._event: torch.Event | None = None
        if result.counts.device.type == "cuda":
            # PyTorch's cache of pinned blocks does not reuse one before its copy is over.
            self._arrays = tuple(_copy_to_pinned(array) for array in arrays)
            self._event = torch.Event("cuda")
            self._event.record()
        else:
            self._arrays = tuple(array.cpu() for array in arrays)

    def arrived(self, wait: bool) -> bool:
        if self._event is None or self._event.query():
            return True
        if wait:
            self._event.synchronize()
        return wait

    def arrays(self) -> tuple[np.ndarray, ...]:
        return tuple(array.numpy() for array in self._arrays)


@dataclass(frozen=True)
class _Record:
    """What one backward pass measured."""

    step: int
    parts: list[_Part]

    def arrived(self, wait: bool) -> bool:
        return all(part.arrived(wait) for part in self.parts)

    def rows(self, n_layers: int, n_bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Integers ``(L, 8)``, floats ``(L, 8)``, counts ``(L, bins)`` of all layers in order."""
        if len(self.parts) == 1 and len(self.parts[0].indices) == n_layers:
            integers, floats, counts = self.parts[0].arrays()
            return integers, floats, counts
        integers = np.zeros((n_layers, len(INTEGERS)), dtype=np.int64)
        floats = np.full((n_layers, len(FLOATS)), np.nan)
        counts = np.zeros((n_layers, n_bins), dtype=np.int64)
        for part in self.parts:
            rows = list(part.indices)
            integers[rows], floats[rows], counts[rows] = part.arrays()
        return integers, floats, counts


def _copy_to_pinned(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _select(model: nn.Module, parameters: Selector | None) -> dict[str, nn.Parameter]:
    """Parameters to watch, by name."""
    if parameters is None:
        matches: Callable[[str, nn.Parameter], bool] = _is_weight
    elif isinstance(parameters, str):
        pattern = re.compile(parameters)

        def matches(name: str, parameter: nn.Parameter) -> bool:
            return pattern.search(name) is not None
    elif callable(parameters):
        matches = parameters
    else:
        raise TypeError(
            f"watch() needs a regular expression or a function; parameters is {parameters!r}"
        )
    selected = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and matches(name, parameter)
    }
    if not any(parameter.requires_grad for parameter in selected.values()):
        total = sum(1 for _ in model.parameters())
        raise ValueError(
            f"watch() needs a model with parameters that require gradients; model is "
            f"{type(model).__name__} with {total} parameters, {len(selected)} selected by "
            f"parameters={parameters!r}, none of them requiring a gradient"
        )
    return selected


def _is_weight(name: str, parameter: nn.Parameter) -> bool:
    return "bias" not in name.rpartition(".")[2]
