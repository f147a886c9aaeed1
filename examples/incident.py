"""Train a small GPT, break it on purpose, and let its record tell what happened.

One layer's learning rate is 150 times too high for three steps. Usage: python examples/incident.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import gradstat
from gradstat.plot import panels

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from networks import GPT

STEPS, AT, LAYER, TIMES = 240, 150, "blocks.1.up.weight", 150
VOCABULARY, LENGTH = 32, 16
BEFORE, AFTER = 30, 50  # steps that are drawn


def make_text() -> Tensor:
    """Tokens, each of which narrows down the next one to three."""
    generator = torch.Generator().manual_seed(1)
    likely = torch.randint(VOCABULARY, (VOCABULARY, 3), generator=generator).tolist()
    tokens = [0]
    for choice in torch.randint(3, (20_000,), generator=generator).tolist():
        tokens.append(likely[tokens[-1]][choice])
    return torch.tensor(tokens)


def train(steps: int = STEPS, at: int = AT) -> gradstat.History:
    """The record of a run in which that happens at a step."""
    torch.manual_seed(0)
    text = make_text()
    model = GPT(layers=2, width=32, heads=2, vocabulary=VOCABULARY, context=LENGTH)
    # A group for each parameter, so that one of them can be broken.
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    broken = [name for name, _ in model.named_parameters()].index(LAYER)
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    what = ("grad", "update", "activation")
    with gradstat.watch(model, what=what, when="step", optimizer=optimizer) as w:
        for step in range(steps):
            optimizer.param_groups[broken]["lr"] = 3e-3 * (TIMES if at <= step < at + 3 else 1)
            starts = torch.randint(len(text) - LENGTH - 1, (32, 1))
            tokens = text[starts + torch.arange(LENGTH + 1)]
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:].flatten())
            w.log(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return w.history


def draw(history: gradstat.History, finding: gradstat.Finding) -> Figure:
    """The loss above the size of each layer's update; a colour for what moved first."""
    figure, (above, below) = panels.grid_2d(None, 2, 1, (6.2, 1.9), margin=0.2, sharex=True)
    for axes in (above, below):
        panels.style_2d(axes)
    steps, loss = history.scalar("loss")
    above.plot(steps, loss, color=panels.INK, linewidth=1.4)
    updates = history.select("update")
    sizes = updates["rms"] / np.median(updates["rms"], axis=0)
    for layer, size in zip(updates.layers, sizes.T, strict=True):
        is_first = f"update/{layer}" == finding.layer
        color = panels.HUES[1] if is_first else panels.GREY
        below.plot(updates.steps, size, color=color, linewidth=1.4, zorder=3 if is_first else 2)
    first, spike = int(finding.numbers["first_step"]), finding.steps[0]
    peak = float(finding.numbers["peak"])
    text = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    above.annotate(
        f"step {spike}: the loss spikes", (spike, peak), (10, 0), color=panels.INK, **text
    )
    below.annotate(
        f"step {first}: {finding.layer.removeprefix('update/')} moves first",
        (first, sizes.max()),
        (14, 0),
        color=panels.HUES[1],
        **text,
    )
    above.set_xlim(first - BEFORE, first + AFTER)
    shown = loss[(steps >= first - BEFORE) & (steps <= first + AFTER)]
    above.set_ylim(shown.min() - 0.05, shown.max() + 0.1)
    above.set_ylabel("loss", fontsize=9, color=panels.INK)
    below.set_yscale("log")
    below.set_ylabel("update of each layer\n÷ its median", fontsize=9, color=panels.INK)
    below.set_xlabel("step", fontsize=9, color=panels.INK)
    below.set_yticks([1, 10, 100], ["1", "10", "100"])
    below.set_yticks([], minor=True)
    figure.align_ylabels([above, below])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("incident.png"))
    output = parser.parse_args().output
    torch.set_num_threads(1)
    history = train()
    _, loss = history.scalar("loss")
    print(
        f"{len(history)} steps of a small GPT; the loss falls from {loss[0]:.2f} to {loss[-1]:.2f}."
    )
    print(f"At step {AT} the learning rate of {LAYER} was {TIMES} times too high, for 3 steps.\n")
    print("What the record says:")
    findings = [finding for finding in history.diagnose() if finding.severity != "note"]
    for finding in findings:
        print(f"  {finding}")
    draw(history, findings[0]).savefig(output, dpi=150)
    print(f"\n{output}")


if __name__ == "__main__":
    main()
