"""Ask what narrow formats would do to a small GPT's gradients, then do it and see.

The loss is divided by 1,024, as it is where the gradients of so many batches are added up. Kept in
float8_e5m2, most of these gradients would be zero: the record of a float32 run says of which
weights. Then the run is repeated with gradients that are really cast, and weights stay where they
were. Usage: python examples/formats.py
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

import gradstat
from gradstat.plot import panels

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from incident import LENGTH, VOCABULARY, make_text
from networks import GPT

STEPS, BATCHES = 200, 1024  # batches whose gradients are added up
EVERY = 10  # steps from one measurement to the next
FORMATS = (
    *("float8_e5m2", "float8_e4m3fn_amax", "float8_e5m2_amax"),
    *("mxfp8_e4m3", "mxfp4_e2m1", "nvfp4"),
)
STARVING, REMEDY = "float8_e5m2", "float8_e5m2_amax"
ENOUGH = 20.0  # dB


@dataclass(frozen=True)
class Run:
    """A training run: names of its weights, and what became of them.

    Args:
        names: L weights.
        moved: how far each one is from where it began, ``(L,)``.
        loss: of each step.
        underflow: of each weight's gradient in each format, the mean over the measurements.
        snr: the same, in dB, of the mean squared relative error.
    """

    names: list[str]
    moved: NDArray[np.float64]
    loss: list[float]
    underflow: dict[str, NDArray[np.float64]]
    snr: dict[str, NDArray[np.float64]]


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(layers=2, width=32, heads=2, vocabulary=VOCABULARY, context=LENGTH)


def backward(model: GPT, text: Tensor) -> Tensor:
    """A batch's loss; its gradients are those of the loss over the number of batches."""
    starts = torch.randint(len(text) - LENGTH - 1, (32, 1))
    tokens = text[starts + torch.arange(LENGTH + 1)]
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:].flatten())
    (loss / BATCHES).backward()
    return loss.detach()


def cast(x: Tensor, form: str) -> Tensor:
    """What a cast to float8_e5m2 and back leaves, without a scale or with that of `REMEDY`."""
    largest = torch.finfo(torch.float8_e5m2).max
    scale = largest / x.abs().amax().clamp(min=1e-30) if form == REMEDY else x.new_ones(())
    return (x * scale).clamp(-largest, largest).to(torch.float8_e5m2).float() / scale


def train(form: str | None = None, steps: int = STEPS) -> Run:
    """Train with gradients of float32, or cast to a format; measure them before that.

    One batch stands for all whose gradients are added up: the optimizer divides by their size.
    """
    model, text = make_model(), make_text()
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    start = [p.detach().clone() for p in weights.values()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, eps=1e-12)
    loss, measured = [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss.append(float(backward(model, text)))
        if step % EVERY == 0:
            gradients = [p.grad for p in weights.values() if p.grad is not None]
            measured.append(gradstat.quantization(gradients, FORMATS))
        for p in model.parameters():
            if form is not None and p.grad is not None:
                p.grad = cast(p.grad, form)
        optimizer.step()
    moved = [
        float((p.detach() - old).norm()) for p, old in zip(weights.values(), start, strict=True)
    ]
    underflow = {f: np.mean([m[f].underflow.numpy() for m in measured], 0) for f in FORMATS}
    errors = {f: np.mean([m[f].error.numpy() ** 2 for m in measured], 0) for f in FORMATS}
    snr = {f: 0.0 - 10 * np.log10(error) for f, error in errors.items()}
    return Run(list(weights), np.array(moved), loss, underflow, snr)


def table(run: Run) -> str:
    """Signal-to-noise ratio of each weight's gradient in each format; what starves comes first."""
    order = np.argsort(-run.underflow[STARVING], kind="stable")
    width = max(map(len, run.names))
    lines = [f"{'gradient of':{width}}  to zero  " + "  ".join(f"{f:>18}" for f in FORMATS)]
    for k in order:
        cells = "  ".join(f"{run.snr[f][k]:15.1f} dB" for f in FORMATS)
        lines.append(f"{run.names[k]:{width}}  {run.underflow[STARVING][k]:7.1%}  {cells}")
    return "\n".join(lines)


def advise(run: Run) -> str:
    """The narrowest format in which every gradient keeps a signal-to-noise ratio."""
    bits = {f: gradstat.formats.FORMATS[f].bits for f in FORMATS}
    enough = [f for f in FORMATS if run.snr[f].min() >= ENOUGH]
    if not enough:
        return f"No format keeps every gradient above {ENOUGH:.0f} dB."
    best = min(enough, key=lambda f: bits[f])
    return (
        f"{best}, {bits[best]:g} bits, keeps every gradient above {ENOUGH:.0f} dB; "
        f"{STARVING} makes {run.underflow[STARVING].max():.2%} of one zero."
    )


def draw(full: Run, runs: dict[str, Run]) -> Figure:
    """How far weights moved against what was predicted, and the losses."""
    figure, (moves, losses) = panels.grid_2d(None, 2, 2, (4.6, 3.4), margin=1.9)
    for axes in (moves, losses):
        panels.style_2d(axes)
    losses.plot(full.loss, color=panels.INK, linewidth=6, alpha=0.25)
    colors = [panels.HUES[1], panels.HUES[0]]
    for (form, run), color in zip(runs.items(), colors, strict=True):
        survive = 100 * (1 - full.underflow[form]).clip(1e-5)
        moves.scatter(survive, 100 * run.moved / full.moved, color=color, s=22)
        losses.plot(run.loss, color=color, linewidth=1.2)
    moved = runs[STARVING].moved / full.moved
    for named, offset in ((int(moved.argmin()), (6, -4)), (int(moved.argmax()), (-6, -4))):
        moves.annotate(
            full.names[named].removesuffix(".weight"),
            (100 - 100 * full.underflow[STARVING][named], 100 * moved[named]),
            offset,
            textcoords="offset points",
            ha="left" if offset[0] > 0 else "right",
            fontsize=8,
            color=panels.INK,
        )
    moves.set_xscale("log")
    moves.set_xlabel(
        "gradient that does not become zero, predicted, %", fontsize=9, color=panels.INK
    )
    moves.set_ylabel("how far each weight moved, % of float32", fontsize=9, color=panels.INK)
    moves.set_ylim(bottom=0)
    losses.set_xlabel("step", fontsize=9, color=panels.INK)
    losses.set_ylabel("loss", fontsize=9, color=panels.INK)
    pale = (*to_rgb(panels.INK), 0.25)
    panels.add_key(figure, ["gradients in float32", *runs], [pale, *colors])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("formats.png"))
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    full = train(steps=options.steps)
    print(f"Gradients of a small GPT over {options.steps} steps, each divided by {BATCHES}.\n")
    print(table(full))
    print(f"\n{advise(full)}\n")
    runs = {form: train(form, options.steps) for form in (STARVING, REMEDY)}
    print("Trained again with gradients that are cast:")
    for form, run in runs.items():
        least = int(np.argmin(run.moved / full.moved))
        share = run.moved[least] / full.moved[least]
        print(
            f"  {form}: {full.names[least]} moved {share:.0%} as far as in float32, with "
            f"{full.underflow[form][least]:.2%} predicted to become zero; loss "
            f"{np.mean(run.loss[-20:]):.2f}, in float32 {np.mean(full.loss[-20:]):.2f}"
        )
    draw(full, runs).savefig(options.output, dpi=110)
    print(f"\n{options.output}")


if __name__ == "__main__":
    main()
