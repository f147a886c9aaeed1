"""What each command does but ``serve``: those that print, and those that write files."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from tqdm import tqdm

from gradstat import tables
from gradstat.diagnosis import Finding
from gradstat.diagnosis.evidence import Evidence
from gradstat.diagnosis.findings import paragraph
from gradstat.diagnosis.narrow_formats import FormatFit, layer_fits, recommendation
from gradstat.history import History, check_history, first_rows
from gradstat.history.follow import Follower
from gradstat.history.ranks import stats_of
from gradstat.record import GRAD, NOUNS, PARAM, UNIT, UPDATE
from gradstat.thresholds import Thresholds
from gradstat.util import (
    Array,
    aligned,
    escaped,
    evenly_spread,
    json_text,
    median,
    plural,
    replacing,
)

Item = TypeVar("Item")

_SEVERE = 1  # exit code of diagnose
_MOST_LAYERS = 24  # lines of a table
_MOST_LINES = 10  # layers that a figure's key has room for
_BAR = 12  # characters
_LATE = 20  # values whose median says where a series is now
_DAY_S = 86_400
_NEWEST = ("rms", "abs_max", "numel", "finite", "zeros")  # fields that tail shows


def load(path: Path) -> History:
    history = History.load(path)
    if not len(history):
        raise ValueError(f"{path} has no records yet")
    return history


def check_output(run: Path, output: Path) -> None:
    """Refuse to write over a run that is read."""
    files = [run, *stats_of(run)]
    if output.exists() and any(file.exists() and output.samefile(file) for file in files):
        raise ValueError(f"{output} is the run itself, or a file of it; write to another one")


def run_name(path: Path) -> str:
    """Name of a run: that of its file without the suffix, or of its directory."""
    # `Path.resolve` raises a RuntimeError where links go in a circle.
    path = Path(os.path.realpath(path))
    return path.stem if path.is_file() or path.suffix == ".npz" else path.name


def diagnose(options: argparse.Namespace) -> int:
    history = load(options.run_path)
    found = history.diagnose(Thresholds(**dict(options.threshold)))
    if options.json:
        print(json_text([dataclasses.asdict(finding) for finding in found], indent=1))
    else:
        print(heading(str(options.run_path), history))
        print(findings(found, most=None if options.all else 3))
    return _SEVERE if any(each.severity == "severe" for each in found) else 0


def formats(options: argparse.Namespace) -> int:
    thresholds = Thresholds(format_snr=options.snr)
    history = load(options.run_path)
    if not history.formats:
        raise ValueError(
            f"formats needs a run of watch(formats=...); {options.run_path} has measured none"
        )
    print(heading(str(options.run_path), history))
    layers = layer_fits(Evidence(history, thresholds.window))
    if not layers:
        print("\nno layer has values")
        return 0
    lines = []
    for kind in dict.fromkeys(each.row.kind for each in layers):
        of_kind = sorted((x for x in layers if x.row.kind == kind), key=lambda x: x.worst)
        shown = of_kind if options.all else of_kind[:_MOST_LAYERS]
        rows: list[tuple[str, ...]] = [(NOUNS[kind], "narrowest", *history.formats)]
        for each in shown:
            cells = [_fit(fit, scales=options.scales) for fit in each.fits.values()]
            rows.append((escaped(each.row.name), each.narrowest(thresholds) or "none", *cells))
        lines += ["", *aligned(rows)]
        if len(of_kind) > len(shown):
            lines.append(f"and {len(of_kind) - len(shown)} better ones (--all shows them)")
    if n_left_out := sum(row.kind != UNIT for row in history.rows) - len(layers):
        lines += ["", f"{plural(n_left_out, 'layer')} without values other than zero left out"]
    sentence = escaped(recommendation(layers, history.formats, thresholds))
    print("\n".join([*lines, "", textwrap.fill(sentence, _width())]))
    return 0


def _fit(fit: FormatFit, *, scales: bool) -> str:
    """SNR, and what share is lost if any is."""
    text = "exact" if fit.snr == math.inf else f"{round(fit.snr, 1) + 0.0:.1f} dB"
    for share, what in ((fit.underflow, "to 0"), (fit.saturated, "saturated")):
        if share:
            text += f", {f'{share:.0%}' if share >= 0.005 else '<1%'} {what}"
    least, most = fit.scales
    if scales and not math.isnan(least):
        text += f", 2^{least:.0f}..{most:.0f}"
    return text


def compare(options: argparse.Namespace) -> int:
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
    print(comparison(runs, every_layer=options.all))
    if options.output:
        draw(runs, options.output)
        print(f"\n{escaped(options.output)}")
    return 0


def comparison(runs: Mapping[str, History], *, every_layer: bool = False) -> str:
    """Two runs layer by layer: rms of each, their ratio, first over last layer, and findings."""
    for history in runs.values():
        check_history("compare", history)
    one, other = runs
    typical = {name: _typical(history) for name, history in _alike(runs).items()}
    layers = list(dict.fromkeys(layer for values in typical.values() for layer in values))
    shown = layers if every_layer else _some(layers, _MOST_LAYERS)
    bars = _bars([x for values in typical.values() for x in values.values()])
    rows: list[tuple[str, ...]] = [("rms, median of all records", "A", "", "B", "", "B / A")]
    for layer in shown:
        a, b = (typical[name].get(layer, math.nan) for name in (one, other))
        of_a, of_b = (bars.get(x, "") for x in (a, b))
        rows.append((escaped(layer), _number(a), of_a, _number(b), of_b, _ratio(b, a)))
    present = [[rms for rms in values.values() if rms > 0] for values in typical.values()]
    shares = [_ratio(each[0], each[-1]) if each else "-" for each in present]
    rows.append(("first layer / last layer", shares[0], "", shares[1], "", ""))
    rows += _derived(list(runs.values()))
    a_series, b_series = (_series_of(history) for history in runs.values())
    for series in a_series:
        if series in b_series:
            a, b = _late(a_series[series]), _late(b_series[series])
            what = f"{escaped(series)}, lately"
            rows.append((what, f"{a:.4g}", "", f"{b:.4g}", "", _ratio(b, a)))
    lines = [f"A  {heading(one, runs[one])}", f"B  {heading(other, runs[other])}", ""]
    lines += aligned(rows)
    if not set(typical[one]) & set(typical[other]):
        lines.append("A and B have no layer in common")
    if len(shown) < len(layers):
        lines.append(f"{len(layers) - len(shown)} layers between them are left out (--all)")
    for name, history in runs.items():
        lines += ["", f"{'A' if name == one else 'B'}  {escaped(name)}:"]
        lines.append(findings(_worse_than_notes(history), most=2, indent="   "))
    return "\n".join(lines)


def _alike(runs: Mapping[str, History]) -> dict[str, History]:
    """Of each run the rows of the first kind that all of them have, or all of its rows."""
    kinds = next(iter(runs.values())).kinds
    common = [kind for kind in kinds if all(kind in history.kinds for history in runs.values())]
    return {name: each.select(common[0]) if common else each for name, each in runs.items()}


def _typical(history: History) -> dict[str, float]:
    """Median rms of each layer of the first kind over all records."""
    typical = dict(zip(history.layers, median(history["rms"]).tolist(), strict=True))
    return {row: typical[row] for row in first_rows(history)}


def _derived(runs: Sequence[History]) -> list[tuple[str, ...]]:
    """Lines on two runs' updates and units, medians over all records, where both have them."""
    rows: list[tuple[str, ...]] = []
    if all({UPDATE, PARAM} <= set(run.kinds) for run in runs):
        a, b = (float(median(median(run.update_ratio()))) for run in runs)
        rows.append(("update / parameter, median", _number(a), "", _number(b), "", _ratio(b, a)))
    if all(UNIT in run.kinds for run in runs):
        a, b = (float(np.fmax.reduce(median(run.dead_units()))) for run in runs)
        rows.append(("dead units, most in a layer", _percent(a), "", _percent(b), "", ""))
    return rows


