"""Tables from the results: printed, or written where they are shown.

The README and docs/what-it-costs.md have the least favourable figures of all machines: those of the
folder and of each folder in it. Every figure of a machine is in its own `tables.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Document = dict[str, Any]
Row = dict[str, Any]

LARGE = "16 M float32 Gaussian"
CALLS = {
    "gradstat log2": "**`gradstat.statistics(x)`**: all statistics, 2,048 bins",
    "gradstat linear": "**`gradstat.statistics(x, LinearBins(64, -1, 1))`**",
    "torch composite": "torch: aminmax, mean, std, norm, histc, count_nonzero, isfinite",
}
RATIOS = "Times are medians, ratios medians of pairs taken a moment apart."
SCHEMES = ("gradstat log2", "gradstat linear")
HISTOGRAMS = (
    *("fast-histogram", "boost-histogram", "torch.histc", "torch.histogram", "numpy.histogram"),
)
ROOT = Path(__file__).parent.parent


class Machine(NamedTuple):
    """The suites' results on one machine."""

    tensors: Document | None
    lists: Document | None
    training: Document | None


def load(folder: Path, suite: str) -> Document | None:
    path = folder / f"{suite}.json"
    return json.loads(path.read_text()) if path.exists() else None


def find(document: Document, group: str, contestant: str) -> Row:
    for row in document["benchmarks"]:
        if row["group"] == group and row["contestant"] == contestant:
            return dict(row)
    sys.exit(f"no tables: the results lack {contestant} of {group}; run the whole suite")


