import copy
import pickle
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from watching import (
    WEIGHTS,
    Fails,
    assert_record,
    backward,
    gradients,
    is_absent,
    make_model,
    n_hooks,
)

import gradstat
from gradstat import LinearBins


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


def test_watch_measures_batches_of_other_sizes_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda *given: outputs.append(given[-1].detach()))
    with gradstat.watch(model, what="activation") as w:
        for size in (4, 7, 2, 7):
            model(torch.randn(size, 3)).sum().backward()
    for step, output in enumerate(outputs):
        found = w.history.select("activation").record(step)
        assert_record(found, gradstat.statistics([output]))


def test_watch_measures_before_an_optimizer_in_backward_frees_the_gradient() -> None:
    model = make_model()
    expected: dict[str, Tensor] = {}

    def step_with(name: str, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def step(parameter: Tensor) -> None:
            assert parameter.grad is not None
            expected[name] = parameter.grad.clone()
            optimizer.step()
            parameter.grad.zero_()  # in place, and freed
            parameter.grad = None

        return step

    for name, parameter in model.named_parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        parameter.register_post_accumulate_grad_hook(step_with(name, optimizer))
    before = n_hooks(model)
    with gradstat.watch(model) as w, gradstat.watch(model, parameters="0.weight") as other:
        for _ in range(3):
            backward(model)
            tensors = [expected[name] for name in WEIGHTS]
            assert_record(w.last, gradstat.statistics(tensors))
            assert_record(other.last, gradstat.statistics(tensors[:1]))
    assert n_hooks(model) == before
    weight = model[0].weight.detach().clone()
    backward(model)
    assert not torch.equal(model[0].weight, weight)


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


class Waits(torch.autograd.Function):
    """The identity, whose gradient waits until something else has been done."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Callable[[], None]) -> Tensor:
        ctx.act = act
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.act()
        return grad, None


@pytest.mark.host("the passes would wait for each other in the device's thread")
def test_watch_makes_one_record_of_passes_that_overlap() -> None:
    model = make_model()

    def run_another() -> None:
        thread = threading.Thread(target=backward, args=(model,))
        thread.start()
        thread.join()

    with gradstat.watch(model) as w:
        model[4](Waits.apply(model[:4](torch.randn(3, 6)), run_another)).sum().backward()
        assert_record(w.last, gradstat.statistics(gradients(model, WEIGHTS)))
        model.zero_grad()
        backward(model)
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


def test_watch_measures_when_it_is_called() -> None:
    model = make_model()
    with gradstat.watch(model, when="call", every=2) as w:
        expected = []
        for _ in range(3):
            backward(model)
            assert len(w.history) == len(expected)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            w.measure()
            # Before the first record there are some, which see the order of the layers.
            assert n_hooks(model) == 0
            expected += [gradstat.statistics(gradients(model, WEIGHTS))]
            w.measure()
    assert w.history.steps.tolist() == [0, 2, 4]
    for step, record in zip(w.history.steps.tolist(), expected, strict=True):
        assert_record(w.history.record(step), record)


def test_watch_measures_inside_the_closure_of_a_step() -> None:
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    with gradstat.watch(model, when="call") as w:

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 6)).square().mean()
            loss.backward()
            w.measure()
            return loss

        optimizer.step(closure)
    assert len(w.history) > 1
    assert_record(w.last, gradstat.statistics(gradients(model, WEIGHTS)))


@pytest.mark.parametrize("when", ["backward", "step"])
def test_watch_measures_only_where_it_is_meant_to(when: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"when": when, "optimizer": optimizer} if when == "step" else {}
    message = re.escape(f"measure() needs watch(when='call'); when is {when!r}")
    with gradstat.watch(model, **options) as w, pytest.raises(ValueError, match=f"^{message}$"):
        w.measure()


def test_watch_last_needs_a_record() -> None:
    with gradstat.watch(make_model()) as w:
        assert len(w.history) == 0
        with pytest.raises(KeyError, match="has no record of step -1: it has none yet"):
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
