"""Outputs and their gradients where memory is shared, reused or freed, and passes come to nothing.

What is expected is measured on a twin, whose outputs are replaced by copies of them.
"""

import copy
import gc
import resource
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu_
from torch.utils.checkpoint import checkpoint
from watching import Fails, assert_record, backward, make_model

import gradstat
from gradstat import History

BOTH = ("activation", "grad_output")


class Tap(torch.autograd.Function):
    """A copy, whose gradient is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: list[Tensor]) -> Tensor:
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.kept.append(gradient.clone())
        return gradient, None


class Twin:
    """Outputs and their gradients of the modules of a copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.outputs: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, list[Tensor]] = {}
        for name, module in self.model.named_modules():
            if not any(module.children()):
                self.outputs[name], self.gradients[name] = [], []
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            self.outputs[name].append(output.detach().clone())
            result: Tensor = Tap.apply(output, self.gradients[name])
            return result

        return hook

    def assert_same(self, history: History, kinds: tuple[str, ...] = BOTH) -> None:
        for kind in kinds:
            expected = self.outputs if kind == "activation" else self.gradients
            selected = history.select(kind)
            for at, name in enumerate(selected.layers):
                values = [x.flatten() for x in expected[name]]
                record, right = selected.record()[at], gradstat.statistics(torch.cat(values))
                assert torch.equal(record.integers, right.integers), (kind, name)
                assert torch.equal(record.counts, right.counts), (kind, name)
                torch.testing.assert_close(record.floats, right.floats, rtol=1e-5, atol=1e-9)


class Plus(nn.Module):
    """Adds a parameter, whose gradient shares its memory with that of the output."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.p


@pytest.mark.parametrize("scaled", [False, True])
def test_grad_output_is_that_of_the_pass_whatever_becomes_of_its_memory(scaled: bool) -> None:
    model, x = nn.Sequential(Plus(4, 6), nn.Linear(6, 3)), torch.randn(4, 6)
    twin = Twin(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    options: dict[str, Any] = {"when": "step", "optimizer": optimizer, "scaler": scaler}
    with gradstat.watch(model, what=("grad", *BOTH), **options) as w:
        scaler.scale(model(x).square().sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
    twin.model(x).square().sum().backward()
    twin.assert_same(w.history)


class InPlace(torch.autograd.Function):
    """Its backward works in the memory of the gradient that it is given, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.mul_(1000.0)


def test_grad_output_is_seen_before_backward_works_in_its_memory() -> None:
    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = InPlace.apply(x)
            return result

    model, x = nn.Sequential(nn.Linear(6, 3), Fused()), torch.randn(4, 6)
    twin = Twin(model)
    with gradstat.watch(model, what=BOTH) as w:
        model(x).square().sum().backward()
    twin.model(x).square().sum().backward()
    twin.assert_same(w.history)


@pytest.mark.parametrize("size", [3, 300], ids=["small", "large"])
@pytest.mark.parametrize("change", [relu_, lambda x: x.add_(1.0), lambda x: x[..., 0].mul_(3.0)])
def test_output_that_is_a_view_may_be_changed_in_place(
    change: Callable[[Tensor], Tensor], size: int
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.pool = nn.Linear(6, 8), nn.MaxPool1d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)  # a view of a matrix
            change(y)
            z = self.pool(y)
            relu_(z)
            return z

    model, x = Model(), torch.randn(size, 20, 6)
    twin = Twin(model)
    with gradstat.watch(model, what=BOTH) as w:
        model(x).square().sum().backward()
    twin.model(x).square().sum().backward()
    twin.assert_same(w.history)


def test_output_that_is_a_view_of_its_input_has_its_own_gradient() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.flat = nn.Linear(6, 8), nn.Flatten(0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x).tanh()
            return self.flat(y).square().sum() + y.sum()

    model, x = Model(), torch.randn(4, 6)
    twin = Twin(model)
    with gradstat.watch(model, what=BOTH) as w:
        model(x).backward()
    twin.model(x).backward()
    twin.assert_same(w.history)