def draw(runs: Mapping[str, History], path: Path) -> None:
    """Draw mean |gradient| of some of the layers of several runs into a file."""
    from gradstat import plot

    runs = _alike(runs)
    layers = list(dict.fromkeys(row for history in runs.values() for row in first_rows(history)))
    average = max(1, max(len(history) for history in runs.values()) // 100)
    shown = _some(layers, _MOST_LINES)
    figure = plot.curves(runs, split="history", layers=shown, average=average)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:] or "png")


def tail(options: argparse.Namespace) -> int:
    if not 0 < options.interval <= _DAY_S:
        raise ValueError(
            f"--interval needs a number of seconds above 0, a day at most; it is {options.interval}"
        )
    try:
        follow(options.run_path, options.interval, options.updates)
    except KeyboardInterrupt:
        print()
    return 0


def follow(path: Path, interval_s: float, updates: int | None = None) -> None:
    """Print the newest record whenever there is another one, so often or until interrupted."""
    # Waits for a run that is not there yet. Reads only what was written last to a directory,
    # however long the run is.
    follower = Follower(path, newest=True)
    printed, told = 0, ""
    while updates is None or printed < updates:
        found = None
        while (look := follower.look()) is not None and not look.is_all:
            found = look.records or found
        if found:
            clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else "\n" if printed else ""
            print(clear + newest(str(path), History.from_records(found)), flush=True)
            printed += 1
            continue
        what = "is not there yet" if look is None else "has no records yet"
        if not printed and what != told:
            print(f"{escaped(path)} {what}", flush=True)
            told = what
        time.sleep(interval_s)