def group(document: Document, name: str) -> list[Row]:
    return [row for row in document["benchmarks"] if row["group"] == name]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Markdown, all columns but some to the right."""
    lines = [head, ["---" if k in left else "---:" for k in range(len(head))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.{1 if seconds >= 0.01 else 2}f} ms"


def where(document: Document) -> str:
    """The line under a table: machine, versions, commit."""
    machine, versions = document["machine"], document["versions"]
    names = ", ".join(f"{name} {number}" for name, number in versions.items() if name != "gradstat")
    dirty = " with changes" if document["dirty"] else ""
    return (
        f"{machine['threads']} threads of {machine['cpu']}, {machine['system']}; {names}; "
        f"commit {document['commit'][:10]}{dirty}."
    )


def tensor_table(document: Document) -> str:
    """A row for each contestant; the prototype is in `target_table`."""
    rows = []
    for row in sorted(group(document, LARGE), key=lambda row: float(row["median"])):
        name = row["contestant"]
        if name.startswith("prototype"):
            continue
        ratios = [f"{row['ratios'][scheme]:.2g}" if scheme != name else "1" for scheme in SCHEMES]
        speed = f"{row['bytes'] / row['median'] / 1e9:.1f}"
        rows.append([CALLS.get(name, name), duration(row["median"]), speed, *ratios])
    return table(
        ["16 M float32 values", "time", "GB/s", "÷ `Log2Bins`", "÷ `LinearBins(64, -1, 1)`"], rows
    )


def histogram_table(document: Document) -> str:
    """A row for each contestant, a column for each size."""
    rows = [row for row in document["benchmarks"] if row.get("suite") == "histograms"]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    lines = [
        [name, *(duration(find(document, size, name)["median"]) for size in groups)]
        for name in dict.fromkeys(row["contestant"] for row in rows)
    ]
    return table(["counts and edges of", *groups], lines)


def list_table(document: Document) -> str:
    rows = []
    for model in ("MLP", "ResNet-50", "GPT-2 small"):
        ours, theirs = (find(document, model, x) for x in ("gradstat log2", "torch composite"))
        rows.append(
            [
                model,
                f"{ours['tensors']}",
                f"{ours['elements']:,}",
                duration(ours["median"]),
                duration(theirs["median"]),
                f"{theirs['ratios']['gradstat log2']:.1f}",
            ]
        )
    head = ["all gradients of", "tensors", "values", "`gradstat.statistics(list)`"]
    return table([*head, "torch, tensor by tensor", "ratio"], rows)


def training_table(document: Document) -> str:
    rows = document["benchmarks"]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    bare = {n: next(row["bare"] for row in rows if row["network"] == n) for n in networks}
    lines = [["nothing", *(duration(bare[n]) for n in networks)]]
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for n in networks:
            row = next(row for row in rows if (row["network"], row["way"]) == (n, way))
            cells.append(f"+{100 * (row['ratio'] - 1):.1f} %" if row["ratio"] < 2 else _times(row))
        lines.append([way_cell(way), *cells])
    return table(["measured at every step", *(f"{n}, a step" for n in networks)], lines)


def _times(row: Row) -> str:
    return f"{row['ratio']:.1f} times"


def summary_table(machines: Sequence[Machine]) -> str:
    """Four lines; each ratio is the least of all machines, rounded down."""
    tensors = [machine.tensors for machine in machines]
    lists = [machine.lists for machine in machines]
    training = [machine.training for machine in machines]
    log2, linear = ([find(d, LARGE, scheme)["median"] for d in tensors] for scheme in SCHEMES)
    whole = [find(d, "GPT-2 small", "gradstat log2") for d in lists]

    def least(documents: Sequence[Document], name: str, peer: str, scheme: str) -> float:
        return min(float(find(d, name, peer)["ratios"][scheme]) for d in documents)

    fastest = min(HISTOGRAMS, key=lambda peer: least(tensors, LARGE, peer, "gradstat linear"))
    rows = [
        [
            "16 M float32 values, all statistics and their histogram",
            between(log2),
            "torch: aminmax, mean, std, norm, histc, ...",
            times(least(tensors, LARGE, "torch composite", "gradstat log2")),
        ],
        [
            "the same, with 64 linear bins",
            between(linear),
            f"a histogram alone: {fastest}, the fastest of five",
            times(least(tensors, LARGE, fastest, "gradstat linear")),
        ],
        [
            f"all gradients of GPT-2 small, {whole[0]['tensors']} tensors",
            between([row["median"] for row in whole]),
            "the same calls of torch, tensor by tensor",
            times(least(lists, "GPT-2 small", "torch composite", "gradstat log2")),
        ],
        [
            "a training step of a small GPT, all its gradients measured",
            more(trained(training, "small GPT", "gradstat.watch", "ratio")),
            "`wandb.watch`",
            more([min(trained(training, "small GPT", "wandb.watch", "ratio"))]),
        ],
    ]
    head = ["two threads of a CPU", "gradstat", "instead", "takes at least"]
    return table(head, rows, left=(0, 2))


def cost_table(machines: Sequence[Machine]) -> str:
    """What each way of watching adds to a step, from the machine where it is least to the most."""
    documents = [machine.training for machine in machines]
    rows = documents[0]["benchmarks"]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    bare = {n: trained(documents, n, "gradstat.watch", "bare") for n in networks}
    head = [f"{n}, a step of {between(times)}" for n, times in bare.items()]
    lines = [
        [way_cell(way), *(more(trained(documents, n, way, "ratio")) for n in networks)]
        for way in dict.fromkeys(row["way"] for row in rows)
    ]
    return table(["measured at every step", *head], lines)


def trained(documents: Sequence[Document], network: str, way: str, what: str) -> list[float]:
    """A number of each machine on which that was timed."""
    return [
        row[what]
        for document in documents
        for row in document["benchmarks"]
        if (row["network"], row["way"]) == (network, way)
    ]


def between(seconds: Sequence[float]) -> str:
    """The least and the most, in milliseconds of two digits."""
    ends = [f"{float(f'{1e3 * end:.2g}'):g}" for end in (min(seconds), max(seconds))]
    return " to ".join(dict.fromkeys(ends)) + " ms"


def times(ratio: float) -> str:
    """Two digits, rounded down."""
    return f"{math.floor(ratio * 10) / 10 if ratio < 10 else math.floor(ratio):g} times as long"


def more(ratios: Sequence[float]) -> str:
    """How much longer a step takes, from the least to the most."""
    low, high = min(ratios), max(ratios)
    if high >= 2:
        ends = [f"{low:.1f}", f"{high:.1f}"]
        return " to ".join(dict.fromkeys(ends)) + " times"
    ends = [f"{100 * (ratio - 1):.{1 if high < 1.1 else 0}f}" for ratio in (low, high)]
    return "+" + " to ".join(dict.fromkeys(ends)) + " %"


def way_cell(way: str) -> str:
    name, comma, rest = way.partition(",")
    return f"`{name}`{comma}{rest}" if "." in name else way


def target_table(
    tensors: Document | None, lists: Document | None, training: Document | None
) -> str:
    """What was asked for beside what was measured."""
    lines: list[list[str]] = []

    def add(what: str, measured: float, limit: float, at_least: bool = True) -> None:
        reached = measured >= limit if at_least else measured <= limit
        sign = "≥" if at_least else "≤"
        lines.append([what, f"{sign} {limit:g}", f"{measured:.3g}", "yes" if reached else "**no**"])

    if tensors:
        for scheme in SCHEMES:
            for peer, limit in (
                ("torch composite", 24 if scheme == "gradstat log2" else 34),
                ("torch.histc", 8),
                ("boost-histogram", 5),
                (scheme.replace("gradstat", "prototype"), 0.95),
            ):
                if not any(row["contestant"] == peer for row in group(tensors, LARGE)):
                    continue  # the prototype is not everywhere
                ratio = find(tensors, LARGE, peer)["ratios"][scheme]
                add(f"16 M float32, {scheme}: {peer} takes times as long", ratio, limit)
            ratio = find(tensors, LARGE, "plain read (torch.sum)")["ratios"][scheme]
            add(
                f"16 M float32, {scheme}: share of the plain read's bandwidth",
                ratio,
                0.4 if scheme == "gradstat log2" else 0.45,
            )
        for scheme in SCHEMES:
            row = find(tensors, "16 M bfloat16 Gaussian", scheme)
            add(
                f"16 M bfloat16, {scheme}: values a second, of float32",
                1 / row["ratios"][LARGE],
                0.9,
            )
            for name, limit in (("lognormal", 1.6), ("zeros", 1.6), ("one bin", 1.0)):
                row = find(tensors, f"16 M float32 {name}", scheme)
                add(
                    f"16 M float32 {name}, {scheme}: time, of Gaussian",
                    row["ratios"][LARGE],
                    limit,
                    False,
                )
        for row in tensors["benchmarks"]:
            if "peak_bytes" in row:
                what = f"memory beside 64 M float32, {row['contestant']}: MB"
                add(what, row["peak_bytes"] / (1 << 20), 1, False)
    if lists:
        for scheme in SCHEMES:
            row = find(lists, "MLP", scheme)
            add(f"the MLP's four gradients, {scheme}: µs", 1e6 * row["median"], 25, False)
            ratio = find(lists, "MLP", "torch composite")["ratios"][scheme]
            add(f"the MLP's four gradients, {scheme}: composite takes times as long", ratio, 15)
            ratio = find(lists, "GPT-2 small", scheme)["ratios"]["one tensor"]
            add(
                f"GPT-2 small's list, {scheme}: time, of as many bytes in one tensor",
                ratio,
                1.15,
                False,
            )
    if training:
        for network, limit in (("MLP", 1.12), ("small GPT", 1.015)):
            for row in training["benchmarks"]:
                if row["network"] == network and row["way"] == "gradstat.watch":
                    add(
                        f"{network} with gradstat.watch: time, of the bare loop",
                        row["ratio"],
                        limit,
                        False,
                    )
    return table(["target", "asked", "measured", "reached"], lines)


def replace(text: str, marker: str, content: str) -> str:
    """Put content between ``<!-- marker -->`` and ``<!-- /marker -->``."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        sys.exit(f"the page needs one line {start} and, after it, one line {end}; none written")
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"


