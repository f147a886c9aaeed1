"""The device's libraries, compiled once for each version of their sources, and who uses them.

Several processes may build at once: each does so in a folder of its own, and the first one to be
done moves it to where all look for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("queue.hpp", "runtime.cpp", "driver.cpp", "build.py")
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-deprecated-declarations"]
# What PyTorch and Triton look up in the driver, beside the calls of driver.cpp.
DRIVER_STUBS = """
cuMemGetAddressRange cuMemGetAddressRange_v2 cuMemAddressReserve cuMemRelease cuMemMap
cuMemAddressFree cuMemSetAccess cuMemUnmap cuMemCreate cuMemGetAllocationGranularity
cuMemExportToShareableHandle cuMemRetainAllocationHandle cuMemsetD32Async cuStreamWriteValue32
cuMulticastAddDevice cuMulticastBindMem cuMulticastCreate cuMulticastUnbind cuCtxFromGreenCtx
cuCtxPopCurrent cuCtxPushCurrent cuGreenCtxCreate cuGreenCtxDestroy cuGreenCtxStreamCreate
cuDevSmResourceSplitByCount cuDeviceGetDevResource cuDevResourceGenerateDesc
cuMemImportFromShareableHandle cuMemGetAllocationPropertiesFromHandle cuLaunchCooperativeKernel
cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2 cuOccupancyMaxActiveBlocksPerMultiprocessor
cuOccupancyMaxActiveClusters cuTensorMapEncodeTiled cuTensorMapEncodeIm2col
""".split()


class BuildError(Exception):
    """Why there are no libraries, for the user."""


class MissingError(BuildError):
    """A compiler, PyTorch for CUDA or Triton is not there: the device cannot be had here."""


def libraries() -> Path:
    """The folder with libcudart.so.13 and libcuda.so.1, compiled if they are not there yet."""
    include, real = wheels()
    digest = hashlib.sha256(b"".join((HERE / source).read_bytes() for source in SOURCES))
    digest.update(f"{real.stat().st_size} {os.environ.get('CXX', '')}".encode())
    root = cache_folder()
    folder = root / digest.hexdigest()[:16]
    if (folder / "done").exists():
        return folder
    compiler = _tool(os.environ.get("CXX") or "g++", "install g++, or set CXX to a C++17 compiler")
    nm = _tool("nm", "install binutils")
    try:
        own = Path(tempfile.mkdtemp(prefix="building-", dir=root))
    except OSError as e:
        raise _unwritable(root, e) from None
    try:
        _compile(own, include, real, compiler, nm)
        (own / "done").touch()
        try:
            own.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "done").exists():
                raise
        return folder
    except OSError as e:
        raise BuildError(f"cannot build in {root}: {e}") from None
    finally:
        shutil.rmtree(own, ignore_errors=True)


def cache_folder() -> Path:
    """Where libraries and compiled kernels are kept: in the environment, or where one says."""
    root = Path(os.environ.get("SOFTWARE_CUDA_CACHE") or Path(sys.prefix, "cache", "cuda_device"))
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise _unwritable(root, e) from None
    return root.absolute()


def environment(schedule: str, seed: int = 0, flags: Iterable[str] = ()) -> dict[str, str]:
    """The variables that put a process, and those it starts, on the device."""
    folder = libraries()
    cache = folder.parent
    added = {
        "SOFTWARE_CUDA": "1",
        "SOFTWARE_CUDA_SCHEDULE": schedule,
        "SOFTWARE_CUDA_SEED": str(seed),
        "SOFTWARE_CUDA_CACHE": str(cache),
        "PYTHONPATH": _joined(os.pathsep, str(HERE / "startup"), os.environ.get("PYTHONPATH")),
        "TRITON_LIBCUDA_PATH": str(folder),
        # Of its own: PTX takes the place of cubins in it.
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "PYTEST_PLUGINS": _joined(",", os.environ.get("PYTEST_PLUGINS"), "cuda_device.plugin"),
    }
    added |= {f"SOFTWARE_CUDA_{flag.upper()}": "1" for flag in flags}
    return {"OMP_NUM_THREADS": "1", **os.environ, **added}


def _joined(separator: str, *words: str | None) -> str:
    return separator.join(filter(None, words))


def _unwritable(root: Path, e: OSError) -> BuildError:
    return BuildError(f"cannot write to {root} ({e.strerror}); set SOFTWARE_CUDA_CACHE to a folder")


def _tool(name: str, advice: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise MissingError(f"{name} is not found: {advice}")
    return found


def _site(package: str) -> Path:
    """The folder of a package, which is not imported: torch must find these libraries first."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(f"it needs PyTorch for CUDA 13 and Triton; {package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def wheels() -> tuple[Path, Path]:
    """CUDA's headers, and its runtime, whose names are those that PyTorch asks for."""
    include = _site("triton") / "backends" / "nvidia" / "include"
    for name in ("cuda.h", "cuda_runtime_api.h"):
        if not (include / name).exists():
            raise MissingError(f"this version of Triton brings no {name}")
    real = _site("nvidia") / "cu13" / "lib" / "libcudart.so.13"
    if not real.exists():
        raise MissingError("it needs PyTorch for CUDA 13; nvidia-cuda-runtime 13 is not installed")
    return include, real


def _run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        said = f":\n{done.stderr.strip()}" if done.stderr.strip() else ""
        name = Path(command[0]).name
        raise BuildError(f"{name} fails with status {done.returncode}{said}")
    return done.stdout


def _compile(folder: Path, include: Path, real: Path, compiler: str, nm: str) -> None:
    def library(source: str, name: str, wanted: list[str], exports: str, *extra: str) -> None:
        compiled, stubs, script = (folder / f"{source}.{end}" for end in ("o", "stubs.cpp", "map"))
        _run(compiler, *FLAGS, f"-I{include}", "-c", HERE / source, "-o", compiled)
        have = {line.split()[-1] for line in _run(nm, compiled).splitlines() if " T " in line}
        # What nobody has needed so far says its name when it is called.
        missing = [each for each in wanted if each not in have]
        bodies = (f'int {each}() {{ return device_unsupported("{each}"); }}' for each in missing)
        stubs.write_text(
            'extern "C" {\nint device_unsupported(const char *);\n'
            + "\n".join(["#pragma GCC visibility push(default)", *bodies, "}\n"])
        )
        script.write_text(exports)
        options = [f"-Wl,-soname,{name}", f"-Wl,--version-script={script}", *extra, "-ldl"]
        _run(compiler, "-shared", *FLAGS, compiled, stubs, "-o", folder / name, *options)
        for rest in (compiled, stubs, script):
            rest.unlink()

    rows = [line.split() for line in _run(nm, "-D", "--defined-only", real).splitlines()]
    exported = sorted({r[2].split("@")[0] for r in rows if len(r) == 3 and r[1] in "TW"})
    exported = [name for name in exported if not name.startswith("_") or name.startswith("__cuda")]
    versioned = "libcudart.so.13 { global: cuda*; __cuda*; device_*; local: *; };\n"
    library("runtime.cpp", "libcudart.so.13", exported, versioned, "-lpthread")
    plain = "{ global: cu*; driver_*; local: *; };\n"
    library("driver.cpp", "libcuda.so.1", DRIVER_STUBS, plain, f"-L{folder}", "-l:libcudart.so.13")
