"""Plans: what to launch for a list of tensors, its tables on the device, kept for the next call."""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat.engines.memory import no_storage
from gradstat.engines.triton_cadence import captured

MAX_TABLE_BYTES = 64 << 20  # of all plans that are kept

# Work items and spans of tensors of one dtype and of their rows.
MakeTables = Callable[[Sequence[Tensor], Sequence[int]], tuple[NDArray[Any], NDArray[Any]]]
_dtype_of = operator.attrgetter("dtype")


@dataclass(frozen=True)
class Group:
    """Tensors of one dtype: their work items and spans on the device, see triton_items.py."""

    dtype: torch.dtype
    items: Tensor
    spans: Tensor
    always: Tensor  # flag of what is measured in any case, int64


@dataclass(frozen=True)
class Plan:
    """What to launch for a list, and its rows of float64."""

    groups: list[Group]
    float64_rows: list[int]
    stream: int  # on which the tables were uploaded
    uploaded: torch.cuda.Event | None

    @property
    def table_bytes(self) -> int:
        """Bytes of its tables on the device."""
        return sum(group.items.nbytes + group.spans.nbytes for group in self.groups)


_plans: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()
_plans_lock = threading.Lock()


def find_plan(
    tensors: Sequence[Tensor], device: torch.device, make_tables: MakeTables, *more: Hashable
) -> Plan:
    """Plan of a list; built and uploaded anew only when addresses, shapes or dtypes change.

    Args:
        tensors: L tensors.
        device: that they are on.
        make_tables: from tensors of one dtype and their rows, work items and spans.
        more: whatever else the tables depend on.
    """
    # Mapped methods: this is most of the cost of a call with many tensors.
    key: tuple[Any, ...] = (
        device,
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(map(Tensor.numel, tensors)),
        tuple(map(_dtype_of, tensors)),
        *more,
    )
    if not all(map(Tensor.is_contiguous, tensors)):
        key = (*key, tuple([(x.shape, x.stride()) for x in tensors]))
    is_capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _plans_lock:
        plan = _plans.get(key)
        if plan is not None:
            _plans.move_to_end(key)
    if plan is None:
        plan = _make_plan(tensors, device, is_capturing, make_tables)
        if not is_capturing:
            _keep_plan(key, plan)
    elif is_capturing:
        captured.append(plan)
    else:
        _wait_for_tables(plan)
    return plan


def _make_plan(
    tensors: Sequence[Tensor], device: torch.device, is_capturing: bool, make_tables: MakeTables
) -> Plan:
    rows: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(tensors):
        if x.numel() and not x.data_ptr():
            raise no_storage(i)
        rows.setdefault(x.dtype, []).append(i)
    float64_rows = rows.pop(torch.float64, [])
    groups = []
    for dtype, members in rows.items():
        items, spans = make_tables([tensors[i] for i in members], members)
        ones = np.ones_like(spans[:1])
        tables = [_upload(x, device, is_capturing) for x in (items, np.concatenate([spans, ones]))]
        groups.append(Group(dtype, tables[0], tables[1][:-1], tables[1][-1]))
    if device.type != "cuda" or is_capturing:
        return Plan(groups, float64_rows, 0, None)
    stream = torch.cuda.current_stream(device)
    return Plan(groups, float64_rows, stream.cuda_stream, stream.record_event())


def _keep_plan(key: tuple[Any, ...], plan: Plan) -> None:
    with _plans_lock:
        _plans[key] = plan
        total = sum(each.table_bytes for each in _plans.values())
        while total > MAX_TABLE_BYTES and len(_plans) > 1:
            total -= _plans.popitem(last=False)[1].table_bytes


def _wait_for_tables(plan: Plan) -> None:
    """Let the current stream use tables that another one uploaded."""
    if plan.uploaded is None:  # the CPU has no streams
        return
    stream = torch.cuda.current_stream()
    if stream.cuda_stream != plan.stream:
        stream.wait_event(plan.uploaded)
        for group in plan.groups:
            group.items.record_stream(stream)
            group.spans.record_stream(stream)


def _upload(table: NDArray[Any], device: torch.device, is_capturing: bool) -> Tensor:
    host = torch.from_numpy(table)
    if device.type == "cpu":
        return host
    host = host.pin_memory()
    if is_capturing:
        # Every replay copies the table anew from here.
        captured.append(host)
    return host.to(device, non_blocking=True)
