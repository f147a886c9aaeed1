"""`one_of`: the names that would have done, for the message about one that does not."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_MOST = 8


def one_of(name: object, names: Sequence[str]) -> str:
    """Those like the name that was given, or the first ones.

    Args:
        name: that is none of them.
        names: of which there may be hundreds.

    Example:
        >>> one_of("stp", ["backward", "step", "call"])
        "one of 'backward', 'step', 'call' (did you mean 'step'?)"
    """
    close = difflib.get_close_matches(str(name), names, 3)
    shown = ", ".join(map(repr, names[:_MOST])) or "none"
    if len(names) > _MOST:
        shown += f" and {len(names) - _MOST} others"
    question = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
    return f"one of {shown}{question}"
