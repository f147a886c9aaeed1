"""Where and with what a result was measured."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def describe(packages: Sequence[str]) -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "machine": {
            "cpu": _cpu(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        **describe_code(),
    }


def describe_code() -> dict[str, Any]:
    """Commit, and whether what results depend on has changed since."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        # The results themselves do not count.
        "dirty": bool(_git("status", "--porcelain", "--", "gradstat", "kernels", "bench/*.py")),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    try:
        output = subprocess.run(
            command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        return ""
    return output.stdout.strip()
