"""What the ranks of the tests of distributed training run: python distributed_workers.py W DIR ...

All numbers are multiples of powers of two that float64 holds, so that sums are the same in any
order and one process can compute what the ranks must have seen.
"""

import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
from histories import append_rows
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from watching import arrays

import gradstat
from gradstat import History, LinearBins, Log2Bins
from gradstat.engines import cpu

N_STEPS = 2
LEARNING_RATE = 2.0**-10
# Neither 2 nor 4 ranks share these rows evenly, and some get none.
SIZES = (6, 5, 3, 1)
EVERYTHING = ("grad", "param", "update", "activation", "grad_output")
FIXED = LinearBins(16, -64.0, 64.0)


class Model(nn.Sequential):
    def __init__(self, reentrant: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(SIZES):
            layers += [nn.Linear(n_in, n_out, bias=False, dtype=torch.float64), nn.ReLU()]
            weight = torch.randint(-2, 3, (n_out, n_in), generator=generator)
            layers[-2].weight.data.copy_(weight)
        super().__init__(*layers[:-1])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if not self.reentrant:
            return super().forward(x)
        for layer in self:
            x = checkpoint(layer, x.requires_grad_(), use_reentrant=True)
        return x


class Scale(nn.Module):
    """As a norm: a weight that no plan of tensor parallelism cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 7.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Scaled(nn.Module):
    """Integers in, integers out."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.scale = Scale()
        self.up = nn.Linear(6, 8, bias=False, dtype=torch.float64)
        self.down = nn.Linear(8, 6, bias=False, dtype=torch.float64)
        for layer in (self.up, self.down):
            weight = torch.randint(-2, 3, layer.weight.shape, generator=generator)
            layer.weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(self.scale(x))))
        return y