def test_inductor_reuses_memory_that_has_been_measured() -> None:
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)
    )
    x = torch.randn(32, 64)
    twin = Twin(model)
    torch._dynamo.reset()
    with gradstat.watch(model, what=BOTH) as w, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(model, fullgraph=True)(x).square().mean().backward()
    twin.model(x).square().mean().backward()
    for kind, expected in (("activation", twin.outputs), ("grad_output", twin.gradients)):
        norms = [float(expected[name][0].double().norm()) for name in w.history.select(kind).layers]
        np.testing.assert_allclose(w.history.select(kind)["l2"][0], norms, rtol=1e-4)


@pytest.mark.host("measures the host's memory, and waits for no device")
def test_outputs_between_two_records_take_no_more_memory_with_each_pass() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def passes(n: int) -> int:
        for _ in range(n):
            model(torch.randn(2, 4)).sum().backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with gradstat.watch(model, what=BOTH, when="step", optimizer=optimizer) as w:
        before = passes(20)
        # 100 passes measure 4,000 outputs, of 16 KB each.
        assert passes(100) - before < 20_000
        optimizer.step()
    assert w.history.select("activation")["numel"].tolist() == [[120 * 8] * 20]
    assert w.history.select("grad_output")["numel"].tolist() == [[120 * 8] * 20]


@pytest.mark.parametrize("when", ["step", "call"])
def test_each_pass_is_divided_by_the_scale_that_it_had(when: str) -> None:
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    options = {"optimizer": optimizer} if when == "step" else {}
    with gradstat.watch(model, what="grad_output", when=when, scaler=scaler, **options) as w:
        for _ in range(3):
            scaler.scale(model(x).sum()).backward()
            if when == "call":
                scaler.step(optimizer)
                scaler.update()
            else:
                scaler._scale.mul_(2.0)
        if when == "call":
            w.measure()
        else:
            optimizer.step()
    assert w.history["numel"].tolist() == [[36]]
    assert w.history["min"].tolist() == w.history["max"].tolist() == [[1.0]]


@pytest.mark.parametrize("what", ["activation", "grad_output"])
def test_outputs_of_a_skipped_step_are_no_part_of_the_next_record(what: str) -> None:
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    options: dict[str, Any] = {"when": "step", "optimizer": optimizer, "scaler": scaler}
    with gradstat.watch(model, what=("grad", what), **options) as w:
        for factor in (1.0, float("inf"), 1.0, 1.0):
            scaler.scale((model(x) * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    outputs = w.history.select(what)
    assert outputs["numel"].tolist() == outputs["finite"].tolist() == [[12]] * 3
    if what == "grad_output":
        assert outputs["max"].tolist() == [[1.0]] * 3


def test_optimizer_of_a_scaler_that_steps_first_keeps_what_comes_after() -> None:
    model, other = nn.Linear(6, 3), nn.Linear(6, 6)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, other)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    options: dict[str, Any] = {"when": "step", "optimizer": optimizers[0], "scaler": scaler}
    with gradstat.watch(model, what="activation", **options) as w:
        for _ in range(3):
            scaler.scale(model(torch.randn(4, 6)).sum()).backward()
            scaler.step(optimizers[0])
            scaler.scale(model(other(torch.randn(2, 6))).sum()).backward()
            scaler.step(optimizers[1])
            scaler.update()
    assert w.history.select("activation")["numel"].tolist() == [[12], [18], [18]]


@pytest.mark.parametrize("what", [BOTH, ("activation",)], ids=str)
@pytest.mark.parametrize("when", ["backward", "step"])
@pytest.mark.parametrize("fails_after", [4, 2, 0])
def test_outputs_of_a_pass_that_fails_are_forgotten(
    fails_after: int, when: str, what: tuple[str, ...]
) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"optimizer": optimizer} if when == "step" else {}
    with gradstat.watch(model, what=("grad", *what), when=when, **options) as w:
        for _ in range(2):
            hidden = model[:fails_after](torch.randn(8, 6, requires_grad=True))
            output = model[fails_after:](Fails.apply(hidden))
            with pytest.raises(RuntimeError, match="no gradient"):
                output.sum().backward()
            model.zero_grad()
        backward(model)
        optimizer.step()
    assert len(w.history) == 1
    for kind in what:
        assert w.history.select(kind)["numel"].tolist() == [[40, 40, 32, 32, 24]]


