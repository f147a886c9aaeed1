"""`warn`: a warning that points at the user's own line."""

from __future__ import annotations

import inspect
import os
import sys
import threading
import warnings
from pathlib import Path

# Torch calls hooks from its own code.
_INSIDE: tuple[str, ...] = (f"{Path(__file__).parent}{os.sep}", threading.__file__)


def warn(message: str) -> None:
    """Give a RuntimeWarning, at the innermost line that is neither gradstat's nor PyTorch's.

    Args:
        message: of the warning.
    """
    torch = sys.modules.get("torch")
    inside = _INSIDE
    if torch is not None:
        inside = (*_INSIDE, f"{Path(inspect.getfile(torch)).parent}{os.sep}")
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
