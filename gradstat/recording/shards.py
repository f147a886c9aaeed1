"""DTensors: what this rank holds of one, and who else holds the same."""

from __future__ import annotations

import torch
from torch import Tensor

from gradstat.history.records import OWN


def local_part(gradient: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor as it is."""
    if not hasattr(gradient, "to_local"):
        return gradient
    with torch.no_grad():
        local = gradient.to_local()
        # A collective may still be under way.
        part: Tensor = local.wait() if hasattr(local, "wait") else local
    return part


def origin_of(gradient: Tensor) -> int | None:
    """The first rank that holds what this rank holds of a DTensor.

    Args:
        gradient: any tensor.

    Returns:
        A rank of the whole world, `OWN` outside the DTensor's mesh, ``None`` for another tensor.
    """
    mesh = getattr(gradient, "device_mesh", None)
    if mesh is None:
        return None
    at = mesh.get_coordinate()
    if at is None:
        return OWN
    placements = gradient.placements  # type: ignore[attr-defined]
    first = (0 if p.is_replicate() else i for i, p in zip(at, placements, strict=True))
    return int(mesh.mesh[tuple(first)])
