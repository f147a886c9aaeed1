"""What has no other home."""

import json
import math

import numpy as np

from gradstat.util import json_text


def test_json_text_has_null_for_nan_and_infinities() -> None:
    value = {"a": [math.nan, 1.5, (math.inf, np.float64(-math.inf))], "b": {"c": math.nan}, "d": 1}
    text = json_text(value)
    assert json.loads(text) == {"a": [None, 1.5, [None, None]], "b": {"c": None}, "d": 1}
    assert json_text({"a": [1, "NaN", None, True]}, indent=1) == json.dumps(
        {"a": [1, "NaN", None, True]}, indent=1
    )
