"""Per-layer gradient statistics for PyTorch, in one pass and without host synchronisation."""

from gradstat.bins import LinearBins, Log2Bins
from gradstat.diagnosis import Finding, Thresholds
from gradstat.history import History
from gradstat.ops import histogram, statistics
from gradstat.statistics import Statistics
from gradstat.watch import Watch, watch

__all__ = [
    "Finding",
    "History",
    "LinearBins",
    "Log2Bins",
    "Statistics",
    "Thresholds",
    "Watch",
    "histogram",
    "statistics",
    "watch",
]
