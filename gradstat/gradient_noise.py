"""`noise_scale`: how large a batch may be before more of it helps little."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import numpy as np

from gradstat.bins import FLOAT64_MAX
from gradstat.history import History, check_history
from gradstat.record import GRAD
from gradstat.util import Array


@dataclass(frozen=True, eq=False)
class NoiseScale:
    """The gradient noise scale of a run, in examples of a batch.

    It has the S steps and the L layers that both histories have.
    """

    steps: Array  #: their numbers: int64 ``(S,)``
    layers: list[str]
    per_layer: Array  #: float64 ``(S, L)``
    whole: Array  #: of all layers together: float64 ``(S,)``


def noise_scale(
    small: History,
    big: History,
    small_batch: float,
    big_batch: float,
    *,
    scale: float = 1.0,
    decay: float = 0.99,
) -> NoiseScale:
    """Estimate the gradient noise scale from gradients of two sizes of batch.

    The simple noise scale of McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch
    Training" (2018), appendix A.1: the trace of the covariance of an example's gradient over the
    squared norm of the true gradient. Both are estimated without bias from the squared norms of the
    two mean gradients, and smoothed over the steps before one is divided by the other. Batches that
    are much smaller waste no examples, those that are much larger save no steps.

    Args:
        small: gradients of the small batches: of one rank or pass, or of all ranks merged.
        big: gradients of the big ones in the same steps; the small ones are parts of them.
        small_batch: examples of one small batch.
        big_batch: examples of a big one.
        scale: what the gradients of ``small`` are to be multiplied by to be those of a mean loss:
            the passes of a step, where each pass has its loss divided by them.
        decay: of the averages, from one record to the next; 0 takes each step for itself.

    Returns:
        A NoiseScale: NaN in steps where a layer is absent or not finite, and where the averages are
        no estimate, because the noise is negative or the squared gradient is not positive.

    Raises:
        TypeError: an argument that is no History or no number.
        ValueError: histories without gradients, layers or steps in common; sparse gradients of
            other elements; a batch or scale that is not positive, a big batch that is not larger, a
            decay outside 0 to 1.

    Example:
        >>> import torch, gradstat
        >>> model = torch.nn.Linear(3, 1)
        >>> def record(x):
        ...     with gradstat.watch(model) as w:
        ...         model.zero_grad()
        ...         model(x).square().mean().backward()
        ...     return w.history
        >>> x = torch.randn(64, 3)
        >>> noise = gradstat.noise_scale(record(x[:16]), record(x), 16, 64)
        >>> noise.layers, noise.whole.shape
        (['weight'], (1,))
    """
    small, big = (_gradients(name, each) for name, each in (("small", small), ("big", big)))
    numbers = {"small_batch": small_batch, "big_batch": big_batch, "scale": scale, "decay": decay}
    for name, number in numbers.items():
        if not isinstance(number, Real) or isinstance(number, bool):
            raise TypeError(f"noise_scale() needs a number; {name} is {number!r}")
        # An integer may be larger than any float.
        if name != "decay" and not 0 < number <= FLOAT64_MAX:
            raise ValueError(f"noise_scale() needs a positive number; {name} is {number}")
    if not 0 <= decay < 1:
        raise ValueError(f"noise_scale() needs a decay from 0 to below 1; decay is {decay}")
    small_batch, big_batch, scale, decay = map(float, numbers.values())
    if not small_batch < big_batch:
        raise ValueError(
            f"noise_scale() needs a small batch below the big one; small_batch is "
            f"{small_batch:g}, big_batch {big_batch:g}"
        )
    steps = np.intersect1d(small.steps, big.steps)
    layers = [layer for layer in big.layers if layer in set(small.layers)]
    for what, found in (("steps", steps), ("layers", layers)):
        if not len(found):
            one, other = (getattr(each, what)[:3] for each in (small, big))
            raise ValueError(
                f"noise_scale() needs {what} that both histories have; small has {one} and so on, "
                f"big {other}"
            )
    numel, small_numel = (_at(each, "numel", steps, layers) for each in (big, small))
    if (differs := (numel > 0) & (small_numel % np.maximum(numel, 1) != 0)).any():
        step, layer = (int(each) for each in np.argwhere(differs)[0])
        raise ValueError(
            f"noise_scale() needs the same elements of both, not those that a sparse gradient has; "
            f"small has {small_numel[step, layer]} of {layers[layer]}, big {numel[step, layer]}"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # no estimate, which is NaN
        # The mean square of merged ranks is that of one rank.
        small_squares = numel * (scale * _mean_norm(small, steps, layers)) ** 2
        big_squares = numel * _mean_norm(big, steps, layers) ** 2
        signal = (big_batch * big_squares - small_batch * small_squares) / (big_batch - small_batch)
        noise = (small_squares - big_squares) / (1 / small_batch - 1 / big_batch)
    # What is absent from both adds nothing to the whole.
    is_there = (numel > 0) | (small_numel > 0)
    total_noise, total_signal = (
        np.where(is_there, x, 0.0).sum(1, keepdims=True) for x in (noise, signal)
    )
    whole = _ratio(total_noise, total_signal, decay)[:, 0]
    return NoiseScale(steps, layers, _ratio(noise, signal, decay), whole)


def _gradients(name: str, history: History) -> History:
    held = check_history("noise_scale", history, name)
    if GRAD not in held.kinds:
        raise ValueError(
            f"noise_scale() needs gradients; {name} has {', '.join(dict.fromkeys(held.kinds))}"
        )
    return held.select(GRAD)


def _at(history: History, field: str, steps: Array, layers: list[str]) -> Array:
    """A field at some steps of some layers."""
    rows = np.searchsorted(history.steps, steps)
    columns = [history.layers.index(layer) for layer in layers]
    return np.asarray(history[field][rows][:, columns])


def _mean_norm(history: History, steps: Array, layers: list[str]) -> Array:
    """Root of the mean square, NaN where not all elements are finite."""
    rms, numel, finite = (_at(history, name, steps, layers) for name in ("rms", "numel", "finite"))
    return np.where((numel > 0) & (numel == finite), rms, np.nan)


def _ratio(noise: Array, signal: Array, decay: float) -> Array:
    """Moving average of the noise over that of the signal, along the steps: ``(S, N)``."""
    is_known = ~np.isnan(noise + signal)
    ratio = np.full(noise.shape, np.nan)
    averages = np.zeros((2, noise.shape[1]))
    for step, known in enumerate(is_known):
        new = np.stack([noise[step], signal[step]])
        # Both begin at zero, a bias that their ratio does not have.
        averages = np.where(known, decay * averages + (1 - decay) * new, averages)
        is_estimate = known & (averages[0] >= 0) & (averages[1] > 0)
        np.divide(averages[0], averages[1], out=ratio[step], where=is_estimate)
    return ratio
