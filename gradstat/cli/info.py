"""The command ``info``: what is known of this machine, or what a run has logged.

PyTorch is not imported where there is no device.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from gradstat.engines import ENGINE_VARIABLE
from gradstat.version import __version__

_PACKAGES = ("torch", "triton", "numba", "numpy", "matplotlib", "pandas", "pyarrow")
# Devices of the drivers of NVIDIA, of Windows under WSL, of Jetson, and of AMD.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap", "/dev/kfd")


def info(options: argparse.Namespace) -> int:
    """Print what is known of the machine or of the run."""
    if options.run_path is None:
        print(environment())
        return 0
    from gradstat.cli.printing import heading, logged
    from gradstat.cli.runs import load

    history = load(options.run_path)
    print(f"{heading(str(options.run_path), history)}\n\n{logged(history)}")
    return 0


def environment() -> str:
    """Versions, devices, and the engine that each will use."""
    lines = [f"gradstat {__version__}, Python {platform.python_version()}", ""]
    lines += [f"{name:11} {_version(name) or 'not installed'}" for name in _PACKAGES]
    forced = os.environ.get(ENGINE_VARIABLE)
    rows = [("CPU tensors", forced or "cpu")]
    gpus = enumerate(_devices())
    rows += [(f"cuda:{i} tensors ({name})", forced or "triton") for i, name in gpus]
    if len(rows) == 1:
        rows.append(("CUDA or ROCm tensors", "triton; no such device here"))
    rows.append(("tensors elsewhere, float64 on a GPU", forced or "reference"))
    width = max(len(what) for what, _ in rows)
    lines += ["", "Engine", *(f"{what:{width}}  {engine}" for what, engine in rows)]
    lines.append(f"{ENGINE_VARIABLE} is {forced!r}" if forced else f"{ENGINE_VARIABLE} is not set")
    return "\n".join(lines)


def _devices() -> list[str]:
    """Name of each CUDA or ROCm device. Without a driver PyTorch, a second, is not imported."""
    has_driver = sys.platform != "linux" or any(Path(driver).exists() for driver in _DRIVERS)
    if not has_driver and "torch" not in sys.modules:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