class Experts(nn.Module):
    """Three experts, which two ranks share unevenly, and a router that each has whole."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        weight = torch.arange(3 * 4 * 6, dtype=torch.float64).reshape(3, 4, 6).remainder(5) - 2
        self.router = Scale()
        self.experts = nn.Parameter(
            weight if mesh is None else distribute_tensor(weight, mesh, [Shard(0)])
        )

    def forward(self, x: Tensor) -> Tensor:
        own = self.experts
        local = own.to_local() if isinstance(own, DTensor) else own
        y = self.router(x)
        # The router's gradient is that of what all experts share, so the same on each rank.
        return torch.einsum("bsi,eoi->bseo", y.detach(), local).sum() + y.square().sum()


def plan(is_by_sequence: bool) -> dict[str, ParallelStyle]:
    if not is_by_sequence:
        return {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return {
        "scale": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }


def tokens(rank: int) -> Tensor:
    """Sequences of four."""
    generator = torch.Generator().manual_seed(50 + rank)
    return torch.randint(-3, 4, (2, 4, 6), generator=generator).double()


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(-3, 4, (4, SIZES[0]), generator=generator).double()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, set_to_none: bool = True
) -> None:
    for step in range(N_STEPS):
        optimizer.zero_grad(set_to_none)
        model(batch(step, rank)).sum().backward()
        optimizer.step()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def extreme_tensors(world: int) -> dict[str, list[Tensor]]:
    """Values of each rank from which a variance is hard to compute; the last rank has one."""
    generator = torch.Generator().manual_seed(5)
    cases = {"far": (1e6, 1.0), "tiny": (0.0, 1e-30), "huge": (0.0, 1e30), "apart": (0.0, 1.0)}
    return {
        name: [
            mean * (rank + 1)
            + 5.0 * rank * (name == "apart")
            + std * torch.randn(1 if rank == world - 1 else 50, generator=generator).double()
            for rank in range(world)
        ]
        for name, (mean, std) in cases.items()
    }


def edge_tensors(world: int) -> dict[str, list[Tensor]]:
    """Values of each rank, float64, that squares and sums do not hold, or that are all equal."""
    ends = [-1e307, 1e307] * (world // 2)
    return {
        "opposite": [torch.full((100,), end, dtype=torch.float64) for end in ends],
        "equal": [torch.full((3 + rank,), 0.1, dtype=torch.float64) for rank in range(world)],
    }


FORMATS = ("float8_e5m2", "nvfp4")
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier")


@contextmanager
def counted_launches() -> Iterator[list[int]]:
    """How many gradients each call of the engine measures."""
    sizes: list[int] = []
    original = cpu.Plan.run

    def run(plan: cpu.Plan, tensors: list[Tensor], *arguments: object) -> object:
        result = original(plan, tensors, *arguments)
        if result is not None:
            sizes.append(len(tensors))
        return result

    cpu.Plan.run = run
    try:
        yield sizes
    finally:
        cpu.Plan.run = original


@contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """The names of collectives that Python code asks for."""
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


class Rank:
    def __init__(self, rank: int, world: int, directory: Path) -> None:
        self.rank, self.world, self.directory = rank, world, directory

    def keep(self, name: str, history: History) -> None:
        history.save(self.directory / f"{name}.{self.rank}.npz")

    def note(self, name: str, text: str) -> None:
        (self.directory / f"{name}.{self.rank}.txt").write_text(text)

    def keep_both(self, name: str, history: History, **options: object) -> None:
        self.keep(name, history)
        self.keep(f"{name}_merged", history.reduce(**options))

    def run(self) -> None:
        self.run_ddp()
        self.run_fsdp()
        self.run_refused()
        self.run_stages()
        self.run_tensor_parallel()
        if self.world == 4:
            self.run_two_dimensions()
        for name, tensors in (extreme_tensors(self.world) | edge_tensors(self.world)).items():
            history = History(["weight"], Log2Bins())
            append_rows(history, 0, *arrays(gradstat.statistics([tensors[self.rank]])))
            self.keep_both(f"extreme_{name}", history)

    def run_tensor_parallel(self) -> None:
        """All ranks have one batch; with sequence parallelism each has rows of it."""
        mesh = init_device_mesh("cpu", (self.world,))
        model = parallelize_module(Scaled(), mesh, plan(is_by_sequence=False))
        self.watch_parallel("tp", model, tokens(0))
        model = parallelize_module(Scaled(), mesh, plan(is_by_sequence=True))
        optimizer = make_optimizer(model)
        with (
            gradstat.watch(model) as partial,
            gradstat.watch(model, when="step", optimizer=optimizer) as whole,
        ):
            model(tokens(0).chunk(self.world, 1)[self.rank]).sum().backward()
            gradient = model.scale.weight.grad
            model.scale.weight.grad = gradient.redistribute(placements=[Replicate()])
            optimizer.step()
        self.keep("tp_sequence", partial.history)
        self.keep("tp_sequence_merged", partial.history.reduce(replicated=False))
        self.keep_both("tp_sequence_step", whole.history)
        try:
            partial.history.reduce()
        except ValueError as error:
            self.note("refused_partial", str(error))

    def run_two_dimensions(self) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        replica, part = divmod(self.rank, 2)
        for name, is_by_sequence in (("2d", False), ("2d_sequence", True)):
            model = parallelize_module(Scaled(), mesh["tp"], plan(is_by_sequence))
            fully_shard(model, mesh=mesh["dp"])
            x = tokens(replica)
            self.watch_parallel(name, model, x.chunk(2, 1)[part] if is_by_sequence else x)
        model = Scaled()
        for layer in (model.scale, model.up, model.down):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self.watch_parallel("2d_hsdp", model, tokens(self.rank))
        experts = Experts(mesh["tp"])
        fully_shard(experts, mesh=mesh["dp"])
        self.watch_parallel("experts", experts, tokens(replica))
        # Meshes that do not know of each other.
        model = Scaled()
        for ranks in ([0, 2], [1, 3]):
            apart = DeviceMesh("cpu", ranks)
            if self.rank in ranks:
                fully_shard(model, mesh=apart)
        self.watch_parallel("apart", model, tokens(replica))
        # Copies that are none: each mesh has another batch.
        model = Scaled()
        fully_shard(model, mesh=mesh["dp"])
        with gradstat.watch(model, path=self.directory / "unequal_run") as w:
            model(tokens(self.rank)).sum().backward()
        self.keep("unequal_merged", w.history.reduce(replicated=False))
        try:
            w.history.reduce()
        except ValueError as error:
            self.note("refused_unequal", str(error))

    def watch_parallel(self, name: str, model: nn.Module, x: Tensor) -> None:
        optimizer = make_optimizer(model)
        what = ("grad", "param", "update")
        with counted_collectives() as own_calls:
            model(x).sum().backward()
            model.zero_grad()
        with (
            gradstat.watch(model, path=self.directory / f"{name}_run") as w,
            gradstat.watch(model, what=what, when="step", optimizer=optimizer) as all_,
            counted_collectives() as calls,
        ):
            model(x).sum().backward()
            optimizer.step()
        self.note(f"{name}_collectives_added", str(len(calls) - len(own_calls)))
        self.keep_both(name, w.history)
        self.keep_both(f"{name}_all", all_.history)

    def run_stages(self) -> None:
        """Each rank has another layer, in a process of its own, as in a pipeline."""
        model = nn.Sequential(*(nn.Identity() for _ in range(self.world)))
        model[self.rank] = Model()[0]
        with gradstat.watch(model, path=self.directory / "stages") as w:
            model(batch(0, self.rank)).sum().backward()
            w.log(loss=self.rank)
        self.keep_both("stages", w.history)

    def note_launches(self, name: str, model: nn.Module) -> None:
        with gradstat.watch(model), counted_launches() as sizes:
            model(batch(0, self.rank)).sum().backward()
        self.note(f"{name}_launches", str(sizes))

    def run_ddp(self) -> None:
        for name, options, set_to_none in (
            ("ddp", {}, True),
            ("ddp_view", {"gradient_as_bucket_view": True}, False),
            ("ddp_static", {"static_graph": True}, True),
            ("ddp_static_view", {"static_graph": True, "gradient_as_bucket_view": True}, False),
            ("ddp_reentrant", {"static_graph": True}, False),
        ):
            model = DistributedDataParallel(Model(reentrant=name == "ddp_reentrant"), **options)
            optimizer = make_optimizer(model)
            with (
                gradstat.watch(
                    model, path=self.directory / f"{name}_run", formats=FORMATS
                ) as local,
                gradstat.watch(model, when="step", optimizer=optimizer) as averaged,
                gradstat.watch(model, FIXED) as linear,
                gradstat.watch(model, what=EVERYTHING, when="step", optimizer=optimizer) as all_,
                counted_collectives() as calls,
            ):
                train(model, optimizer, self.rank, set_to_none)
            self.note_launches(name, model)
            self.keep_both(name, local.history)
            self.keep_both(f"{name}_step", averaged.history)
            self.keep_both(f"{name}_all", all_.history)
            if name == "ddp":
                self.note("collectives_in_training", " ".join(calls))
                with counted_collectives() as calls:
                    again = local.history.reduce().reduce()
                self.note("collectives_of_reduce", " ".join(calls[: len(calls) // 2]))
                self.keep("ddp_merged_twice", again)
                self.keep("ddp_as_replicated_one", self.reduce_alone(local.history))
                self.keep_both("ddp_linear", linear.history)
                averaged.history.save(self.directory / f"again.{self.rank}.npz")
                loaded = History.load(self.directory / f"again.{self.rank}.npz")
                self.keep("ddp_step_loaded_merged", loaded.reduce())
                self.keep("ddp_step_summed", averaged.history.reduce(replicated=False))
        self.run_unused()

    def reduce_alone(self, history: History) -> History:
        """Over a group of this rank only."""
        groups = [dist.new_group([rank]) for rank in range(self.world)]
        return history.reduce(groups[self.rank])

    def run_unused(self) -> None:
        """Layer 2 has no gradient but on the first rank."""
        model = DistributedDataParallel(Model(), find_unused_parameters=True)
        inner = model.module
        inner.forward = lambda x: (
            nn.Sequential.forward(inner, x) if self.rank == 0 else inner[4](inner[0](x)[:, :3])
        )
        with gradstat.watch(model) as w:
            model(batch(0, self.rank)).sum().backward()
        self.keep_both("unused", w.history)

    def run_fsdp(self) -> None:
        meshes = {"fsdp": init_device_mesh("cpu", (self.world,))}
        if self.world == 4:
            meshes["hsdp"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        for name, mesh in meshes.items():
            model = Model()
            for layer in model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            optimizer = make_optimizer(model)
            with (
                gradstat.watch(model, path=self.directory / f"{name}_run") as w,
                gradstat.watch(model, when="step", optimizer=optimizer) as applied,
                gradstat.watch(model, what=EVERYTHING, when="step", optimizer=optimizer) as all_,
                counted_collectives() as calls,
            ):
                train(model, optimizer, self.rank)
            self.note_launches(name, model)
            self.note(f"{name}_collectives", " ".join(calls))
            self.keep_both(name, w.history)
            self.keep_both(f"{name}_step", applied.history)
            self.keep_both(f"{name}_all", all_.history)
            if name == "hsdp":
                self.keep("hsdp_shard_merged", w.history.reduce(mesh.get_group("shard")))
                self.keep("hsdp_replica_merged", w.history.reduce(mesh.get_group("replica")))

    def run_refused(self) -> None:
        one = arrays(gradstat.statistics([torch.full((3,), float(self.rank + 1))]))
        steps = History(["weight"], Log2Bins())
        append_rows(steps, self.rank, *one)
        bins = History(["weight"], LinearBins(2048, 0.0, self.rank + 1.0))
        replicas = History(["weight"], Log2Bins())
        append_rows(replicas, 7, *one)
        ranges = History(["weight"], LinearBins(2048))
        ranged = gradstat.statistics([torch.arange(4.0) * (self.rank + 1)], LinearBins(2048))
        append_rows(ranges, 5, *arrays(ranged))
        for name, history, replicated in (
            ("steps", steps, None),
            ("bins", bins, None),
            ("replicas", replicas, True),
            ("ranges", ranges, None),
        ):
            try:
                history.reduce(replicated=replicated)
            except ValueError as error:
                self.note(f"refused_{name}", str(error))


def main(rank: int, world: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'meeting'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=40),
    )
    Rank(rank, world, directory).run()
    dist.destroy_process_group()


def fork(world: int, directory: Path) -> bool:
    """Run all ranks; whether all went through."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=main, args=(rank, world, directory)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return all(rank.exitcode == 0 for rank in ranks)


if __name__ == "__main__":
    warnings.filterwarnings("error", category=UserWarning, module=r"gradstat\Z")
    # What all ranks import is imported once.
    import torch._dynamo

    torch.set_num_threads(1)
    gradstat.statistics([torch.ones(1, dtype=torch.float64)])
    worlds, directories = map(int, sys.argv[1::2]), map(Path, sys.argv[2::2])
    sys.exit(not all(map(fork, worlds, directories)))