def test_outputs_after_a_step_that_fails_are_those_of_the_next_pass() -> None:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with gradstat.watch(model, what=("update", *BOTH), when="step", optimizer=optimizer) as w:
        backward(model)
        optimizer.param_groups[0]["betas"] = None
        with pytest.raises(TypeError):
            optimizer.step()
        optimizer.param_groups[0]["betas"] = (0.9, 0.999)
        backward(model)
        optimizer.step()
    assert len(w.history) == 1
    for kind in BOTH:
        assert w.history.select(kind)["numel"].tolist() == [[40, 40, 32, 32, 24]]


def test_outputs_of_a_closure_belong_to_the_step_that_calls_it() -> None:
    model, x = nn.Linear(6, 1), torch.randn(8, 6)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()
        return loss

    with gradstat.watch(
        model, what=("update", "activation"), when="step", optimizer=optimizer
    ) as w:
        optimizer.step(closure)
        optimizer.step(closure)
    n = w.history.select("activation")["numel"]
    assert (n > 0).all()
    assert (n % 8 == 0).all()
    assert (w.history.select("update")["numel"] == 6).all()


@pytest.mark.parametrize(
    ("module", "shape", "units"),
    [
        (nn.Linear(7, 5), (2, 3, 4, 7), 5),
        (nn.Linear(7, 5), (7,), 5),
        (nn.LayerNorm(7), (2, 3, 4, 7), 7),
        (nn.Conv1d(3, 5, 1), (2, 3, 7), 5),
        (nn.Conv2d(3, 5, 1), (2, 3, 7, 4), 5),
        (nn.Conv2d(3, 5, 1), (3, 7, 4), 5),
        (nn.BatchNorm1d(3), (2, 3), 3),
        (nn.BatchNorm1d(3), (2, 3, 7), 3),
        (nn.GroupNorm(1, 3), (2, 3, 7), 3),
        (nn.MaxPool1d(1), (2, 3, 7), 3),
        (nn.LSTM(7, 5), (2, 3, 7), 5),
        (nn.ReLU(), (2, 3, 7), 7),
        (nn.ReLU(), (2, 3, 7, 4), 3),
    ],
    ids=lambda each: str(each).replace(" ", ""),
)
def test_units_are_where_the_module_has_them(
    module: nn.Module, shape: tuple[int, ...], units: int
) -> None:
    model = nn.ModuleDict({"module": module, "last": nn.Linear(1, 1)})
    model.to(torch.get_default_device())
    with gradstat.watch(model, what="activation", modules="module") as w:
        model["module"](torch.ones(shape))
        model["last"](torch.ones(1)).sum().backward()
    assert w.history.select("unit")["numel"].tolist() == [[units]]


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(7, 6), (2, 3, 4, 7)), (nn.Conv1d(3, 6, 1), (2, 3, 9))]
)
def test_dead_units_of_an_activation_are_those_of_the_layer_before(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(layer, nn.ReLU()).to(torch.get_default_device())
    with torch.no_grad():
        layer.bias[:2] = -1e6
        layer.bias[2:] = 1e6
    with gradstat.watch(model, what="activation") as w:
        model(torch.randn(shape)).sum().backward()
    assert w.history.dead_units()[0].tolist() == [0.0, 2 / 6]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_counts_a_shared_module_each_time_that_it_is_run(reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh()

        def block(self, x: Tensor) -> Tensor:
            return self.act(self.b(self.act(x)))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, self.act(self.a(x)), use_reentrant=reentrant)

    model = Model()
    with gradstat.watch(model, what=BOTH) as w:
        model(torch.randn(4, 6)).sum().backward()
    for kind in BOTH:
        assert w.history.select(kind)["numel"].tolist() == [[24, 24, 72]]


def test_checkpoint_counts_a_pass_in_its_own_record() -> None:
    model = make_model()
    with gradstat.watch(model, what="activation") as w:
        losses = [checkpoint(model, torch.randn(8, 6), use_reentrant=False).sum() for _ in range(2)]
        for loss in losses:
            loss.backward()
    n = [40, 40, 32, 32, 24]
    assert w.history.select("activation")["numel"].tolist() == [[2 * each for each in n], [0] * 5]


def test_call_does_not_measure_parameters_that_were_replaced() -> None:
    model = make_model()
    with gradstat.watch(model, what=("grad", "param"), when="call") as w:
        backward(model)
        w.measure()
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        gc.collect()
        w.measure()
        with pytest.warns(RuntimeWarning, match="sees 0 of its 3 parameters"):
            history = w.history
    assert (history["numel"] > 0).tolist() == [[True] * 6, [False] * 6]


def test_attention_is_measured_as_a_whole() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    outputs: list[Tensor] = []
    encoder.self_attn.register_forward_hook(lambda *args: outputs.append(args[2][0].clone()))
    with gradstat.watch(encoder, what=BOTH) as w:
        encoder(torch.randn(3, 5, 8)).square().mean().backward()
    for kind in BOTH:
        history = w.history.select(kind)
        assert "self_attn" in history.layers
        assert not any(name.startswith("self_attn.") for name in history.layers)
        assert (history["numel"] > 0).all()
    at = w.history.select("activation").layers.index("self_attn")
    record = w.history.select("activation").record()[at]
    assert torch.equal(record.counts, gradstat.statistics(outputs[0]).counts)


@pytest.mark.parametrize("modules", [r"out_proj", lambda name, _: name == "self_attn.out_proj"])
def test_attention_s_own_projection_can_be_asked_for(modules: Any) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with gradstat.watch(encoder, what="activation", modules=modules) as w:
        assert set(w.history.select("activation").layers) == {"self_attn.out_proj"}


@pytest.mark.parametrize("when", ["backward", "step", "call"])
def test_closed_watch_keeps_nothing_of_the_model_alive(when: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"optimizer": optimizer} if when == "step" else {}
    what = ("grad", "param", *BOTH) + (("update",) if when == "step" else ())
    w = gradstat.watch(model, what=what, when=when, **options)
    backward(model)
    optimizer.step()
    model(torch.randn(8, 6))
    w.close()
    alive = [weakref.ref(each) for each in (model, optimizer, *model.parameters())]
    del model, optimizer, options
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)
    assert len(w.history) == (when != "call")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_transforms_of_the_gradient_are_not_measured() -> None:
    model, x = make_model(), torch.randn(2, 6, requires_grad=True)
    with gradstat.watch(model, what=("grad", *BOTH)) as w:
        torch.autograd.functional.jacobian(model, x, vectorize=True)
        y = model(x)
        torch.autograd.grad(y, x, torch.ones(3, 2, 3), is_grads_batched=True)
        nested = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)])
        model[0](nested)
    assert len(w.history) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["backward", "step"])
