"""Planning and resuming at full size: 1 B samples in 1 M shards, from a synthetic index. CPU only, about a minute.

    python benchmarks/data_order.py

Bars: from the file of a list to the first batch of a run and of a resume in under 10 s, with the list, the samples and
the order under 100 MB in all.
"""

import argparse
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from encoders.data.index import SetIndex
from encoders.data.order import StepOrder
from encoders.data.shards import TarSamples

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
        print(f"{options.shards:,} shards; list of {file.stat().st_size / 1e6:.0f} MB")
        slow = [measure(file, label, epochs) for label, epochs in (("a first batch", 0), ("one of a resume", 1.99))]
    if any(slow):
        raise SystemExit("a bar was missed: 10 s, 100 MB")


def measure(file: Path, label: str, epochs: float) -> bool:
    """Read the list and plan the first batch after so many epochs; whether a bar was missed."""
    tracemalloc.start()
    began = time.perf_counter()
    samples = TarSamples(file)
    start = int(epochs * len(samples)) // BATCH
    order = StepOrder(samples.sizes, BATCH, start + 100, 0, rank=7, world=64)
    order.start = start
    batch = next(iter(order))
    seconds = time.perf_counter() - began
    held, peak = (bytes_ / 1e6 for bytes_ in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    shards = len({samples.shard(i) for _, i in batch})
    print(
        f"{label} of {len(samples):,} samples: {seconds:.2f} s from the file; list, samples and order hold "
        f"{held:.0f} MB, at most {peak:.0f} MB; rank 7 of 64 reads {len(batch)} samples in {shards} shards"
    )
    began = time.perf_counter()
    for step in range(start, start + 100):
        order.global_ids(step)
    print(f"a further batch of {BATCH:,}: {(time.perf_counter() - began) * 10:.1f} ms")
    return seconds > 10 or peak > 100


def write_index(file: Path, shards: int, samples: int) -> None:
    """A list of shards with sizes and counts as img2dataset's vary."""
    rng = np.random.default_rng(0)
    counts = rng.integers(samples * 8 // 10, samples * 12 // 10 + 1, size=shards)
    names = [f"s3://bucket/data/{shard // 1000:05d}/{shard:08d}.tar" for shard in range(shards)]
    rows = np.stack([counts * 100_000, np.zeros_like(counts), counts], axis=1)
    SetIndex.of("", names, rows).save(file)


if __name__ == "__main__":
    main()
