"""`watch` hangs hooks on a model that measure its gradients, and returns the running `Watch`."""

from __future__ import annotations

import html
import importlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.cuda import CUDAGraph
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradstat.bins import Bins, Log2Bins
from gradstat.diagnosis.alerts import Alert, Alerts
from gradstat.formats import Format, asked_formats
from gradstat.history import History
from gradstat.history.journal import Journal
from gradstat.history.ranks import own_directory
from gradstat.ops import check_bins, check_engine
from gradstat.record import KINDS, OF_OUTPUTS, Row
from gradstat.recording import options
from gradstat.recording.cuda import Schedule, SideStream
from gradstat.recording.gradients import BackwardHooks, StepHook
from gradstat.recording.outputs import OutputHooks
from gradstat.recording.passes import Recorder
from gradstat.recording.scalars import ScalarLog, log_rates
from gradstat.recording.shards import agreed_run, rank_and_world, usual_placements
from gradstat.recording.torch_internals import SparingCaptures, leave_uncompiled, unwrapped
from gradstat.recording.transfers import Delivery, RunWriter, Sink
from gradstat.results import Statistics
from gradstat.util import check_integer, warn

Kind = Literal["grad", "param", "update", "activation", "grad_output"]
What = Kind | Literal["all"] | Sequence[Kind]
Hooks = BackwardHooks | StepHook
Others = OutputHooks | RemovableHandle

# Of a view in a notebook.
_MOST_OF_THE_TIME = 0.05  # that is spent drawing
_PATIENCE_S = 1.0  # with a drawing that goes on when the watch is closed
_LOOK_S = 0.1  # from one look at whether the run has ended to the next


