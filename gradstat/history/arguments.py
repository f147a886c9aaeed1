"""What readers of a record check before they read, and the rows that they read by default."""

from __future__ import annotations

import numpy as np

from gradstat.history.history import History


def check_history(function: str, history: History) -> History:
    """Refuse what is no single History with records; return those that it has now."""
    if not isinstance(history, History):
        raise TypeError(f"{function}() needs a History; history is {type(history).__name__}")
    if len(history) == 0 or not history.layers:
        raise ValueError(f"{function}() needs a History with records; history is {history!r}")
    return history.snapshot()


def check_count(function: str, name: str, value: int, noun: str = "step") -> None:
    """Refuse what is not a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{function}() needs an integer number of {noun}s; {name} is {value!r}")
    if value < 1:
        raise ValueError(f"{function}() needs one {noun} or more; {name} is {value}")


def first_rows(history: History) -> list[str]:
    """Names of the rows of a history's first kind, gradients where they were recorded, by depth."""
    columns = np.flatnonzero(np.array(history.kinds) == history.kinds[:1])
    return [history.layers[at] for at in history.by_depth(columns)]
