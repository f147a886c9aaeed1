"""`Watch`: what `watch` returns, with which a running script reads, logs and closes."""

from __future__ import annotations

import weakref
from numbers import Real
from types import TracebackType

from torch import Tensor
from torch.cuda import CUDAGraph

from gradstat.history import History
from gradstat.recording.live_view import LiveView, html_of
from gradstat.recording.open_watches import Hooks, Others, close
from gradstat.recording.parameter_hooks import StepHook
from gradstat.recording.recorder import Recorder
from gradstat.recording.torch_internals import disable_dynamo
from gradstat.results import Statistics


class Watch:
    """Running hooks; made by `watch`.

    Args:
        recorder: what the hooks feed.
        hooks: on the parameters or the optimizer.
        others: on the modules, if any, and on the optimizer, if it is known.
    """

    def __init__(self, recorder: Recorder, hooks: Hooks, others: list[Others]) -> None:
        self._recorder, self._hooks, self._others = recorder, hooks, others
        self._views: list[LiveView] = []
        # A run that ends without close() loses nothing either: hooks live as long as the model.
        self._finish = weakref.finalize(hooks, recorder.finish)

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
        """The newest record, shape ``(L,)``, on the CPU; waits for it.

        Raises:
            KeyError: there is none yet.
        """
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
            TypeError: no number.
            ValueError: fewer seconds, or more.
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

    @disable_dynamo
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
            ValueError: a tensor that is not 0-dim.
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
            self._recorder.logged.add(values)
            self._recorder.tell_alerts()

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
            close(self._recorder, self._hooks, self._others)
            self._finish.detach()
        for view in self._views:
            view.finish()

    def __enter__(self) -> Watch:
        """The watch itself.

        Raises:
            RuntimeError: it is closed.
        """
        self._check_open("with")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def _check_open(self, function: str) -> None:
        if self._recorder.is_closed:
            raise RuntimeError(f"{function} needs a watch that is not closed; watch() again")
