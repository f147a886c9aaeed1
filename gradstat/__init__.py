"""Per-layer gradient statistics for PyTorch, in one pass and without host synchronisation.

A name is imported when it is first used, and all of them where PyTorch is there already: the
command line starts without it.
"""

import importlib.util
import sys
import typing

from gradstat.util import __version__

if typing.TYPE_CHECKING:
    from gradstat import plot as plot
    from gradstat.bins import LinearBins, Log2Bins
    from gradstat.diagnosis.findings import Finding
    from gradstat.gradient_noise import NoiseScale, noise_scale
    from gradstat.history import History
    from gradstat.ops import histogram, quantization, statistics
    from gradstat.recording.watch import Watch, watch
    from gradstat.results import Quantization, Statistics
    from gradstat.thresholds import Thresholds

__all__ = [
    "Finding",
    "History",
    "LinearBins",
    "Log2Bins",
    "NoiseScale",
    "Quantization",
    "Statistics",
    "Thresholds",
    "Watch",
    "__version__",
    "histogram",
    "noise_scale",
    "quantization",
    "statistics",
    "watch",
]
_HOMES = {
    "Finding": "diagnosis.findings",
    "History": "history",
    "LinearBins": "bins",
    "Log2Bins": "bins",
    "NoiseScale": "gradient_noise",
    "Quantization": "results",
    "Statistics": "results",
    "Thresholds": "thresholds",
    "Watch": "recording.watch",
    "histogram": "ops",
    "noise_scale": "gradient_noise",
    "quantization": "ops",
    "statistics": "ops",
    "watch": "recording.watch",
}


def __getattr__(name: str) -> object:
    """A public name or a module, such as ``gradstat.plot``, when it is first used."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"gradstat.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"gradstat.{name}") is not None:
        return importlib.import_module(f"gradstat.{name}")
    raise AttributeError(f"module 'gradstat' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__, "plot"})


if "torch" in sys.modules:
    for _name in _HOMES:
        __getattr__(_name)
