"""Results on their way from a device to the host, and the `Record` that a pass makes of them."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradstat.arrays import PackedRows
from gradstat.bins import Bins, LinearBins
from gradstat.history import History
from gradstat.history.union_quantized import union_of
from gradstat.quantized import PACKED
from gradstat.record import OF_OUTPUTS, RecordLayout
from gradstat.recording.streams import Computed, take_over
from gradstat.recording.torch_internals import SparingCaptures
from gradstat.results import FLOATS, INTEGERS, as_arrays, as_statistics

# Integers, floats and `Counts` of some layers; where formats are measured, what they would do too.
Rows = tuple[Any, ...]

_ALIGNMENT = 8  # bytes of the widest number
_LEAST_BYTES = 1 << 9


class Transfer:
    """Tensors on their way from one device to the host, or arrays that are there."""

    __slots__ = ("__weakref__", "_event", "_tensors")

    def __init__(self, tensors: tuple[Any, ...]) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if not isinstance(tensors[0], Tensor):
            return
        if tensors[0].is_cuda:
            block, self._tensors = _copy_to_pinned(tensors)
            # The tensors' device need not be the current one.
            stream = torch.cuda.current_stream(tensors[0].device)
            self._event = stream.record_event()
            _BLOCKS[block.nbytes].append(_Block(block, self._event, weakref.ref(self)))
        elif not tensors[0].is_cpu:
            self._tensors = tuple(x.cpu() for x in tensors)

    def has_arrived(self, wait: bool) -> bool:
        """Whether they are there, which they are after waiting."""
        if self._event is None:
            return True
        with SparingCaptures():
            if self._event.query():  # type: ignore[no-untyped-call]
                return True
            if wait:
                self._event.synchronize()
        return wait

    def arrays(self) -> tuple[Any, ...]:
        """The same as arrays in ordinary memory, once they are there."""
        if isinstance(self._tensors[0], Tensor):
            arrays = [x.numpy() for x in self._tensors]
            self._tensors = tuple(arrays if self._event is None else [x.copy() for x in arrays])
        return self._tensors

    @property
    def is_array(self) -> bool:
        """Whether they are arrays by now."""
        return not isinstance(self._tensors[0], Tensor)


class _Block(NamedTuple):
    """Pinned memory, the event after the last copy into it, and whom that was for."""

    memory: Tensor
    copied: torch.cuda.Event
    owner: weakref.ref[Transfer]

    def is_free(self) -> bool:
        """Whether nobody reads it and nothing is copied into it any more."""
        owner = self.owner()
        if owner is not None and not owner.is_array:
            return False
        with SparingCaptures():
            return bool(self.copied.query())  # type: ignore[no-untyped-call]


# All pinned memory, by its bytes. It is used again and never freed: to free it, PyTorch records an
# event on the streams that have copied into it, and where one of them is being captured, that event
# fails all who ask for pinned memory later. So no record may keep it either.
_BLOCKS: defaultdict[int, deque[_Block]] = defaultdict(deque)


class Launch(NamedTuple):
    """What was measured at once.

    Args:
        indices: the layer of each row.
        rows: `Rows` as tensors on their device, or as arrays if the engine makes these.
        stream: that computes them.
        scales: what the values of a kind are still to be divided by.
    """

    indices: tuple[int, ...]
    rows: tuple[Any, ...]
    stream: torch.Stream | None
    scales: Mapping[str, Computed]


class Part(NamedTuple):
    """Rows on their way from one device.

    Args:
        indices: the layer of each row.
        result: `Rows`.
        is_one_launch: whether each layer comes once, in order, as in one launch.
        scales: what the values of a kind are still to be divided by.
    """

    indices: tuple[int, ...]
    result: Transfer
    is_one_launch: bool
    scales: dict[str, Transfer]

    def has_arrived(self, wait: bool) -> bool:
        """Whether it is there, which it is after waiting."""
        if self.scales and not all(x.has_arrived(wait) for x in self.scales.values()):
            return False
        return self.result.has_arrived(wait)


def send(launches: Sequence[Launch]) -> list[Part]:
    """Start the results of launches on their way to the host, those of each device together."""
    if len(launches) == 1:
        return [_send_together(launches)]
    groups: dict[object, list[Launch]] = {}
    for at, launch in enumerate(launches):
        key: object = at
        if not _is_host(launch.rows[0]):
            key = launch.rows[0].device, *map(id, launch.scales.values())
        groups.setdefault(key, []).append(launch)
    return [_send_together(group) for group in groups.values()]


def _send_together(launches: Sequence[Launch]) -> Part:
    indices, rows, _, scales = launches[0]
    for launch in launches:
        take_over(launch.rows, launch.stream)
    if len(launches) > 1:
        indices = tuple(index for launch in launches for index in launch.indices)
        results = zip(*(dense(launch.rows) for launch in launches), strict=True)
        rows = tuple(torch.cat(tuple(map(torch.as_tensor, each))) for each in results)
    arriving = {kind: Transfer((scale.get(),)) for kind, scale in scales.items()} if scales else {}
    return Part(indices, Transfer(rows), len(launches) == 1, arriving)


def combine_arrived(parts: list[Part], history: History) -> list[Part]:
    """Parts in their order, the first of them that have arrived as one."""
    arrived = list(takewhile(lambda part: part.has_arrived(wait=False), parts))
    if len(arrived) < 2:
        return parts
    return [_combine(arrived, history), *parts[len(arrived) :]]


def _combine(parts: Sequence[Part], history: History) -> Part:
    """Make one part, without scales, of parts that have arrived: a row for each layer.

    Several rows of a module's outputs are counted together; of other layers the last row counts.
    """
    if len(parts) == 1 and not parts[0].scales and parts[0].is_one_launch:
        return parts[0]
    layers = sorted({layer for part in parts for layer in part.indices})
    whole = _absent(len(layers), history)
    row_of = {layer: row for row, layer in enumerate(layers)}
    seen: Counter[int] = Counter()
    for part in parts:
        arrays = _unscaled(part, history)
        for joins, at in _turns(part.indices, seen, history.kinds):
            rows = [row_of[part.indices[i]] for i in at]
            new: Rows = tuple(each[at] for each in arrays)
            if joins:
                new = _counted_together(history.bins, tuple(each[rows] for each in whole), new)
            for each, values in zip(whole, new, strict=True):
                each[rows] = values
    return Part(tuple(layers), Transfer(whole), True, {})


def dense(rows: Rows) -> Rows:
    """The same with counts that are not packed."""
    integers, floats, counts, *others = rows
    counts = counts.dense() if isinstance(counts, PackedRows) else counts
    return integers, floats, counts, *others


def packed(layout: RecordLayout, rows: Rows) -> bytes:
    """The same as a packed record."""
    integers, floats, counts, *others = dense(rows)
    return layout.pack(integers, floats, others[0] if others else None, counts)


def _counted_together(bins: Bins, before: Rows, new: Rows) -> Rows:
    """Rows of the same layers, counted together."""
    a, b = (as_statistics(bins, rows[:3]) for rows in (before, new))
    quantized = [union_of(np.stack(each)) for each in zip(before[3:], new[3:], strict=True)]
    return *as_arrays(a.merge(b)), *quantized


def _unscaled(part: Part, history: History) -> Rows:
    arrays = dense(part.result.arrays())
    if isinstance(history.bins, LinearBins):
        return arrays
    for kind, scale in part.scales.items():
        rows = [at for at, layer in enumerate(part.indices) if history.kinds[layer] == kind]
        if rows:
            scaled = as_statistics(history.bins, tuple(each[rows] for each in arrays[:3]))
            unscaled = scaled.unscale(torch.from_numpy(scale.arrays()[0]).double())
            arrays = tuple(each.copy() for each in arrays)
            for each, new in zip(arrays, as_arrays(unscaled), strict=False):
                each[rows] = new
    return arrays


def _turns(
    layers: tuple[int, ...], seen: Counter[int], kinds: list[str]
) -> Iterable[tuple[bool, list[int]]]:
    """Rows in turns, in each of which no layer comes twice.

    Returns:
        For each turn whether its rows join those before, and where they are.
    """
    turns: dict[tuple[int, bool], list[int]] = {}
    for at, layer in enumerate(layers):
        joins = seen[layer] > 0 and kinds[layer] in OF_OUTPUTS
        turns.setdefault((seen[layer], joins), []).append(at)
        seen[layer] += 1
    return [(joins, at) for (_, joins), at in turns.items()]


def _is_host(x: object) -> bool:
    """Whether results are on the host already: to put them together would only take time."""
    return not isinstance(x, Tensor) or x.is_cpu


class Record(NamedTuple):
    """What one pass measured.

    Args:
        step: its number, as the host counts.
        history: where it goes.
        parts: its rows.
        n_told: passes before it that the host knew of.
        stamp: of a replay, how many there were in truth, for `Cadence.take_stamp`.
    """

    step: int
    history: History
    parts: list[Part]
    n_told: int
    stamp: Transfer | None

    def has_arrived(self, wait: bool) -> bool:
        """Whether it is there, which it is after waiting."""
        if self.stamp is not None and not self.stamp.has_arrived(wait):
            return False
        return all(part.has_arrived(wait) for part in self.parts)

    def rows(self) -> Rows:
        """`Rows` of all layers in order."""
        n_layers = len(self.history.layers)
        whole = _combine(self.parts, self.history)
        found = whole.result.arrays()
        if len(whole.indices) < n_layers:
            absent, rows = _absent(n_layers, self.history), list(whole.indices)
            for each, values in zip(absent, dense(found), strict=True):
                each[rows] = values
            found = absent
        return found


def _absent(n_layers: int, history: History) -> Rows:
    """Rows of layers without values."""
    integers = np.zeros((n_layers, len(INTEGERS)), np.int64)
    floats = np.full((n_layers, len(FLOATS)), np.nan)
    counts = np.zeros((n_layers, history.bins.bins), np.int64)
    if not history.formats:
        return integers, floats, counts
    quantized = np.full((n_layers, len(history.formats), len(PACKED)), np.nan)
    return integers, floats, counts, quantized


def _copy_to_pinned(tensors: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Start to copy tensors into one block of pinned memory; their parts of it."""
    ends = list(accumulate(-(-x.nbytes // _ALIGNMENT) * _ALIGNMENT for x in tensors))
    block = _pinned_block(ends[-1])
    parts = []
    for x, start in zip(tensors, (0, *ends), strict=False):
        part = block[start : start + x.nbytes].view(x.dtype).view(x.shape)
        parts.append(part.copy_(x, non_blocking=True))
    return block, tuple(parts)


def _pinned_block(n_bytes: int) -> Tensor:
    size = max(_LEAST_BYTES, 1 << (n_bytes - 1).bit_length())
    blocks = _BLOCKS[size]
    with suppress(IndexError):
        oldest = blocks.popleft()
        if oldest.is_free():
            return oldest.memory
        blocks.append(oldest)
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