def test_compiled_training_step_is_recorded(when: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"optimizer": optimizer} if when == "step" else {}

    def step(x: Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch._dynamo.reset()
    with gradstat.watch(model, when=when, **options) as w:
        for _ in range(3):
            torch.compile(step, backend="eager")(torch.randn(8, 6))
        backward(model)
        torch.compile(optimizer.step, backend="eager")()
    assert len(w.history) == 4
    assert (w.history["numel"] > 0).all()


def test_outputs_before_a_tensor_of_integers_are_searched_further() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.last = nn.MaxPool1d(2, return_indices=True), Reversed()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.pool(x))[1]

    class Reversed(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return pair[1], pair[0] * self.factor

        factor = 2.0

    model = nn.Sequential(nn.Linear(6, 6), Model())
    with gradstat.watch(model, what=BOTH) as w:
        model(torch.randn(8, 6)).sum().backward()
    for kind in BOTH:
        assert w.history.select(kind).layers == ["0", "1.pool", "1.last"]
        assert w.history.select(kind)["numel"].tolist() == [[48, 24, 24]]


def test_mode_is_that_of_the_module_within_its_wrappers() -> None:
    inner = make_model()
    model = torch.compile(nn.DataParallel(inner), backend="eager")
    with gradstat.watch(model, what="activation") as w:
        backward(inner)
        inner.eval()
        inner(torch.randn(100, 6))
        inner.train()
        backward(inner)
    assert w.history.select("activation")["numel"].tolist() == [[40, 40, 32, 32, 24]] * 2


def test_scripted_modules_are_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.ReLU()))
    with gradstat.watch(model, what="activation") as w:
        backward(model)
    assert w.history.select("activation").layers == ["0"]


def test_root_has_a_name_that_no_child_has() -> None:
    model = nn.Sequential()
    model.add_module("Sequential", nn.Linear(6, 3))
    with gradstat.watch(model, what="activation", modules="") as w:
        backward(model)
    assert w.history.select("activation").layers == ["(Sequential)", "Sequential"]
    record = w.history.select("activation").record()
    assert_record(record[0:1], record[1:2])
