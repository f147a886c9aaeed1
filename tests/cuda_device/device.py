"""The device's libraries, loaded, and the commands of Python's that its streams run."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import itertools
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from cuda_device import build

SCHEDULES = {"eager": 0, "lazy": 1, "random": 2, "reverse": 3}
# Where the memory of the device and pinned memory of the host lie, as in runtime.cpp.
ARENA, ARENA_BYTES = 0x1000_0000_0000, 64 << 30
PINNED, PINNED_BYTES = 0x2000_0000_0000, 32 << 30

runtime: Any = None
driver: Any = None
errors: list[BaseException] = []
operator_counts: Counter[str] = Counter()
kernel_counts: Counter[str] = Counter()
chosen = ("lazy", 0)

_calls: dict[int, Callable[[], None]] = {}
_numbers = itertools.count(1)
_callbacks: list[Any] = []  # ctypes does not keep them


def load() -> None:
    """Load both libraries, so that what asks for them by name later gets these."""
    global runtime, driver
    if runtime is not None:
        return
    try:
        folder = build.libraries()
    except build.BuildError as e:
        sys.exit(f"cuda_device: {e}")
    runtime = ctypes.CDLL(str(folder / "libcudart.so.13"), mode=ctypes.RTLD_GLOBAL)
    driver = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
    run = ctypes.CFUNCTYPE(ctypes.c_int, number)(_run)
    _callbacks.append(run)
    runtime.device_init.argtypes = [type(run), ctypes.c_int, number]
    runtime.device_enqueue.argtypes = [pointer, number, ctypes.c_char_p]
    runtime.device_fill.argtypes = [pointer, pointer, size]
    runtime.device_schedule.argtypes = [ctypes.c_int, number]
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    for name in ("device_allocations", "device_released"):
        getattr(runtime, name).argtypes = [pointer, size]
        getattr(runtime, name).restype = size
    for name in ("pending", "executed", "generation", "violations"):
        getattr(runtime, f"device_{name}").restype = number
    runtime.device_init(run, 0, 0)
    schedule(os.environ["SOFTWARE_CUDA_SCHEDULE"], int(os.environ["SOFTWARE_CUDA_SEED"]))
    atexit.register(_stop)


def set_launcher(load_module: Any, get_function: Any, launch: Any) -> None:
    """Give the driver what becomes of modules, their kernels and launches."""
    number, pointer = ctypes.c_uint64, ctypes.c_void_p
    shape, parameters = ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(pointer)
    module = ctypes.CFUNCTYPE(number, ctypes.c_char_p)(load_module)
    function = ctypes.CFUNCTYPE(number, number, ctypes.c_char_p)(get_function)
    launched = ctypes.CFUNCTYPE(ctypes.c_int, number, pointer, shape, parameters)(launch)
    _callbacks.extend([module, function, launched])
    driver.driver_init(module, function, launched)


def _stop() -> None:
    with contextlib.suppress(Exception):
        runtime.device_run_all()
    runtime.device_stop()


def schedule(name: str, seed: int = 0) -> None:
    """Change the schedule, after everything that is queued."""
    global chosen
    chosen = name, seed
    runtime.device_schedule(SCHEDULES[name], seed)


def pending() -> int:
    """Commands that are queued."""
    return runtime.device_pending()


def reset() -> None:
    """Drop what is queued behind a failed command, and the error that it has left."""
    errors.clear()
    runtime.device_reset()


def _run(number: int) -> int:
    enabled = gc.isenabled()
    gc.disable()  # no CUDA tensor is freed in the middle of a command
    try:
        _calls[number]()
    except BaseException as e:
        errors.append(e)
        print(f"[cuda_device] a command failed: {type(e).__name__}: {e}", file=sys.stderr)
        if not isinstance(e, RuntimeError) or os.environ.get("SOFTWARE_CUDA_VERBOSE"):
            traceback.print_exc()
        return 1
    finally:
        if enabled:
            gc.enable()
    return 0


def _forget_released() -> None:
    numbers = (ctypes.c_uint64 * 256)()
    while n := runtime.device_released(numbers, 256):
        for number in numbers[:n]:
            _calls.pop(number, None)


def enqueue(stream: int, call: Callable[[], None], label: str) -> None:
    """Queue a call on a stream, or put it into the graph that the stream is captured in."""
    number = next(_numbers)
    if number % 128 == 0:
        _forget_released()
    _calls[number] = call
    code = runtime.device_enqueue(stream, number, label.encode())
    if code:
        said = runtime.cudaGetErrorString(code).decode()
        detail = f"; {errors[0]}" if errors else ""
        raise RuntimeError(f"CUDA error: {said} ({label}){detail}")