def watch(
    model: nn.Module,
    bins: int | Bins | None = None,
    every: int = 1,
    *,
    what: What = "grad",
    formats: str | Format | Sequence[str | Format] = (),
    parameters: options.ParameterSelector | None = None,
    modules: options.ModuleSelector | None = None,
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
            is not finite, a spike or an explosion, or that instability is ahead; once for each, and
            again after it has cleared.
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
    every = check_integer("watch", "every", every, 1)
    accumulation_steps = check_integer("watch", "accumulation_steps", accumulation_steps, 1)
    bucket_bytes = check_integer("watch", "bucket_bytes", bucket_bytes, 1)
    if capacity is not None:
        capacity = check_integer("watch", "capacity", capacity, 2)
    if first_step is not None:
        first_step = check_integer("watch", "first_step", first_step, 0)
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
    engine = check_engine("watch", engine)
    parsed = asked_formats("watch", formats)
    if not isinstance(scaler, GradScaler | None):
        raise TypeError(f"watch() needs a torch.amp.GradScaler; scaler is {type(scaler).__name__}")
    kinds = options.check_what(what, when, optimizer, scheme, modules)
    has_outputs = not kinds.isdisjoint(OF_OUTPUTS)
    options.check_when(when, optimizer, None if has_outputs else scaler, accumulation_steps)
    selected = options.select_parameters(model, parameters)
    weights = list(selected.values())
    if optimizer is not None:
        optimizer = unwrapped(optimizer)
        options.check_holds(optimizer, weights)
    seen = options.select_modules(model, modules) if has_outputs else {}
    rows = [
        Row(kind, name)
        for kind in KINDS
        if kind in kinds
        for name in (seen if kind in OF_OUTPUTS else selected)
    ]
    history = History(rows, scheme, capacity=capacity, formats=[each.name for each in parsed])
    history.modules = {name: type(module).__name__ for name, module in seen.items()}
    history.placements = usual_placements(model, history.kinds, when)
    history.rank, history.world = rank_and_world()
    journal = None
    if path is not None:
        run = agreed_run(path) if history.world else None
        journal = Journal(own_directory(Path(path), history.rank), history, first_step, run)
    side = SideStream() if stream == "side" else None
    schedule = Schedule(every, accumulation_steps, weights, engine, first_step or 0)
    alerts = None if alert is None else Alerts(history, alert, is_scaled=scaler is not None)
    replaced = options.Replaced(model, selected)
    delivery = Delivery(history, schedule, sink, journal, alerts)
    scalars = ScalarLog(schedule, delivery, replaced)
    recorder = Recorder(history, schedule, scalars, delivery, replaced, bucket_bytes, engine, side)
    # Parameters by their ids: others may have taken their places, and names, since.
    watched = (*rows, *map(id, weights), *history.formats)
    measures = (*watched, scheme, every, when, accumulation_steps, capacity, stream, engine)
    _make_room(model, name, measures)
    if writer is not None:
        writer.begin(history, first_step, recorder.finish)
    hooks: Hooks
    stepping = optimizer if when == "step" else None
    if when == "backward":
        hooks = BackwardHooks(weights, recorder, scaler, _is_changed_in_backward(model))
    else:
        hooks = StepHook(weights, recorder, optimizer, calls_only=when == "call")
    others: list[Others] = []
    if seen:
        others.append(
            OutputHooks(model, list(seen.values()), recorder, scaler, stepping, hooks.is_running)
        )
    if optimizer is not None:
        others.append(log_rates(optimizer, scalars, hooks))
    opened = _Open(name, measures, recorder, weakref.ref(hooks), others)
    _OPEN[model] = [*(each for each in _OPEN.get(model, ()) if each.is_open), opened]
    return Watch(opened, hooks)


def _is_changed_in_backward(model: nn.Module) -> bool:
    """Whether gradients may be averaged before the end of the pass that computes them."""
    return any(
        isinstance(module, DistributedDataParallel) and module.static_graph
        for module in model.modules()
    )


class Watch:
    """Running hooks on a model's parameters, modules and optimizer; made by `watch`.

    A context manager; without a with block ``close()`` takes the hooks off.
    """

    def __init__(self, opened: _Open, hooks: Hooks) -> None:
        self._open, self._recorder, self._hooks = opened, opened.recorder, hooks
        self._views: list[LiveView] = []
        # A run that ends without close() loses nothing either: hooks live as long as the model.
        self._finish = weakref.finalize(hooks, opened.recorder.finish)

    @property
    def history(self) -> History:
        """All records so far; waits for those still on their way from the device.

        Always the same object, to which later records are added; any thread may read it meanwhile,
        and `History.snapshot` holds those of one moment.
        """
        with self._recorder.lock:
            self._recorder.collect(wait=True)
        return self._recorder.history

    @property
    def last(self) -> Statistics:
        """The newest record, shape ``(L,)``, on the CPU, once it is there; KeyError without any."""
        with self._recorder.lock:
            return self.history.record(-1)

    def _repr_html_(self) -> str:
        """What a notebook shows: whether it is open, and its history."""
        return html_of(self.history, is_open=not self._recorder.is_closed)

    def live(self, every_s: float = 3.0) -> None:
        """Show the run below a notebook's cell, and draw it again as the training goes on.

        Size, findings, the loss and a map, as for the watch as a cell's last line; call it in the
        cell that trains, or in one before it. It is drawn in a thread of its own, which takes a
        twentieth of the time at most, and once more when the watch is closed. It needs no server.

        Args:
            every_s: seconds from one drawing to the next, 0.1 to 86,400.

        Raises:
            RuntimeError: outside a notebook, or the watch is closed.
        """
        if not isinstance(every_s, Real) or isinstance(every_s, bool):
            raise TypeError(f"live() needs a number of seconds; every_s is {every_s!r}")
        if not 0.1 <= every_s <= 86_400:
            raise ValueError(f"live() needs 0.1 to 86,400 seconds; every_s is {every_s}")
        self._check_open("live()")
        self._views.append(LiveView(self._recorder, self._hooks, float(every_s)))

    def measure(self) -> None:
        """Make a record of the gradients as they are, for ``when="call"``.

        One with updates is done when the optimizer has stepped; without a step before the next call
        it has none.

        Raises:
            ValueError: another ``when``.
            RuntimeError: the watch is closed.
        """
        if not isinstance(self._hooks, StepHook) or not self._hooks.calls_only:
            when = "step" if isinstance(self._hooks, StepHook) else "backward"
            raise ValueError(f"measure() needs watch(when='call'); when is {when!r}")
        self._check_open("measure()")
        self._hooks.measure()

    @leave_uncompiled
    def log(self, **values: float | Tensor) -> None:
        """Keep numbers such as the loss with the record, at every step, recorded or not.

        A value belongs to the pass that has just ended (a step, for ``when="step"``), unless that
        one has a value of this name already: then to the coming one. So it may be called before or
        after ``backward()``. Several values of one name in one step are all kept.

        Nothing waits for a device, and no graph is kept alive. `History.scalar` has the values.

        Args:
            **values: by name, numbers or 0-dim tensors on any device; they may be changed
                afterwards.

        Raises:
            TypeError: what is no number.
            ValueError: a tensor that is not 0-dim, an integer beyond float64.
            RuntimeError: within the capture of a CUDA graph.

        Example:
            >>> import torch, gradstat
            >>> model = torch.nn.Linear(3, 2)
            >>> with gradstat.watch(model) as w:
            ...     loss = model(torch.ones(1, 3)).square().sum()
            ...     loss.backward()
            ...     w.log(loss=loss, tokens=3)
            >>> w.history.scalars, w.history.scalar("tokens")
            (['loss', 'tokens'], (array([0]), array([3.])))
        """
        with self._recorder.lock:
            self._recorder.scalars.add(values)

    def replayed(self, graph: CUDAGraph | None = None) -> None:
        """Make records of the passes of a CUDA graph that was replayed, of those that are due.

        Call it once after each ``graph.replay()``, before the next one, also where no record is
        due: ``every`` and ``accumulation_steps`` count the passes of a replay like those outside
        graphs. The capture itself counts as none.

        The graph counts its passes itself, on the device, and measures only those that are due.
        That count is what holds: the record of a replay has the step that the device counted. After
        a replay without a call, or a call without a replay, the next record that arrives tells of
        it: a warning says so, and calls are counted anew from there. Records that came due until
        then may be missing; none has the values of another step. float64 tensors, more than 4,093
        linear bins, narrow formats and the engines other than Triton's are measured in each replay.

        Args:
            graph: what was replayed; by default the graph that was captured last.

        Raises:
            RuntimeError: no pass was captured in it while this watched.
        """
        with self._recorder.lock:
            if not self._recorder.replayed(graph):
                raise RuntimeError(
                    "replayed() needs a training step that was captured under watch(); there is "
                    "none"
                )

    def close(self) -> None:
        """Take the hooks off the model; `history` stays readable.

        What a pass has measured that has not ended is kept as the last record, which
        `History.partial_step` names, if an exception has stopped it or a value that is not finite
        was logged for it: that of a script which stops at a NaN loss before its backward pass.

        Waits for records on their way from the device if they are to be written or handed on.
        """
        with self._recorder.lock:
            self._open.close()
            self._finish.detach()
        for view in self._views:
            view.finish()

    def __enter__(self) -> Watch:
        """The watch itself; RuntimeError if it is closed."""
        self._check_open("with")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self, function: str) -> None:
        if self._recorder.is_closed:
            raise RuntimeError(f"{function} needs a watch that is not closed; watch() again")


