"""Two and four processes train on gloo; one process computes what they must have measured."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from distributed_workers import (
    FIXED,
    FORMATS,
    LEARNING_RATE,
    N_STEPS,
    Experts,
    Model,
    Scaled,
    batch,
    edge_tensors,
    extreme_tensors,
    tokens,
)
from programs import run_python
from torch import Tensor, nn
from watching import assert_same, is_absent

import gradstat
from gradstat import History, Log2Bins, Statistics
from gradstat.bins import Bins
from gradstat.results import QUANTIZATION_COUNTS

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.host("trains on the CPU in processes of its own"),
]

LAYERS = ["0.weight", "2.weight", "4.weight"]
WORKER = ROOT / "tests" / "distributed_workers.py"


class Run:
    """What the ranks of one run have left."""

    def __init__(self, world: int, directory: Path) -> None:
        self.world, self.directory = world, directory

    def history(self, name: str, rank: int = 0) -> History:
        return History.load(self.directory / f"{name}.{rank}.npz")

    def histories(self, name: str) -> list[History]:
        return [self.history(name, rank) for rank in range(self.world)]

    def merged(self, name: str) -> History:
        """What `reduce` returned, which is the same on each rank."""
        first, *others = self.histories(f"{name}_merged")
        for other in others:
            assert_same(other, first)
        return first

    def note(self, name: str) -> str:
        """What all ranks have noted."""
        notes = {(self.directory / f"{name}.{rank}.txt").read_text() for rank in range(self.world)}
        assert len(notes) == 1
        return notes.pop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """Of two and of four ranks, all forked from one process."""
    directories = {world: tmp_path_factory.mktemp(f"{world}-ranks") for world in (2, 4)}
    run_python(WORKER, *itertools.chain(*directories.items()), check=True)
    return {world: Run(world, directory) for world, directory in directories.items()}


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def run(request: pytest.FixtureRequest, runs: dict[int, Run]) -> Run:
    return runs[request.param]


def expected_gradients(world: int) -> list[list[list[Tensor]]]:
    """Gradient of each step, rank and layer, of a training that averages them over the ranks."""
    model, steps = Model(), []
    weights = list(model.parameters())
    for step in range(N_STEPS):
        ranks = [
            [g.clone() for g in torch.autograd.grad(model(batch(step, rank)).sum(), weights)]
            for rank in range(world)
        ]
        steps.append(ranks)
        with torch.no_grad():
            for weight, mean in zip(weights, averages(ranks), strict=True):
                weight -= LEARNING_RATE * mean
    return steps


def expected_outputs(world: int) -> list[dict[str, list[Tensor]]]:
    """Of each step what all ranks have of parameters, updates, outputs and their gradients."""
    model, steps = Model(), []
    weights = list(model.parameters())
    for step, ranks in enumerate(expected_gradients(world)):
        outputs, gradients = [], []
        for rank in range(world):
            outputs.append([])
            x = batch(step, rank)
            for layer in model:
                x = layer(x)
                outputs[-1].append(x)
            gradients.append(torch.autograd.grad(x.sum(), outputs[-1]))
        outputs = [[x.detach() for x in rank] for rank in outputs]
        # Nothing changes by 0.0, not by -0.0.
        updates = [0.0 - LEARNING_RATE * mean for mean in averages(ranks)]
        steps.append(
            {
                "grad": averages(ranks),
                "param": [weight.detach().clone() for weight in weights],
                "update": updates,
                "activation": unions(outputs),
                "unit": unions([[x.abs().amax(0) for x in rank] for rank in outputs]),
                "grad_output": unions(gradients),
            }
        )
        with torch.no_grad():
            for weight, update in zip(weights, updates, strict=True):
                weight += update
    return steps


def averages(ranks: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(layer).mean(0) for layer in zip(*ranks, strict=True)]


def unions(ranks: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(layer) for layer in zip(*ranks, strict=True)]


def shards(mean: list[Tensor], world: int, rank: int) -> list[Tensor]:
    """What FSDP2 gives a rank of each layer: rows as `torch.chunk` cuts them, or none."""
    chunks = [layer.chunk(world) for layer in mean]
    return [c[rank] if rank < len(c) else x[:0] for c, x in zip(chunks, mean, strict=True)]


def assert_history(got: History, expected: list[list[Tensor]], bins: Bins | None = None) -> None:
    """Compare with the gradients of each step and layer: counts and extremes exactly."""
    bins = bins or Log2Bins()
    assert got.steps.tolist() == list(range(len(expected)))
    for step, tensors in enumerate(expected):
        record, right = got.record(step), gradstat.statistics(tensors, bins, engine="reference")
        assert_close(record, right)
        assert torch.equal(record.numel, torch.tensor([x.numel() for x in tensors]))


def assert_close(got: Statistics, right: Statistics) -> None:
    assert torch.equal(got.integers, right.integers)
    assert torch.equal(got.counts, right.counts)
    # min, max, and the range of the histogram
    exact, rest = [0, 1, 6, 7], [2, 3, 4, 5]
    assert got.floats[:, exact].numpy().tobytes() == right.floats[:, exact].numpy().tobytes()
    torch.testing.assert_close(
        got.floats[:, rest], right.floats[:, rest], rtol=1e-12, atol=1e-12, equal_nan=True
    )


DDP = ["ddp", "ddp_view", "ddp_static", "ddp_static_view", "ddp_reentrant"]


@pytest.mark.parametrize("name", DDP)
def test_watch_records_each_ranks_own_gradients_under_ddp(run: Run, name: str) -> None:
    steps = expected_gradients(run.world)
    for rank, history in enumerate(run.histories(name)):
        assert history.layers == LAYERS
        # Gradients of different ranks must differ, or this could not tell them apart.
        assert not torch.equal(steps[0][0][0], steps[0][1][0])
        assert_history(history, [ranks[rank] for ranks in steps])


@pytest.mark.parametrize("name", DDP)
def test_reduce_merges_the_ranks_own_gradients(run: Run, name: str) -> None:
    assert_history(run.merged(name), [unions(ranks) for ranks in expected_gradients(run.world)])


@pytest.mark.parametrize("name", DDP)
def test_watch_at_step_records_averages_that_reduce_counts_once(run: Run, name: str) -> None:
    expected = [averages(ranks) for ranks in expected_gradients(run.world)]
    for history in run.histories(f"{name}_step"):
        assert_history(history, expected)
    assert_history(run.merged(f"{name}_step"), expected)


def test_reduce_knows_replicas_after_save_and_load(run: Run) -> None:
    assert_same(run.history("ddp_step_loaded_merged"), run.merged("ddp_step"))


def test_reduce_sums_replicas_when_told_that_they_are_none(run: Run) -> None:
    expected = [averages(ranks) for ranks in expected_gradients(run.world)]
    repeated = [[torch.cat([x] * run.world) for x in layers] for layers in expected]
    assert_history(run.history("ddp_step_summed"), repeated)


def test_reduce_merges_linear_bins_of_one_range(run: Run) -> None:
    expected = [unions(ranks) for ranks in expected_gradients(run.world)]
    merged = run.merged("ddp_linear")
    assert_history(merged, expected, FIXED)
    assert merged["below"].sum() + merged["above"].sum() > 0


def test_reduce_has_the_layers_of_all_stages(run: Run) -> None:
    merged = run.merged("stages")
    assert merged.layers == [f"{rank}.weight" for rank in range(run.world)]
    assert merged.scalars == [f"rank{rank}/loss" for rank in range(run.world)]
    weight = next(Model().parameters())
    gradients = [
        torch.autograd.grad(nn.functional.linear(batch(0, rank), weight).sum(), weight)[0]
        for rank in range(run.world)
    ]
    assert_history(merged, [gradients])


@pytest.mark.parametrize("name", ["ddp", "ddp_view", "fsdp", "hsdp", "stages"])
def test_history_load_merges_what_the_ranks_wrote_as_reduce_does(run: Run, name: str) -> None:
    if name == "hsdp" and run.world < 4:
        pytest.skip("a mesh of two dimensions needs four ranks")
    folder = run.directory / (name if name == "stages" else f"{name}_run")
    assert sorted(each.name for each in folder.iterdir()) == [
        f"rank-{rank}" for rank in range(run.world)
    ]
    loaded, merged = History.load(folder), run.merged(name)
    assert loaded.layers == merged.layers
    assert loaded.scalars == merged.scalars
    assert loaded.order == merged.order
    for step in merged.steps.tolist():
        assert_close(loaded.record(step), merged.record(step))
    for got in (History.merge(run.histories(name)), loaded):
        assert got.steps.tolist() == merged.steps.tolist()
    assert loaded.formats == merged.formats == (list(FORMATS) if name.startswith("ddp") else [])
    for form in loaded.formats:
        found, expected = loaded.quantization(form), merged.quantization(form)
        each = [history.quantization(form) for history in run.histories(name)]
        for field in QUANTIZATION_COUNTS:
            total = sum(part[field] for part in each)
            np.testing.assert_array_equal(found[field], total)
            np.testing.assert_array_equal(expected[field], total)
        for field, values in expected.items():
            np.testing.assert_allclose(found[field], values, rtol=1e-9)
    own = History.load(folder / "rank-1")
    assert (own.rank, own.world) == (1, run.world)


def parallel_gradients(name: str, world: int) -> list[Tensor]:
    """What one process computes of `Scaled` or `Experts`, averaged over what each rank has."""
    model = Experts() if name == "experts" else Scaled()
    n = {"tp": 1, "tp_sequence_step": 1, "2d_hsdp": world, "unequal": world}.get(name, 2)
    weights = list(model.parameters())
    ranks = [list(torch.autograd.grad(model(tokens(at)).sum(), weights)) for at in range(n)]
    return averages(ranks)


PARALLEL = ["tp", "2d", "2d_sequence", "2d_hsdp", "experts", "apart"]


def skip_without_four(run: Run, name: str) -> None:
    if run.world < 4 and not name.startswith("tp"):
        pytest.skip("a mesh of two dimensions needs four ranks")


@pytest.mark.parametrize("name", [*PARALLEL, "tp_sequence_step"])
def test_reduce_counts_each_part_once_on_any_mesh(run: Run, name: str) -> None:
    skip_without_four(run, name)
    assert_history(run.merged(name), [parallel_gradients(name, run.world)])
    # Each rank has less than the whole of some layer: there was something to merge.
    whole = run.merged(name)["numel"]
    assert any((own["numel"] < whole).any() for own in run.histories(name))


@pytest.mark.parametrize("name", PARALLEL)
def test_history_load_counts_each_part_once_on_any_mesh(run: Run, name: str) -> None:
    skip_without_four(run, name)
    expected = [parallel_gradients(name, run.world)]
    assert_history(History.load(run.directory / f"{name}_run"), expected)
    assert_history(History.merge(run.histories(name)), expected)


@pytest.mark.parametrize("name", PARALLEL)
def test_reduce_counts_parameters_and_updates_once_on_any_mesh(run: Run, name: str) -> None:
    skip_without_four(run, name)
    model = Experts() if name == "experts" else Scaled()
    gradients = parallel_gradients(name, run.world)
    merged = run.merged(f"{name}_all")
    assert_history(merged.select("grad"), [gradients])
    assert_history(merged.select("param"), [[p.detach() for p in model.parameters()]])
    assert_history(merged.select("update"), [[0.0 - LEARNING_RATE * g for g in gradients]])


@pytest.mark.parametrize("name", PARALLEL)
def test_watch_adds_no_collective_on_any_mesh(run: Run, name: str) -> None:
    skip_without_four(run, name)
    assert run.note(f"{name}_collectives_added") == "0"


def test_reduce_refuses_copies_on_other_meshes_that_differ(run: Run) -> None:
    skip_without_four(run, "2d")
    says = (
        "needs what is the same on several ranks to be equal there; the gradient of scale.weight "
        "in step 0 is not the same on ranks 0 and 1: measure it when it is whole, as with "
        "when='step', or pass replicated=False if each rank has its own"
    )
    assert run.note("refused_unequal") == f"reduce() {says}"
    with pytest.raises(ValueError, match=re.escape(says)):
        History.load(run.directory / "unequal_run")
    # Each of two meshes has averaged over two ranks.
    model = Scaled()
    weights = list(model.parameters())
    ranks = [list(torch.autograd.grad(model(tokens(at)).sum(), weights)) for at in range(4)]
    both = [averages([ranks[0], ranks[2]]), averages([ranks[1], ranks[3]])]
    parts = [run.directory / "unequal_run" / f"rank-{rank}" for rank in range(4)]
    for merged in (run.merged("unequal"), History.merge(parts, replicated=False)):
        assert_history(merged, [unions(both)])


def test_reduce_refuses_gradients_that_are_partial(run: Run) -> None:
    says = (
        "needs gradients that are whole; the gradient of scale.weight is partial on ranks 0 and 1, "
        "a sum that has not been taken: redistribute it before a step that is measured with "
        "when='step', or pass replicated=False if each rank's part is to count"
    )
    assert run.note("refused_partial") == f"reduce() {says}"
    with pytest.raises(ValueError, match=re.escape(says)):
        History.merge(run.histories("tp_sequence"))
    merged = run.merged("tp_sequence")
    assert merged["numel"].tolist() == [[6 * run.world, 48, 48]]


def test_reduce_has_the_arithmetic_of_statistics_merge(run: Run) -> None:
    for name, tensors in edge_tensors(run.world).items():
        got = run.merged(f"extreme_{name}").record()
        # Of values that are as large, as a share of the largest.
        std = 0.0 if name == "equal" else 1e307 * float((torch.cat(tensors) / 1e307).std())
        assert float(got.std) == pytest.approx(std, rel=1e-12, abs=0)
        assert int(got.numel) == sum(x.numel() for x in tensors)


def test_noise_scale_reads_own_and_averaged_gradients(run: Run) -> None:
    own, averaged = run.merged("ddp"), run.merged("ddp_step")
    noise = gradstat.noise_scale(own, averaged, 4, 4 * run.world, decay=0)
    steps = expected_gradients(run.world)
    for step, ranks in enumerate(steps):
        squares = [float(sum(x.square().sum() for x in layers)) for layers in ranks]
        small = sum(squares) / run.world
        big = float(sum(x.square().sum() for x in averages(ranks)))
        trace = (small - big) / (1 / 4 - 1 / (4 * run.world))
        signal = (4 * run.world * big - 4 * small) / (4 * run.world - 4)
        expected = trace / signal if signal > 0 else np.nan
        assert noise.whole[step] == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_reduce_of_what_is_reduced_changes_nothing(run: Run) -> None:
    merged, again = run.merged("ddp"), run.history("ddp_merged_twice")
    for step in merged.steps.tolist():
        assert_close(again.record(step), merged.record(step))


def test_reduce_over_one_rank_changes_nothing(run: Run) -> None:
    for alone, own in zip(
        run.histories("ddp_as_replicated_one"), run.histories("ddp"), strict=True
    ):
        for step in own.steps.tolist():
            assert_close(alone.record(step), own.record(step))


def test_reduce_gathers_windows_and_training_takes_no_collective(run: Run) -> None:
    assert run.note("collectives_in_training") == ""
    assert run.note("fsdp_collectives") == ""
    assert run.note("collectives_of_reduce") == "all_gather_object all_gather_object"


def test_watch_measures_gradients_together_where_nothing_changes_them(run: Run) -> None:
    assert run.note("ddp_launches") == run.note("fsdp_launches") == "[3]"
    assert run.note("ddp_static_launches") == "[1, 1, 1]"


def test_reduce_takes_layers_that_some_ranks_lack(run: Run) -> None:
    model = Model()
    whole = torch.autograd.grad(model(batch(0, 0)).sum(), list(model.parameters()))
    gradients = [list(whole)]
    for rank in range(1, run.world):
        y = model[4](model[0](batch(0, rank))[:, :3])
        gradients.append(list(torch.autograd.grad(y.sum(), [model[0].weight, model[4].weight])))
    for rank, history in enumerate(run.histories("unused")):
        assert is_absent(history.record(0)) == [False, rank > 0, False]
    first, last = (torch.cat([ranks[i] for ranks in gradients]) for i in (0, -1))
    assert_history(run.merged("unused"), [[first, whole[1], last]])


@pytest.mark.parametrize("name", ["ddp", "ddp_static", "fsdp", "hsdp"])
def test_reduce_merges_each_kind_by_who_holds_it(run: Run, name: str) -> None:
    if name == "hsdp" and run.world < 4:
        pytest.skip("a mesh of two dimensions needs four ranks")
    steps = expected_outputs(run.world)
    history = run.merged(f"{name}_all")
    for kind in steps[0]:
        assert_history(history.select(kind), [step[kind] for step in steps])


@pytest.mark.parametrize("name", ["fsdp", "fsdp_step"])
def test_watch_records_each_ranks_shard_under_fsdp(run: Run, name: str) -> None:
    means = [averages(ranks) for ranks in expected_gradients(run.world)]
    sizes = set()
    for rank, history in enumerate(run.histories(name)):
        assert history.layers == LAYERS
        assert_history(history, [shards(mean, run.world, rank) for mean in means])
        sizes |= set(history["numel"].ravel().tolist())
    assert 0 in sizes  # a rank without rows


@pytest.mark.parametrize("name", ["fsdp", "fsdp_step"])
def test_reduce_puts_uneven_and_empty_shards_together(run: Run, name: str) -> None:
    assert_history(run.merged(name), [averages(ranks) for ranks in expected_gradients(run.world)])


@pytest.mark.parametrize("name", ["hsdp", "hsdp_step"])
def test_reduce_counts_replicated_shards_once(run: Run, name: str) -> None:
    if run.world < 4:
        pytest.skip("a mesh of two dimensions needs four ranks")
    means = [averages(ranks) for ranks in expected_gradients(run.world)]
    assert_history(run.merged(name), means)
    for rank, history in enumerate(run.histories(name)):
        assert_history(history, [shards(mean, 2, rank % 2) for mean in means])


def test_reduce_over_a_part_of_a_mesh_merges_what_its_ranks_hold(run: Run) -> None:
    if run.world < 4:
        pytest.skip("a mesh of two dimensions needs four ranks")
    means = [averages(ranks) for ranks in expected_gradients(run.world)]
    for rank in range(4):
        assert_history(run.history("hsdp_shard_merged", rank), means)
        own = [shards(mean, 2, rank % 2) for mean in means]
        assert_history(run.history("hsdp_replica_merged", rank), own)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("steps", "the same steps on each rank; steps on rank 1 is [1], on rank 0 [0]"),
        (
            "bins",
            "the same bins on each rank; bins on rank 1 is LinearBins(2048, 0.0, 2.0), on "
            "rank 0 LinearBins(2048, 0.0, 1.0)",
        ),
        (
            "replicas",
            "what is the same on several ranks to be equal there; the gradient of weight in step "
            "7 is not the same on ranks 0 and 1: measure it when it is whole, as with "
            "when='step', or pass replicated=False if each rank has its own",
        ),
        (
            "ranges",
            "Log2Bins, or LinearBins with a range; the range of LinearBins(2048) of weight in step "
            "5 is not the same on all",
        ),
    ],
)
def test_reduce_refuses_on_each_rank(run: Run, name: str, message: str) -> None:
    assert run.note(f"refused_{name}") == f"reduce() needs {message}"


def test_reduce_merges_values_far_from_zero_and_of_any_size(run: Run) -> None:
    for name, tensors in extreme_tensors(run.world).items():
        merged = run.merged(f"extreme_{name}")
        right = gradstat.statistics([torch.cat(tensors)], engine="reference")
        assert torch.equal(merged.record().integers, right.integers)
        torch.testing.assert_close(
            merged.record().floats, right.floats, rtol=1e-9, atol=0, equal_nan=True
        )
    assert np.isfinite(merged["std"]).all()