def newest(name: str, history: History) -> str:
    """The newest record as a table of the layers of the first kind, and the worst findings."""
    numbers = {name: history[name][-1].tolist() for name in _NEWEST}
    rms = numbers["rms"]
    shown = [history.layers.index(row) for row in first_rows(history)]
    bars = _bars([rms[at] for at in shown])
    rows = [("layer", "rms", "", "largest", "zeros", "NaN, infinite")]
    for at in shown:
        numel, finite, zeros = (numbers[name][at] for name in ("numel", "finite", "zeros"))
        rows.append(
            (
                escaped(history.layers[at]),
                _number(rms[at]),
                bars.get(rms[at], ""),
                _number(numbers["abs_max"][at]),
                _percent(zeros / finite if finite else math.nan),
                str(numel - finite) if numel else f"no {NOUNS[history.kinds[0]]}",
            )
        )
    lines = [f"{escaped(name)}: step {history.steps[-1]}", ""]
    lines += aligned([rows[0], *_some(rows[1:], _MOST_LAYERS)])
    return "\n".join([*lines, "", findings(_worse_than_notes(history), most=2)])


def export(options: argparse.Namespace) -> int:
    if options.tags is not None and options.to not in ("tensorboard", "wandb"):
        raise ValueError(f"--tags needs --to tensorboard or wandb; --to is {options.to}")
    name, to = run_name(options.run_path), options.to
    tags: Literal["layer", "kind"] = options.tags or "layer"
    path = options.directory / f"{name}.{to}"
    check_output(options.run_path, path)
    history = load(options.run_path)
    options.directory.mkdir(parents=True, exist_ok=True)
    # Silent where stderr is not a terminal.
    with tqdm(total=len(history), desc=to, unit="record", disable=None) as bar:
        if to == "parquet":
            tables.to_parquet(history, path, progress=bar.update)
        elif to == "csv":
            tables.to_csv(history, path, progress=bar.update)
        elif to == "tensorboard":
            from gradstat.integrations import tensorboard

            path = options.directory / name
            # Every point would be there twice.
            if list(path.glob("events.out.tfevents.*")):
                raise ValueError(f"{path} holds event files already")
            tensorboard.write(history, path, tags=tags, progress=bar.update)
        else:
            from gradstat.integrations import wandb

            path = wandb.write(history, options.directory, name, tags=tags, progress=bar.update)
    print(escaped(path))
    return 0


