"""What has no other home: JSON as others can read it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping


def json_text(value: object, indent: int | None = None) -> str:
    """JSON of a value, with null for NaN and infinities, which JSON does not have.

    Args:
        value: mappings, lists and tuples of texts, numbers, booleans and ``None``.
        indent: spaces of each level; by default all is in one line.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:  # there are some; others need no second look
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
