import copy
import math
import pickle
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import gradstat
from gradstat import LinearBins, Log2Bins, Statistics
from gradstat.bins import Bins
from gradstat.history import FIELDS

SCHEMES = [
    Log2Bins(),
    LinearBins(6, -0.05, 0.05),
    LinearBins(6),
    LinearBins(6, nice=True),
    LinearBins(6, track=True),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


WEIGHTS = ["0.weight", "2.weight", "4.weight"]


def backward(model: nn.Module, n: int = 8) -> None:
    loss: Tensor = model(torch.randn(n, 6)).square().mean()
    loss.backward()


def gradients(model: nn.Module, names: list[str]) -> list[Tensor]:
    """Copies of the gradients of some parameters."""
    parameters = dict(model.named_parameters())
    return [parameters[name].grad.clone() for name in names]


def train(model: nn.Module, n_steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(n_steps):
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def n_hooks(model: nn.Module) -> int:
    per_parameter = [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in model.parameters()]
    per_module = [
        (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        for m in model.modules()
    ]
    return sum(len(hooks) for group in per_parameter + per_module for hooks in group if hooks)


def assert_record(record: Statistics, expected: Statistics) -> None:
    assert record.bins == expected.bins
    assert torch.equal(record.integers, expected.integers)
    assert record.floats.numpy().tobytes() == expected.floats.numpy().tobytes()
    assert torch.equal(record.counts, expected.counts)


def is_absent(record: Statistics) -> list[bool]:
    """Whether each layer has a row of no values."""
    for row in record:
        present = int(row.numel) > 0
        assert present or (row.integers.eq(0).all() and row.floats.isnan().all())
        assert present or row.counts.eq(0).all()
    return [int(row.numel) == 0 for row in record]


@pytest.mark.parametrize("options", [{}, {"bucket_bytes": 1}, {"every": 3}])
@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_watch_leaves_training_bit_identical(bins: Bins, options: dict[str, int]) -> None:
    model = make_model()
    watched = copy.deepcopy(model)
    torch.manual_seed(1)
    train(model, 5)
    torch.manual_seed(1)
    with gradstat.watch(watched, bins, **options) as w:
        train(watched, 5)
    assert len(w.history) == len(range(0, 5, options.get("every", 1)))
    for mine, theirs in zip(watched.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("bucket_bytes", [1, 100, 25 << 20])
@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_watch_records_the_statistics_of_each_gradient(bins: Bins, bucket_bytes: int) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    previous = None
    with gradstat.watch(model, bins, bucket_bytes=bucket_bytes) as w:
        for step in range(4):
            backward(model)
            tracked = previous if bins == LinearBins(6, track=True) else None
            expected = gradstat.statistics(gradients(model, WEIGHTS), bins, previous=tracked)
            assert w.history.steps.tolist() == list(range(step + 1))
            assert_record(w.last, expected)
            previous = expected
            optimizer.step()
            optimizer.zero_grad()
    assert w.history.layers == WEIGHTS
    assert len(w.history) == 4
    for field in FIELDS:
        assert w.history[field].shape == (4, 3)


def test_watch_works_with_each_engine(engine: Any) -> None:
    model = nn.Linear(6, 2, bias=False).to(engine.device)
    with gradstat.watch(model, engine=engine.name) as w:
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(3, 6, device=engine.device)).square().sum().backward()
            expected = gradstat.statistics([model.weight.grad], engine="reference").to("cpu")
            assert torch.equal(w.last.integers, expected.integers)
            assert torch.equal(w.last.counts, expected.counts)
            torch.testing.assert_close(w.last.floats, expected.floats, rtol=1e-5, atol=0)
    assert w.history.steps.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_watch_records_any_float_type(dtype: torch.dtype) -> None:
    model = nn.Linear(6, 2).to(dtype)
    with gradstat.watch(model) as w:
        model(torch.randn(3, 6, dtype=dtype)).square().sum().backward()
    assert_record(w.last, gradstat.statistics([model.weight.grad]))


def test_watch_goes_on_after_the_model_is_cast() -> None:
    model = nn.Linear(6, 2)
    with gradstat.watch(model, LinearBins(3, track=True)) as w:
        backward(model)
        model.zero_grad()
        model.double()(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    assert w.history["numel"].tolist() == [[12], [12]]
    assert w.history["max"][1].tolist() == [2.0]


def test_watch_every_records_each_nth_step() -> None:
    model = make_model()
    with gradstat.watch(model, every=3) as w:
        for step in range(8):
            model.zero_grad()
            backward(model)
            if step % 3 == 0:
                assert_record(w.last, gradstat.statistics(gradients(model, WEIGHTS)))
    assert w.history.steps.tolist() == [0, 3, 6]


def test_watch_accumulation_steps_records_the_whole_gradient() -> None:
    model = make_model()
    expected = []
    with gradstat.watch(model, accumulation_steps=3, every=2) as w:
        for step in range(4):
            model.zero_grad()
            for _ in range(3):
                assert len(w.history) == (step + 1) // 2
                backward(model)
            if step % 2 == 0:
                expected.append(gradstat.statistics(gradients(model, WEIGHTS)))
    assert w.history.steps.tolist() == [0, 2]
    for step, record in zip((0, 2), expected, strict=True):
        assert_record(w.history.record(step), record)


def test_watch_records_every_backward_of_a_sum_without_accumulation_steps() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        for step in range(3):
            backward(model)
            assert_record(w.history.record(step), gradstat.statistics(gradients(model, WEIGHTS)))
    assert len(w.history) == 3


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (None, WEIGHTS),
        ("", [name for name, _ in make_model().named_parameters()]),
        ("^2", ["2.weight", "2.bias"]),
        ("bias$", ["0.bias", "2.bias", "4.bias"]),
        (lambda name, p: p.ndim == 1 and "4" not in name, ["0.bias", "2.bias"]),
    ],
)
def test_watch_selects_parameters(parameters: Any, expected: list[str]) -> None:
    model = make_model()
    with gradstat.watch(model, parameters=parameters) as w:
        backward(model)
    assert w.history.layers == expected
    assert_record(w.last, gradstat.statistics(gradients(model, expected)))


def test_watch_records_tied_parameters_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    with gradstat.watch(model) as w:
        backward(model)
    assert w.history.layers == ["0.weight"]
    assert_record(w.last, gradstat.statistics(gradients(model, ["0.weight"])))


def test_watch_leaves_frozen_and_unused_parameters_absent() -> None:
    model = make_model()
    model.append(nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    tail = model[5]
    with gradstat.watch(model, LinearBins(5)) as w:
        model[:5](torch.randn(3, 6)).sum().backward()
        assert is_absent(w.last) == [True, False, False, True]
        tail(torch.ones(1, 2)).sum().backward()
        assert is_absent(w.last) == [True, True, True, False]
        assert not model[0].weight.requires_grad
    assert w.history["numel"].tolist() == [[0, 20, 12, 0], [0, 0, 0, 4]]
    assert np.isnan(w.history["mean"]).tolist() == [
        [True, False, False, True],
        [True, True, True, False],
    ]


def test_watch_sees_a_parameter_from_the_backward_after_it_is_unfrozen() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    with gradstat.watch(model) as w:
        backward(model)
        assert is_absent(w.last) == [True, False, False]
        model[0].requires_grad_(True)
        model[2].requires_grad_(False)
        model.zero_grad()
        backward(model)
        assert is_absent(w.last) == [False, True, False]
        model[2].requires_grad_(True)
        model.zero_grad()
        backward(model)
        assert_record(w.last, gradstat.statistics(gradients(model, WEIGHTS)))
    assert n_hooks(model) == 0


def test_watch_tracks_the_range_of_each_layer_through_steps_without_it() -> None:
    bins = LinearBins(5, track=True)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    first = model[0]
    with gradstat.watch(model, bins) as w:
        backward(model)
        expected = gradstat.statistics(gradients(model, ["0.weight", "1.weight"]), bins)
        model.zero_grad()
        first(torch.randn(3, 6)).sum().backward()
        row = gradstat.statistics(first.weight.grad, bins, previous=expected[0])
        assert_record(w.last[0], row)
        model.zero_grad()
        backward(model)
        for layer, previous in ((0, row), (1, expected[1])):
            gradient = model[layer].weight.grad
            assert_record(w.last[layer], gradstat.statistics(gradient, bins, previous=previous))


def test_watch_must_be_repeated_after_parameters_are_replaced() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        backward(model)
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        backward(model)
        assert len(w.history) == 1
        with gradstat.watch(model) as again:
            backward(model)
    assert (len(w.history), len(again.history)) == (1, 1)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_watch_does_not_mind_how_gradients_are_zeroed(set_to_none: bool) -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        for step in range(3):
            model.zero_grad(set_to_none=set_to_none)
            backward(model)
            assert_record(w.history.record(step), gradstat.statistics(gradients(model, WEIGHTS)))


def test_watch_records_gradients_that_are_not_finite() -> None:
    model = nn.Linear(4, 1, bias=False)
    with gradstat.watch(model) as w:
        model(torch.tensor([[math.nan, math.inf, -math.inf, 2.0]])).sum().backward()
    row = w.last[0]
    assert (int(row.numel), int(row.finite)) == (4, 1)
    assert (int(row.nan), int(row.posinf), int(row.neginf)) == (1, 1, 1)
    assert float(row.sum) == 2.0


def test_watch_records_an_empty_gradient() -> None:
    model = nn.ParameterDict({"a": nn.Parameter(torch.empty(0)), "b": nn.Parameter(torch.ones(2))})
    with gradstat.watch(model) as w:
        (model["a"].sum() + model["b"].sum()).backward()
    assert w.history["numel"].tolist() == [[0, 2]]
    assert w.history["l2"][0].tolist() == [0.0, math.sqrt(2)]


def test_watch_records_the_values_of_a_sparse_gradient() -> None:
    model = nn.Embedding(10, 3, sparse=True)
    with gradstat.watch(model) as w:
        model(torch.tensor([1, 4, 1])).sum().backward()
    assert model.weight.grad.is_sparse
    assert_record(w.last, gradstat.statistics([torch.tensor([[2.0] * 3, [1.0] * 3])]))


class Fails(torch.autograd.Function):
    """The identity, whose gradient cannot be computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("no gradient")


@pytest.mark.parametrize("bucket_bytes", [1, 25 << 20])
def test_watch_forgets_a_backward_that_fails(bucket_bytes: int) -> None:
    model = make_model()
    with gradstat.watch(model, bucket_bytes=bucket_bytes) as w:
        backward(model)
        model.zero_grad()
        for _ in range(2):
            # The last layer has its gradient before the failure.
            loss = model[4](Fails.apply(model[:4](torch.randn(3, 6)))).sum()
            with pytest.raises(RuntimeError, match="no gradient"):
                loss.backward()
            assert model[4].weight.grad is not None
        assert len(w.history) == 1
        model.zero_grad()
        model[:4](torch.randn(3, 6)).sum().backward()
        assert is_absent(w.last) == [False, False, True]
        assert_record(w.last[:2], gradstat.statistics(gradients(model, WEIGHTS[:2])))
    assert w.history.steps.tolist() == [0, 1]


def test_watch_records_backward_over_a_retained_graph_again() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        loss = model(torch.randn(3, 6)).square().sum()
        loss.backward(retain_graph=True)
        once = gradients(model, WEIGHTS)
        loss.backward()
    assert_record(w.history.record(0), gradstat.statistics(once))
    assert_record(w.history.record(1), gradstat.statistics([2 * g for g in once]))


def test_watch_records_gradients_that_carry_a_graph() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False))
    with gradstat.watch(model) as w:
        loss = model(torch.randn(3, 6)).square().sum()
        with pytest.warns(UserWarning, match="create_graph=True"):
            loss.backward(create_graph=True)
        assert model[0].weight.grad.requires_grad
        expected = gradstat.statistics(gradients(model, ["0.weight", "2.weight"]))
        assert not w.last.floats.requires_grad
        assert_record(w.last, expected)
        sum(p.grad.square().sum() for p in model.parameters()).backward()
    assert len(w.history) == 2
    for parameter in model.parameters():
        parameter.grad = None


def test_watch_does_not_see_autograd_grad() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        torch.autograd.grad(model(torch.randn(3, 6)).sum(), list(model.parameters()))
    assert len(w.history) == 0


def test_watch_records_backward_in_another_thread() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        for _ in range(2):
            model.zero_grad()
            thread = threading.Thread(target=backward, args=(model,))
            thread.start()
            thread.join()
            assert_record(w.last, gradstat.statistics(gradients(model, WEIGHTS)))
    assert w.history.steps.tolist() == [0, 1]


def test_watch_history_can_be_read_from_another_thread_meanwhile() -> None:
    model = make_model()
    errors = []
    done = threading.Event()

    def read(w: gradstat.Watch) -> None:
        try:
            while not done.is_set():
                if len(w.history):
                    assert is_absent(w.last) == [False] * 3
        except BaseException as error:
            errors.append(error)

    with gradstat.watch(model, bucket_bytes=1) as w:
        thread = threading.Thread(target=read, args=(w,))
        thread.start()
        for _ in range(50):
            model.zero_grad()
            backward(model)
        done.set()
        thread.join()
    assert errors == []
    assert len(w.history) == 50


def test_watches_of_two_models_do_not_mix() -> None:
    one, other = make_model(), nn.Linear(3, 2)
    with gradstat.watch(one) as w, gradstat.watch(other) as v:
        other(one(torch.randn(4, 6))).sum().backward()
        one.zero_grad()
        other.zero_grad()
        backward(one)
    assert w.history["numel"].tolist() == [[30, 20, 12]] * 2
    assert v.history["numel"].tolist() == [[6]]


def test_watches_of_one_model_do_not_mix() -> None:
    model = make_model()
    w = gradstat.watch(model, LinearBins(4), every=2)
    with gradstat.watch(model, parameters="bias") as v:
        for _ in range(3):
            backward(model)
    w.close()
    assert w.history.steps.tolist() == [0, 2]
    assert v.history.steps.tolist() == [0, 1, 2]
    assert_record(w.last, gradstat.statistics(gradients(model, WEIGHTS), LinearBins(4)))
    assert_record(v.last, gradstat.statistics(gradients(model, v.history.layers)))
    assert n_hooks(model) == 0


def test_watch_closes_at_the_end_of_the_block() -> None:
    model = make_model()
    with gradstat.watch(model, parameters="") as w:
        assert n_hooks(model) == 6
        backward(model)
        assert w.history is w.history
        during = w.last
    assert n_hooks(model) == 0
    backward(model)
    assert len(w.history) == 1
    assert_record(w.last, during)


def test_watch_closes_when_the_block_fails() -> None:
    model = make_model()
    w = gradstat.watch(model)
    backward(model)
    with pytest.raises(KeyError, match="mine"), w:
        raise KeyError("mine")
    assert n_hooks(model) == 0
    assert len(w.history) == 1


def test_watch_close_may_be_repeated() -> None:
    model = make_model()
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    w = gradstat.watch(model)
    w.close()
    w.close()
    assert n_hooks(model) == 1


def test_watch_close_in_the_middle_of_backward_drops_that_record() -> None:
    model = make_model()
    w = gradstat.watch(model, bucket_bytes=1)
    backward(model)
    handle = model[2].weight.register_post_accumulate_grad_hook(lambda parameter: w.close())
    backward(model)
    handle.remove()
    assert len(w.history) == 1
    assert n_hooks(model) == 0


def test_watch_last_needs_a_record() -> None:
    with gradstat.watch(make_model()) as w:
        assert len(w.history) == 0
        with pytest.raises(KeyError, match="step is -1 of 0 records"):
            _ = w.last


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_watch_lets_the_model_be_copied(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = make_model()
    names = list(model.state_dict())
    identities = [id(value) for value in model.state_dict(keep_vars=True).values()]
    with gradstat.watch(model) as w:
        assert list(model.state_dict()) == names
        assert [id(value) for value in model.state_dict(keep_vars=True).values()] == identities
        backward(model)
        twin = duplicate(model)
        assert n_hooks(twin) == 0
        backward(twin)
        assert len(w.history) == 1
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("when", ["before", "after"])
def test_watch_sees_the_gradients_of_a_compiled_model(when: str) -> None:
    torch.compiler.reset()
    model = make_model()
    if when == "after":
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        backward(compiled)
        model.zero_grad()
    with gradstat.watch(model) as w:
        if when == "before":
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            model.zero_grad()
            backward(compiled)
            assert_record(w.last, gradstat.statistics(gradients(model, WEIGHTS)))
    assert len(w.history) == 2


def scaled_backward(model: nn.Module, scaler: GradScaler, factor: float = 1.0) -> None:
    scaler.scale(factor * model(torch.randn(8, 6)).square().mean()).backward()


@pytest.mark.parametrize("bucket_bytes", [1, 25 << 20])
@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_watch_measures_unscaled_gradients(bins: Bins, bucket_bytes: int) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = GradScaler("cpu", growth_interval=2)
    previous = None
    with gradstat.watch(model, bins, scaler=scaler, bucket_bytes=bucket_bytes) as w:
        for _ in range(4):
            scaled_backward(model, scaler)
            scaler.unscale_(optimizer)
            tracked = previous if bins == LinearBins(6, track=True) else None
            previous = gradstat.statistics(gradients(model, WEIGHTS), bins, previous=tracked)
            assert_record(w.last, previous)
            scaler.step(optimizer)
            scaler.update()
            assert_record(w.last, previous)
            optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**18


@pytest.mark.parametrize("bins", SCHEMES[1:], ids=repr)
def test_watch_measures_gradients_of_any_scale_exactly_in_linear_bins(bins: Bins) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = GradScaler("cpu", init_scale=1000.0)
    with gradstat.watch(model, bins, scaler=scaler) as w:
        scaled_backward(model, scaler)
        scaler.unscale_(optimizer)
    assert_record(w.last, gradstat.statistics(gradients(model, WEIGHTS), bins))


def test_watch_is_at_most_two_bins_off_for_a_scale_that_is_no_power_of_two() -> None:
    model = nn.Linear(500, 20, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for scale in (3.0, 1000.0, 2.0**16 / 1.74):
        scaler = GradScaler("cpu", init_scale=scale)
        model.zero_grad()
        with gradstat.watch(model, scaler=scaler) as w:
            scaler.scale(model(torch.randn(3, 500)).square().mean()).backward()
            scaler.unscale_(optimizer)
        expected = gradstat.statistics([model.weight.grad])
        assert torch.equal(w.last.integers, expected.integers)
        torch.testing.assert_close(w.last.floats, expected.floats, rtol=1e-6, atol=1e-7)
        # Values in a bin or beyond it, away from zero.
        got, true = (
            torch.stack([c[0, 1024:], c[0, :1024].flip(0)]).flip(1).cumsum(1).flip(1)
            for c in (w.last.counts, expected.counts)
        )
        assert (got <= true).all()
        assert (got[:, :-2] >= true[:, 2:]).all()


def test_watch_shows_the_steps_that_a_scaler_skips() -> None:
    model = nn.Linear(6, 5, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = GradScaler("cpu", init_scale=2.0**127)
    weights = [model.weight.detach().clone()]
    with gradstat.watch(model, scaler=scaler) as w:
        for factor in (1e3, 1e-3):
            scaled_backward(model, scaler, factor)
            scaler.step(optimizer)
            scaler.update()
            largest = model.weight.grad.double().abs().max()
            weights.append(model.weight.detach().clone())
            optimizer.zero_grad()
    skipped, taken = w.history.record(0), w.history.record(1)
    assert torch.equal(weights[1], weights[0])
    assert int(skipped.nan + skipped.posinf + skipped.neginf) > 0
    assert not torch.equal(weights[2], weights[1])
    assert int(taken.finite) == 30
    # scaler.step() has unscaled it.
    assert float(taken.abs_max) == float(largest)


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(6)], ids=repr)
def test_watch_loses_nothing_of_scaled_half_gradients(bins: Bins) -> None:
    model = nn.Linear(6, 5, bias=False).half()
    scaler = GradScaler("cpu", init_scale=2.0**15)
    with gradstat.watch(model, bins, scaler=scaler) as w:
        x = torch.full((1, 6), 2.0**-12, dtype=torch.float16)
        scaler.scale(1.5 * 2.0**-10 * model(x).float().sum()).backward()
    # Half of float16's smallest number would be nothing.
    assert w.history["max"].tolist() == [[1.5 * 2.0**-22]]
    assert w.history["zeros"].tolist() == [[0]]


@pytest.mark.parametrize("enabled", [True, False])
def test_watch_takes_a_scaler_that_does_not_scale(enabled: bool) -> None:
    model = make_model()
    with gradstat.watch(model, scaler=GradScaler("cpu", enabled=enabled)) as w:
        backward(model)
    assert_record(w.last, gradstat.statistics(gradients(model, WEIGHTS)))


@pytest.mark.gpu
@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_watch_never_makes_backward_wait_for_the_gpu(bins: Bins) -> None:
    model = make_model().cuda()
    scaler = GradScaler("cuda")
    x = torch.randn(8, 6, device="cuda")
    with gradstat.watch(model, bins, scaler=scaler, bucket_bytes=100) as w:
        for step in range(4):
            loss = scaler.scale(model(x).square().mean())
            # The first step compiles kernels and fills caches.
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            expected = [g / 2.0**16 for g in gradients(model, WEIGHTS)]
            model.zero_grad()
    last = gradstat.statistics(expected, Log2Bins())
    assert len(w.history) == 4
    assert torch.equal(w.last.min, last.min.cpu())


def n_step_hooks(optimizer: torch.optim.Optimizer) -> int:
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return sum(len(each) for each in hooks)


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_watch_at_step_measures_what_the_optimizer_applies(bins: Bins) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = GradScaler("cpu")
    previous = None
    with gradstat.watch(model, bins, when="step", optimizer=optimizer) as w:
        for step in range(3):
            for _ in range(2):
                scaled_backward(model, scaler)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            tracked = previous if bins == LinearBins(6, track=True) else None
            previous = gradstat.statistics(gradients(model, WEIGHTS), bins, previous=tracked)
            assert len(w.history) == step
            scaler.step(optimizer)
            assert_record(w.last, previous)
            scaler.update()
            optimizer.zero_grad()
        assert n_hooks(model) == 0
    assert w.history.steps.tolist() == [0, 1, 2]
    assert n_step_hooks(optimizer) == 0


def test_watch_at_step_leaves_training_bit_identical() -> None:
    model = make_model()
    watched = copy.deepcopy(model)
    for each in (model, watched):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1)
        w = gradstat.watch(each, when="step", optimizer=optimizer)
        if each is model:
            w.close()
        for _ in range(4):
            backward(each)
            optimizer.step()
            optimizer.zero_grad()
    assert len(w.history) == 4
    for mine, theirs in zip(watched.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(6, nice=True)], ids=repr)
def test_watch_at_step_unscales_what_a_fused_optimizer_is_given(bins: Bins, unscale: bool) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    scaler = GradScaler("cpu")
    with gradstat.watch(model, bins, when="step", optimizer=optimizer) as w:
        scaled_backward(model, scaler)
        expected = [g / 2.0**16 for g in gradients(model, WEIGHTS)]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
    assert_record(w.last, gradstat.statistics(expected, bins))


def test_watch_at_step_does_not_see_steps_that_a_scaler_skips() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = GradScaler("cpu", init_scale=2.0**127)
    with (
        gradstat.watch(model, scaler=scaler) as seen,
        gradstat.watch(model, when="step", optimizer=optimizer) as applied,
    ):
        for factor in (1e4, 1e-4, 1e4):
            scaled_backward(model, scaler, factor)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert seen.history.steps.tolist() == [0, 1, 2]
    assert (seen.history["finite"] < seen.history["numel"]).any(1).tolist() == [True, False, True]
    assert applied.history.steps.tolist() == [0]
    assert_record(applied.last, seen.history.record(1))


def test_watches_at_backward_and_at_step_show_what_clipping_does() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with (
        gradstat.watch(model, parameters="") as before,
        gradstat.watch(model, parameters="", when="step", optimizer=optimizer) as after,
    ):
        for _ in range(3):
            backward(model)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
    norms = [np.linalg.norm(w.history["l2"], axis=1) for w in (before, after)]
    assert (norms[0] > 0.02).all()
    np.testing.assert_allclose(norms[1], 0.01, rtol=1e-4)


def test_watch_at_step_leaves_out_layers_that_the_optimizer_does_not_hold() -> None:
    model = make_model()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model[2:].parameters(), lr=0.5)
    with gradstat.watch(model, when="step", optimizer=optimizer) as w:
        backward(model)
        optimizer.step()
        assert is_absent(w.last) == [True, True, False]
        model[2].weight.requires_grad_(True)
        optimizer.add_param_group({"params": [model[0].weight]})
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        assert_record(w.last, gradstat.statistics(gradients(model, WEIGHTS)))


def test_watch_at_step_every_records_each_nth_step() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with gradstat.watch(model, every=2, when="step", optimizer=optimizer) as w:
        for _ in range(5):
            backward(model)
            backward(model)
            optimizer.step()
    assert w.history.steps.tolist() == [0, 2, 4]


def test_watch_at_step_closes_when_the_block_fails() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    w = gradstat.watch(model, when="step", optimizer=optimizer)
    assert n_step_hooks(optimizer) == 1
    with pytest.raises(KeyError, match="mine"), w:
        raise KeyError("mine")
    assert n_step_hooks(optimizer) == 0


def test_watch_at_step_lets_the_optimizer_be_copied() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    keys = list(optimizer.state_dict())
    with gradstat.watch(model, when="step", optimizer=optimizer) as w:
        assert list(optimizer.state_dict()) == keys
        for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            twin.step()
        assert len(w.history) == 0


class Checkpointed(nn.Module):
    """Blocks that are run again during backward; the last one shares the first one's weight."""

    def __init__(self, use_reentrant: bool | None, plain: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.blocks[3].weight = self.blocks[0].weight
        self.use_reentrant, self.plain = use_reentrant, plain

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_()
        for i, block in enumerate(self.blocks):
            if self.use_reentrant is None or i in self.plain:
                x = torch.tanh(block(x))
            else:
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)
                x = torch.tanh(x)
        return x


@pytest.mark.parametrize("bucket_bytes", [1, 25 << 20])
@pytest.mark.parametrize("plain", [(), (0,), (3,), (0, 1, 2, 3), (1, 2)])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_watch_counts_a_checkpointed_backward_once(
    use_reentrant: bool, plain: tuple[int, ...], bucket_bytes: int
) -> None:
    model = Checkpointed(use_reentrant, plain)
    names = [f"blocks.{i}.weight" for i in range(3)]
    with gradstat.watch(model, bucket_bytes=bucket_bytes) as w:
        for step in range(3):
            model.zero_grad()
            backward(model)
            assert w.history.steps.tolist() == list(range(step + 1))
            assert_record(w.last, gradstat.statistics(gradients(model, names)))


class Nested(nn.Module):
    """A checkpoint inside a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Checkpointed(True), nn.Linear(6, 6)

    def run(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(self.outer(x)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x.requires_grad_(), use_reentrant=True)


# In the outer checkpoint's forward nothing requires a gradient, and the inner one says so.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_watch_counts_nested_checkpoints_once() -> None:
    model = Nested()
    with gradstat.watch(model, every=2) as w:
        for step in range(3):
            model.zero_grad()
            backward(model)
            if step % 2 == 0:
                assert_record(w.last, gradstat.statistics(gradients(model, w.history.layers)))
    assert w.history.steps.tolist() == [0, 2]


def test_watch_forgets_a_checkpointed_backward_that_fails() -> None:
    model = Checkpointed(True)
    with gradstat.watch(model) as w:
        x = Fails.apply(model.blocks[1](torch.randn(3, 6)))
        loss = checkpoint(model.blocks[2], x, use_reentrant=True).sum()
        with pytest.raises(RuntimeError, match="no gradient"):
            loss.backward()
        assert model.blocks[2].weight.grad is not None
        assert len(w.history) == 0
        model.zero_grad()
        model.blocks[1](torch.randn(3, 6)).sum().backward()
        assert is_absent(w.last) == [True, False, True]
    assert w.history.steps.tolist() == [0]


MODEL = make_model()
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gradstat.watch(3), TypeError, "a torch.nn.Module; model is int"),
        (lambda: gradstat.watch(MODEL, 30), TypeError, "Log2Bins or LinearBins; bins is 30"),
        (
            lambda: gradstat.watch(MODEL, every=0),
            ValueError,
            "a number of 1 or more; every is 0",
        ),
        (lambda: gradstat.watch(MODEL, every=True), TypeError, "an integer; every is True"),
        (lambda: gradstat.watch(MODEL, every=1.5), TypeError, "an integer; every is 1.5"),
        (
            lambda: gradstat.watch(MODEL, accumulation_steps=-1),
            ValueError,
            "a number of 1 or more; accumulation_steps is -1",
        ),
        (
            lambda: gradstat.watch(MODEL, bucket_bytes="25 MB"),
            TypeError,
            "an integer; bucket_bytes is '25 MB'",
        ),
        (
            lambda: gradstat.watch(MODEL, when="forward"),
            ValueError,
            "one of backward, step; when is 'forward'",
        ),
        (
            lambda: gradstat.watch(MODEL, optimizer=OPTIMIZER),
            ValueError,
            "when='step' for an optimizer; optimizer is SGD, when is 'backward'",
        ),
        (
            lambda: gradstat.watch(MODEL, when="step"),
            TypeError,
            "a torch.optim.Optimizer for when='step'; optimizer is NoneType",
        ),
        (
            lambda: gradstat.watch(
                MODEL, when="step", optimizer=OPTIMIZER, scaler=GradScaler("cpu")
            ),
            ValueError,
            "no scaler for when='step', which sees unscaled gradients; scaler is GradScaler",
        ),
        (
            lambda: gradstat.watch(MODEL, when="step", optimizer=OPTIMIZER, accumulation_steps=2),
            ValueError,
            "accumulation_steps of 1 for when='step', which counts steps; accumulation_steps is 2",
        ),
        (
            lambda: gradstat.watch(make_model(), when="step", optimizer=OPTIMIZER),
            ValueError,
            "an optimizer of the model's parameters; optimizer is SGD with 6 others, 3 are "
            "selected",
        ),
        (
            lambda: gradstat.watch(MODEL, scaler=2.0),
            TypeError,
            "a torch.amp.GradScaler; scaler is float",
        ),
        (
            lambda: gradstat.watch(MODEL, engine="cuda"),
            ValueError,
            "one of the engines cpu, reference, triton; engine is 'cuda'",
        ),
        (
            lambda: gradstat.watch(MODEL, parameters=3),
            TypeError,
            "a regular expression or a function; parameters is 3",
        ),
        (
            lambda: gradstat.watch(MODEL, parameters="("),
            ValueError,
            "a regular expression; parameters is '(': missing ), unterminated subpattern at "
            "position 0",
        ),
        (
            lambda: gradstat.watch(MODEL, parameters="lora"),
            ValueError,
            "a model with parameters that require gradients; model is Sequential with 6 "
            "parameters, 0 selected by parameters='lora', none of them requiring a gradient",
        ),
        (
            lambda: gradstat.watch(nn.ReLU()),
            ValueError,
            "a model with parameters that require gradients; model is ReLU with 0 parameters, 0 "
            "selected by parameters=None, none of them requiring a gradient",
        ),
        (
            lambda: gradstat.watch(make_model().requires_grad_(False)),
            ValueError,
            "a model with parameters that require gradients; model is Sequential with 6 "
            "parameters, 3 selected by parameters=None, none of them requiring a gradient",
        ),
        (
            lambda: gradstat.watch(nn.Sequential(nn.LazyLinear(2))),
            ValueError,
            "initialised parameters; 0.weight of Sequential gets its shape from the first batch: "
            "run one first",
        ),
    ],
)
def test_watch_refuses_by_argument(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape('watch() needs ' + message)}$"):
        call()
    assert n_hooks(MODEL) == n_step_hooks(OPTIMIZER) == 0
