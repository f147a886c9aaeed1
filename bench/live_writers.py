"""What a record costs that goes to a viewer while the run goes on; each beside the viewer's own.

Usage: python bench/live_writers.py [--layers N]. Needs TensorBoard and wandb.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import gradstat
from gradstat.integrations import tensorboard
from gradstat.integrations import wandb as viewer

ROUNDS, RECORDS = 5, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=50)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(parser.parse_args().layers)])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    os.environ["WANDB_SILENT"] = "true"
    import wandb

    settings = wandb.Settings(mode="offline", console="off")
    with tempfile.TemporaryDirectory() as folder, wandb.init(dir=folder, settings=settings) as run:
        ways = {
            "watch alone": lambda: watched(model),
            "tensorboard.writer": lambda: watched(
                model, tensorboard.writer(tempfile.mkdtemp(dir=folder))
            ),
            "SummaryWriter.add_histogram": lambda: added(model, tempfile.mkdtemp(dir=folder)),
            "wandb.writer": lambda: watched(model, viewer.writer(run)),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                times[name].append(way())
    for name, each in times.items():
        print(f"{name:28} {statistics.median(each) * 1e3:6.2f} ms a record")


def watched(model: nn.Module, sink: Callable[..., object] | None = None) -> float:
    with gradstat.watch(model, when="call", sink=sink) as w:
        return timed(w.measure)


def added(model: nn.Module, folder: str) -> float:
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    with SummaryWriter(folder) as writer:

        def add() -> None:
            for name, parameter in weights.items():
                writer.add_histogram(name, parameter.grad)

        return timed(add)


def timed(record: Callable[[], object]) -> float:
    for _ in range(3):
        record()
    start = time.perf_counter()
    for _ in range(RECORDS):
        record()
    return (time.perf_counter() - start) / RECORDS


if __name__ == "__main__":
    main()
