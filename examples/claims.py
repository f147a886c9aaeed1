"""What the study claims, asked of a run's own numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Standard deviation of layers 1 to 4, mean over an epoch, median of 20 seeds of synthetic digits,
# measured with plain PyTorch.
PLAIN_STD = {
    "ReLU": {1: (3.6e-3, 6.7e-3, 6.5e-3, 7.2e-3), 10: (9.9e-3, 7.6e-2, 7.5e-2, 6.6e-2)},
    "sigmoid": {1: (1.5e-4, 1.5e-3, 5.1e-3, 2.2e-2), 10: (2.9e-4, 2.4e-3, 5.4e-3, 1.5e-2)},
}


@dataclass(frozen=True)
class Measured:
    """What was measured while a network trained, by epoch E, step S and layer L.

    Args:
        loss: ``(E, S)``.
        mean: mean gradient, ``(E, S, L)``.
        mean_abs: mean of magnitudes, ``(E, S, L)``.
        std: standard deviation, ``(E, S, L)``.
    """

    loss: Array
    mean: Array
    mean_abs: Array
    std: Array

    def layers(self, first: int, last: int) -> Array:
        """Mean |gradient| of each layer over epochs ``first`` to ``last``, counted from 1."""
        by_layer: Array = self.mean_abs[first - 1 : last].mean((0, 1))
        return by_layer

    def ratio(self, epoch: int) -> float:
        """Mean |gradient| of the first layer over that of the last."""
        by_layer = self.layers(epoch, epoch)
        return float(by_layer[0] / by_layer[-1])


Answer = tuple[str, bool]


@dataclass(frozen=True)
class Claim:
    """A claim: `text`, how many epochs it needs, the data it is about, and how it is asked."""

    text: str
    epochs: int
    data: tuple[str, ...]
    ask: Callable[[Measured, Measured], Answer]


@dataclass(frozen=True)
class Verdict:
    """What became of a claim: `held` is ``None`` where `detail` says why it was not asked."""

    text: str
    held: bool | None
    detail: str

    def __str__(self) -> str:
        """The verdict and the claim, and below them the numbers."""
        word = {True: "held", False: "NOT held", None: "not asked"}[self.held]
        return f"{word:>9}  {self.text}\n           {self.detail}"


CLAIMS: list[Claim] = []


def claim(
    text: str, *, epochs: int = 1, data: tuple[str, ...] = ("digits", "mnist")
) -> Callable[[Callable[[Measured, Measured], Answer]], None]:
    """Put a question, a function of the ReLU and the sigmoid network, among `CLAIMS`."""
    return lambda ask: CLAIMS.append(Claim(text, epochs, data, ask))


def judge(relu: Measured, sigmoid: Measured, data: str, batch_size: int) -> list[Verdict]:
    """Ask every claim that the run can answer.

    Args:
        relu: of the ReLU network.
        sigmoid: of the sigmoid network.
        data: what they were trained on: ``"digits"``, ``"mnist"`` or a path.
        batch_size: images in a batch.

    Returns:
        A verdict for each claim, in order.
    """
    verdicts = []
    for each in CLAIMS:
        held, detail = None, ""
        if data not in each.data:
            detail = f"is about --data {' and '.join(each.data)}"
        elif batch_size != 128:
            detail = "is about batches of 128"
        elif len(relu.loss) < each.epochs:
            detail = f"needs {each.epochs} epochs"
        else:
            detail, held = each.ask(relu, sigmoid)
        verdicts.append(Verdict(each.text, held, detail))
    return verdicts


@claim("Epoch 1: sigmoid's layer 1 has less than .02 of layer 4's mean |gradient|")
def _(relu: Measured, sigmoid: Measured) -> Answer:
    return f"L1 / L4 = {sigmoid.ratio(1):.4f}", sigmoid.ratio(1) < 0.02


@claim("Epoch 1: ReLU's layer 1 has more than .1 of layer 4's mean |gradient|")
def _(relu: Measured, sigmoid: Measured) -> Answer:
    return f"L1 / L4 = {relu.ratio(1):.3f}", relu.ratio(1) > 0.1


@claim("Epochs 1 to 10: sigmoid's mean |gradient| rises from each layer to the next", epochs=10)
def _(relu: Measured, sigmoid: Measured) -> Answer:
    by_layer = sigmoid.layers(1, 10)
    return _list(by_layer), _rises(by_layer)


@claim(
    "Epochs 1 to 10: sigmoid's mean |gradient| is below .1, .2, .5 and 1 of ReLU's in layers 1 to "
    "4,\n           a share that rises from each layer to the next",
    epochs=10,
)
def _(relu: Measured, sigmoid: Measured) -> Answer:
    share = sigmoid.layers(1, 10) / relu.layers(1, 10)
    return _list(share), _rises(share) and bool(np.all(share < (0.1, 0.2, 0.5, 1.0)))


@claim("Epoch 10: sigmoid's loss is more than .5 above ReLU's", epochs=10)
def _(relu: Measured, sigmoid: Measured) -> Answer:
    losses = _losses(relu, sigmoid, 10)
    return "ReLU {:.3f}, sigmoid {:.3f}".format(*losses), losses[1] - losses[0] > 0.5


@claim("Epoch 50: sigmoid's loss is still more than twice ReLU's", epochs=50)
def _(relu: Measured, sigmoid: Measured) -> Answer:
    losses = _losses(relu, sigmoid, 50)
    return "ReLU {:.3f}, sigmoid {:.3f}".format(*losses), losses[1] > 2 * losses[0]


@claim("Always: layer 4's mean gradient is within 1e-6 of zero, in both networks")
def _(relu: Measured, sigmoid: Measured) -> Answer:
    largest = [float(np.abs(network.mean[..., -1]).max()) for network in (relu, sigmoid)]
    held = all(value < 1e-6 for value in largest)
    return "at most {:.1e} (ReLU), {:.1e} (sigmoid)".format(*largest), held


@claim(
    "Epochs 1 and 10: standard deviations are those of plain PyTorch, within a factor of 3 for "
    "the seed",
    epochs=10,
    data=("digits",),
)
def _(relu: Measured, sigmoid: Measured) -> Answer:
    factors = [
        network.std[epoch - 1].mean(0) / plain
        for network, name in ((relu, "ReLU"), (sigmoid, "sigmoid"))
        for epoch, plain in PLAIN_STD[name].items()
    ]
    low, high = float(np.min(factors)), float(np.max(factors))
    return f"ratios from {low:.2f} to {high:.2f}", low > 1 / 3 and high < 3


def _losses(relu: Measured, sigmoid: Measured, epoch: int) -> list[float]:
    return [float(network.loss[epoch - 1].mean()) for network in (relu, sigmoid)]


def _rises(x: Array) -> bool:
    return bool(np.all(np.diff(x) > 0))


def _list(x: Array) -> str:
    return ", ".join(f"{value:.2g}" for value in x)
