"""The command ``gradstat``: what a run's record says, without writing a script."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import io
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from gradstat.thresholds import Thresholds
from gradstat.util import ENGINE_VARIABLE, __version__, escaped, one_of

# Each is a function. Its module is imported when it is asked for: PyTorch takes a second or two.
COMMANDS = ("info", "diagnose", "formats", "compare", "tail", "serve", "export", "report", "merge")
_HOMES = {"info": "gradstat.cli", "serve": "gradstat.cli.server"}  # `info` needs no PyTorch
_TARGETS = ("parquet", "csv", "tensorboard", "wandb")  # of export
_RUN = "file that History.save() wrote, or directory that watch(path=...) writes"
_EVERY_LAYER = "every layer of a deep network"
_THRESHOLDS = [field.name for field in dataclasses.fields(Thresholds)]
_FAILED = 2  # exit code
_LAST_PORT = 65_535
_PACKAGES = ("torch", "triton", "numba", "numpy", "matplotlib", "pandas", "pyarrow")
# Devices of the drivers of NVIDIA, of Windows under WSL, of Jetson, and of AMD.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap", "/dev/kfd")

_Add: TypeAlias = Callable[..., argparse.ArgumentParser]


class _Parser(argparse.ArgumentParser):
    """Parses arguments, and shows what a wrong one holds without obeying it."""

    def error(self, message: str) -> NoReturn:
        super().error(escaped(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0; 1 when ``diagnose`` finds something severe; 2 for an error; 130: Ctrl-C."""
    options = _parser().parse_args(argv)
    before, warnings.formatwarning = warnings.formatwarning, _one_line
    out, errors = sys.stdout, sys.stdout.errors
    try:
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="backslashreplace")  # as stderr: a terminal may know ASCII alone
        home = importlib.import_module(_HOMES.get(options.command, "gradstat.cli.commands"))
        code: int = getattr(home, options.command)(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has read enough, as in `gradstat diagnose RUN | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _fail(options, f"{error.strerror}: {error.filename}" if error.filename else error)
    except (ImportError, ValueError) as error:
        return _fail(options, error)
    finally:
        warnings.formatwarning = before
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors=errors)
    return code


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning without the line of code that gives it."""
    return f"gradstat: warning: {escaped(message)}\n"


def _fail(options: argparse.Namespace, why: object) -> int:
    print(f"gradstat {options.command}: error: {escaped(why)}", file=sys.stderr)
    return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gradstat",
        description="Read the gradient statistics of a training run.",
        epilog="RUN is a file that History.save() wrote, or a directory that watch(path=...) "
        "writes. Exit codes: 0; 1 when diagnose finds something severe; 2 for an error.",
    )
    parser.add_argument("--version", action="version", version=f"gradstat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, what: str, of: str = _RUN, n: str | None = None) -> argparse.ArgumentParser:
        """A command of one run, or of so many."""
        command = commands.add_parser(name, help=what, description=what)
        runs = "run_paths" if n == "+" else "run_path"
        command.add_argument(runs, metavar="RUN", type=Path, nargs=n, help=of)
        return command

    _add_printing(add)
    _add_writing(add)
    return parser


def _add_printing(add: _Add) -> None:
    what = "show versions, engines, and what will run where; or what a run has logged"
    add("info", what, "instead: what this run has logged", "?")
    diagnose = add(
        "diagnose", "say what is wrong with a run's gradients; exit code 1 for something severe"
    )
    diagnose.add_argument("--all", action="store_true", help="also where many layers show the same")
    diagnose.add_argument("--json", action="store_true", help="print the findings as a JSON list")
    diagnose.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=_threshold,
        help=f"another threshold; may be repeated. Names: {', '.join(_THRESHOLDS)}",
    )
    formats = add(
        "formats", "say what narrow number formats would do to each layer, and which one fits"
    )
    formats.add_argument(
        "--snr",
        type=float,
        default=Thresholds().format_snr,
        metavar="DB",
        help="signal-to-noise ratio to keep, by default %(default)g dB",
    )
    formats.add_argument("--all", action="store_true", help=_EVERY_LAYER)
    formats.add_argument(
        "--scales", action="store_true", help="exponents of the smallest and the largest scale too"
    )
    compare = add("compare", "compare two runs layer by layer")
    compare.add_argument("other", metavar="RUN", type=Path, help=_RUN)
    compare.add_argument("--all", action="store_true", help=_EVERY_LAYER)
    _add_output(compare, "also draw the curves of both into a PNG")
    tail = add("tail", "show a run's newest record as it is written, and wait for the next")
    tail.add_argument("--interval", type=float, default=1.0, help="seconds between two looks")
    tail.add_argument("--updates", type=int, help="stop after so many tables")
    serve = add(
        "serve",
        "show the report page of runs in a browser of this machine, while they are written",
        "what watch(path=...) writes or will write, a file that History.save() wrote, or a "
        "directory of such runs",
        "+",
    )
    what = "to listen on; by default any that is free"
    serve.add_argument("--port", type=_port, default=0, help=what)


def _add_writing(add: _Add) -> None:
    export = add("export", "write a run for other programs")
    what = "what to write; wandb: an offline run"
    export.add_argument("--to", required=True, choices=_TARGETS, help=what)
    export.add_argument(
        "--tags",
        choices=["layer", "kind"],
        help="of tensorboard and wandb: kind names them as wandb.watch, gradients/LAYER",
    )
    export.add_argument(
        "directory", metavar="DIR", type=Path, help="where to; made if it is not there"
    )
    report = add("report", "write a run as an HTML page to look around in")
    _add_output(report, "the page; by default RUN's name and .html")
    what = "directory that all ranks of a run write, or what each of them wrote"
    merge = add("merge", "put what the ranks of a run wrote into one file", what, "+")
    _add_output(merge, "the .npz file to write", required=True)
    what = "count what each rank has as its own, but for replicas on one mesh"
    merge.add_argument("--not-replicated", action="store_true", help=what)


def _add_output(parser: argparse.ArgumentParser, what: str, *, required: bool = False) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help=what, required=required)


def _threshold(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in _THRESHOLDS:
        raise argparse.ArgumentTypeError(
            f"needs NAME=VALUE with a name, {one_of(name, _THRESHOLDS)}; got {text!r}"
        )
    try:
        return name, int(value) if name == "window" else float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"needs a number; got {text!r}") from error


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _LAST_PORT):
        raise argparse.ArgumentTypeError(f"needs a number from 0 to {_LAST_PORT}; got {text!r}")
    return int(text)


def info(options: argparse.Namespace) -> int:
    if options.run_path is None:
        print(environment())
        return 0
    from gradstat.cli import commands

    history = commands.load(options.run_path)
    print(f"{commands.heading(str(options.run_path), history)}\n\n{commands.logged(history)}")
    return 0


def environment() -> str:
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
