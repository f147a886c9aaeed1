"""`watch`: hooks on a model that measure its gradients during backward, into a `History`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gradstat.bins import Bins, Log2Bins
from gradstat.diagnosis.alerts import Alert, Alerts
from gradstat.formats import Format, asked_formats
from gradstat.history import History
from gradstat.history.journal import Journal
from gradstat.history.rank_directories import own_directory
from gradstat.ops import check_bins, check_engine
from gradstat.record import KINDS, OF_OUTPUTS, Row
from gradstat.recording import open_watches, options
from gradstat.recording.cuda_graphs import Cadence
from gradstat.recording.delivery import Delivery, Sink
from gradstat.recording.logged import LearningRates, Logged
from gradstat.recording.module_hooks import OutputHooks
from gradstat.recording.parameter_hooks import BackwardHooks, StepHook
from gradstat.recording.recorder import Recorder
from gradstat.recording.run_writer import RunWriter
from gradstat.recording.running_watch import Watch
from gradstat.recording.selection import (
    ModuleSelector,
    ParameterSelector,
    Replaced,
    select_modules,
    select_parameters,
)
from gradstat.recording.shards import rank_and_world, usual_origins
from gradstat.recording.streams import SideStream
from gradstat.recording.torch_internals import unwrapped

Kind = Literal["grad", "param", "update", "activation", "grad_output"]
What = Kind | Literal["all"] | Sequence[Kind]


def watch(
    model: nn.Module,
    bins: int | Bins | None = None,
    every: int = 1,
    *,
    what: What = "grad",
    formats: str | Format | Sequence[str | Format] = (),
    parameters: ParameterSelector | None = None,
    modules: ModuleSelector | None = None,
    accumulation_steps: int = 1,
    when: Literal["backward", "step", "call"] = "backward",
    optimizer: Optimizer | None = None,
    scaler: GradScaler | None = None,
    capacity: int | None = None,
    sink: Sink | None = None,
    path: str | os.PathLike[str] | None = None,
    first_step: int | None = None,
    alert: Alert | None = None,
    bucket_bytes: int = 25 << 20,
    stream: Literal["current", "side"] = "current",
    engine: str | None = None,
    name: str | None = None,
) -> Watch:
    """Measure a model's gradients, during backward or when the optimizer steps.

    One record per backward pass that reaches a watched parameter, or per step. Reentrant
    checkpoints are part of the pass they run in, and passes that overlap in several threads make
    one record. Nothing waits for the device until a record is read, and nothing about the training
    changes.

    A record holds ``p.grad`` as the pass has accumulated it. A layer that has none, being frozen or
    unused, is a row of NaN and of zero counts; a shared parameter is one layer, under its first
    name. A sparse gradient is measured by its values, without the zeros around them. Parameters
    that are replaced, as ``load_state_dict(assign=True)`` does, or added later are not seen: watch
    again; a RuntimeWarning names those that were replaced. Compiled autograd needs ``when="step"``.

    In a distributed run each rank records what it has itself, and `History.reduce` puts the ranks
    together. For a DTensor, as FSDP2 makes them, that is its shard. DistributedDataParallel
    averages gradients during backward; they are measured before that. ``when="step"`` measures the
    average.

    Args:
        model: the model; watch it after moving, sharding or wrapping it.
        bins: as in `statistics`.
        every: record every so many steps, from the first one.
        what: what to measure, one or several of these, or ``"all"``, with updates where they can be
            had; `History.select` has the rows of each.
            ``"grad"``: gradients. ``"param"``: the parameters themselves, by the end of the pass or
            before the step. ``"update"``: by how much a step changes them, with ``"param"``, for
            `History.update_ratio`; it needs an ``optimizer``, with ``when="step"`` or ``"call"``,
            and memory for a copy of them in the steps recorded. ``"activation"``: what modules
            return while the model is in training mode, with the largest magnitude of each unit
            (``"unit"``: a channel of convolutions, a feature otherwise), for
            `History.dead_units`. ``"grad_output"``: the gradients with respect to that. What a
            module returns several times before a record is counted together; a large output is
            measured in a launch of its own.
        formats: narrow number formats, such as ``"mxfp8_e4m3"``, and what each would do to every
            tensor that is recorded: `History.quantization`, a finding, and ``gradstat formats``;
            names as for `quantization`, blocks along the last dimension. With a scaler they are
            given the scaled gradients, as a cast would be; for a sharded tensor each rank's part.
        parameters: which parameters: a regular expression searched for in their names, or a
            function of name and parameter. By default all but biases.
        modules: which modules return activations, as for ``parameters``. By default those that have
            no modules in them, and `torch.nn.MultiheadAttention` as a whole.
        accumulation_steps: backward passes per optimizer step. The last of each is recorded, when
            the gradient is whole.
        when: ``"backward"`` measures gradients by the end of the pass, in buckets: other hooks must
            not change them before that; ``"step"`` measures what the optimizer is about to apply:
            after reduction, unscaling and clipping; ``"call"`` measures where `Watch.measure` is
            called. Two watches of one model compare them.
        optimizer: whose learning rate is kept at each step, as the scalar ``lr``, or ``lr/0``,
            ``lr/1`` and so on for several groups; and whose steps are records, for ``when="step"``:
            layers that it does not hold are absent, and so are the steps that a scaler skips (a
            fused optimizer skips them itself, with a record). A closure given to its ``step()``
            runs after the measurement: for that there is ``when="call"``.
        scaler: what scales the loss, for ``when="backward"``, and for outputs always: gradients are
            then measured unscaled, and outputs of skipped steps left out. Exact while the scale is
            a power of two, as by default; with another one a value may be counted up to two bins of
            `Log2Bins` too near to zero. A backward pass before a step that is skipped has a record
            like any other, its NaN and infinities counted.
        capacity: most records to keep in memory, 2 or more: the first, the last, and between them
            every so many, evenly.
        sink: a function of a step's number and its record, Statistics on the CPU that it must not
            change. It is called in order, in the thread that trains, and what it raises is raised
            there. `integrations.tensorboard.writer` and `integrations.wandb.writer` make sinks
            that show the run while it goes on.
        path: a directory to which all records are written as the run goes on, every 5 seconds and
            at the end, for `History.load` to read at any time, also after the process was killed.
            Where that fails one warning is given, and training goes on. Where there is a process
            group, each rank writes to a directory of its own in it, such as ``rank-3``.
        first_step: number of the first step, by default 0. A run that is resumed goes on in a
            directory that has records: those from this step on are superseded, the others stay, and
            all of it loads as one run.
        alert: a function of a `Finding`, called as soon as a record or a logged loss shows what
            is not finite, a spike or an explosion; once for each, and again after it has cleared.
            It is called in the thread that trains, and what it raises stops the training.
        bucket_bytes: gradients measured in one launch; the default leaves them in a GPU's cache.
        stream: ``"side"`` measures on a CUDA stream of its own, beside the rest of the backward
            pass; whatever comes after the pass waits for it, on the device.
        engine: as in `statistics`.
        name: of the watch, for a cell of a notebook that is run again: an open watch of this model
            with the same name is closed first. Without a name an open watch goes on measuring
            beside the new one; a RuntimeWarning says so if both measure the same.

    Returns:
        The running Watch: a context manager, or to be closed with ``close()``.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number below 1, an unknown engine, options that do not go together, no
            parameter that is selected and needs a gradient, one without a shape so far, an
            optimizer of other parameters, a directory that has records already without first_step,
            or records of other layers or bins.

    Example:
        >>> import torch, gradstat
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        >>> with gradstat.watch(model) as w:
        ...     for _ in range(3):
        ...         model(torch.randn(8, 4)).mean().backward()
        >>> w.history
        History(3 steps, 2 layers, Log2Bins())
    """
    scheme = check_bins("watch", Log2Bins() if bins is None else bins)
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch() needs a torch.nn.Module; model is {type(model).__name__}")
    options.check_integer("every", every, 1)
    options.check_integer("accumulation_steps", accumulation_steps, 1)
    options.check_integer("bucket_bytes", bucket_bytes, 1)
    if capacity is not None:
        options.check_integer("capacity", capacity, 2)
    if first_step is not None:
        options.check_integer("first_step", first_step, 0)
    for argument, function in (("sink", sink), ("alert", alert)):
        if function is not None and not callable(function):
            raise TypeError(f"watch() needs a function; {argument} is {function!r}")
    writer = sink if isinstance(sink, RunWriter) else None
    if writer is not None:
        writer.check_new()
    if path is not None:
        options.check_directory("watch", "path", path)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"watch() needs a string; name is {name!r}")
    if stream not in ("current", "side"):
        raise ValueError(f"watch() needs one of current, side; stream is {stream!r}")
    check_engine("watch", engine)
    parsed = asked_formats("watch", formats)
    if not isinstance(scaler, GradScaler | None):
        raise TypeError(f"watch() needs a torch.amp.GradScaler; scaler is {type(scaler).__name__}")
    kinds = options.check_what(what, when, optimizer, scheme, modules)
    has_outputs = not kinds.isdisjoint(OF_OUTPUTS)
    options.check_when(when, optimizer, None if has_outputs else scaler, accumulation_steps)
    selected = select_parameters(model, parameters)
    weights = list(selected.values())
    if optimizer is not None:
        optimizer = unwrapped(optimizer)
        options.check_holds(optimizer, weights)
    seen = select_modules(model, modules) if has_outputs else {}
    rows = [
        Row(kind, name)
        for kind in KINDS
        if kind in kinds
        for name in (seen if kind in OF_OUTPUTS else selected)
    ]
    history = History(rows, scheme, capacity=capacity, formats=[each.name for each in parsed])
    history.origins[:] = usual_origins(model, history.kinds, when)
    history.rank, history.world = rank_and_world()
    journal = None
    if path is not None:
        journal = Journal(own_directory(Path(path), history.rank), history, first_step)
    side = SideStream() if stream == "side" else None
    cadence = Cadence(every, accumulation_steps, weights, engine, first_step or 0)
    alerts = None
    if alert is not None:
        alerts = Alerts(history, alert, is_scaled=scaler is not None)
    keepers = [each.add_scalar for each in (history, journal, writer) if each is not None]
    replaced = Replaced(model, selected)
    logged = Logged(cadence, keepers, alerts, replaced)
    delivery = Delivery(history, cadence, sink, journal, alerts)
    recorder = Recorder(history, cadence, logged, delivery, replaced, bucket_bytes, engine, side)
    # Parameters by their ids: others may have taken their places, and names, since.
    watched = (*rows, *map(id, weights), *history.formats)
    measures = (*watched, scheme, every, when, accumulation_steps, capacity, stream, engine)
    open_watches.make_room(model, name, measures)
    if writer is not None:
        writer.begin(history, first_step, recorder.finish)
    hooks: open_watches.Hooks
    stepping = optimizer if when == "step" else None
    if when == "backward":
        at_once = _is_changed_in_backward(model)
        hooks = BackwardHooks(weights, recorder, scaler, at_once)
    else:
        hooks = StepHook(weights, recorder, optimizer, calls_only=when == "call")
    others: list[open_watches.Others] = []
    if seen:
        others.append(
            OutputHooks(model, list(seen.values()), recorder, scaler, stepping, hooks.is_running)
        )
    if optimizer is not None:
        hooks.rates = LearningRates(optimizer, logged.add)
        others.append(hooks.rates)
    open_watches.add(model, name, measures, recorder, hooks, others)
    return Watch(recorder, hooks, others)


def _is_changed_in_backward(model: nn.Module) -> bool:
    """Whether gradients may be averaged before the end of the pass that computes them."""
    return any(
        isinstance(module, DistributedDataParallel) and module.static_graph
        for module in model.modules()
    )
