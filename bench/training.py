"""What it costs a training run to measure all weight gradients, or more, at every step.

Each way is timed against a bare loop of its own: a few steps bare, a few steps measured, and again,
so that what else the machine does falls on both. The ratio is the median over those pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe
from networks import GPT
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import gradstat
from gradstat.engines import reference

os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import wandb  # reads its environment when imported

GPT_SIZES = {"layers": 4, "width": 256, "heads": 4, "vocabulary": 1024, "context": 128}


def build_mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """The study's network, 784-10-10-10-10, on a batch of 128."""
    layers: list[nn.Module] = [nn.Linear(784, 10)]
    for _ in range(3):
        layers += [nn.ReLU(), nn.Linear(10, 10)]
    return nn.Sequential(*layers), torch.rand(128, 784), torch.randint(10, (128,))


def build_layers() -> tuple[nn.Module, Tensor, Tensor]:
    """148 layers of 16 x 16, on a batch of 2: as many gradients as GPT-2 small has, all small."""
    return (
        nn.Sequential(*[nn.Linear(16, 16) for _ in range(148)]),
        torch.rand(2, 16),
        torch.ones(2).long(),
    )


def build_gpt() -> tuple[nn.Module, Tensor, Tensor]:
    """A small GPT, 4 layers of width 256, on 8 rows of 128 random tokens."""
    tokens = torch.randint(GPT_SIZES["vocabulary"], (8, GPT_SIZES["context"] + 1))
    return GPT(**GPT_SIZES), tokens[:, :-1], tokens[:, 1:].flatten()


Build = Callable[[], tuple[nn.Module, Tensor, Tensor]]


class Run:
    """A model in training with Adam on one batch; one more step at each call."""

    def __init__(self, build: Build) -> None:
        torch.manual_seed(20)
        self.model, self.inputs, self.targets = build()
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.loss = torch.zeros(())

    def __call__(self) -> None:
        self.loss = nn.functional.cross_entropy(self.model(self.inputs), self.targets)
        self.loss.backward()
        self.measure()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self) -> None:
        """Nothing: bare."""


class WithGradstat(Run):
    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self.watch = gradstat.watch(self.model)
        # Before it is timed: its record is what the reference says of the same gradients.
        nn.functional.cross_entropy(self.model(self.inputs), self.targets).backward()
        weights = [p for name, p in self.model.named_parameters() if "bias" not in name]
        expected = reference.measure([p.grad for p in weights], gradstat.Log2Bins())
        assert torch.equal(self.watch.last.counts, expected.counts)
        torch.testing.assert_close(self.watch.last.floats, expected.floats, rtol=1e-5, atol=1e-6)
        self.optimizer.zero_grad()


class WithEverything(Run):
    """Weights, their updates, activations and the gradients with respect to them as well."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        what = ("grad", "update", "activation", "grad_output")
        self.watch = gradstat.watch(self.model, what=what, when="step", optimizer=self.optimizer)


class WithLog(Run):
    """The loss and the learning rate as well, all of it written to a directory."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        path = Path(tempfile.mkdtemp()) / "run"
        self.watch = gradstat.watch(self.model, optimizer=self.optimizer, path=path)

    def measure(self) -> None:
        self.watch.log(loss=self.loss)


class WithWandb(Run):
    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self.run = wandb.init(project="bench", dir=tempfile.gettempdir())
        self.run.watch(self.model, log="gradients", log_freq=1)

    def measure(self) -> None:
        self.run.log({"loss": self.loss.item()})


class WithTensorBoard(Run):
    def __init__(self, build: Build) -> None:
        super().__init__(build)
        self.writer, self.step = SummaryWriter(tempfile.mkdtemp()), 0

    def measure(self) -> None:
        for name, parameter in self.model.named_parameters():
            if "bias" not in name:
                self.writer.add_histogram(name, parameter.grad, self.step)
        self.step += 1


@dataclass(frozen=True)
class Workload:
    """A network, how many steps are timed at a time, how many times, and on how many threads."""

    build: Build
    steps: int
    pairs: int
    threads: int = 1


WORKLOADS = {
    "MLP": Workload(build_mlp, 5, 300),
    "148 layers": Workload(build_layers, 1, 100),
    "small GPT": Workload(build_gpt, 1, 40, 2),
}
WAYS: dict[str, type[Run]] = {
    "gradstat.watch": WithGradstat,
    "gradstat.watch, loss, path=": WithLog,
    "gradstat.watch, every kind": WithEverything,
    "wandb.watch": WithWandb,
    "TensorBoard add_histogram": WithTensorBoard,
}


def seconds_per_step(run: Run, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        run()
    return (time.perf_counter() - start) / steps


def compare(workload: Workload, way: type[Run], pairs: int) -> dict[str, float]:
    torch.set_num_threads(workload.threads)
    bare, measured = Run(workload.build), way(workload.build)
    for run in (bare, measured):
        seconds_per_step(run, max(3, workload.steps // 4))
    times = []
    for pair in range(pairs):
        # Whoever comes second has the warmer cache: they take turns.
        runs = (bare, measured) if pair % 2 else (measured, bare)
        seconds = {run: seconds_per_step(run, workload.steps) for run in runs}
        times.append((seconds[bare], seconds[measured]))
    ratios = [b / a for a, b in times]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "bare": statistics.median(a for a, _ in times),
        "measured": statistics.median(b for _, b in times),
        "ratio": quartiles[1],
        "lower quartile": quartiles[0],
        "upper quartile": quartiles[2],
        "pairs": pairs,
    }


def compare_elsewhere(folder: str, name: str, way: str, pairs: float) -> float:
    """The ratio that another checkout's gradstat has, in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "training.json"
        options = ["--networks", name, "--ways", way, "--pairs", str(pairs), "--json", str(path)]
        subprocess.run(
            [sys.executable, __file__, *options],
            env={**os.environ, "PYTHONPATH": folder},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        ratio: float = json.loads(path.read_text())["benchmarks"][0]["ratio"]
    return ratio


@contextlib.contextmanager
def quiet_exit() -> Iterator[None]:
    """wandb's helper process is asked to end even if a comparison fails."""
    try:
        yield
    finally:
        wandb.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--pairs", type=float, default=1.0, help="times as many pairs as usual")
    parser.add_argument("--networks", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--against", metavar="FOLDER", help="also time the gradstat of another checkout, in turn"
    )
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with quiet_exit():
        for name, way in itertools.product(arguments.networks, arguments.ways):
            workload, kind = WORKLOADS[name], WAYS[way]
            result = compare(workload, kind, max(4, round(workload.pairs * arguments.pairs)))
            before = ""
            if arguments.against:
                other = compare_elsewhere(arguments.against, name, way, arguments.pairs)
                result["ratio against"] = other
                before = f", there {other:.3f}"
            rows.append({"network": name, "way": way, **result})
            print(
                f"{name:10} {way:27} bare {1e3 * result['bare']:8.3f} ms a step, "
                f"measured {1e3 * result['measured']:8.3f}, ratio {result['ratio']:.3f} "
                f"({result['lower quartile']:.3f} to {result['upper quartile']:.3f}){before}",
                flush=True,
            )
    if arguments.json:
        packages = ("gradstat", "torch", "numba", "numpy", "wandb", "tensorboard")
        document = {**describe(packages), "benchmarks": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
