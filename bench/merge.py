"""Measure the merging of what the ranks of a large run wrote: python bench/merge.py DIR.

The first call writes the run, the second one merges it: only that is to be measured.

Each rank has another order of the same histograms, of shards of 4,096 normal values.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

import gradstat
from gradstat import History, Log2Bins
from gradstat.history.journal import Journal
from gradstat.record import Placement, Record, Unpacked

N_VALUES = 4096
POOL = 2000  # different histograms
BLOCK = 20  # records that a rank has written together, or some more


def make_pool() -> Unpacked:
    """Measurements of shards, one record of them."""
    generator = torch.Generator().manual_seed(20)
    shards = [torch.randn(N_VALUES, generator=generator) * 10.0 ** -(i % 7) for i in range(POOL)]
    s = gradstat.statistics(shards)
    layout = History([f"{i}.weight" for i in range(POOL)], Log2Bins()).layout
    numbers = s.integers.numpy(), s.floats.numpy(), None, s.counts.numpy()
    return layout.unpack([layout.pack(*numbers)])


def write_rank(folder: Path, pool: Unpacked, rank: int, args: argparse.Namespace) -> None:
    """A rank's directory, its rows drawn from the pool."""
    rng = np.random.default_rng(rank)
    # The histograms of a layer are of one size, as in a run.
    classes = rng.integers(0, POOL // 7, (args.records, args.layers)) * 7
    draw = classes + np.arange(args.layers) % 7
    history = History([f"{i}.weight" for i in range(args.layers)], Log2Bins())
    history.rank, history.world = rank, args.ranks
    history.placements = [Placement(rank)] * args.layers
    journal = Journal(folder, history, run="of bench/merge.py")
    for step, rows in enumerate(draw):
        journal.add(Record(step, float(step), history.layout.pack_all(pool.take(rows))[0]))
        if (step + 1) % (BLOCK + rank % 10) == 0:
            journal.flush()
    journal.flush()


def main() -> None:
    """Write the run if it is not there, merge it and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--records", type=int, default=1000)
    args = parser.parse_args()
    if not args.directory.exists():
        pool = make_pool()
        for rank in range(args.ranks):
            write_rank(args.directory / f"rank-{rank}", pool, rank, args)
        # Its own memory would count as the merging's.
        print("written; run it again to merge", file=sys.stderr)
        return
    start_s = time.perf_counter()
    history = History.load(args.directory)
    seconds = time.perf_counter() - start_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert (history["numel"] == args.ranks * N_VALUES).all()
    counts = sum(int(each.counts.sum()) for each in history.unpacked())
    assert counts == args.ranks * args.layers * args.records * N_VALUES
    print(f"{args.ranks} ranks, {args.layers} layers, {args.records} records")
    print(f"{seconds:.1f} s, {peak:.0f} MB at most")


if __name__ == "__main__":
    main()