def report(options: argparse.Namespace) -> int:
    name = run_name(options.run_path)
    path = options.output or Path(f"{name}.html")
    check_output(options.run_path, path)
    load(options.run_path).report(path, title=name)
    print(escaped(path))
    return 0


def merge(options: argparse.Namespace) -> int:
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
    print(heading(str(options.output), history))
    return 0


def logged(history: History) -> str:
    """What was logged, and the norm of the whole gradient: a line for each."""
    rows: list[tuple[str, ...]] = [("", "values", "first", "lately", "least", "most")]
    for name, values in _series_of(history).items():
        known = np.where(np.isfinite(values), values, math.nan)
        ends = np.fmin.reduce(known), np.fmax.reduce(known)
        numbers = [f"{x:.4g}" for x in (values[0], _late(values), *ends)]
        rows.append((escaped(name), str(len(values)), *numbers))
    return "\n".join(aligned(rows))


def heading(name: str, history: History) -> str:
    """A run in one line: its layers are those of its first kind."""
    steps = history.steps
    kinds = ", ".join(dict.fromkeys(history.kinds))
    layers = plural(len(first_rows(history)), "layer")
    layers += f" ({escaped(kinds)})" if kinds != GRAD else ""
    return (
        f"{escaped(name)}: {plural(len(history), 'record')} of {layers}, "
        f"steps {steps[0]} to {steps[-1]}, {history.bins}"
    )


def findings(found: Sequence[Finding], most: int | None = 3, indent: str = "") -> str:
    """Findings, a paragraph each: so many of each kind and severity, or all with every layer."""
    lines = []
    shown: Counter[tuple[str, str]] = Counter()
    total = Counter((each.severity, each.kind) for each in found)
    for each in found:
        group = each.severity, each.kind
        shown[group] += 1
        if most is None or shown[group] <= most:
            text = str(each)
            if each.others and most is None:
                text += f" They are {', '.join(each.others)}."
            lines.append(paragraph(text, _width()))
        elif shown[group] == total[group]:
            lines.append(f"  and {total[group] - most} more like it (--all shows them)")
    return textwrap.indent("\n".join(lines) or "nothing found", indent)


def _worse_than_notes(history: History) -> list[Finding]:
    return [each for each in history.diagnose() if each.severity != "note"]


def _series_of(history: History) -> dict[str, Array]:
    """Values of each scalar, and the norm of the records' first kind."""
    series = {name: history.scalar(name)[1] for name in history.scalars}
    kind = history.kinds[0]
    return series | {f"{NOUNS[kind]} norm": history.norm(kind)}


def _late(values: Array) -> float:
    """Median of the newest values, which says where a series is now."""
    return float(median(values[-_LATE:]))


def _some(items: Sequence[Item], most: int) -> list[Item]:
    return [items[i] for i in evenly_spread(len(items), most)]


def _bars(values: Sequence[float]) -> dict[float, str]:
    """A bar for each value above 0, on a log scale from the smallest, one character long."""
    # Differences, since a quotient of float64 may overflow.
    logs = {x: math.log(x) for x in values if x > 0 and math.isfinite(x)}
    low = min(logs.values(), default=0.0)
    span = max(logs.values(), default=0.0) - low
    shares = {x: (y - low) / span if span else 1.0 for x, y in logs.items()}
    return {x: "#" * (1 + round(share * (_BAR - 1))) for x, share in shares.items()}


def _number(value: float) -> str:
    """A magnitude: two digits and its exponent; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.1e}" if value else "0"


def _ratio(value: float, by: float) -> str:
    return f"{value / by:.2g}" if by > 0 and not math.isnan(value) else "-"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def _width() -> int:
    return max(60, min(shutil.get_terminal_size().columns, 100))
