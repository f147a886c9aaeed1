"""Vanishing gradients, seen: the same network with ReLU and with sigmoid, layer by layer.

Trains both on images of digits, measures every weight gradient during backward, draws how their
distributions develop, and asks the study's claims of the numbers. ``docs/study.md`` explains it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from claims import Measured, judge
from digits import CLASSES, load
from figures import LiveRidge, figures, save_figure
from torch import Tensor, nn
from tqdm import tqdm

import gradstat
from gradstat import History

ACTIVATIONS = {"ReLU": nn.ReLU, "sigmoid": nn.Sigmoid}
HIDDEN = 10


@dataclass(frozen=True)
class Run:
    """A trained network's record.

    Args:
        loss: of each step.
        every_step: over `Log2Bins`, of each step.
        each_epoch: over 30 linear bins, of the last step of each epoch.
    """

    loss: np.ndarray
    every_step: History
    each_epoch: History

    def measured(self) -> Measured:
        """By epoch, step and layer."""
        h, epochs = self.every_step, len(self.each_epoch)
        fields = (h["mean"], h["l1"] / h["finite"], h["std"])
        return Measured(
            self.loss.reshape(epochs, -1), *(x.reshape(epochs, -1, len(h.layers)) for x in fields)
        )


def build(activation: type[nn.Module], inputs: int, generator: torch.Generator) -> nn.Sequential:
    """Four fully connected layers, Glorot-uniform weights, zero biases."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    sizes = (inputs, HIDDEN, HIDDEN, HIDDEN, CLASSES)
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes), start=1):
        layer = nn.Linear(fan_in, fan_out)
        bound = math.sqrt(6 / (fan_in + fan_out))
        with torch.no_grad():
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.zero_()
        modules[f"layer{i}"] = layer
        if i < len(sizes) - 1:
            modules[f"activation{i}"] = activation()
    return nn.Sequential(modules)


def train(
    name: str,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    on_epoch: Callable[[str, History], None] | None = None,
) -> Run:
    """Train one network and measure its weight gradients during backward.

    The same seed gives both networks the same weights and the same batches.

    Args:
        name: a key of `ACTIVATIONS`.
        x: images, float32 ``(N, pixels)``.
        y: labels, int64 ``(N,)``, on the same device.
        epochs: passes over the images.
        batch_size: the last batch of an epoch may be smaller.
        seed: of the weights and the shuffling.
        on_epoch: called after each epoch with the name and its record so far.

    Returns:
        The record.
    """
    generator = torch.Generator().manual_seed(seed)
    model = build(ACTIVATIONS[name], x.shape[1], generator).to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    per_epoch = math.ceil(len(x) / batch_size)
    bins = gradstat.LinearBins(30, nice=True)
    losses = []
    with (
        gradstat.watch(model) as every_step,
        # Gradients are not accumulated here; this asks for the last backward pass of each epoch.
        gradstat.watch(model, bins, accumulation_steps=per_epoch) as each_epoch,
        tqdm(total=epochs * per_epoch, desc=f"{name:>7}", unit="it") as bar,
    ):
        for _ in range(epochs):
            for batch in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            bar.update(per_epoch)
            last = every_step.last
            layers = last.l1 / last.finite
            bar.set_postfix_str(
                f"loss {torch.stack(losses[-per_epoch:]).mean():.3f}, |gradient| layer 1 / layer 4 "
                f"{layers[0] / layers[-1]:.4f}"
            )
            if on_epoch is not None:
                on_epoch(name, each_epoch.history)
        return Run(torch.stack(losses).cpu().numpy(), every_step.history, each_epoch.history)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data",
        default="digits",
        help="digits (synthetic, the default), mnist, or the path of an IDX or .npz file",
    )
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder for what is saved")
    parser.add_argument("--live", action="store_true", help="redraw the ridge as training goes")
    options = parser.parse_args(argv)
    for name in ("epochs", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} needs a number of 1 or more")
    if options.seed < 0:
        parser.error("--seed needs a number of 0 or more")
    try:
        x, y = load(options.data, options.seed)
        options.x = torch.from_numpy(x).to(options.device)
        options.y = torch.from_numpy(y).to(options.device)
        options.out.mkdir(parents=True, exist_ok=True)
    # A PyTorch built without CUDA refuses its device with an AssertionError.
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study.

    Returns:
        0, or 1 when a claim does not hold.
    """
    start = time.perf_counter()
    options = parse(argv)
    live = LiveRidge() if options.live else None
    runs = {}
    threads = torch.get_num_threads()
    # Products this small gain nothing from a second thread, and on a busy machine wait for it.
    torch.set_num_threads(1)
    for name in ACTIVATIONS:
        run = train(
            name,
            options.x,
            options.y,
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=options.seed,
            on_epoch=live,
        )
        run.every_step.save(options.out / f"{name.lower()}_every_step.npz")
        run.each_epoch.save(options.out / f"{name.lower()}_each_epoch.npz")
        run.every_step.report(options.out / f"{name.lower()}.html", title=f"{name} network")
        runs[name] = run
    torch.set_num_threads(threads)
    drawn = figures(
        {name: run.every_step for name, run in runs.items()},
        {name: run.each_epoch for name, run in runs.items()},
        {name: run.loss for name, run in runs.items()},
    )
    for name, figure in drawn:
        save_figure(figure, options.out / f"{name}.png")
    print(f"\nFigures, reports and histories are in {options.out}/")

    verdicts = judge(
        runs["ReLU"].measured(), runs["sigmoid"].measured(), options.data, options.batch_size
    )
    print("\nThe claims, with this run's numbers:\n")
    print(*verdicts, sep="\n")
    print(f"\n{time.perf_counter() - start:.1f} s in all")
    return int(any(verdict.held is False for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
