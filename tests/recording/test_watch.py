import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from watching import (
    SCHEMES,
    WEIGHTS,
    assert_record,
    backward,
    gradients,
    is_absent,
    make_model,
    n_hooks,
    train,
)

import gradstat
from gradstat import LinearBins
from gradstat.bins import Bins
from gradstat.history import FIELDS
from gradstat.recording.options import LOOKS


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


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
    with gradstat.watch(model, bins, bucket_bytes=bucket_bytes) as w:
        for step in range(4):
            backward(model)
            expected = gradstat.statistics(gradients(model, WEIGHTS), bins)
            assert w.history.steps.tolist() == list(range(step + 1))
            assert_record(w.last, expected)
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


@pytest.mark.parametrize("nice", [False, True])
def test_watch_finds_a_range_for_float64_beyond_float32(nice: bool) -> None:
    model = nn.Linear(6, 2, bias=False).double()
    with gradstat.watch(model, LinearBins(4, nice=nice)) as w:
        (model(torch.arange(-3, 3, dtype=torch.float64)) * 1e200).sum().backward()
    assert w.last.counts.sum(-1).tolist() == [12]
    assert w.last.low[0] <= -3e200
    assert w.last.high[0] >= 2e200


def test_watch_goes_on_after_the_model_is_cast() -> None:
    model = nn.Linear(6, 2)
    with gradstat.watch(model, LinearBins(3)) as w:
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


def test_watch_must_be_repeated_after_parameters_are_replaced() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        backward(model)
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        backward(model)
        with pytest.warns(
            RuntimeWarning, match=r"sees 0 of its 3 parameters .* 0.weight, 2.weight"
        ):
            assert len(w.history) == 1
        with gradstat.watch(model) as again:
            backward(model)
    assert (len(w.history), len(again.history)) == (1, 1)


@pytest.mark.parametrize("when", ["backward", "step"])
def test_watch_names_a_head_that_was_replaced_at_the_next_pass(when: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradstat.watch(model, when=when, optimizer=optimizer) as w:
        model[4] = nn.Linear(4, 3)

        def train(n_steps: int) -> None:
            for _ in range(n_steps):
                backward(model)
                optimizer.step()

        with pytest.warns(RuntimeWarning, match=r"sees 2 of its 3 parameters .*out: 4.weight;"):
            train(1)
        train(LOOKS + 6)  # it is said once
    assert is_absent(w.last) == [False, False, True]


def test_log_names_parameters_that_no_pass_reaches_any_more() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        for _ in range(10):
            backward(model)
            w.log(loss=1.0)
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)

        def log(n_steps: int) -> None:
            for _ in range(n_steps):
                w.log(loss=1.0)

        with pytest.warns(RuntimeWarning, match="sees 0 of its 3 parameters"):
            log(LOOKS)
    assert len(w.history) == 10


def test_watch_sees_parameters_that_have_other_names_or_wrappers_now() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        wrapped = nn.ModuleDict({"inner": model[4]})
        model[4] = nn.Sequential(wrapped["inner"], nn.Identity())
        for _ in range(3):
            backward(model)
        assert len(w.history) == 3


def test_watch_must_be_repeated_after_parameters_are_added() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        model.append(nn.Linear(3, 2))
        backward(model)
        with gradstat.watch(model) as again:
            backward(model)
    assert w.history.layers == WEIGHTS
    assert is_absent(w.last) == [False] * 3
    assert again.history.layers == [*WEIGHTS, "5.weight"]


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


@pytest.mark.host("watch() makes a counter on the device, without values in fake mode, too")
@pytest.mark.parametrize(
    "options", [{}, {"formats": "nvfp4"}, {"bins": 3}, {"engine": "reference"}]
)
def test_watch_passes_over_gradients_without_values(options: dict[str, Any]) -> None:
    with FakeTensorMode():  # as tools use it that find out how much memory a training takes
        model = nn.Linear(3, 2)
        with gradstat.watch(model, **options) as w:
            for _ in range(2):
                model(torch.ones(1, 3)).sum().backward()
    assert w.history["numel"].tolist() == [[0], [0]]


def test_watch_records_the_values_of_a_sparse_gradient() -> None:
    model = nn.Embedding(10, 3, sparse=True)
    with gradstat.watch(model) as w:
        model(torch.tensor([1, 4, 1])).sum().backward()
    assert model.weight.grad.is_sparse
    assert_record(w.last, gradstat.statistics([torch.tensor([[2.0] * 3, [1.0] * 3])]))
