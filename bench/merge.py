"""Measure the merging of what the ranks of a large run wrote: python bench/merge.py DIR.

The first call writes the run, the second one merges it: only that is to be measured.

Each rank has another order of the same histograms, of shards of 4,096 normal values.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gradstat.history.packed_counts import SparseRows

import gradstat
from gradstat import History, Log2Bins
from gradstat.history import archive, blocks, sections
from gradstat.history.records import Records

N_VALUES = 4096
POOL = 2000  # different histograms
BLOCK = 20  # records that a rank has written together, or some more


def make_pool() -> Records:
    """Measurements of shards, one record of them."""
    generator = torch.Generator().manual_seed(20)
    shards = [torch.randn(N_VALUES, generator=generator) * 10.0 ** -(i % 7) for i in range(POOL)]
    s = gradstat.statistics(shards)
    history = History([f"{i}.weight" for i in range(POOL)], Log2Bins())
    numbers = s.integers.numpy(), s.floats.numpy(), None, s.counts.numpy()
    history.append(0, history.layout.pack(*numbers))
    return history.to_records()


def write_rank(folder: Path, pool: Records, rank: int, args: argparse.Namespace) -> None:
    """A rank's directory, its rows drawn from the pool."""
    rng = np.random.default_rng(rank)
    # The histograms of a layer are of one size, as in a run.
    classes = rng.integers(0, POOL // 7, (args.records, args.layers)) * 7
    draw = classes + np.arange(args.layers) % 7
    like = History([f"{i}.weight" for i in range(args.layers)], Log2Bins()).to_records()
    like = replace(like, rank=rank, world=args.ranks, origins=np.full(args.layers, rank))
    folder.mkdir(parents=True)
    link = blocks.Link()
    with (folder / archive.segment_name(0)).open("wb") as file:
        parts, link = blocks.encode(sections.head(like) | sections.body(like), 0, link)
        file.writelines(parts)
        size = BLOCK + rank % 10
        for start in range(0, args.records, size):
            rows = draw[start : start + size]
            counts: SparseRows = pool.counts.rearranged(rows.ravel())
            records = replace(
                like,
                steps=list(range(start, start + len(rows))),
                times=np.arange(start, start + len(rows), dtype=float),
                integers=pool.integers[0][rows],
                floats=pool.floats[0][rows],
                counts=counts,
            )
            parts, link = blocks.encode(sections.body(records), len(rows), link)
            file.writelines(parts)


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
    counts = history.to_records().counts.arrays()[2].sum(dtype=np.int64)
    assert counts == args.ranks * args.layers * args.records * N_VALUES
    print(f"{args.ranks} ranks, {args.layers} layers, {args.records} records")
    print(f"{seconds:.1f} s, {peak:.0f} MB at most")


if __name__ == "__main__":
    main()
