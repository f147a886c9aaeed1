"""`watch(what=...)`: parameters, updates, activations and gradients with respect to outputs."""

import copy
import gc
import math
import pickle
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from watching import Fails, assert_record, backward, make_model, n_hooks, n_step_hooks

import gradstat
from gradstat import History, LinearBins, Log2Bins, Statistics
from gradstat.bins import Bins
from gradstat.recording import gradients

EVERYTHING = ("grad", "param", "update", "activation", "grad_output")
WEIGHTS = ["0.weight", "2.weight", "4.weight"]
MODULES = ["0", "1", "2", "3", "4"]


class Seen:
    """Outputs of some modules and the gradients with respect to them, by hooks of the test."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        self.gradients: dict[str, list[Tensor]] = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.outputs[name].append(output.detach().clone())
            output.register_hook(lambda g: self.gradients[name].append(g.clone()))

        return hook


def measure(tensors: list[Tensor], bins: Bins | None = None) -> Statistics:
    return gradstat.statistics(tensors, bins)


def joined(pieces: list[Tensor]) -> Tensor:
    return torch.cat([piece.flatten() for piece in pieces])


def assert_close(record: Statistics, expected: Statistics) -> None:
    """The same counts, and floats within 1e-5: parts put together have other roundings."""
    assert torch.equal(record.integers, expected.integers)
    assert torch.equal(record.counts, expected.counts)
    torch.testing.assert_close(record.floats, expected.floats, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("engine", [None, "reference"])
@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(8, -1, 1)], ids=str)
def test_what_measures_each_kind_as_statistics_does(
    bins: Bins, engine: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Larger outputs are launched one by one.
    monkeypatch.setattr("gradstat.recording.passes._SMALL_BYTES", 130)
    model = make_model()
    seen = Seen(model, MODULES)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options = {"what": EVERYTHING, "when": "step", "optimizer": optimizer, "engine": engine}
    with gradstat.watch(model, bins, **options) as w:
        backward(model)
        weights = [model.get_parameter(name).detach().clone() for name in WEIGHTS]
        gradients = [model.get_parameter(name).grad.clone() for name in WEIGHTS]
        optimizer.step()
    updates = [model.get_parameter(n).detach() - x for n, x in zip(WEIGHTS, weights, strict=True)]
    outputs = [seen.outputs[name][0] for name in MODULES]
    expected = {
        "grad": gradients,
        "param": weights,
        "update": updates,
        "activation": outputs,
        "unit": [x.abs().amax(0) for x in outputs],
        "grad_output": [seen.gradients[name][0] for name in MODULES],
    }
    for kind, tensors in expected.items():
        history = w.history.select(kind)
        assert history.layers == (WEIGHTS if len(tensors) == 3 else MODULES)
        expected_record = gradstat.statistics(tensors, bins, engine=engine)
        assert_record(history.record(), expected_record)


@pytest.mark.parametrize("when", ["backward", "step", "call"])
@pytest.mark.parametrize("what", ["grad", "param", "activation", "grad_output"])
def test_what_alone_makes_its_rows_only(what: str, when: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if when == "step" else None
    with gradstat.watch(model, what=what, when=when, optimizer=optimizer) as w:
        for _ in range(2):
            backward(model)
            if when == "call":
                w.measure()
            elif optimizer is not None:
                optimizer.step()
    kinds = {what, "unit"} if what == "activation" else {what}
    assert set(w.history.kinds) == kinds
    assert w.history.steps.tolist() == [0, 1]
    assert (w.history["numel"] > 0).all()


def test_update_ratio_is_rms_of_change_over_rms_of_weights() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [model.get_parameter(name).detach().double().clone() for name in WEIGHTS]
    with gradstat.watch(model, what="update", when="step", optimizer=optimizer) as w:
        backward(model)
        optimizer.step()
    changes = [
        model.get_parameter(name).detach().double() - x
        for name, x in zip(WEIGHTS, before, strict=True)
    ]
    expected = [float(d.norm() / x.norm()) for d, x in zip(changes, before, strict=True)]
    np.testing.assert_allclose(w.history.update_ratio()[0], expected, rtol=1e-5)
    with pytest.raises(KeyError, match=r"dead_units.. needs a history with 'unit'"):
        w.history.dead_units()


def test_update_ratio_beyond_what_float64_holds_is_infinite() -> None:
    model = nn.Linear(4, 2, bias=False).double()
    nn.init.constant_(model.weight, 1e-310)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e300)
    with gradstat.watch(model, what="update", when="step", optimizer=optimizer) as w:
        (model.weight * 1e5).sum().backward()
        optimizer.step()
    assert w.history.update_ratio().tolist() == [[np.inf]]


def test_update_of_half_precision_weights_counts_those_that_round_to_nothing() -> None:
    model = nn.Linear(16, 8, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with gradstat.watch(model, what="update", when="step", optimizer=optimizer) as w:
        model.weight.grad = torch.full_like(model.weight, 2.0**-12)
        model.weight.grad[0] = 2.0**-4
        optimizer.step()
    updates = w.history.select("update")
    assert updates["zeros"].tolist() == [[7 * 16]]
    assert updates["min"].tolist() == [[-(2.0**-4)]]


def test_update_of_what_the_optimizer_does_not_hold_is_absent() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with gradstat.watch(model, what="update", when="step", optimizer=optimizer) as w:
        backward(model)
        optimizer.step()
    assert w.history.select("update")["numel"].tolist() == [[0, 20, 0]]


def test_update_copies_weights_only_in_recorded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    original = gradients._wide_copy
    monkeypatch.setattr(gradients, "_wide_copy", lambda p: copies.append(p) or original(p))
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradstat.watch(model, every=3, what="update", when="step", optimizer=optimizer) as w:
        for _ in range(7):
            backward(model)
            optimizer.step()
    assert w.history.steps.tolist() == [0, 3, 6]
    assert len(copies) == 9


def test_step_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with gradstat.watch(model, what=EVERYTHING, when="step", optimizer=optimizer) as w:
        backward(model)
        optimizer.param_groups[0]["betas"] = None
        with pytest.raises(TypeError):
            optimizer.step()
        optimizer.param_groups[0]["betas"] = (0.9, 0.999)
        optimizer.step()
    assert len(w.history) == 1
    assert w.history.select("update")["numel"].tolist() == [[30, 20, 12]]


def test_activation_of_a_module_run_several_times_is_counted_together() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.relu = nn.Linear(6, 5), nn.Linear(5, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.second(self.relu(self.first(x))))

    model = Twice()
    seen = Seen(model, ["relu"])
    with gradstat.watch(model, what=("activation", "grad_output"), modules="relu") as w:
        backward(model)
        backward(model)
    for at in range(2):
        outputs = seen.outputs["relu"][2 * at : 2 * at + 2]
        gradients = seen.gradients["relu"][2 * at : 2 * at + 2]
        record = w.history.select("activation").record(at)
        assert_close(record, measure([joined(outputs)]))
        assert_close(w.history.select("grad_output").record(at), measure([joined(gradients)]))
        # Units of layers of other widths are other units.
        assert w.history.select("unit")["numel"][at] == 5 + 3


def test_activation_of_a_step_is_that_of_all_its_passes() -> None:
    model = make_model()
    seen = Seen(model, MODULES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradstat.watch(model, what="activation", when="step", optimizer=optimizer) as w:
        for _ in range(3):
            backward(model)
        optimizer.step()
    expected = measure([joined(seen.outputs[name]) for name in MODULES])
    assert_close(w.history.select("activation").record(), expected)
    peaks = [torch.cat(seen.outputs[name]).abs().amax(0) for name in MODULES]
    assert_record(w.history.select("unit").record(), measure(peaks))


def test_activation_follows_accumulation_steps() -> None:
    model = make_model()
    seen = Seen(model, ["4"])
    what = ("grad", "activation")
    with gradstat.watch(model, what=what, modules="4", accumulation_steps=2, every=2) as w:
        for _ in range(8):
            backward(model)
    assert w.history.steps.tolist() == [0, 2]
    for step, call in ((0, 1), (2, 5)):
        record = w.history.select("activation").record(step)
        assert_record(record, measure([seen.outputs["4"][call]]))


def test_activation_is_measured_before_it_is_changed_in_place() -> None:
    model = nn.Sequential(nn.Linear(6, 50), nn.ReLU(inplace=True), nn.Linear(50, 3))
    seen = Seen(model, ["0", "1"])
    with gradstat.watch(model, what=("activation", "grad_output"), modules="^[01]$") as w:
        backward(model)
    before = seen.outputs["0"][0]
    assert (before < 0).any()
    assert_record(w.history.select("activation").record(), measure([before, before.relu()]))
    assert (w.history.select("grad_output")["numel"] == before.numel()).all()


def test_activation_leaves_out_evaluation() -> None:
    model = make_model()
    with gradstat.watch(model, what="activation") as w:
        backward(model)
        with torch.no_grad():
            model(torch.randn(100, 6))
        model.eval()
        model(torch.randn(100, 6))
        model.train()
        backward(model)
    assert w.history.select("activation")["numel"].tolist() == [[40, 40, 32, 32, 24]] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_counts_once_what_a_checkpoint_computes_again(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Linear(6, 6), make_model()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(self.block, self.first(x), use_reentrant=reentrant)
            return result

    model = Checkpointed()
    with gradstat.watch(model, what=EVERYTHING[:2] + EVERYTHING[3:]) as w:
        for _ in range(3):
            backward(model)
    n = [[48, 40, 40, 32, 32, 24]] * 3
    assert w.history.select("activation")["numel"].tolist() == n
    assert w.history.select("grad_output")["numel"].tolist() == n


def test_activation_of_a_failed_pass_is_forgotten() -> None:
    model = make_model()
    with gradstat.watch(model, what=("grad", "activation", "grad_output")) as w:
        output = model[2:](Fails.apply(model[:2](torch.randn(8, 6))))
        with pytest.raises(RuntimeError, match="no gradient"):
            output.sum().backward()
        model.zero_grad()
        backward(model)
    assert len(w.history) == 1
    assert w.history.select("activation")["numel"].tolist() == [[40, 40, 32, 32, 24]]
    assert w.history.select("grad_output")["numel"].tolist() == [[40, 40, 32, 32, 24]]


def test_dead_units_are_those_without_an_output_in_the_batch() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-1e6, 1e6, -1e6, 0.0]))
    with gradstat.watch(model, what="activation") as w:
        backward(model)
    assert w.history.dead_units().tolist() == [[0.0, 0.5, 0.0]]
    # A NaN is not dead.
    with gradstat.watch(model, what="activation") as w:
        model(torch.full((3, 6), math.nan)).sum().backward()
    assert w.history.dead_units().tolist() == [[0.0, 0.0, 0.0]]
    assert w.history.select("unit")["nan"].tolist() == [[4, 4, 1]]


@pytest.mark.parametrize(
    ("shape", "units"), [((7,), 0), ((4, 7), 7), ((4, 5, 7), 7), ((4, 5, 3, 7), 5), ((0, 7), 0)]
)
def test_units_are_channels_of_images_and_features_otherwise(
    shape: tuple[int, ...], units: int
) -> None:
    model = nn.Sequential(nn.Identity(), nn.Flatten(0), nn.LazyLinear(1))
    x = torch.ones(shape)
    model[2] = nn.Linear(max(x.numel(), 1), 1)
    with gradstat.watch(model, what="activation", modules="^0$") as w:
        model[0](x)
        model[2](torch.ones(model[2].in_features)).sum().backward()
    assert w.history.select("unit")["numel"].tolist() == [[units]]


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(8, -1, 1)], ids=str)
@pytest.mark.parametrize("when", ["backward", "step"])
def test_grad_output_is_unscaled_and_activation_is_left_alone(bins: Bins, when: str) -> None:
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(8, 6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    histories = []
    for each, scales in ((model, scaler), (twin, None)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        options: dict[str, Any] = {"optimizer": optimizer} if when == "step" else {}
        what = ("grad", "param", "activation", "grad_output")
        with gradstat.watch(each, bins, what=what, when=when, scaler=scales, **options) as w:
            for _ in range(2):
                loss = each(x).square().mean()
                if scales is None:
                    loss.backward()
                    optimizer.step()
                else:
                    scales.scale(loss).backward()
                    scales.step(optimizer)
                    scales.update()
                optimizer.zero_grad()
        histories.append(w.history)
    for step in range(2):
        assert_record(histories[0].record(step), histories[1].record(step))


def test_outputs_that_are_no_tensors_are_searched_for_the_first() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"name": "several", "values": (None, [x * 2, x * 3])}

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.several, self.nothing = nn.LSTM(6, 4), Several(), Nothing()
            self.indices = nn.Softmax(0)

        def forward(self, x: Tensor) -> Tensor:
            self.nothing(x)
            result: Tensor = self.several(self.lstm(x)[0])["values"][1][0]
            return result

    model = Model()
    with gradstat.watch(model, what=("activation", "grad_output")) as w:
        backward(model)
    assert w.history.select("activation").layers == ["lstm", "several", "nothing", "indices"]
    numel = [[32, 32, 0, 0]]
    assert w.history.select("activation")["numel"].tolist() == numel
    assert w.history.select("grad_output")["numel"].tolist() == numel


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_has_the_same_outputs_without_a_break(backend: str) -> None:
    what = ("grad", "activation", "grad_output")
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with gradstat.watch(model, what=what) as w, gradstat.watch(twin, what=what) as expected:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for _ in range(3):
            x = torch.randn(8, 6)
            compiled(x).square().mean().backward()
            twin(x).square().mean().backward()
            model.zero_grad()
            twin.zero_grad()
    for step in range(3):
        assert_close(w.history.record(step), expected.history.record(step))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    # The compiled graph outlives the watch, which sees nothing any more.
    compiled(torch.randn(8, 6)).sum().backward()
    assert len(w.history) == 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(6, 6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.linear(x))
        return result


# Dynamo itself looks at .grad of the tensor between two compiled blocks.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_share_their_graph_and_keep_their_rows() -> None:
    what = ("grad", "activation", "grad_output")
    model = nn.Sequential(nn.Linear(6, 6), *(Block() for _ in range(4)))
    twin, xs = copy.deepcopy(model), torch.randn(2, 8, 6)
    graphs = []
    for watched in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = copy.deepcopy(model)
        with gradstat.watch(compiled if watched else twin, what=what) as w:
            for block in compiled[1:]:
                block.compile(backend="aot_eager", fullgraph=True)
            for x in xs:
                (compiled if watched else twin)(x).square().mean().backward()
                if not watched:
                    compiled(x).sum().backward()
        graphs.append((torch._dynamo.utils.counters["stats"]["unique_graphs"], w.history))
    (bare, expected), (shared, history) = graphs
    assert shared == bare == 1
    for step in range(2):
        assert_close(history.record(step), expected.record(step))


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_activation_is_measured_as_it_is_under_autocast(engine: str) -> None:
    model = make_model()
    seen = Seen(model, MODULES)
    what = ("activation", "grad_output")
    with gradstat.watch(model, what=what, engine=engine) as w:
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            output = model(torch.randn(8, 6))
        output.float().square().mean().backward()
    outputs = [seen.outputs[name][0] for name in MODULES]
    assert {x.dtype for x in outputs} == {torch.bfloat16}
    expected = gradstat.statistics(outputs, engine=engine)
    assert_record(w.history.select("activation").record(), expected)
    peaks = [x.abs().amax(0) for x in outputs]
    assert_record(w.history.select("unit").record(), gradstat.statistics(peaks, engine=engine))


def test_model_compiled_before_is_warned_of() -> None:
    model = make_model()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(8, 6)).sum().backward()
    with gradstat.watch(model, what=("grad", "activation")) as w:
        with pytest.warns(RuntimeWarning, match="compiled after watch"):
            compiled(torch.randn(8, 6)).sum().backward()
        compiled(torch.randn(8, 6)).sum().backward()
    assert w.history.select("activation")["numel"].tolist() == [[0] * 5] * 2
    assert (w.history.select("grad")["numel"] > 0).all()


def test_hooks_leave_with_the_watch_and_do_nothing_in_copies() -> None:
    model = make_model()
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradstat.watch(model, what=EVERYTHING, when="step", optimizer=optimizer) as w:
        assert list(model.state_dict()) == keys
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            backward(clone)
        backward(model)
        optimizer.step()
    assert n_hooks(model) == n_step_hooks(optimizer) == 0
    assert w.history.select("activation")["numel"].tolist() == [[40, 40, 32, 32, 24]]


def test_pickled_model_needs_no_gradstat() -> None:
    model = make_model()
    with gradstat.watch(model, what="activation"):
        assert b"gradstat" not in pickle.dumps(model)


def test_hooks_outlive_a_watch_that_nobody_keeps(tmp_path: Path) -> None:
    model = make_model()
    gradstat.watch(model, what=("grad", "activation"), path=tmp_path / "run")
    backward(model)
    del model
    # The device's own thread, if it has one, may still hold what it has computed.
    end_s = time.monotonic() + 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a block that is being written
        while not len(History.load(tmp_path / "run")) and time.monotonic() < end_s:
            gc.collect()
            time.sleep(0.01)
        history = History.load(tmp_path / "run")
    assert history.select("activation")["numel"].tolist() == [[40, 40, 32, 32, 24]]


def test_tracing_and_transforms_are_not_measured() -> None:
    model = make_model()
    parameters = dict(model.named_parameters())
    x = torch.randn(8, 6)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).square().mean()

    with gradstat.watch(model, what=("grad", "activation", "grad_output")) as w:
        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        exported = torch.export.export(model, (x,))
        assert "gradstat" not in str(exported.graph)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(model, x)
        backward(model)
    assert w.history.select("activation")["numel"].tolist() == [[40, 40, 32, 32, 24]]


def test_kinds_are_saved_and_written_with_the_records(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"when": "step", "optimizer": optimizer, "path": tmp_path / "run"}
    with gradstat.watch(model, what=EVERYTHING, **options) as w:
        for _ in range(3):
            backward(model)
            optimizer.step()
    w.history.save(tmp_path / "run.npz")
    for path in (tmp_path / "run.npz", tmp_path / "run"):
        loaded = History.load(path)
        assert loaded.kinds == w.history.kinds
        assert loaded.layers == w.history.layers
        np.testing.assert_array_equal(loaded.update_ratio(), w.history.update_ratio())
        assert_record(loaded.select("unit").record(1), w.history.select("unit").record(1))


def test_module_is_printed_with_its_type(tmp_path: Path) -> None:
    model = make_model()
    with gradstat.watch(model, what=("grad", "activation"), path=tmp_path / "run") as w:
        backward(model)
    w.history.save(tmp_path / "run.npz")
    read = [History.load(tmp_path / name) for name in ("run", "run.npz")]
    for history in (w.history, *read):
        table = str(history.record())
        assert "activation/1 (Tanh) " in table
        assert "2.weight " in table


def test_select_refuses_what_was_not_recorded() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        backward(model)
    assert w.history.select("grad").layers == w.history.layers
    with pytest.raises(KeyError, match=r"select.. needs a history with 'update'; it has grad"):
        w.history.select("update")
    with pytest.raises(KeyError, match="update_ratio"):
        w.history.update_ratio()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"what": 3}, TypeError, "what is 3"),
        ({"what": ()}, ValueError, r"what is \(\)"),
        ({"what": "gradient"}, ValueError, "grad_output; what is 'gradient'"),
        ({"what": ("grad", "unit")}, ValueError, "what is .'grad', 'unit'"),
        ({"what": "update"}, ValueError, "needs when='step' .* when is 'backward'"),
        ({"what": "grad", "modules": "0"}, ValueError, "for modules; what is 'grad'"),
        ({"what": "activation", "modules": "none"}, ValueError, "5 modules|6 modules"),
        ({"what": "activation", "modules": "["}, ValueError, "modules is '\\['"),
        ({"what": "activation", "modules": 3}, TypeError, "modules is 3"),
        ({"what": "activation", "bins": LinearBins(8)}, ValueError, "bins is LinearBins"),
        ({"when": "step", "scaler": torch.amp.GradScaler("cpu")}, (TypeError, ValueError), "watch"),
    ],
)
def test_what_refuses_options_that_do_not_go_together(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make_model()
    with pytest.raises(error, match=message):
        gradstat.watch(model, **options)
    assert n_hooks(model) == 0


def test_call_measures_updates_when_the_optimizer_has_stepped() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    options = {"what": ("grad", "update"), "optimizer": optimizer}
    changes = []
    with gradstat.watch(model, when="call", **options) as w:
        for step in range(3):
            backward(model)
            before = [model.get_parameter(name).detach().clone() for name in WEIGHTS]
            w.measure()
            if step != 1:  # as a scaler skips it
                optimizer.step()
            after = [model.get_parameter(name).detach() for name in WEIGHTS]
            changes.append([float((a - b).norm()) for a, b in zip(after, before, strict=True)])
        optimizer.step()  # which no call has measured
    assert w.history.steps.tolist() == [0, 1, 2]
    updates = w.history.select("update")["l2"]
    assert np.isnan(updates[1]).all()
    assert updates[[0, 2]] == pytest.approx(np.array(changes)[[0, 2]])


def test_call_keeps_a_record_whose_step_never_came() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    w = gradstat.watch(model, when="call", what=("grad", "update"), optimizer=optimizer, every=2)
    for _ in range(3):
        backward(model)
        w.measure()
    w.close()
    assert w.history.steps.tolist() == [0, 2]
    assert np.isfinite(w.history.select("grad")["l2"]).all()
    assert np.isnan(w.history.update_ratio()).all()


@pytest.mark.parametrize("when", ["backward", "step", "call"])
def test_watch_of_all_takes_updates_where_it_sees_steps(when: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with gradstat.watch(model, what="all", when=when, optimizer=optimizer) as w:
        backward(model)
        if when == "call":
            w.measure()
        optimizer.step()
    kinds = ["grad", "param", "update", "activation", "unit", "grad_output"]
    if when == "backward":
        kinds.remove("update")
    assert list(dict.fromkeys(w.history.kinds)) == kinds
    with gradstat.watch(model, what="all", when="call") as w:
        assert "update" not in w.history.kinds
