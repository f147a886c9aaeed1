"""Write the table of incidents in docs/reading.md from runs in which it is known what happened.

Usage: python docs/make_incidents.py [--seeds N]
"""

import argparse
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "incidents")]
from incidents import CASES, SEEDS, alarms, judge, train  # noqa: E402
from tasks import SETTINGS  # noqa: E402 (its place comes first)

PAGE = ROOT / "docs" / "reading.md"
TABLE = re.compile(r"(?<=<!-- incidents -->\n).*?(?=<!-- end of incidents -->)", re.DOTALL)


def rows(seeds: int) -> list[str]:
    """The lines of the table; each run's verdict that is not right goes to stderr."""
    lines = [
        "| what happened | networks | runs | found | right step | right layer, or none |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        verdicts = []
        for setting in case.settings:
            for seed in SEEDS[:seeds]:
                incident = case.incident(setting, seed)
                verdict = judge(train(setting, seed, incident), incident)
                verdicts.append(verdict)
                if not (verdict.found and verdict.step and verdict.layer):
                    print(name, setting, seed, incident.layer, verdict, file=sys.stderr)
        counts = [sum(getattr(v, what) for v in verdicts) for what in ("found", "step", "layer")]
        networks = ", ".join(dict.fromkeys(setting.task for setting in case.settings))
        lines.append(f"| {name} | {networks} | {len(verdicts)} | {' | '.join(map(str, counts))} |")
    false = 0
    for setting in SETTINGS:
        for seed in SEEDS[:seeds]:
            found = alarms(train(setting, seed))
            false += bool(found)
            if found:
                print("healthy", setting, seed, *found, file=sys.stderr)
    runs = len(SETTINGS) * seeds
    lines.append(f"| nothing | all, {len(SETTINGS)} settings | {runs} | {false} false alarms | | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    torch.set_num_threads(1)
    table = "\n".join(rows(parser.parse_args().seeds)) + "\n"
    print(table)
    text = PAGE.read_text()
    assert TABLE.search(text)
    PAGE.write_text(TABLE.sub(lambda _: table, text))


if __name__ == "__main__":
    main()
