"""Uncertainty of a paired difference when questions come in clusters: all questions about one picture stand or fall
together, so whole pictures are resampled. Works on statistics that are functions of row weights, many draws at once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]  # weights (draws, n) -> (draws,)

CHUNK = 2**19  # weights held at once: 4 MiB, about a core's cache


@dataclass(frozen=True)
class Difference:
    """A run minus the baseline, with its 95 % interval (None where all questions are about one picture).

    `detectable` is the true difference that a comparison of this size finds four times in five.
    """

    value: float
    low: float | None
    high: float | None
    detectable: float | None
    verdict: str  # better | worse | differs | within noise


def bootstrap(statistics: Sequence[Statistic], clusters: NDArray[np.int64], draws: int, seed: int) -> Floats:
    """Values (statistics, draws) under resampling of clusters with replacement; all statistics share each draw.

    clusters (n,): the cluster 0..C-1 of each row, for benchmarks its picture.
    """
    values = np.empty((len(statistics), draws))
    done = 0
    for weights in cluster_weights(clusters, draws, seed):
        for row, statistic in zip(values, statistics, strict=True):
            row[done : done + len(weights)] = statistic(weights)
        done += len(weights)
    return values


def cluster_weights(clusters: NDArray[np.int64], draws: int, seed: int) -> Iterator[Floats]:
    """Chunks (c, n) of row weights: how often each row's cluster was drawn, C draws out of C with replacement."""
    rng = np.random.default_rng(seed)
    count = int(clusters.max()) + 1
    step = max(1, CHUNK // len(clusters))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn = rng.integers(count, size=(size, count))  # (c, C)
        drawn += count * np.arange(size)[:, None]  # one histogram per draw
        times = np.bincount(drawn.reshape(-1), minlength=size * count).reshape(size, count)  # (c, C)
        yield times.astype(np.float64)[:, clusters]  # (c, n)


def difference(value: float, draws: Floats, clusters: int, undirected: bool = False) -> Difference:
    """The 95 % percentile interval of a paired difference with bootstrap values `draws`, and what to call it.

    The spread is widened by sqrt(C / (C-1)): resampling C clusters understates their deviation by that factor.
    """
    if clusters < 2:
        return Difference(value, None, None, None, "within noise")
    spread = (draws - value) * math.sqrt(clusters / (clusters - 1))
    low, high = (value + float(edge) for edge in np.quantile(spread, [0.025, 0.975]))
    verdict = "within noise"
    if low > 0 or high < 0:
        verdict = "differs" if undirected else "better" if low > 0 else "worse"
    # 1.96 + 0.84 standard errors: a two-sided test at 5 % with 80 % power
    return Difference(value, low, high, 2.8 * float(spread.std()), verdict)
