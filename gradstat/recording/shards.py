"""DTensors: what this rank holds of one, and who else holds the same."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gradstat.history import History
from gradstat.history.journal import new_run
from gradstat.record import GRAD, OF_OUTPUTS, OF_PARAMETERS, OWN, PARTIAL, SAME, UNKNOWN, Placement
from gradstat.recording.torch_internals import default_store

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import placement_types


def rank_and_world() -> tuple[int, int] | tuple[None, None]:
    """Number of this process in a distributed run, and how many there are, if it is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None, None
    return dist.get_rank(), dist.get_world_size()


_n_begun: Counter[str] = Counter()  # runs in each directory


def agreed_run(path: str | os.PathLike[str]) -> str | None:
    """Identifier of the run that all ranks begin in a directory; ``None`` if they cannot tell."""
    # Nobody waits: the rank that comes first says it.
    name = os.fspath(path)
    _n_begun[name] += 1
    store = default_store()
    if store is None:
        return None
    run: bytes = store.compare_set(f"gradstat {name} {_n_begun[name]}", "", new_run())
    return run.decode()


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of a detached DTensor; any other tensor as it is."""
    if not hasattr(x, "to_local"):
        return x
    local = x.to_local()
    # A collective may still be under way.
    part: Tensor = local.wait() if hasattr(local, "wait") else local
    return part


@lru_cache(64)
def _place(
    mesh: DeviceMesh, placements: tuple[placement_types.Placement, ...]
) -> tuple[int, tuple[int, int]]:
    """The first rank of a mesh that holds the same, or `OWN` outside of it; and the shard held."""
    # Kept, as to look into a mesh takes longer than to measure.
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


def own_part(history: History, row: int, x: Tensor) -> Tensor:
    """As `local_part`; for a DTensor a history is told what this rank holds of the row."""
    mesh = getattr(x, "device_mesh", None)
    if mesh is None:
        return x
    owner, shard = _place(mesh, tuple(x.placements))  # type: ignore[attr-defined]
    history.placements[row] = Placement(owner, shard, tuple(x.shape))
    return local_part(x)


def _owner_beside_tensor_parallelism(model: nn.Module) -> int:
    """The first rank with the same gradients of plain parameters as this one, `OWN` for none."""
    # Tensor parallelism gives each rank of its one mesh the same batch, so the parameters that it
    # leaves alone have the same gradients on each. That is not so beside FSDP or
    # DistributedDataParallel.
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    if not meshes or any(mesh != meshes[0] for mesh in meshes) or not meshes[0].get_coordinate():
        return OWN
    from torch.distributed.fsdp import FSDPModule  # which takes time to load

    if any(isinstance(each, FSDPModule | DistributedDataParallel) for each in model.modules()):
        return OWN
    return int(meshes[0].mesh.flatten()[0])


def usual_placements(model: nn.Module, kinds: Iterable[str], when: str) -> list[Placement]:
    """Who holds the same values of each row, by its kind, unless they are DTensors."""
    owners = dict.fromkeys(OF_PARAMETERS, SAME) | dict.fromkeys(OF_OUTPUTS, OWN)
    if when == "backward":
        owners[GRAD] = _owner_beside_tensor_parallelism(model)
    return [Placement(owners[kind]) for kind in kinds]
