"""DTensors: what this rank holds of one, and who else holds the same."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradstat.history import History
from gradstat.history.placements import PARTIAL, UNKNOWN, Placements
from gradstat.history.records import OWN, SAME
from gradstat.record import GRAD, OF_OUTPUTS, OF_PARAMETERS

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


def rank_and_world() -> tuple[int, int] | tuple[None, None]:
    """Number of this process in a distributed run, and how many there are, if it is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None, None
    return dist.get_rank(), dist.get_world_size()


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of a detached DTensor; any other tensor as it is."""
    if not hasattr(x, "to_local"):
        return x
    local = x.to_local()
    # A collective may still be under way.
    part: Tensor = local.wait() if hasattr(local, "wait") else local
    return part


@lru_cache(64)
def _place(mesh: DeviceMesh, placements: tuple[Placement, ...]) -> tuple[int, tuple[int, int]]:
    """The first rank of a mesh that holds the same, or `OWN` outside of it; and the part held.

    To look into a mesh takes longer than to measure.
    """
    at = mesh.get_coordinate()
    if at is None:
        return OWN, (UNKNOWN, UNKNOWN)
    first: list[int] = []
    part, n_parts, is_partial = 0, 1, False
    for i, size, placement in zip(at, mesh.shape, placements, strict=True):
        is_partial |= placement.is_partial() and size > 1
        is_cut = not (placement.is_replicate() or placement.is_partial())
        first.append(i if is_cut else 0)
        if is_cut:
            part, n_parts = part * size + i, n_parts * size
    return int(mesh.mesh[tuple(first)]), (PARTIAL if is_partial else part, n_parts)


def note_placement(history: History, row: int, x: Tensor) -> bool:
    """Tell a history what this rank holds of a row; returns whether it is a DTensor."""
    mesh = getattr(x, "device_mesh", None)
    if mesh is None:
        return False
    origin, part = _place(mesh, tuple(x.placements))  # type: ignore[attr-defined]
    if history.placements is None:
        history.placements = Placements.unknown(len(history.rows))
    history.origins[row] = origin
    history.placements.set(row, part, tuple(x.shape))
    return True


def copy_placement(history: History, row: int, like: int) -> None:
    """Tell a history that this rank holds the same part of a row as of another one."""
    history.origins[row] = history.origins[like]
    if (placements := history.placements) is not None:
        n, of = placements.parts[like].tolist()
        placements.set(row, (n, of), placements.shapes[like])


def _origin_beside_tensor_parallelism(model: nn.Module) -> int:
    """Who holds the same gradients of the plain parameters in a model that has DTensors too.

    Tensor parallelism gives each rank of its mesh the same batch, so the parameters that it leaves
    alone have the same gradients on each. That is not so beside FSDP or DistributedDataParallel.

    Returns:
        The first rank of the mesh; `OWN` where there is none, or several.
    """
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    if not meshes or any(mesh != meshes[0] for mesh in meshes) or not meshes[0].get_coordinate():
        return OWN
    from torch.distributed.fsdp import FSDPModule  # which takes time to load

    if any(isinstance(each, FSDPModule | DistributedDataParallel) for each in model.modules()):
        return OWN
    return int(meshes[0].mesh.flatten()[0])


def usual_origins(model: nn.Module, kinds: Iterable[str], when: str) -> list[int]:
    """Who holds the same values of each row, by its kind, unless they are DTensors.

    Args:
        model: whose parameters and modules they are.
        kinds: of the rows.
        when: they are measured, as for `watch`.
    """
    origins = dict.fromkeys(OF_PARAMETERS, SAME) | dict.fromkeys(OF_OUTPUTS, OWN)
    if when == "backward":
        origins[GRAD] = _origin_beside_tensor_parallelism(model)
    return [origins[kind] for kind in kinds]
