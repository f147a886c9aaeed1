"""Callbacks of the real trainers, on tiny models that nothing has to be downloaded for."""

import copy
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from watching import WEIGHTS, assert_record, assert_same, make_model, n_hooks, n_step_hooks

import gradstat
from gradstat import History, Log2Bins

# What the trainers' own code and what they import say of each other is not ours to change.
pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


class Data(torch.utils.data.Dataset):
    """Twelve rows, always the same."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> Tensor:
        return torch.randn(6, generator=torch.Generator().manual_seed(row))


@pytest.fixture
def lightning() -> Any:
    pytest.importorskip("lightning.pytorch")
    import lightning.pytorch

    return lightning.pytorch


QUIET = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
}


def make_trainer(lightning: Any, callback: Any, **options: Any) -> Any:
    return lightning.Trainer(callbacks=[callback], **QUIET, **options)


def make_module(lightning: Any, fails_at: int | None = None) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()
            self.whole: list[list[Tensor]] = []

        def training_step(self, batch: Tensor, at: int) -> Tensor:
            if at == fails_at:
                raise KeyError("mine")
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            parameters = dict(self.model.named_parameters())
            self.whole.append([parameters[name].grad.clone() for name in WEIGHTS])

    return Module()


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Data(), batch_size=2)


@pytest.mark.parametrize(
    ("options", "n_steps"),
    [
        ({}, 12),
        ({"accumulate_grad_batches": 4}, 4),  # of six batches: four, and the two that are left
        ({"gradient_clip_val": 1e-3}, 12),
    ],
    ids=["plain", "accumulated", "clipped"],
)
def test_lightning_callback_records_each_step(
    lightning: Any, options: dict[str, Any], n_steps: int
) -> None:
    from gradstat.integrations.lightning import WatchCallback

    callback, module = WatchCallback(bins=Log2Bins()), make_module(lightning)
    make_trainer(lightning, callback, max_epochs=2, **options).fit(module, loader())
    history = callback.history
    assert history.layers == [f"model.{name}" for name in WEIGHTS]
    assert history.steps.tolist() == list(range(n_steps))
    assert len(module.whole) == n_steps
    for step, tensors in enumerate(module.whole):
        assert_record(history.record(step), gradstat.statistics(tensors))


@pytest.mark.parametrize("n_batches", [1, 3])
def test_lightning_callback_keeps_losses_rates_and_what_is_logged(
    lightning: Any, n_batches: int
) -> None:
    from gradstat.integrations.lightning import WatchCallback

    losses: list[float] = []

    class Logs(type(make_module(lightning))):  # type: ignore[misc]
        def training_step(self, batch: Tensor, at: int) -> Tensor:
            loss = super().training_step(batch, at)
            losses.append(float(loss.detach()))
            self.log("size", float(at))
            return loss

    callback = WatchCallback()
    trainer = make_trainer(lightning, callback, max_epochs=1, accumulate_grad_batches=n_batches)
    trainer.fit(Logs(), loader())
    history = callback.history
    steps, values = history.scalar("loss")
    assert steps.tolist() == [at // n_batches for at in range(6)]
    assert values.tolist() == pytest.approx(losses)
    assert history.scalar("lr")[0].tolist() == history.steps.tolist()
    assert set(history.scalar("lr")[1]) == {0.1}
    assert history.scalar("size")[1].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 4}, {"gradient_clip_val": 1}])
def test_lightning_callback_sees_the_updates_of_each_step(
    lightning: Any, options: dict[str, Any]
) -> None:
    from gradstat.integrations.lightning import WatchCallback

    class Keeps(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            self.before = [dict(module.named_parameters())[n].clone() for n in names]

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step > len(updates):
                after = [dict(module.named_parameters())[n].detach() for n in names]
                updates.append([a - b for a, b in zip(after, self.before, strict=True)])

    names, updates = [f"model.{name}" for name in WEIGHTS], []
    callback, module = WatchCallback(what=("grad", "update")), make_module(lightning)
    options |= {"max_epochs": 1, "callbacks": [callback, Keeps()]}
    lightning.Trainer(**QUIET, **options).fit(module, loader())
    history = callback.history.select("update")
    assert history.layers == names
    assert len(module.whole) == len(history)
    for step, tensors in enumerate(module.whole):
        assert_record(callback.history.select("grad").record(step), gradstat.statistics(tensors))
        assert history.record(step).l2.tolist() == pytest.approx(
            [float(x.norm()) for x in updates[step]]
        )
    assert n_hooks(module) == n_step_hooks(module.optimizers().optimizer) == 0


def test_lightning_callback_says_that_updates_need_one_optimizer(lightning: Any) -> None:
    from gradstat.integrations.lightning import WatchCallback

    class Two(type(make_module(lightning))):  # type: ignore[misc]
        automatic_optimization = False

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    message = re.escape("needs a module with one optimizer to see updates; Two has 2")
    with pytest.raises(ValueError, match=message):
        make_trainer(lightning, WatchCallback(what="update"), max_epochs=1).fit(Two(), loader())


@pytest.mark.parametrize("trainer", ["lightning", "transformers"])
def test_callback_refuses_a_misspelt_option_when_it_is_made(
    trainer: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(trainer)
    module = importlib.import_module(f"gradstat.integrations.{trainer}")
    message = r"WatchCallback\(\) needs options of watch\(\), .*did you mean 'every'.*; got evry=3"
    with pytest.raises(TypeError, match=message):
        module.WatchCallback(evry=3)
    with pytest.raises(ValueError, match=r"WatchCallback\(\) needs formats, each .*; one is 'fp4'"):
        module.WatchCallback(formats="fp4")
    with pytest.raises(TypeError, match=r"WatchCallback\(\) needs a function; sink is 5"):
        module.WatchCallback(sink=5)


def test_lightning_callback_leaves_training_bit_identical(lightning: Any) -> None:
    from gradstat.integrations.lightning import WatchCallback

    one = make_module(lightning)
    other = copy.deepcopy(one)
    for module, callback in ((one, WatchCallback(every=2)), (other, lightning.Callback())):
        make_trainer(lightning, callback, max_epochs=1).fit(module, loader())
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))


def test_lightning_callback_measures_unscaled_gradients(lightning: Any) -> None:
    from gradstat.integrations.lightning import WatchCallback

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    callback, module = WatchCallback(), make_module(lightning)
    make_trainer(lightning, callback, max_epochs=1, plugins=[plugin]).fit(module, loader())
    assert len(callback.history) == len(module.whole) > 0
    for step, tensors in enumerate(module.whole):
        assert_record(callback.history.record(step), gradstat.statistics(tensors))


def test_lightning_callback_writes_what_it_has_when_training_fails(
    lightning: Any, tmp_path: Path
) -> None:
    from gradstat.integrations.lightning import WatchCallback

    callback, module = WatchCallback(path=tmp_path / "run"), make_module(lightning, fails_at=3)
    with pytest.raises(KeyError, match="mine"):
        make_trainer(lightning, callback, max_epochs=1).fit(module, loader())
    assert History.load(tmp_path / "run").steps.tolist() == [0, 1, 2]


def test_lightning_callback_goes_on_where_a_checkpoint_was_made(
    lightning: Any, tmp_path: Path
) -> None:
    from gradstat.integrations.lightning import WatchCallback

    path, checkpoint = tmp_path / "run", tmp_path / "checkpoint"
    trainer = make_trainer(lightning, WatchCallback(path=path), max_epochs=1)
    trainer.fit(make_module(lightning), loader())
    trainer.save_checkpoint(checkpoint)
    callback, module = WatchCallback(path=path), make_module(lightning)
    make_trainer(lightning, callback, max_epochs=2).fit(module, loader(), ckpt_path=checkpoint)
    assert callback.history.steps.tolist() == list(range(6, 12))
    loaded = History.load(path)
    assert loaded.steps.tolist() == loaded.scalar("loss")[0].tolist() == list(range(12))
    assert_record(loaded.record(7), gradstat.statistics(module.whole[1]))
    with pytest.raises(ValueError, match="first_step to go on with them"):
        make_trainer(lightning, WatchCallback(path=path), max_epochs=1).fit(module, loader())


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("accelerate")
    # In the root of a checkout transformers takes kernels/ for a package that it knows.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() != ROOT])
    return pytest.importorskip("transformers")


def make_gpt(transformers: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=32,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def make_rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": x, "labels": x} for x in torch.randint(32, (12, 8)).unbind()]


def make_arguments(transformers: Any, path: Path) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.01,
        num_train_epochs=2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )


def train_gpt(transformers: Any, model: nn.Module, callback: Any, path: Path) -> None:
    arguments = make_arguments(transformers, path)
    transformers.Trainer(model, arguments, train_dataset=make_rows(), callbacks=[callback]).train()


def test_transformers_callback_records_what_each_step_applies(
    transformers: Any, tmp_path: Path
) -> None:
    from gradstat.integrations.transformers import WatchCallback

    applied: list[list[Tensor]] = []
    seen: list[torch.optim.Optimizer] = []

    class Keeping(WatchCallback):
        def on_pre_optimizer_step(
            self, *_: Any, model: nn.Module, optimizer: Any, **__: Any
        ) -> None:
            parameters = dict(model.named_parameters())
            applied.append([parameters[n].grad.clone() for n in self.history.layers])
            seen[:] = [optimizer.optimizer]

    model, callback = make_gpt(transformers), Keeping(parameters="")
    train_gpt(transformers, model, callback, tmp_path)
    history = callback.history
    assert history.layers == [name for name, _ in model.named_parameters()]
    assert history.steps.tolist() == list(range(6))
    for step, tensors in enumerate(applied):
        assert_record(history.record(step), gradstat.statistics(tensors))
    # All gradients together are clipped to that.
    assert ((history["l2"] ** 2).sum(1) ** 0.5).tolist() == pytest.approx([0.01] * 6, rel=1e-3)
    assert n_hooks(model) == n_step_hooks(seen[0]) == 0


def test_transformers_callback_keeps_what_the_trainer_logs(
    transformers: Any, tmp_path: Path
) -> None:
    from gradstat.integrations.transformers import WatchCallback

    class Logs(transformers.Trainer):
        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            self.log({"mine": float(self.state.global_step)})
            return super().compute_loss(*arguments, **options)

    arguments = make_arguments(transformers, tmp_path)
    arguments.logging_strategy, arguments.logging_steps = "steps", 2
    callback = WatchCallback()
    trainer = Logs(
        make_gpt(transformers), arguments, train_dataset=make_rows(), callbacks=[callback]
    )
    trainer.train()
    history = callback.history
    logged = [each for each in trainer.state.log_history if "loss" in each]
    steps, losses = history.scalar("loss")
    assert steps.tolist() == list(range(6))
    # The Trainer has the mean of two steps.
    assert losses.reshape(3, 2).mean(1).tolist() == pytest.approx([each["loss"] for each in logged])
    assert "trainer_loss" not in history.scalars
    assert history.scalar("lr/0")[0].tolist() == history.steps.tolist()
    # Two batches of each step.
    steps, mine = history.scalar("mine")
    assert mine.tolist() == steps.tolist() == [step for step in range(6) for _ in range(2)]


@pytest.mark.parametrize("how", ["another loss", "no loss", "means"])
def test_transformers_callback_says_whose_loss_it_keeps(
    transformers: Any, tmp_path: Path, how: str
) -> None:
    from gradstat.integrations.transformers import WatchCallback

    class Other(transformers.Trainer):
        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Tensor], *arguments: Any, **options: Any
        ) -> Tensor:
            if how == "means":
                return model(**inputs).loss
            labels = inputs.pop("labels") if how == "no loss" else inputs["labels"]
            logits = model(**inputs).logits
            return 3 * nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    arguments = make_arguments(transformers, tmp_path)
    arguments.logging_strategy, arguments.logging_steps = "steps", 2
    callback, model = WatchCallback(), make_gpt(transformers)
    trainer = Other(model, arguments, train_dataset=make_rows(), callbacks=[callback])
    if how == "means":
        trainer.model_accepts_loss_kwargs = False
    trainer.train()
    h = callback.history
    logged = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    if how == "no loss":
        assert h.scalar("loss")[1].tolist() == pytest.approx(logged)
        return
    assert h.scalar("loss")[0].tolist() == list(range(6))
    means = h.scalar("loss")[1].reshape(3, 2).mean(1)
    assert ("trainer_loss" in h.scalars) == (how == "another loss")
    if how == "means":
        assert means.tolist() == pytest.approx(logged, rel=1e-3)
    else:
        assert h.scalar("trainer_loss")[1].tolist() == pytest.approx(logged)
    assert n_hooks(model) == 0


def test_transformers_callback_writes_each_training_for_its_viewer(
    transformers: Any, tmp_path: Path
) -> None:
    tensorboard = pytest.importorskip("gradstat.integrations.tensorboard")
    pytest.importorskip("tensorboard")
    from gradstat.integrations.transformers import WatchCallback

    callback = WatchCallback(sink=tensorboard.writer(tmp_path / "runs"))
    for _ in range(2):
        train_gpt(transformers, make_gpt(transformers), callback, tmp_path / "out")
    assert len(list((tmp_path / "runs").glob("events.out.tfevents.*"))) == 2


def test_transformers_callback_goes_on_where_a_checkpoint_was_made(
    transformers: Any, tmp_path: Path
) -> None:
    from gradstat.integrations.transformers import WatchCallback

    arguments, rows = make_arguments(transformers, tmp_path / "out"), make_rows()
    arguments.save_strategy, arguments.save_steps = "steps", 4
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-4")):
        callback = WatchCallback(path=tmp_path / "run")
        trainer = transformers.Trainer(
            make_gpt(transformers), arguments, train_dataset=rows, callbacks=[callback]
        )
        trainer.train(resume_from_checkpoint=checkpoint)
    assert callback.history.steps.tolist() == [4, 5]
    loaded = History.load(tmp_path / "run")
    assert loaded.steps.tolist() == loaded.scalar("lr/0")[0].tolist() == list(range(6))


def test_transformers_callback_leaves_training_bit_identical(
    transformers: Any, tmp_path: Path
) -> None:
    from gradstat.integrations.transformers import WatchCallback

    one = make_gpt(transformers)
    other = copy.deepcopy(one)
    for model, callback in ((one, WatchCallback()), (other, transformers.TrainerCallback())):
        torch.manual_seed(7)
        train_gpt(transformers, model, callback, tmp_path)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))


PRINTED = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_printed(package: str, namespace: dict[str, Any]) -> History:
    """Run what docs/training.md prints for a trainer."""
    code = next(
        each for each in PRINTED.findall((ROOT / "docs/training.md").read_text()) if package in each
    )
    exec(code, namespace)
    return namespace["gradients"].history


def test_lightning_lines_run_as_printed(
    lightning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"Trainer": lightning.Trainer, "options": QUIET, "loader": loader()}
    history = run_printed("lightning", {**names, "module": make_module(lightning)})
    assert history.steps.tolist() == [0, 2, 4]
    assert_same(History.load(tmp_path / "run" / "lightning"), history)


def test_transformers_lines_run_as_printed(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, rows = make_arguments(transformers, tmp_path), make_rows()
    names = {"Trainer": transformers.Trainer, "arguments": arguments, "rows": rows}
    history = run_printed("transformers", {**names, "model": make_gpt(transformers)})
    assert history.steps.tolist() == [0, 2, 4]
    assert_same(History.load(tmp_path / "run" / "transformers"), history)


def lightning_callback() -> type:
    pytest.importorskip("lightning.pytorch")
    from gradstat.integrations.lightning import WatchCallback

    return WatchCallback


def transformers_callback() -> type:
    pytest.importorskip("transformers")
    from gradstat.integrations.transformers import WatchCallback

    return WatchCallback


@pytest.mark.parametrize("callback", [lightning_callback, transformers_callback])
@pytest.mark.parametrize(
    "name", ["model", "when", "optimizer", "scaler", "accumulation_steps", "first_step"]
)
def test_callbacks_refuse_what_the_trainer_knows(callback: Callable[[], type], name: str) -> None:
    message = f"WatchCallback() needs no {name}, which the trainer knows; {name} is 'mine'"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        callback()(**{name: "mine"})


@pytest.mark.parametrize("callback", [lightning_callback, transformers_callback])
def test_callbacks_have_no_history_before_training(callback: Callable[[], type]) -> None:
    with pytest.raises(RuntimeError, match="WatchCallback needs a training"):
        _ = callback()().history


def test_lightning_measures_gradients_of_outputs_unscaled(lightning: Any) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    from gradstat.integrations.lightning import WatchCallback

    norms = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(20)
        callback, module = WatchCallback(what=("grad", "grad_output")), make_module(lightning)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugins = [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]
        trainer = make_trainer(lightning, callback, max_epochs=1, plugins=plugins)
        trainer.fit(module, torch.utils.data.DataLoader(Data(), batch_size=4))
        norms.append(callback.history["l2"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)  # of float16 values


def test_transformers_measures_gradients_of_outputs_unscaled() -> None:
    pytest.importorskip("transformers")
    from accelerate.optimizer import AcceleratedOptimizer

    from gradstat.integrations.transformers import WatchCallback

    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    callback = WatchCallback(what=("grad", "grad_output"), modules="4")
    state = SimpleNamespace(global_step=0)
    callback.on_train_begin(None, state, None, model=model, optimizer=optimizer)
    scaler.scale(model(torch.randn(8, 6)).sum()).backward()
    optimizer.step()
    assert callback.history.select("grad_output")["max"].tolist() == [[1.0]]


@pytest.mark.parametrize("n_batches", [1, 2])
@pytest.mark.parametrize("when", ["backward", "step"])
def test_watch_takes_what_accelerate_has_prepared(when: str, n_batches: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=n_batches)
    plain = make_model()
    inner = torch.optim.SGD(plain.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(plain, inner)
    options = {"accumulation_steps": n_batches} if when == "backward" else {}
    expected = []
    with gradstat.watch(model, when=when, optimizer=optimizer, **options) as w:
        for batch in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.randn(8, 6)).square().mean())
                if batch % n_batches == n_batches - 1:
                    weights = [plain.get_parameter(name) for name in WEIGHTS]
                    expected.append(gradstat.statistics([p.grad.clone() for p in weights]))
                optimizer.step()
                optimizer.zero_grad()
    assert len(w.history) == len(expected) == 4 // n_batches
    for step, each in enumerate(expected):
        assert_record(w.history.record(step), each)
    assert w.history.scalar("lr")[1].tolist() == [0.1] * len(expected)
    assert n_step_hooks(inner) == n_hooks(plain) == 0


def test_watch_refuses_a_wrapper_without_an_optimizer_in_it() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self) -> None:
            self.param_groups = []

    with pytest.raises(TypeError, match=r"needs an optimizer that has step hooks; .* Wrapper"):
        gradstat.watch(make_model(), optimizer=Wrapper())
