"""Write the tables of incidents in docs/reading.md from runs in which it is known what happened.

Usage: python docs/make_incidents.py [own] [foreign] [ahead] [--seeds N] [--keep FOLDER]

`foreign` is of networks, tasks and schedules that no rule was made for, `ahead` of runs that break
by themselves, and of what trainscope tells of them, which must be installed. Runs that a folder
keeps are read from there, and others are put into it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "incidents")]
import foreign  # noqa: E402 (its place comes first)
import organic  # noqa: E402
from incidents import (  # noqa: E402
    CASES,
    FOREIGN_CASES,
    FOREIGN_SEEDS,
    SEEDS,
    SUBTLE,
    Case,
    alarms,
    judge,
    sudden,
    train,
)
from tasks import SETTINGS, Setting  # noqa: E402

from gradstat import History  # noqa: E402

PAGE = ROOT / "docs" / "reading.md"
ALL = {"own": SEEDS, "foreign": FOREIGN_SEEDS, "ahead": organic.SEEDS}
AHEAD = 10  # steps


class Runs:
    """Runs that are trained, or read from a folder in which they are kept.

    Args:
        folder: of files, which is made if need be; ``None`` to keep none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], History]) -> History:
        if self._folder is None:
            return make()
        path = self._folder / (name.replace("/", "_").replace(" ", "_") + ".npz")
        if not path.exists():
            make().save(path)
        return History.load(path)


def of_cases(tag: str, cases: dict[str, Case], seeds: range, runs: Runs) -> Iterator[list[str]]:
    """Cells of a table; each run's verdict that is not right goes to stderr."""
    for name, case in cases.items():
        verdicts = []
        for setting in case.settings:
            for seed in seeds:
                incident = case.incident(setting, seed)
                history = runs.get(
                    f"{tag}|{name}|{setting}|{seed}",
                    lambda s=setting, n=seed, i=incident: train(s, n, i),  # type: ignore[misc]
                )
                verdict = judge(history, incident)
                verdicts.append(verdict)
                if not (verdict.found and verdict.step and verdict.layer):
                    print(name, setting, seed, incident.layer, verdict, file=sys.stderr)
        counts = [sum(getattr(v, what) for v in verdicts) for what in ("found", "step", "layer")]
        networks = ", ".join(dict.fromkeys(setting.task for setting in case.settings))
        yield [name, networks, *map(str, (len(verdicts), *counts))]


def of_healthy(
    tag: str, settings: tuple[Setting, ...], seeds: range, runs: Runs, *, with_gan: bool = False
) -> list[str]:
    """The cells about runs in which all is well."""
    n = n_sudden = n_warned = 0
    makers = {str(each): lambda seed, s=each: train(s, seed) for each in settings}
    if with_gan:
        makers["GAN"] = foreign.train_gan
    for name, make in makers.items():
        for seed in seeds:
            history = runs.get(f"{tag}|{name}|{seed}", lambda m=make, s=seed: m(s))  # type: ignore[misc]
            found = alarms(history)
            n, n_sudden = n + 1, n_sudden + bool(sudden(found))
            n_warned += bool(found) and not sudden(found)
            if found:
                print("healthy", name, seed, *found, file=sys.stderr)
    which = f"all, {len(makers)} settings"
    return ["nothing", which, str(n), f"{n_sudden} sudden, {n_warned} other alarms", "", ""]


def first_told(history: History, broke: int | None) -> list[int | None]:
    """When each first tells before a run breaks: `alert=`, trainscope's CUSUM, its kurtosis."""
    from trainscope.analysis import first_crossing_step
    from trainscope.core.detectors import make_detector

    history = history.between(end=math.inf if broke is None else broke)
    found = organic.told(history)
    ours = next((step for step, each in found if each.kind == "instability ahead"), None)
    name = next(each for each in history.scalars if each.endswith("loss"))
    steps, losses = history.scalar(name)
    detector = make_detector({"name": "changepoint"})
    finite = itertools.takewhile(np.isfinite, losses.tolist())
    theirs = [detector.update(loss) is not None for loss in finite]
    outputs = history.select("activation")["kurtosis"]
    crossings = [first_crossing_step(np.nan_to_num(each - 3).tolist()) for each in outputs.T]
    # It begins at the first of three records above the limit, and is known at the third.
    known = [each + 2 for each in crossings if each is not None]
    cusum = int(steps[theirs.index(True)]) if True in theirs else None
    return [ours, cusum, int(history.steps[min(known)]) if known else None]