@dataclass(frozen=True)
class _Open:
    """A watch, without what would keep its model alive."""

    name: str | None  # given by the user
    measures: Hashable  # equal for watches that measure the same
    recorder: Recorder
    hooks: weakref.ref[Hooks]  # on the parameters or the optimizer
    others: list[Others]  # on the modules, and on the optimizer for its learning rate

    @property
    def is_open(self) -> bool:
        return not self.recorder.is_closed and self.hooks() is not None

    def close(self) -> None:
        """Take it off its model, as `Watch.close` says."""
        hooks, recorder = self.hooks(), self.recorder
        if hooks is None:
            return
        with recorder.lock, SparingCaptures():
            recorder.is_closed = True
            hooks.remove()
            for each in self.others:
                each.remove()
            # In a clean-up, or at the end of a with block, there is the exception that led there.
            if sys.exc_info()[0] is not None or recorder.has_failed():
                if isinstance(hooks, StepHook):
                    hooks.add_unfinished()
                recorder.end_early()
            # Where an interrupt ends this, the end of the process does it again.
            recorder.finish()


_OPEN: weakref.WeakKeyDictionary[nn.Module, list[_Open]] = weakref.WeakKeyDictionary()


def _make_room(model: nn.Module, name: str | None, measures: Hashable) -> None:
    """Close the open watch that has a new one's name; without a name, warn of one like it."""
    still_open = [each for each in _OPEN.get(model, ()) if each.is_open]
    if name is None:
        n_same = sum(each.name is None and each.measures == measures for each in still_open)
        if n_same:
            watches, are, measure = "another watch", "is", "measures"
            if n_same > 1:
                watches, are, measure = f"{n_same} other watches", "are", "measure"
            warn(
                f"{watches} of this {type(model).__name__} {are} still open and {measure} the "
                f"same at each step: close() what is no longer needed, or give it a name, as in "
                f"watch(model, name='main'): a new watch then takes the place of the open one of "
                f"its name"
            )
    for each in still_open:
        if name is not None and each.name == name:
            each.close()


