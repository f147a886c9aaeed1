"""`History`: the record of a run, steps x layers, with a histogram for each."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradstat.bins import Bins, parse_bins
from gradstat.sparse import SparseRows
from gradstat.statistics import DERIVED, FLOATS, INTEGERS, Statistics

FORMAT = "gradstat history 1"
FIELDS = (*INTEGERS, *FLOATS, *DERIVED)
_DENSE_BYTES = 4 << 20  # dense histograms waiting to be packed together

Array = NDArray[Any]


class History:
    """Statistics of L layers over S recorded steps.

    A layer without a gradient in a step has a row of NaN and of zero counts there. Histograms are
    kept as their non-zero bins alone.

    Args:
        layers: L names.
        bins: scheme of every histogram.

    Example:
        >>> import torch, gradstat
        >>> model = torch.nn.Linear(3, 2)
        >>> with gradstat.watch(model) as w:
        ...     model(torch.ones(1, 3)).sum().backward()
        >>> w.history.layers, w.history["mean"]
        (['weight'], array([[1.]]))
    """

    def __init__(self, layers: Sequence[str], bins: Bins) -> None:
        self.layers = list(layers)
        self.bins = bins
        self._steps: list[int] = []
        self._integers: list[Array] = []
        self._floats: list[Array] = []
        self._dense: list[Array] = []
        self._packed = SparseRows.empty()

    @property
    def steps(self) -> Array:
        """Number of each recorded step, from 0: int64 ``(S,)``."""
        return np.array(self._steps, dtype=np.int64)

    def __len__(self) -> int:
        """Number of recorded steps, S."""
        return len(self._steps)

    def __repr__(self) -> str:
        """Size and bins."""
        return f"History({len(self)} steps, {len(self.layers)} layers, {self.bins})"

    def append(self, step: int, integers: Array, floats: Array, counts: Array) -> None:
        """Add one record; the arrays are kept, not copied.

        Args:
            step: its number, higher than the last one's.
            integers: int64 ``(L, 8)``, fields as in `Statistics`.
            floats: float64 ``(L, 8)``.
            counts: int64 ``(L, bins)``.
        """
        self._steps.append(step)
        self._integers.append(integers)
        self._floats.append(floats)
        self._dense.append(counts)
        if len(self._dense) * counts.nbytes > _DENSE_BYTES:
            self._pack()

    def __getitem__(self, field: str) -> Array:
        """One field of `Statistics` at every step and layer.

        Args:
            field: its name, such as ``"mean"``, ``"std"`` or ``"nan"``.

        Returns:
            float64 or int64, shape ``(S, L)``; NaN (0 for a count) where a layer had no gradient.

        Raises:
            KeyError: another name.
        """
        if field not in FIELDS:
            raise KeyError(f"History[] needs one of {', '.join(FIELDS)}; got {field!r}")
        shape = (len(self), len(self.layers))
        integers = np.array(self._integers, dtype=np.int64).reshape(*shape, len(INTEGERS))
        floats = np.array(self._floats, dtype=np.float64).reshape(*shape, len(FLOATS))
        statistics = Statistics(
            self.bins, torch.from_numpy(integers), torch.from_numpy(floats), torch.empty(*shape, 0)
        )
        values: Array = getattr(statistics, field).numpy()
        return values

    def record(self, step: int = -1) -> Statistics:
        """Everything measured in one step.

        Args:
            step: a number in `steps`, or negative to count back from the newest.

        Returns:
            Statistics of shape ``(L,)``, on the CPU.

        Raises:
            KeyError: a step that was not recorded.
        """
        at = self._find_step(step)
        self._pack()
        n = len(self.layers)
        rows = range(at * n, (at + 1) * n)
        counts = np.stack([self._packed.row(row, self.bins.bins) for row in rows])
        return Statistics(
            self.bins,
            torch.from_numpy(self._integers[at].copy()),
            torch.from_numpy(self._floats[at].copy()),
            torch.from_numpy(counts),
        )

    def histogram(self, layer: str, step: int = -1) -> tuple[Array, Array]:
        """Histogram of one layer in one step.

        Args:
            layer: a name in `layers`.
            step: a number in `steps`, or negative to count back from the newest.

        Returns:
            counts, int64 ``(bins,)``, and edges, float64 ``(bins + 1,)``.

        Raises:
            KeyError: an unknown layer, or a step that was not recorded.
        """
        column, at = self._find_layer(layer), self._find_step(step)
        self._pack()
        counts = self._packed.row(at * len(self.layers) + column, self.bins.bins)
        return counts, self._edges(self._floats[at][column])

    def histograms(self, layer: str) -> tuple[Array, Array]:
        """Histogram of one layer in every recorded step.

        Args:
            layer: a name in `layers`.

        Returns:
            counts, int64 ``(S, bins)``, and edges, float64, ``(bins + 1,)`` for `Log2Bins` and
            ``(S, bins + 1)`` for `LinearBins`.

        Raises:
            KeyError: an unknown layer.
        """
        column = self._find_layer(layer)
        self._pack()
        rows = range(column, len(self) * len(self.layers), len(self.layers))
        counts = np.zeros((len(self), self.bins.bins), dtype=np.int64)
        for at, row in enumerate(rows):
            counts[at] = self._packed.row(row, self.bins.bins)
        floats = [record[column] for record in self._floats]
        return counts, self._edges(np.array(floats).reshape(len(self), len(FLOATS)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole record to a NumPy ``.npz`` file, which appears whole or not at all.

        Args:
            path: the file; one that is there is replaced.
        """
        self._pack()
        target = Path(path)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with unfinished.open("wb") as file:
                np.savez_compressed(
                    file,
                    format=np.array(FORMAT),
                    bins=np.array(self.bins.spec),
                    layers=np.array(self.layers, dtype=np.str_),
                    steps=self.steps,
                    integers=np.array(self._integers, dtype=np.int64),
                    floats=np.array(self._floats, dtype=np.float64),
                    sizes=self._packed.sizes,
                    indices=self._packed.indices,
                    values=self._packed.values,
                )
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what `save` wrote.

        Args:
            path: the file.

        Returns:
            An equal History.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged file, or one that `save` did not write.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                data = {name: file[name] for name in file.files}
            if str(data["format"]) != FORMAT:
                raise ValueError(f"its format is {data['format']}, not {FORMAT}")
            history = cls([str(name) for name in data["layers"]], parse_bins(str(data["bins"])))
            history._restore(data)
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"History.load() needs a file that History.save() wrote; {os.fspath(path)} is "
                f"damaged or another kind: {error}"
            ) from error
        return history

    def _restore(self, data: dict[str, Array]) -> None:
        n_steps, n_layers = len(data["steps"]), len(self.layers)
        sizes, indices, values = data["sizes"], data["indices"], data["values"]
        shapes_fit = (
            data["integers"].size == n_steps * n_layers * len(INTEGERS)
            and data["floats"].size == n_steps * n_layers * len(FLOATS)
            and sizes.shape == (n_steps * n_layers,)
            and indices.shape == values.shape == (int(sizes.sum()),)
            and (indices.size == 0 or int(indices.max()) < self.bins.bins)
        )
        if not shapes_fit:
            raise ValueError("its arrays do not fit each other")
        self._steps = [int(step) for step in data["steps"]]
        self._integers = list(data["integers"].reshape(n_steps, n_layers, -1))
        self._floats = list(data["floats"].reshape(n_steps, n_layers, -1))
        self._packed = SparseRows(sizes, indices, values)

    def _pack(self) -> None:
        if self._dense:
            self._packed.extend(np.concatenate(self._dense))
            self._dense.clear()

    def _edges(self, floats: Array) -> Array:
        """Edges for rows of `FLOATS`."""
        ends = torch.from_numpy(np.ascontiguousarray(floats[..., 6:]))
        edges: Array = self.bins.edges(ends[..., 0], ends[..., 1]).numpy()
        return edges

    def _find_layer(self, layer: str) -> int:
        if layer not in self.layers:
            raise KeyError(f"History needs a layer of {self.layers}; layer is {layer!r}")
        return self.layers.index(layer)

    def _find_step(self, step: int) -> int:
        if step < 0 and -step <= len(self):
            return len(self) + step
        if step not in self._steps:
            raise KeyError(f"History needs a recorded step; step is {step} of {len(self)} records")
        return self._steps.index(step)
