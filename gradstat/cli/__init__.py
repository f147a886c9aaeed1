"""The command ``gradstat``: what a run's record says, without writing a script.

A command is a function that adds its arguments to a parser, and one that runs; `COMMANDS` lists
them, and `TARGETS` what ``gradstat export`` writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, TypeAlias

from gradstat.choices import one_of
from gradstat.cli import serve
from gradstat.escaping import escaped
from gradstat.thresholds import Thresholds
from gradstat.version import __version__

# Whatever imports PyTorch, which takes a second or two, is imported by the command that needs it.
if TYPE_CHECKING:
    from gradstat.diagnosis import Finding
    from gradstat.history import History

Progress: TypeAlias = Callable[[int], object]
Tags: TypeAlias = Literal["layer", "kind"]
Target: TypeAlias = Callable[..., Path]

SEVERE, FAILED = 1, 2  # exit codes


@dataclass(frozen=True)
class Command:
    """A subcommand: its line in the help, its arguments, and what it does."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Parses arguments, and shows what a wrong one holds without obeying it."""

    def error(self, message: str) -> NoReturn:
        super().error(escaped(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; by default those of the process.

    Returns:
        0; 1 when ``diagnose`` finds something severe; 2 when a command cannot be carried out, with
        a line on stderr that says why; 130 when Ctrl-C ended it.

    Raises:
        SystemExit: arguments that are no command, or ``--help``.
    """
    options = _parser().parse_args(argv)
    before, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads has read enough, as in `gradstat diagnose RUN | head`.
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
    return code


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning without the line of code that gives it."""
    return f"gradstat: warning: {escaped(message)}\n"


def _fail(options: argparse.Namespace, why: object) -> int:
    print(f"gradstat {options.command}: error: {escaped(why)}", file=sys.stderr)
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gradstat",
        description="Read the gradient statistics of a training run.",
        epilog="RUN is a file that History.save() wrote, or a directory that watch(path=...) "
        "writes. Exit codes: 0; 1 when diagnose finds something severe; 2 for an error.",
    )
    parser.add_argument("--version", action="version", version=f"gradstat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.help, description=command.help)
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser


def _add_run(parser: argparse.ArgumentParser, name: str = "run_path") -> None:
    parser.add_argument(
        name,
        metavar="RUN",
        type=Path,
        help="file that History.save() wrote, or directory that watch(path=...) writes",
    )


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_path", metavar="RUN", type=Path, nargs="?", help="instead: what this run has logged"
    )


def _info(options: argparse.Namespace) -> int:
    from gradstat.cli.environment import info

    if options.run_path is None:
        print(info())
        return 0
    from gradstat.cli import text
    from gradstat.cli.runs import load

    history = load(options.run_path)
    print(text.heading(str(options.run_path), history))
    print(f"\n{text.scalars(history)}")
    return 0


def _add_diagnose(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--all", action="store_true", help="also where many layers show the same")
    parser.add_argument("--json", action="store_true", help="print the findings as a JSON list")
    names = ", ".join(field.name for field in dataclasses.fields(Thresholds))
    parser.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=_threshold,
        help=f"another threshold; may be repeated. Names: {names}",
    )


def _threshold(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    names = [field.name for field in dataclasses.fields(Thresholds)]
    if name not in names:
        raise argparse.ArgumentTypeError(
            f"needs NAME=VALUE with a name, {one_of(name, names)}; got {text!r}"
        )
    try:
        return name, int(value) if name == "window" else float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"needs a number; got {text!r}") from error


def _diagnose(options: argparse.Namespace) -> int:
    from gradstat.cli import text
    from gradstat.cli.runs import load

    history = load(options.run_path)
    findings = history.diagnose(Thresholds(**dict(options.threshold)))
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print(text.heading(str(options.run_path), history))
        print(text.findings(findings, most=None if options.all else 3))
    return SEVERE if _any_severe(findings) else 0


def _add_formats(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--snr",
        type=float,
        default=Thresholds().format_snr,
        metavar="DB",
        help="signal-to-noise ratio to keep, by default %(default)g dB",
    )
    parser.add_argument("--all", action="store_true", help="every layer of a deep network")
    parser.add_argument(
        "--scales", action="store_true", help="exponents of the smallest and the largest scale too"
    )


def _formats(options: argparse.Namespace) -> int:
    from gradstat.cli import narrow_formats, text
    from gradstat.cli.runs import load

    thresholds = Thresholds(format_snr=options.snr)
    history = load(options.run_path)
    if not history.formats:
        raise ValueError(
            f"formats needs a run of watch(formats=...); {options.run_path} has measured none"
        )
    print(text.heading(str(options.run_path), history))
    shown = narrow_formats.formats(
        history, thresholds, every_layer=options.all, scales=options.scales
    )
    print(shown)
    return 0


def _any_severe(findings: Sequence[Finding]) -> bool:
    return any(finding.severity == "severe" for finding in findings)


def _parquet(history: History, folder: Path, name: str, progress: Progress) -> Path:
    from gradstat import tables

    tables.to_parquet(history, folder / f"{name}.parquet", progress=progress)
    return folder / f"{name}.parquet"


def _csv(history: History, folder: Path, name: str, progress: Progress) -> Path:
    from gradstat import tables

    tables.to_csv(history, folder / f"{name}.csv", progress=progress)
    return folder / f"{name}.csv"


def _tensorboard(
    history: History, folder: Path, name: str, progress: Progress, tags: Tags = "layer"
) -> Path:
    from gradstat.integrations import tensorboard

    # Every point would be there twice.
    if list((folder / name).glob("events.out.tfevents.*")):
        raise ValueError(f"{folder / name} holds event files already")
    tensorboard.write(history, folder / name, tags=tags, progress=progress)
    return folder / name


def _wandb(
    history: History, folder: Path, name: str, progress: Progress, tags: Tags = "layer"
) -> Path:
    from gradstat.integrations import wandb

    return wandb.write(history, folder, name, tags=tags, progress=progress)


# Each is given the history, the directory, the run's name and what to call with the number of
# records that are done, and returns what it wrote.
TARGETS: dict[str, Target] = {
    "parquet": _parquet,
    "csv": _csv,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--to", required=True, choices=list(TARGETS), help="what to write; wandb: an offline run"
    )
    parser.add_argument(
        "--tags",
        choices=["layer", "kind"],
        help="of tensorboard and wandb: kind names them as wandb.watch, gradients/LAYER",
    )
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="where to; made if it is not there"
    )


