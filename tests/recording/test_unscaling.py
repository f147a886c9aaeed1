import copy
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import no_waiting
from torch import nn
from torch.amp import GradScaler
from watching import (
    SCHEMES,
    WEIGHTS,
    assert_record,
    backward,
    gradients,
    is_absent,
    make_model,
    n_hooks,
    n_step_hooks,
)

import gradstat
from gradstat import LinearBins, Log2Bins
from gradstat.bins import Bins


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


def scaled_backward(model: nn.Module, scaler: GradScaler, factor: float = 1.0) -> None:
    scaler.scale(factor * model(torch.randn(8, 6)).square().mean()).backward()


@pytest.mark.parametrize("bucket_bytes", [1, 25 << 20])
@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_watch_measures_unscaled_gradients(bins: Bins, bucket_bytes: int) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = GradScaler("cpu", growth_interval=2)
    with gradstat.watch(model, bins, scaler=scaler, bucket_bytes=bucket_bytes) as w:
        for _ in range(4):
            scaled_backward(model, scaler)
            scaler.unscale_(optimizer)
            expected = gradstat.statistics(gradients(model, WEIGHTS), bins)
            assert_record(w.last, expected)
            scaler.step(optimizer)
            scaler.update()
            assert_record(w.last, expected)
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


@pytest.mark.host("compares sums more closely than is promised: the CPU's engine keeps that")
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
        # As the engines promise; a sum, whose terms cancel, to 1e-6 of the sum of magnitudes.
        cancelled = 1e-6 * float(expected.l1.max())
        torch.testing.assert_close(w.last.floats, expected.floats, rtol=1e-5, atol=cancelled)
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
            with no_waiting() if step else nullcontext():
                loss.backward()
            expected = [g / 2.0**16 for g in gradients(model, WEIGHTS)]
            model.zero_grad()
    last = gradstat.statistics(expected, Log2Bins())
    assert len(w.history) == 4
    assert torch.equal(w.last.min, last.min.cpu())


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_watch_at_step_measures_what_the_optimizer_applies(bins: Bins) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = GradScaler("cpu")
    with gradstat.watch(model, bins, when="step", optimizer=optimizer) as w:
        for step in range(3):
            for _ in range(2):
                scaled_backward(model, scaler)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            expected = gradstat.statistics(gradients(model, WEIGHTS), bins)
            assert len(w.history) == step
            scaler.step(optimizer)
            assert_record(w.last, expected)
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
    # One measures, one keeps the learning rate.
    assert n_step_hooks(optimizer) == 2
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
