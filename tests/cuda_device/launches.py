"""Triton's kernels: PTX takes the place of machine code, and is executed at a launch."""

from __future__ import annotations

import ctypes
import itertools
import os
import struct
import traceback
from typing import Any

import numpy as np

from cuda_device import device
from cuda_device.ptx.execution import MOST_RACING_WARPS, Module
from cuda_device.ptx.memory import Buffer, Memory
from cuda_device.ptx.parsing import Type

FLOATS = {16: "<e", 32: "<f", 64: "<d"}
# Under `random` one launch of so many shows another order of the warps: all would take too long.
EVERY = 16

_modules: list[Module] = []
_kernels: list[tuple[Module, str]] = []
_launches = itertools.count(1)


class DeviceMemory(Memory):
    """What the device has allocated, pinned memory of the host, and the modules' own."""

    def __init__(self) -> None:
        super().__init__()
        self.generation = 0
        self.allocated: dict[tuple[int, int], Buffer] = {}

    def refresh(self) -> None:
        generation = device.runtime.device_generation()
        if generation == self.generation:
            return
        n = device.runtime.device_allocations(None, 0)
        table = np.zeros((n, 2), np.uint64)
        device.runtime.device_allocations(table.ctypes.data, n)
        kept, n_kept = self.allocated, len(self.allocated)
        self.allocated = {
            (start, size): kept.get((start, size)) or buffer(start, size)
            for start, size in table.tolist()
        }
        # The modules' own lies behind.
        self.starts[:n_kept] = [start for start, _ in self.allocated]
        self.buffers[:n_kept] = self.allocated.values()
        self.generation = generation


def buffer(start: int, size: int) -> Buffer:
    raw = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
    return Buffer(start, raw, f"allocation {start:#x}")


memory = DeviceMemory()


def replace_cubins(compiler: Any) -> None:
    """PTX takes the place of a cubin; ptxas is run only to see that it accepts it."""
    original = compiler.CUDABackend.make_cubin

    def make_cubin(self: Any, source: str, *rest: Any) -> bytes:
        if os.environ.get("SOFTWARE_CUDA_PTXAS"):
            original(self, source, *rest)
        return source.encode() + b"\0"

    compiler.CUDABackend.make_cubin = make_cubin
    device.set_launcher(load_module, get_function, launch)


def load_module(image: bytes) -> int:
    try:
        text = image.decode()
        if ".entry" not in text:
            raise ValueError("no PTX: a cubin of another cache?")
        _modules.append(Module(text, memory=memory))
    except BaseException:
        traceback.print_exc()
        return 0
    return len(_modules)


def get_function(number: int, name: bytes) -> int:
    module = _modules[number - 1]
    if name.decode() not in module.programs:
        return 0
    _kernels.append((module, name.decode()))
    return len(_kernels)


def launch(number: int, stream: int | None, shape: Any, parameters: Any) -> int:
    try:
        module, name = _kernels[number - 1]
        # As CUDA does: copied at the launch.
        arguments = [
            value(ctypes.string_at(parameters[i], kind.bits // 8), kind)
            for i, (_, kind, _) in enumerate(module.programs[name].kernel.params)
        ]
        grid, warps = tuple(shape[:3]), shape[3] * shape[4] * shape[5] // 32
        if 0 in grid:
            return 1
        shared_bytes = shape[6]
        device.kernel_counts[name] += 1
        schedule, seed = device.chosen
        is_random = schedule == "random" and device.kernel_counts[name] % EVERY == 1
        seed = seed * 1000 + next(_launches) if is_random else None
        racecheck = bool(os.environ.get("SOFTWARE_CUDA_RACECHECK"))
        racecheck &= grid[0] * grid[1] * grid[2] * warps <= MOST_RACING_WARPS

        def call() -> None:
            memory.refresh()
            module.launch(
                grid,
                arguments,
                warps,
                kernel=name,
                shared_bytes=shared_bytes,
                in_step=True,
                seed=seed,
                racecheck=racecheck,
            )

        device.enqueue(stream or 0, call, name)
    except BaseException:
        traceback.print_exc()
        return 719
    return 0


def value(raw: bytes, kind: Type) -> float | int:
    if kind.is_float:
        return struct.unpack(FLOATS[kind.bits], raw)[0]
    return int.from_bytes(raw, "little")
