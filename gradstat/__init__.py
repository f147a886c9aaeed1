"""Per-layer gradient statistics for PyTorch, in one pass and without host synchronisation."""

from gradstat.bins import LinearBins, Log2Bins
from gradstat.diagnosis import Finding, Thresholds
from gradstat.gradient_noise import NoiseScale, noise_scale
from gradstat.history import History
from gradstat.ops import histogram, statistics
from gradstat.recording.watch import Watch, watch
from gradstat.results import Statistics
from gradstat.version import __version__

__all__ = [
    "Finding",
    "History",
    "LinearBins",
    "Log2Bins",
    "NoiseScale",
    "Statistics",
    "Thresholds",
    "Watch",
    "__version__",
    "histogram",
    "noise_scale",
    "statistics",
    "watch",
]