class LiveView:
    """An output of a notebook's cell that shows a watch; a thread of its own draws it."""

    def __init__(self, recorder: Recorder, hooks: Hooks, every_s: float) -> None:
        module = sys.modules.get("IPython")
        shell = None if module is None else module.get_ipython()
        # It has a kernel where cells have outputs that can change.
        if not hasattr(shell, "kernel"):
            raise RuntimeError(
                "live() needs a notebook, which this is not: watch(path=) and `gradstat serve` "
                "show a run in the browser"
            )
        api: Any = importlib.import_module("IPython.display")
        # Whatever refers to the hooks would keep the watch open.
        self._recorder, self._hooks, self._every_s = recorder, weakref.ref(hooks), every_s
        self._as_output, self._drawn = api.HTML, self._state()
        self._output: Any = api.display(api.HTML(self._text()), display_id=True)
        self._thread = threading.Thread(target=self._follow, name="gradstat-live", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the end of the run is drawn; a forked process has no thread that draws it."""
        self._thread.join(_PATIENCE_S)

    def _follow(self) -> None:
        due = time.monotonic() + self._every_s
        while not self._recorder.is_closed and self._hooks() is not None:
            time.sleep(_LOOK_S)
            begun = time.monotonic()
            if begun < due:
                continue
            if self._state() != self._drawn:
                self._update()
            ended = time.monotonic()
            due = ended + max(self._every_s, (ended - begun) / _MOST_OF_THE_TIME)
        with self._recorder.lock:  # once the last record is filed
            self._update()

    def _state(self) -> object:
        """Equal as long as there is nothing new to draw."""
        history = self._recorder.history
        return history.last_step, history.logged.sizes

    def _update(self) -> None:
        self._drawn = self._state()
        # A front end that is gone must stop neither the training nor the other front ends.
        with suppress(Exception):
            self._output.update(self._as_output(self._text()))

    def _text(self) -> str:
        try:
            return html_of(self._recorder.history, is_open=not self._recorder.is_closed)
        except Exception as error:  # which must not stop the training
            return html.escape(f"live() cannot draw: {type(error).__name__}: {error}")


def html_of(history: History, *, is_open: bool) -> str:
    return f"<div>Watch, {'open' if is_open else 'closed'}</div>{history._repr_html_()}"
