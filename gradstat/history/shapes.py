"""Numbers of a record that are read off its histograms."""

from __future__ import annotations

import numpy as np
import torch

from gradstat.arrays import Array
from gradstat.bins import LOG2_MAGNITUDES, LinearBins
from gradstat.history.records import Records
from gradstat.results import Statistics

_CELLS = 1 << 22  # of histograms, at a time


def kurtosis_of(records: Records, at: Array, columns: Array) -> Array:
    """`Statistics.kurtosis` of some rows of some records, from their filled bins alone.

    Args:
        records: S of them, L layers.
        at: positions of N of them, which rise.
        columns: M of the layers, which rise.

    Returns:
        float64 ``(N, M)``.
    """
    shape = len(at), len(columns)
    rows = at[:, None] * len(records.rows) + columns
    kept = records.counts.keep(rows.ravel())
    integers, floats = (
        torch.from_numpy(x[at[:, None], columns].reshape(-1, x.shape[-1]))
        for x in (records.integers, records.floats)
    )
    found = []
    widest = records.bins.bins if isinstance(records.bins, LinearBins) else LOG2_MAGNITUDES
    n_rows = max(1, _CELLS // widest)
    for start in range(0, len(kept), n_rows):
        held = slice(start, min(start + n_rows, len(kept)))
        size, indices, values = kept.part(held.start, held.stop).arrays()
        row = np.repeat(np.arange(len(size)), size)
        # Each filled bin has a place; of linear bins, which are few, the others have one too.
        place = np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)
        bins = np.zeros((len(size), int(size.max(initial=1))), np.int64)
        if isinstance(records.bins, LinearBins):
            place = indices
            bins = np.tile(np.arange(records.bins.bins), (len(size), 1))
        counts = np.zeros_like(bins)
        counts[row, place], bins[row, place] = values, indices
        statistics = Statistics(
            records.bins, integers[held], floats[held], torch.from_numpy(counts)
        )
        found.append(statistics.kurtosis_over(torch.from_numpy(bins)).numpy())
    return np.concatenate([np.empty(0), *found]).reshape(shape)
