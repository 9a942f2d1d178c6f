"""Planning and resuming at full size: 1 B samples in 1 M shards, from a synthetic index. CPU only, about a minute.

    python benchmarks/data_order.py

Bars: the first batch of a run and of a resume in under 10 s, the state of the order under 100 MB.
"""

import argparse
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from encoders.data.index import SetIndex
from encoders.data.order import StepOrder

BATCH = 32_768


def main() -> None:
    """Write the index, plan from it, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=1_000, help="of a shard, on average")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "list.npz")
        write_index(file, options.shards, options.samples)
        began = time.perf_counter()
        index = SetIndex.load(file)
        assert index is not None
        print(f"{len(index):,} shards, {int(index.counts.sum()):,} samples; list of {file.stat().st_size / 1e6:.0f} MB")
        print(f"reading the list: {time.perf_counter() - began:.2f} s")
    steps = 2 * int(index.counts.sum()) // BATCH
    failed = False
    for label, start in (("first batch", 0), ("first batch of a resume in the second epoch", steps - 1000)):
        tracemalloc.start()
        began = time.perf_counter()
        order = StepOrder(index.counts, BATCH, steps, 0, rank=7, world=64)
        order.start = start
        batch = next(iter(order))
        seconds, memory = time.perf_counter() - began, tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        ends = np.cumsum(index.counts)
        shards = len({int(np.searchsorted(ends, i, side="right")) for _, i in batch})
        print(
            f"{label}: {seconds:.2f} s, at most {memory:.0f} MB; rank 7 of 64 reads {len(batch)} samples "
            f"in {shards} shards"
        )
        failed |= seconds > 10 or memory > 100
    began = time.perf_counter()
    for step in range(start, start + 100):
        order.global_ids(step)
    print(f"a further batch of {BATCH:,}: {(time.perf_counter() - began) * 10:.1f} ms")
    if failed:
        raise SystemExit("a bar was missed: 10 s, 100 MB")


def write_index(file: Path, shards: int, samples: int) -> None:
    """A list of shards with sizes and counts as img2dataset's vary."""
    rng = np.random.default_rng(0)
    counts = rng.integers(samples * 8 // 10, samples * 12 // 10 + 1, size=shards)
    names = [f"s3://bucket/data/{shard // 1000:05d}/{shard:08d}.tar" for shard in range(shards)]
    rows = np.stack([counts * 100_000, np.zeros_like(counts), counts], axis=1)
    SetIndex.of("", names, rows.tolist()).save(file)


if __name__ == "__main__":
    main()
