"""Units of a module's output: `Layout` tells which dimension they are, `unit_peaks` measures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradstat.recording.torch_internals import BATCH_NORM

_SPATIAL = ("Conv", "ConvTranspose", "MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")
_BY_DIMENSIONS = {n: tuple(getattr(nn, f"{name}{n}d") for name in _SPATIAL) for n in (1, 2, 3)}
_SECOND = (BATCH_NORM, nn.GroupNorm, nn.Upsample)
_LAST = (
    nn.Linear,
    nn.Bilinear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


class Layout:
    """Which dimension of an output has a unit in each of its places.

    Convolutions, their norms and pooling have their channels after the batch, ``(N, C, ...)``;
    linear layers, layer norms, embeddings and recurrent ones have their features last. Any other
    module, such as an activation, has its units where the newest of those had them, if its output
    has the same shape; if not, after the batch in four dimensions or more, and last otherwise.

    Args:
        modules: in the order of their indices.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._known = [_known_dim(module) for module in modules]
        self._newest: tuple[torch.Size, int] | None = None

    def unit_dim(self, index: int, x: Tensor) -> int | None:
        """The dimension of a module's output, from 0; ``None`` where there are no units."""
        known = self._known[index]
        if x.dim() == 0 or x.numel() == 0:
            return None
        if known is not None:
            unit = min(known, x.dim() - 1) if known >= 0 else max(x.dim() + known, 0)
            self._newest = x.shape, unit
            return unit
        if self._newest is not None and self._newest[0] == x.shape:
            return self._newest[1]
        if x.dim() == 1:
            return None
        return 1 if x.dim() >= 4 else x.dim() - 1


def unit_peaks(x: Tensor, unit: int) -> Tensor:
    """Largest magnitude of each of C units along a dimension: ``(C,)``, NaN where one is."""
    others = [dim for dim in range(x.dim()) if dim != unit]
    if not others:
        return x.abs()
    # Ten times faster on a CPU than torch.linalg.vector_norm, and without a copy of magnitudes.
    return torch.maximum(x.amax(others), -x.amin(others))


def _known_dim(module: nn.Module) -> int | None:
    """The dimension, from the end if it is negative; ``None`` if the module does not say."""
    if isinstance(module, _LAST):
        return -1
    if isinstance(module, _SECOND):
        return 1
    for n, types in _BY_DIMENSIONS.items():
        # From the end, as there need not be a batch.
        if isinstance(module, types):
            return -n - 1
    return None
