"""`RunWriter`: a sink that knows its run, from its beginning to its end, as a viewer needs it."""

from __future__ import annotations

from collections.abc import Callable

from gradstat.history import History
from gradstat.results import Statistics, as_arrays
from gradstat.util import call_after_fork, warn


class RunWriter:
    """Takes what a watch records and what is logged in it; never stops a training.

    The first exception becomes a RuntimeWarning, and nothing more is written. A forked process
    writes nothing. When one run has ended, the writer takes another one. Messages name the function
    that made it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._history: History | None = None
        self._is_writing = False
        call_after_fork(self)

    def check_new(self) -> None:
        """Raise ValueError if it writes another run, which has not ended."""
        if self._is_writing:
            raise ValueError(
                f"watch() needs a sink of its own; sink is a {self._name} that writes another run"
            )

    def begin(self, history: History, first_step: int | None, collect: Callable[[], None]) -> None:
        """Take the run that is to be written.

        Of a run that is resumed, what is there from its first step on is superseded. ``collect``
        waits for all of its records and ends it, for viewers that end before it.
        """
        self._history, self._collect, self._is_writing = history, collect, True
        self._try(lambda: self.start(history, first_step))

    def __call__(self, step: int, statistics: Statistics) -> None:
        """Write a record: statistics of shape ``(L,)``, on the CPU."""
        history = self._history
        if history is None:
            raise RuntimeError(f"{self._name} needs a watch, as in watch(model, sink=...)")
        if not self._is_writing:
            return
        record = History(history.rows, history.bins)
        integers, floats, counts = as_arrays(statistics)
        record.append(step, record.layout.pack(integers, floats, None, counts))
        self._try(lambda: self.write_record(record, step))

    def add_scalar(self, name: str, step: int, value: float) -> None:
        """Write a logged value."""
        self._try(lambda: self.write_scalar(name, step, value))

    def finish(self) -> None:
        """Write what is left; the run has ended."""
        history = self._history
        if history is not None:
            self._try(lambda: self.end(history))
        self._is_writing = False

    def forget_other_threads(self) -> None:
        """In a forked process: write nothing, which is for the other one to do."""
        self._is_writing = False

    def end_run(self) -> None:
        """End the run that is written, before its watch does."""
        if self._is_writing:
            self._collect()

    def start(self, history: History, first_step: int | None) -> None:
        """Open what is written to; of each viewer."""
        raise NotImplementedError

    def write_record(self, record: History, step: int) -> None:
        """Write the one record of a history; of each viewer."""
        raise NotImplementedError

    def write_scalar(self, name: str, step: int, value: float) -> None:
        """Write a logged value; of each viewer."""
        raise NotImplementedError

    def end(self, history: History) -> None:
        """Write what is left, and close; of each viewer."""
        raise NotImplementedError

    def _try(self, write: Callable[[], object]) -> None:
        if not self._is_writing:
            return
        try:
            write()
        except Exception as error:
            self._is_writing = False
            warn(
                f"{self._name} has stopped writing, the training and its record go on: "
                f"{type(error).__name__}: {error}"
            )
