"""DTensors: what this rank holds of one, and who else holds the same."""

from __future__ import annotations

from torch import Tensor
from torch import distributed as dist

from gradstat.history.records import OWN, SAME
from gradstat.kinds import GRAD, OF_OUTPUTS


def rank_and_world() -> tuple[int, int] | tuple[None, None]:
    """Number of this process in a distributed run, and how many there are, if it is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None, None
    return dist.get_rank(), dist.get_world_size()


def local_part(gradient: Tensor) -> Tensor:
    """What this rank holds of a detached DTensor; any other tensor as it is."""
    if not hasattr(gradient, "to_local"):
        return gradient
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


def usual_origin(kind: str, when: str) -> int:
    """Who holds the same values of a kind, unless they are DTensors: `OWN` or `SAME`.

    Args:
        kind: of a row.
        when: they are measured, as for `watch`.
    """
    return OWN if kind in OF_OUTPUTS or (kind == GRAD and when == "backward") else SAME