def read(folder: Path) -> Machine:
    return Machine(*(load(folder, suite) for suite in Machine._fields))


def tables(machine: Machine) -> str:
    """Every figure that people look for, of one machine."""
    parts = []
    if machine.tensors and machine.lists:
        parts += [tensor_table(machine.tensors), list_table(machine.lists)]
        parts.append(f"{where(machine.tensors)} {RATIOS}")
    if machine.training:
        parts += [training_table(machine.training), f"{where(machine.training)} {RATIOS}"]
    return "\n\n".join(parts)


def pages(folder: Path) -> dict[Path, str]:
    """Whole texts of the pages that have figures, by their place."""
    machines = {folder: read(folder)}
    machines |= {path.parent: read(path.parent) for path in sorted(folder.glob("*/training.json"))}
    texts = {
        place / "tables.md": f"# Time on one machine\n\n{tables(machine)}\n"
        for place, machine in machines.items()
    }
    every = list(machines.values())
    from_where = "\n".join(f"- {where(machine.training)}" for machine in every)
    below = f"From the one machine to the other:\n\n{from_where}\n\n{RATIOS}"
    assert len(every) == 2, "the sentence below the tables counts the machines"
    for page, marker, content in (
        (ROOT / "README.md", "bench:summary", summary_table(every)),
        (ROOT / "docs" / "what-it-costs.md", "bench:training", f"{cost_table(every)}\n\n{below}"),
    ):
        texts[page] = replace(page.read_text(), marker, content)
    tensors, lists, training = machines[folder]
    texts[folder / "targets.md"] = (
        f"# What was asked for, and what was measured\n\n{target_table(tensors, lists, training)}\n"
    )
    if tensors:
        texts[folder / "histograms.md"] = (
            f"# Counts and edges of one tensor\n\n{histogram_table(tensors)}\n\n{where(tensors)}\n"
        )
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the JSON files are")
    parser.add_argument(
        "--pages",
        action="store_true",
        help="write the pages that show results, and those beside them",
    )
    arguments = parser.parse_args()
    machine = read(arguments.folder)
    print(tables(machine))
    if machine.tensors:
        print(f"\n{histogram_table(machine.tensors)}\n\n{where(machine.tensors)}")
    print(f"\n{target_table(*machine)}")
    if arguments.pages:
        for path, text in pages(arguments.folder).items():
            path.write_text(text)


if __name__ == "__main__":
    main()