def of_organic(seeds: range, runs: Runs) -> Iterator[list[str]]:
    """Cells of the table about what is told before a run breaks, and of runs that do not."""
    groups: dict[str, dict[str, Callable[[int], History]]] = {
        name: {f"O|{name}": setting.train} for name, setting in organic.ORGANIC.items()
    }
    groups["well: the same networks"] = {f"C|{n}": s.train for n, s in organic.CALM.items()}
    groups["well: those above"] = {
        f"H|{each}": lambda seed, s=each: train(s, seed)  # type: ignore[misc]
        for each in (*foreign.HEALTHY, *SETTINGS)
    }
    for name, makers in groups.items():
        told, n_runs = [], 0
        for key, make in makers.items():
            for seed in seeds[:1] if key.startswith("H|") else seeds:
                history = runs.get(f"{key}|{seed}", lambda m=make, s=seed: m(s))  # type: ignore[misc]
                broke = organic.breaks(history)
                n_runs += 1
                if name in organic.ORGANIC and broke is None:
                    continue
                when = first_told(history, broke)
                print(key, seed, "breaks", broke, "told", when, file=sys.stderr)
                told.append([np.nan if at is None else (broke or 0) - at for at in when])
        leads = np.array(told).reshape(len(told), 3)
        if name in organic.ORGANIC:
            counts = [str(n) for n in (leads >= AHEAD).sum(0)]
            before = leads[:, 0][leads[:, 0] > 0]
            median = f"{np.median(before):.0f}" if len(before) else "-"
            yield [name, str(n_runs), str(len(told)), counts[0], median, *counts[1:]]
        else:
            counts = [f"{n} told" for n in (~np.isnan(leads)).sum(0)]
            yield [name, str(n_runs), "0", counts[0], "", *counts[1:]]


def table(group: str, seeds: range, runs: Runs) -> str:
    """The lines of a table."""
    if group == "ahead":
        head = ["what makes it break", "runs", "broke", f"told {AHEAD} steps ahead", "median"]
        lines = [[*head, "trainscope's CUSUM", "its kurtosis"], ["---"] * 7]
        lines += of_organic(seeds, runs)
        return "".join(f"| {' | '.join(cells)} |\n".replace("|  |", "| |") for cells in lines)
    lines = [["what happened", "networks", "runs", "found", "right step", "right layer, or none"]]
    lines.append(["---"] * 6)
    if group == "own":
        lines += of_cases("C", CASES, seeds, runs)
        lines.append(of_healthy("HO", SETTINGS, seeds, runs))
    else:
        lines += of_cases("F", FOREIGN_CASES, seeds, runs)
        lines += of_cases("S", SUBTLE, seeds, runs)
        lines.append(of_healthy("H", foreign.HEALTHY, seeds, runs, with_gan=True))
    return "".join(f"| {' | '.join(cells)} |\n".replace("|  |  |", "| | |") for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*ALL, []], help="by default all")
    parser.add_argument("--seeds", type=int, help="by default 20 of our own, 3 and 5 of others")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for group in options.groups or ALL:
        lines = table(group, ALL[group][: options.seeds], Runs(options.keep))
        print(lines)
        text = PAGE.read_text()
        place = re.compile(
            rf"(?<=<!-- {group} incidents -->\n).*?(?=<!-- end of {group} incidents -->)", re.DOTALL
        )
        assert place.search(text)
        PAGE.write_text(place.sub(lambda _: lines, text))  # noqa: B023 (called at once)


if __name__ == "__main__":
    main()
