"""Uncertainty of a paired difference between two arms: which pictures were asked about, and the luck of training.

All questions about one picture stand or fall together, so whole pictures are resampled, within strata; the runs of all
arms share each draw. Where an arm has several seeds, what they differ by beyond that is the luck of training.
Works on statistics that are functions of row weights, many draws at once. W draws, n rows, C pictures, R runs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # weights (W, n) -> values (R, W)

CHUNK = 2**19  # weights held at once: 4 MiB, about a core's cache
FEW_PICTURES = 50
MOST_FREEDOM = 10_000  # above it, Student's t is the normal distribution


@dataclass(frozen=True)
class Design:
    """Which picture each row is about, and which stratum each picture belongs to."""

    pictures: NDArray[np.int64]  # (n,) 0..C-1
    strata: NDArray[np.int64]  # (C,) 0..S-1

    @classmethod
    def of(cls, pictures: Sequence[str], categories: Sequence[str]) -> "Design":
        """Pictures of categories that share no picture are strata: a new set would have as many of each."""
        _, cluster = np.unique(np.array(pictures, dtype=np.str_), return_inverse=True)
        parent = {category: category for category in categories}

        def root(category: str) -> str:
            while parent[category] != category:
                category = parent[category]
            return category

        seen: dict[int, str] = {}
        for at, category in dict.fromkeys(zip(cluster.tolist(), categories, strict=True)):  # no set: its order varies
            parent[root(category)] = root(seen.setdefault(at, category))
        _, stratum = np.unique([root(seen[at]) for at in range(int(cluster.max()) + 1)], return_inverse=True)
        return cls(cluster.reshape(-1), _without_singles(stratum.reshape(-1)))

    @property
    def count(self) -> int:
        """Number of pictures."""
        return len(self.strata)

    @property
    def freedom(self) -> int:
        """Degrees of freedom of a variance over the pictures: pictures less strata."""
        return self.count - (int(self.strata.max()) + 1)


@dataclass(frozen=True)
class Sample:
    """One statistic of one arm: its score with each of k seeds, and their values under the draws of pictures."""

    scores: Floats  # (k,)
    values: Floats  # (k, W)


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline with its 95 % interval; low, high, error, detectable are None for a single picture.

    `error` is the standard error, `luck` the part of it that the luck of training has (None: one seed an arm, so it is
    not covered). `detectable` is the true difference that a comparison of this size finds four times in five (also
    None if no answer differs).
    """

    value: float
    low: float | None
    high: float | None
    error: float | None
    luck: float | None
    detectable: float | None
    verdict: str  # better | worse | differs | within noise | few images


def bootstrap(statistics: Sequence[Statistic], design: Design, draws: int, seed: int) -> list[Floats]:
    """Values (R, draws) of each statistic under resampling of pictures; all statistics share each draw."""
    parts: list[list[Floats]] = [[] for _ in statistics]
    for weights in picture_weights(design, draws, seed):
        for part, statistic in zip(parts, statistics, strict=True):
            part.append(statistic(weights))
    return [np.concatenate(part, axis=1) for part in parts]


def picture_weights(design: Design, draws: int, seed: int) -> Iterator[Floats]:
    """Chunks (w, n) of row weights: in each stratum of n pictures, n are drawn with replacement.

    A picture drawn t times weighs 1 + sqrt(n / (n-1)) (t - 1): this rescales each stratum's deviations, which
    resampling n pictures understates by that factor (Rao and Wu 1988).
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(design.strata == stratum) for stratum in range(int(design.strata.max()) + 1)]
    step = max(1, CHUNK // len(design.pictures))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        weights = np.empty((size, design.count))  # (w, C)
        for pictures in members:
            count = len(pictures)
            drawn = rng.integers(count, size=(size, count))
            drawn += count * np.arange(size)[:, None]  # one histogram per draw
            times = np.bincount(drawn.reshape(-1), minlength=size * count).reshape(size, count)
            weights[:, pictures] = 1 + math.sqrt(count / max(1, count - 1)) * (times - 1)
        yield weights[:, design.pictures]  # (w, n)


def difference(base: Sample, other: Sample, design: Design, undirected: bool = False) -> Difference:
    """The paired difference of two arms, its interval (Student's t x the standard error) and what to call it.

    Seeds are few, so their share of the variance is estimated rather than resampled: what the seeds of an arm differ
    by, less what the choice of pictures alone makes them differ by. The degrees of freedom are Welch-Satterthwaite's.
    """
    value = float(other.scores.mean() - base.scores.mean())
    if design.count < 2:
        return Difference(value, None, None, None, None, None, "few images")
    of_pictures = float((other.values.mean(axis=0) - base.values.mean(axis=0)).var())
    seeds = [(*_luck(sample), len(sample.scores) - 1) for sample in (base, other) if len(sample.scores) > 1]
    variance = of_pictures + sum(luck for luck, _, _ in seeds)
    doubt = of_pictures**2 / design.freedom + sum(between**2 / freedom for _, between, freedom in seeds)
    freedom = min(variance**2 / doubt, MOST_FREEDOM) if doubt else MOST_FREEDOM
    error = math.sqrt(variance)
    reach = float(stdtrit(freedom, 0.975)) * error  # Student's t
    word = "within noise"
    if design.count < FEW_PICTURES:
        word = "few images"
    elif abs(value) > reach:
        word = "differs" if undirected else "better" if value > 0 else "worse"
    luck = math.sqrt(sum(luck for luck, _, _ in seeds)) if seeds else None
    # A two-sided test at 5 % with 80 % power; where no answer differs there is nothing to judge it by.
    detectable = reach + float(stdtrit(freedom, 0.8)) * error if error else None
    return Difference(value, value - reach, value + reach, error, luck, detectable, word)


def _luck(sample: Sample) -> tuple[float, float]:
    """Variance of an arm's mean score over k seeds: the part that pictures do not explain, and all of it."""
    seeds = len(sample.scores)
    between = float(sample.scores.var(ddof=1)) / seeds
    by_pictures = float((sample.values - sample.scores[:, None]).var(axis=0, ddof=1).mean()) / seeds
    return max(0.0, between - by_pictures), between


def _without_singles(strata: NDArray[np.int64]) -> NDArray[np.int64]:
    """One picture has no variance of its own: all such strata together, or one with the smallest other, are one."""
    sizes = np.bincount(strata)
    order = np.argsort(sizes, kind="stable")
    joined = order[: max(int((sizes == 1).sum()), 2)] if sizes[order[0]] == 1 else order[:0]
    merged = np.where(np.isin(strata, joined), order[0], strata)
    return np.unique(merged, return_inverse=True)[1].reshape(-1)
