"""The order of training: every sample once an epoch, a function of (seed, epoch, step), quick and small at any size."""

import pickle
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from encoders.data.index import SetIndex
from encoders.data.order import StepOrder
from encoders.data.shards import TarSamples
from encoders.errors import UsageError

Item = tuple[int, int]


def order(sizes: int | np.ndarray, steps: int, rank: int = 0, world: int = 1, **options: int) -> StepOrder:
    return StepOrder(sizes, options.pop("batch", 8), steps, options.pop("seed", 3), rank=rank, world=world, **options)


def random_sets(count: int) -> list[tuple[np.ndarray, int]]:
    """(sizes of shards, window): empty shards, one-sample shards and shards larger than a window among them."""
    rng = np.random.default_rng(0)
    drawn = [(rng.integers(0, 40, size=rng.integers(1, 60)), int(rng.integers(1, 200))) for _ in range(count)]
    return [(sizes, window) for sizes, window in drawn if sizes.sum() >= 8]


def test_every_sample_comes_once_an_epoch() -> None:
    for sizes, window in random_sets(100):
        total = int(sizes.sum())
        batches = list(order(sizes, total, window=window))  # total steps of 8: eight epochs
        expected = Counter((epoch, i) for epoch in range(8) for i in range(total))
        assert Counter(item for batch in batches for item in batch) == expected
        epochs = [sorted({epoch for epoch, _ in batch}) for batch in batches]
        assert epochs == sorted(epochs)


def test_a_step_holds_the_same_samples_whatever_ranks_micro_batches_and_where_it_starts() -> None:
    for sizes, window in random_sets(30):
        one = list(order(sizes, 20, window=window))
        late = order(sizes, 20, window=window)
        late.start = 13
        assert list(late) == one[13:]
        for world, micro in ((2, 1), (2, 2), (4, 1), (8, 1)):
            ranks = [list(order(sizes, 20, rank, world, window=window, micro_batches=micro)) for rank in range(world)]
            for step in range(20):
                parts = [batch for rank in ranks for batch in rank[step * micro : (step + 1) * micro]]
                assert [item for part in parts for item in part] == one[step]
    assert list(order(50, 9, seed=4)) != list(order(50, 9, seed=3))


def test_a_small_set_is_shuffled_whole_whatever_its_shards() -> None:
    for sizes in ([1000], [500, 500], [1, 0, 998, 1], [100] * 10):
        assert ids(order(np.array(sizes), 1, batch=1000)) == ids(order(1000, 1, batch=1000))
    epoch = order(1000, 2, batch=1000)
    assert ids(epoch) == [set(range(1000))] * 2
    firsts = [batch[:20] for batch in order(1000, 20, batch=1000, window=10**6)]
    assert len({tuple(i for _, i in first) for first in firsts}) == 20  # a fresh permutation every epoch


def ids(batches: StepOrder) -> list[set[int]]:
    return [{i for _, i in batch} for batch in batches]


def test_shards_are_read_while_they_are_in_use_and_then_left() -> None:
    sizes = np.full(1000, 100)
    seen = [item for batch in order(sizes, 1000, batch=100, window=2000) for item in batch]
    places: dict[int, list[int]] = {}
    for place, (_, i) in enumerate(seen):
        places.setdefault(i // 100, []).append(place)
    assert all(of_shard[-1] - of_shard[0] < 2000 for of_shard in places.values())
    sharing = [len({i // 100 for _, i in batch}) for batch in order(sizes, 100, batch=100, window=2000)]
    assert min(sharing) >= 15  # twenty shards are mixed
    ranks = [order(sizes, 20, rank, 4, batch=100, window=2000) for rank in range(4)]
    touched = [{i // 100 for batch in rank for _, i in batch} for rank in ranks]
    assert max(map(len, touched)) <= 10  # of twenty


def test_coming_shards_are_told_a_window_ahead() -> None:
    sizes = np.full(40, 10)
    told: list[np.ndarray] = []
    batches = StepOrder(sizes, 20, 40, 3, rank=0, world=1, window=100, ahead=told.append)
    known: set[int] = set()
    for batch in batches:
        known |= set(told[-1].tolist())
        assert {i // 10 for _, i in batch} <= known
    assert len(told) == 8  # four windows an epoch
    assert all(len(shards) == 20 for shards in told)
    halves = [list(np.concatenate(t)) for t in (told_to(0, sizes), told_to(1, sizes))]
    assert sorted(halves[0] + halves[1]) == sorted(np.concatenate(told))


def told_to(rank: int, sizes: np.ndarray) -> list[np.ndarray]:
    told: list[np.ndarray] = []
    list(StepOrder(sizes, 20, 40, 3, rank=rank, world=2, window=100, ahead=told.append))
    return told


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(UsageError, match="50 training samples are fewer than one batch of 64"):
        order(50, 1, batch=64)
    with pytest.raises(UsageError, match="batch_size 10 does not divide into 4 rank"):
        order(50, 1, batch=10, world=4)


def test_a_billion_samples_in_a_million_shards_are_planned_in_little_time_and_memory(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).integers(800, 1201, size=10**6)
    names = [f"s3://bucket/data/{shard // 1000:05d}/{shard:08d}.tar" for shard in range(10**6)]
    SetIndex.of("", names, np.stack([sizes * 100_000, -sizes, sizes], axis=1)).save(tmp_path / "list.npz")
    tracemalloc.start()
    began = time.process_time()
    samples = TarSamples(tmp_path / "list.npz")
    plan = order(samples.sizes, 10**6, 3, 64, batch=2**15)
    plan.start = 765_432
    first = next(iter(plan))
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(first) == 512
    assert samples.index.name(987_654) == names[987_654]
    assert seconds < 10
    assert peak < 100 * 10**6
    assert len(pickle.dumps((samples, plan))) < 100 * 10**6
