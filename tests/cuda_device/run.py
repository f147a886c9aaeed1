"""Runs a command with a CUDA device in software: see README.md.

Exit status: the command's own; 2 for wrong arguments, 3 when the device's libraries cannot be had,
127 when there is no such command.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

from cuda_device import build  # noqa: E402

FLAGS = {
    "racecheck": "look for data races within kernels (slow)",
    "ptxas": "also assemble what Triton emits, as a check",
    "verbose": "say what fails in full",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument(
        "--schedule",
        choices=["eager", "lazy", "reverse", "random"],
        default="lazy",
        help="when queued work runs: at once; late, oldest first; late, newest first; at random",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random schedule")
    for flag, what in FLAGS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=what)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- command")
    options = parser.parse_args()
    command = options.command[options.command[:1] == ["--"] :]
    if not command:
        parser.error("no command")
    flags = [flag for flag in FLAGS if getattr(options, flag)]
    try:
        os.execvpe(command[0], command, build.environment(options.schedule, options.seed, flags))
    except build.BuildError as e:
        print(f"cuda_device: {e}", file=sys.stderr)
        sys.exit(3)
    except OSError as e:
        print(f"cuda_device: cannot run {command[0]}: {e.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
