"""`LiveView`: what a notebook shows of a watch, drawn again and again while the run goes on."""

from __future__ import annotations

import html
import importlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_MOST_OF_THE_TIME = 0.05  # that is spent drawing
_LOOK_S = 0.1  # from one look at whether the run has ended to the next


class LiveView:
    """An output of a notebook's cell; a thread of its own draws it.

    Args:
        draw: gives HTML.
        state: is equal as long as there is nothing new to draw.
        is_open: whether the run goes on.
        every_s: seconds from one drawing to the next, or more where a drawing takes long.

    Raises:
        RuntimeError: this is no notebook.
    """

    def __init__(
        self,
        draw: Callable[[], str],
        state: Callable[[], object],
        is_open: Callable[[], bool],
        every_s: float,
    ) -> None:
        if not _is_notebook():
            raise RuntimeError(
                "live() needs a notebook, which this is not: watch(path=) and `gradstat serve` "
                "show a run in the browser"
            )
        api: Any = importlib.import_module("IPython.display")
        self._draw, self._state, self._is_open, self._every_s = draw, state, is_open, every_s
        self._as_output = api.HTML
        self._lock, self._has_ended, self._drawn = threading.Lock(), False, state()
        self._output: Any = api.display(api.HTML(draw()), display_id=True)
        threading.Thread(target=self._follow, name="gradstat-live", daemon=True).start()

    def finish(self) -> None:
        """Draw the end of the run, and no more."""
        self._update(is_last=True)

    def _follow(self) -> None:
        due = time.monotonic() + self._every_s
        while self._is_open() and not self._has_ended:
            time.sleep(_LOOK_S)
            begun = time.monotonic()
            if begun >= due:
                self._update()
                ended = time.monotonic()
                due = ended + max(self._every_s, (ended - begun) / _MOST_OF_THE_TIME)
        self.finish()

    def _update(self, is_last: bool = False) -> None:
        with self._lock:
            state = self._state()
            if self._has_ended or (state == self._drawn and not is_last):
                return
            self._has_ended, self._drawn = is_last, state
            try:
                text = self._draw()
            except Exception as error:  # the training is not to know
                text = html.escape(f"live() cannot draw: {type(error).__name__}: {error}")
            self._output.update(self._as_output(text))


def _is_notebook() -> bool:
    """Whether a kernel runs this, whose cells have outputs that can change."""
    module = sys.modules.get("IPython")
    shell = None if module is None else module.get_ipython()
    return hasattr(shell, "kernel")
