"""Tables from the results: printed, or written into the README between its markers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, all columns but the first to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
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
        name, comma, rest = way.partition(",")
        lines.append([f"`{name}`{comma}{rest}" if "." in name else way, *cells])
    return table(["measured at every step", *(f"{n}, a step" for n in networks)], lines)


def _times(row: Row) -> str:
    return f"{row['ratio']:.1f} times"


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
        sys.exit(f"the README needs one line {start} and, after it, one line {end}; none written")
    before, rest = text.split(start)
    return f"{before}{start}\n{content}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the JSON files are")
    parser.add_argument("--readme", type=Path, help="file to write the tables into")
    arguments = parser.parse_args()
    tensors, lists, training = (
        load(arguments.folder, suite) for suite in ("tensors", "lists", "training")
    )
    sections: dict[str, str] = {}
    if tensors and lists:
        parts = (
            tensor_table(tensors),
            list_table(lists),
            f"{where(tensors)} {RATIOS}",
        )
        sections["bench:cpu"] = "\n\n".join(parts)
    if training:
        sections["bench:training"] = f"{training_table(training)}\n\n{where(training)} {RATIOS}"
    for section in sections.values():
        print(f"{section}\n")
    histograms = f"{histogram_table(tensors)}\n\n{where(tensors)}" if tensors else ""
    targets = target_table(tensors, lists, training)
    print(f"{histograms}\n\n{targets}")
    if arguments.readme:
        text = arguments.readme.read_text()
        for marker, content in sections.items():
            text = replace(text, marker, content)
        arguments.readme.write_text(text)
        (arguments.folder / "targets.md").write_text(
            f"# What was asked for, and what was measured\n\n{targets}\n"
        )
        (arguments.folder / "histograms.md").write_text(
            f"# Counts and edges of one tensor\n\n{histograms}\n"
        )


if __name__ == "__main__":
    main()
