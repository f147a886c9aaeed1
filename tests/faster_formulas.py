"""Formulas of figures, parsed once in a process.

Each number of a logarithmic axis is a formula. Matplotlib keeps what it has parsed for one figure
alone, and parses the same powers of ten again for the next one: a fifth of the time of figures.
Versions of Matplotlib that keep it elsewhere are left as they are.
"""

from __future__ import annotations

import functools
from typing import Any

from matplotlib.mathtext import MathTextParser


def install() -> None:
    """Let all parsers of this process that give the same kind of result share it."""
    parse = getattr(getattr(MathTextParser, "_parse_cached", None), "__wrapped__", None)
    if parse is None:
        return
    parsers: dict[str, MathTextParser[Any]] = {}

    @functools.lru_cache(1000)
    def parse_once(output: str, *arguments: Any) -> Any:
        return parse(parsers[output], *arguments)

    def parse_cached(self: MathTextParser[Any], *arguments: Any) -> Any:
        return parse_once(parsers.setdefault(self._output_type, self)._output_type, *arguments)

    MathTextParser._parse_cached = parse_cached
