"""The order in which training visits its samples: a pure function of (seed, epoch, global step).

An epoch is every sample once. Its shards come in random order, some at a time (a window); within a window samples are
shuffled whole, so a shard is read while it is in use and then left. What a step holds does not depend on ranks or
workers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from encoders.errors import UsageError

WINDOW = 2**18  # samples, about; a smaller set is shuffled whole


class Shards(Protocol):
    """What the order must know of a data set."""

    @property
    def sizes(self) -> np.ndarray:
        """Samples of each part that is best read together, int64 (shards,)."""

    @property
    def window(self) -> int:
        """Samples whose shards can be in use at a time."""

    def fetch_ahead(self, shards: np.ndarray) -> None:
        """Get ready the shards that this rank needs soon."""


class Unsharded:
    """`Shards` of a set on this machine: of so many samples, any of which is at hand, or so many in each part."""

    def __init__(self, samples: int | np.ndarray, window: int = WINDOW):
        self.sizes, self.window = np.atleast_1d(np.asarray(samples, dtype=np.int64)), window

    def fetch_ahead(self, shards: np.ndarray) -> None:
        """Nothing."""


class StepOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, sample id) for one rank, from `start` to `steps`; micro-batches of a step follow each other.

    Global batch t holds the same samples whatever the number of ranks; a rank's part of it lies in few shards. A batch
    may end one epoch and begin the next. `samples` is their number, or the number in each shard. `ahead` is told the
    shards of this rank that come next, once per window.
    """

    def __init__(
        self,
        samples: int | np.ndarray,
        global_batch: int,
        steps: int,
        seed: int,
        *,
        rank: int,
        world: int,
        micro_batches: int = 1,
        window: int = WINDOW,
        ahead: Callable[[np.ndarray], None] | None = None,
    ):
        sizes = np.atleast_1d(np.asarray(samples, dtype=np.int64))
        self.samples = int(sizes.sum())
        if global_batch % (world * micro_batches):
            raise UsageError(
                f"batch_size {global_batch} does not divide into {world} rank(s) x {micro_batches} micro-batch(es)"
            )
        if self.samples < global_batch:
            raise UsageError(
                f"{self.samples} training samples are fewer than one batch of {global_batch}; lower the batch size"
            )
        self.global_batch, self.steps, self.seed = global_batch, steps, seed
        self.rank, self.world, self.micro_batches = rank, world, micro_batches
        self.start, self.ahead, self.window = 0, ahead, window
        self._shards = _Shards(sizes, seed, window)

    def __len__(self) -> int:
        return (self.steps - self.start) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        told: tuple[int, int] | None = None
        for step in range(self.start, self.steps):
            if self.ahead is not None and (place := self._shards.window_at(step * self.global_batch)) != told:
                told = place
                self.ahead(self._coming(place))
            epochs, ids = self.global_ids(step)
            mine = np.split(np.arange(len(ids)), self.world)[self.rank]
            for micro in np.split(mine, self.micro_batches):
                yield list(zip(epochs[micro].tolist(), ids[micro].tolist(), strict=True))

    def global_ids(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, sample ids) of a step's global batch, int64 (B,) each: neighbours in it lie in the same shard,
        unless all shards are in use at a time anyway."""
        first = step * self.global_batch
        epochs, ids = self._shards.take(first, first + self.global_batch)
        if self.samples <= self.window:
            return epochs, ids
        grouped = np.argsort(self._shards.shard_of(ids), kind="stable")
        return epochs[grouped], ids[grouped]

    def _coming(self, place: tuple[int, int]) -> np.ndarray:
        """This rank's shards of a window and of the next one."""
        windows = [self._shards.window(*place), self._shards.window(*self._shards.after(*place))]
        return np.concatenate([np.array_split(np.sort(shards), self.world)[self.rank] for shards in windows])


@dataclass(frozen=True)
class _Epoch:
    """Shards in the order of an epoch, and how many samples lie before each; int64 (S,) and (S + 1,)."""

    number: int
    shards: np.ndarray
    before: np.ndarray


class _Shards:
    """Positions in the endless row of epochs -> sample ids. Holds one epoch's shards and one window's ids."""

    def __init__(self, sizes: np.ndarray, seed: int, window: int):
        self.sizes, self.seed, self.window_size = sizes, seed, window
        self.ends = np.cumsum(sizes)
        self.total = int(self.ends[-1])
        self._epoch: _Epoch | None = None
        self._window: tuple[int, int, np.ndarray] | None = None

    def take(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, ids) at positions first <= p < end."""
        epochs, ids = [], []
        while first < end:
            number, place = divmod(first, self.total)
            row, start = self._ids_around(number, place)
            piece = row[place - start : place - start + end - first]
            epochs.append(np.full(len(piece), number))
            ids.append(piece)
            first += len(piece)
        return np.concatenate(epochs), np.concatenate(ids)

    def shard_of(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, ids, side="right")

    def window_at(self, position: int) -> tuple[int, int]:
        """(epoch, window's first slot) at a position."""
        number, place = divmod(position, self.total)
        return number, self._slots(self._order(number), place)[0]

    def after(self, number: int, slot: int) -> tuple[int, int]:
        """The window that follows."""
        epoch = self._order(number)
        end = self._slots(epoch, int(epoch.before[slot]))[1]
        return (number + 1, 0) if epoch.before[end] == self.total else (number, end)

    def window(self, number: int, slot: int) -> np.ndarray:
        """The shards of a window."""
        epoch = self._order(number)
        first, end = self._slots(epoch, int(epoch.before[slot]))
        return epoch.shards[first:end]

    def _ids_around(self, number: int, place: int) -> tuple[np.ndarray, int]:
        """The ids of the window in which a place of an epoch lies, and the place of its first."""
        epoch = self._order(number)
        first, end = self._slots(epoch, place)
        if self._window is None or self._window[:2] != (number, first):
            shards = np.sort(epoch.shards[first:end])
            sizes = self.sizes[shards]
            offsets = np.repeat(self.ends[shards] - np.cumsum(sizes), sizes)  # id minus place in the sorted window
            ids = offsets + np.arange(len(offsets))
            self._window = (number, first, np.random.default_rng([self.seed, number, first]).permutation(ids))
        return self._window[2], int(epoch.before[first])

    def _slots(self, epoch: _Epoch, place: int) -> tuple[int, int]:
        """Slots (first, end) of the window around a place: shards that begin in the same stretch of `window_size`."""
        slot = int(np.searchsorted(epoch.before, place, side="right")) - 1
        stretch = int(epoch.before[slot]) // self.window_size
        edges = np.array([stretch, stretch + 1]) * self.window_size
        first, end = np.searchsorted(epoch.before[:-1], edges, side="left")
        return int(first), int(end)

    def _order(self, number: int) -> _Epoch:
        if self._epoch is None or self._epoch.number != number:
            shards = np.random.default_rng([self.seed, number, 0, 1]).permutation(len(self.sizes))
            before = np.concatenate([[0], np.cumsum(self.sizes[shards])])
            self._epoch = _Epoch(number, shards, before)
        return self._epoch
