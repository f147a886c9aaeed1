"""Python imports it at its start, see run.py: the device is there before torch and Triton are."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent


def load_package() -> None:
    """Load cuda_device without the folder that it is in, whose other names would come too."""
    folder = HERE.parent
    spec = importlib.util.spec_from_file_location(
        "cuda_device", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["cuda_device"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["cuda_device"])


def load_libraries() -> None:
    from cuda_device import device

    device.load()


def replace_operators(torch: ModuleType) -> None:
    from cuda_device import operators

    operators.replace(torch)


def replace_cubins(compiler: ModuleType) -> None:
    from cuda_device import launches

    launches.replace_cubins(compiler)


def nothing() -> None: ...


# What comes before a module is executed, and after.
AROUND = {
    "torch": (load_libraries, replace_operators),
    "triton.backends.nvidia.compiler": (nothing, replace_cubins),
}


class Finder(importlib.abc.MetaPathFinder):
    """Finds torch and Triton's compiler as Python does, with the device around them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in AROUND:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            before, after = AROUND[name]
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                before()
                execute(module)
                after(module)

            spec.loader.exec_module = exec_module
        return spec


def run_the_other_one() -> None:
    """A sitecustomize that this one hides, of the system or the environment."""
    rest = [path for path in sys.path if path and Path(path).absolute() != HERE.absolute()]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("SOFTWARE_CUDA"):
    load_package()
    sys.meta_path.insert(0, Finder())
run_the_other_one()
