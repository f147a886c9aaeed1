"""`LiveView`: a watch in a notebook, drawn again and again while the run goes on."""

from __future__ import annotations

import html
import importlib
import sys
import threading
import time
import weakref
from contextlib import suppress
from typing import Any

from gradstat.history import History
from gradstat.recording.gradients import BackwardHooks, StepHook
from gradstat.recording.passes import Recorder
from gradstat.util import call_after_fork

_MOST_OF_THE_TIME = 0.05  # that is spent drawing
_PATIENCE_S = 1.0  # with a drawing that goes on when the watch is closed
_LOOK_S = 0.1  # from one look at whether the run has ended to the next


class LiveView:
    """An output of a notebook's cell that shows a watch; a thread of its own draws it.

    Args:
        recorder: of the watch; its history is drawn.
        hooks: of the watch; the run goes on as long as they live.
        every_s: seconds from one drawing to the next, or more where a drawing takes long.

    Raises:
        RuntimeError: this is no notebook.
    """

    def __init__(self, recorder: Recorder, hooks: BackwardHooks | StepHook, every_s: float) -> None:
        if not _is_notebook():
            raise RuntimeError(
                "live() needs a notebook, which this is not: watch(path=) and `gradstat serve` "
                "show a run in the browser"
            )
        api: Any = importlib.import_module("IPython.display")
        # Whatever refers to the hooks would keep the watch open.
        self._recorder, self._hooks, self._every_s = recorder, weakref.ref(hooks), every_s
        self._as_output, self._drawn = api.HTML, self._state()
        # Held by who draws; a signal's handler may close the watch within a drawing.
        self._lock = threading.RLock()
        self._is_to_end = self._has_ended = False
        self._output: Any = api.display(api.HTML(self._text()), display_id=True)
        call_after_fork(self)
        threading.Thread(target=self._follow, name="gradstat-live", daemon=True).start()

    def finish(self) -> None:
        """Draw the end of the run, and no more; what a slow viewer holds up is left to the thread.

        The thread comes here too when the run has ended, so that it is drawn in any case.
        """
        self._is_to_end = True
        if self._lock.acquire(timeout=_PATIENCE_S):
            try:
                if not self._has_ended:
                    self._has_ended = True
                    self._update()
            finally:
                self._lock.release()

    def forget_other_threads(self) -> None:
        """In a forked process: draw nothing."""
        self._lock = threading.RLock()
        self._is_to_end = self._has_ended = True

    def _follow(self) -> None:
        due = time.monotonic() + self._every_s
        while self._is_open():
            time.sleep(_LOOK_S)
            begun = time.monotonic()
            if begun < due:
                continue
            with self._lock:
                if not self._has_ended and self._state() != self._drawn:
                    self._update()
            ended = time.monotonic()
            due = ended + max(self._every_s, (ended - begun) / _MOST_OF_THE_TIME)
        self.finish()

    def _is_open(self) -> bool:
        return not (self._is_to_end or self._recorder.is_closed or self._hooks() is None)

    def _state(self) -> object:
        """Equal as long as there is nothing new to draw."""
        history = self._recorder.history
        sizes = [len(history.scalar(name)[0]) for name in history.scalars]
        return history.steps[-1:].tolist(), sizes

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
    """What a notebook shows of a watch."""
    return f"<div>Watch, {'open' if is_open else 'closed'}</div>{history._repr_html_()}"


def _is_notebook() -> bool:
    """Whether a kernel runs this, whose cells have outputs that can change."""
    module = sys.modules.get("IPython")
    shell = None if module is None else module.get_ipython()
    return hasattr(shell, "kernel")