def _export(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from gradstat.cli.runs import check_output, load, run_name

    write = TARGETS[options.to]
    if options.tags is not None:
        if options.to not in ("tensorboard", "wandb"):
            raise ValueError(f"--tags needs --to tensorboard or wandb; --to is {options.to}")
        write = functools.partial(write, tags=options.tags)
    name = run_name(options.run_path)
    check_output(options.run_path, options.directory / f"{name}.{options.to}")
    history = load(options.run_path)
    options.directory.mkdir(parents=True, exist_ok=True)
    # Silent where stderr is not a terminal.
    with tqdm(total=len(history), desc=options.to, unit="record", disable=None) as bar:
        written = write(history, options.directory, name, bar.update)
    print(escaped(written))
    return 0


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="the page; by default RUN's name and .html",
    )


def _report(options: argparse.Namespace) -> int:
    from gradstat.cli.runs import check_output, load, run_name

    name = run_name(options.run_path)
    path = options.output or Path(f"{name}.html")
    check_output(options.run_path, path)
    load(options.run_path).report(path, title=name)
    print(escaped(path))
    return 0


def _add_compare(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    _add_run(parser, "other")
    parser.add_argument("--all", action="store_true", help="every layer of a deep network")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="also draw the curves of both into a PNG"
    )


def _compare(options: argparse.Namespace) -> int:
    from gradstat.cli import comparison
    from gradstat.cli.runs import check_output, load, run_name

    paths = (options.run_path, options.other)
    names = [run_name(path) for path in paths]
    if names[0] == names[1]:
        names = [str(path) for path in paths]
    if names[0] == names[1]:
        raise ValueError(f"compare needs two runs; both are {names[0]}")
    if options.output:
        for path in paths:
            check_output(path, options.output)
    runs = {name: load(path) for name, path in zip(names, paths, strict=True)}
    print(comparison.compare(runs, every_layer=options.all))
    if options.output:
        comparison.draw(runs, options.output)
        print(f"\n{escaped(options.output)}")
    return 0


def _add_tail(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks")
    parser.add_argument("--updates", type=int, help="stop after so many tables")


def _tail(options: argparse.Namespace) -> int:
    if not options.interval > 0:
        raise ValueError(f"--interval needs a number of seconds above 0; it is {options.interval}")
    from gradstat.cli import newest

    try:
        newest.tail(options.run_path, options.interval, options.updates)
    except KeyboardInterrupt:
        print()
    return 0


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_paths",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="directory that all ranks of a run write, or what each of them wrote",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", type=Path, help="the .npz file to write"
    )
    parser.add_argument(
        "--not-replicated",
        action="store_true",
        help="count what each rank has as its own, but for replicas on one mesh",
    )


def _merge(options: argparse.Namespace) -> int:
    from gradstat.cli import text
    from gradstat.cli.runs import check_output, load
    from gradstat.history import History

    paths: list[Path] = options.run_paths
    for path in paths:
        check_output(path, options.output)
    if options.not_replicated:
        history = History.merge(paths, replicated=False)
    else:
        history = load(paths[0]) if len(paths) == 1 else History.merge(paths)
    if not len(history):
        raise ValueError("merge needs ranks with a step in common; they have none")
    history.save(options.output)
    print(text.heading(str(options.output), history))
    return 0


COMMANDS = {
    "info": Command(
        "show versions, engines, and what will run where; or what a run has logged",
        _add_info,
        _info,
    ),
    "diagnose": Command(
        "say what is wrong with a run's gradients; exit code 1 for something severe",
        _add_diagnose,
        _diagnose,
    ),
    "formats": Command(
        "say what narrow number formats would do to each layer, and which one fits",
        _add_formats,
        _formats,
    ),
    "export": Command("write a run for other programs", _add_export, _export),
    "report": Command("write a run as an HTML page to look around in", _add_report, _report),
    "compare": Command("compare two runs layer by layer", _add_compare, _compare),
    "merge": Command("put what the ranks of a run wrote into one file", _add_merge, _merge),
    "tail": Command(
        "show a run's newest record as it is written, and wait for the next", _add_tail, _tail
    ),
    "serve": Command(
        "show the report page of runs in a browser of this machine, while they are written",
        serve.add_arguments,
        serve.run,
    ),
}
