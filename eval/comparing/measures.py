"""The measures of a comparison: every metric of a benchmark and its sub-tasks, for every arm, with paired differences.

Tables of rows are tables[arm][seed], each in the order of the questions. W draws, n rows, R runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from eval.benches.benchmarks import Bench, point
from eval.benches.metrics import Columns
from eval.comparing.bootstrap import Design, Difference, Floats, Sample, bootstrap, difference
from eval.comparing.results import Row

SUBTASK_DRAWS = 2_000  # of each of the many sub-tasks; the standard error is then known to 2 %
OneRun = Callable[[Floats], Floats]  # weights (W, n) -> values (W,)


@dataclass(frozen=True)
class Measure:
    """One metric: a score per arm, and a difference per arm after the first. `ceiling` is a perfect arm's score.

    `seeds` are the scores of each arm's runs.
    """

    name: str
    percent: bool
    headline: bool
    ceiling: float
    scores: list[float]
    seeds: list[list[float]]
    differences: list[Difference]


@dataclass(frozen=True)
class Subtask:
    """A category of a benchmark, measured on its own."""

    name: str
    questions: int
    images: int
    measures: list[Measure]


def verdict_of(measures: Sequence[Measure], arm: int) -> str:
    """One word for a benchmark: what its headline measures say of an arm beside the baseline."""
    words = {measure.differences[arm - 1].verdict for measure in measures if measure.headline}
    if {"better", "worse"} <= words:
        return "mixed"
    ranked = ("better", "worse", "differs", "within noise", "few images")
    return next((word for word in ranked if word in words), "within noise")


def subtasks_of(bench: Bench, tables: Sequence[Sequence[list[Row]]], draws: int, seed: int) -> list[Subtask]:
    """Each category measured on its own; none where a benchmark's metrics make no sense within one, or there is one."""
    categories = dict.fromkeys(str(row["category"]) for row in tables[0][0])
    if not bench.subtasks or len(categories) < 2:
        return []
    found = []
    for category in categories:
        members = [at for at, row in enumerate(tables[0][0]) if str(row["category"]) == category]
        part = [[[table[at] for at in members] for table in of_arm] for of_arm in tables]
        pictures = len({picture_of(row) for row in part[0][0]})
        found.append(
            Subtask(category, len(members), pictures, measures_of(bench, part, min(draws, SUBTASK_DRAWS), seed))
        )
    return found


def measures_of(bench: Bench, tables: Sequence[Sequence[list[Row]]], draws: int, seed: int) -> list[Measure]:
    """Every metric that these rows have; tables[arm][seed] are rows in the order of the questions."""
    rows = tables[0][0]
    if not bench.metrics:
        return []
    perfect = point(bench, [{**row, "correct": 1.0, "prediction": row["target"]} for row in rows])
    columns = [[Columns.of(table) for table in of_arm] for of_arm in tables]
    statistics = {
        name: [[partial(bench.metrics[name], column) for column in of_arm] for of_arm in columns] for name in perfect
    }
    design = Design.of([picture_of(row) for row in rows], [str(row["category"]) for row in rows])
    found = []
    for name, (scores, seeds, differences) in paired(statistics, design, draws, seed, bench.undirected).items():
        ceiling = max(1.0, *scores) if bench.percent else max(perfect[name], *scores)
        found.append(Measure(name, bench.percent, name in bench.headline, ceiling, scores, seeds, differences))
    return found


def paired(
    statistics: Mapping[str, Sequence[Sequence[OneRun]]],
    design: Design,
    draws: int,
    seed: int,
    undirected: Sequence[str] = (),
) -> dict[str, tuple[list[float], list[list[float]], list[Difference]]]:
    """By name: the score of every arm, the scores of its runs, and the difference of each arm after the first to it.

    statistics[name][arm][seed] is the metric as a function of row weights. A statistic that is one under another name
    (an average over the rows of the very category) is left out.
    """
    stacked = [_stack([one for of_arm in arms for one in of_arm]) for arms in statistics.values()]
    ones = np.ones((1, len(design.pictures)))
    drawn = bootstrap(stacked, design, draws, seed)
    found = {}
    for at, (name, arms) in enumerate(statistics.items()):
        if np.ptp(drawn[at]) > 0 and any(np.array_equal(drawn[at], earlier) for earlier in drawn[:at]):
            continue
        edges = np.cumsum([len(of_arm) for of_arm in arms])[:-1]
        scores = np.split(stacked[at](ones)[:, 0], edges)
        samples = [Sample(*pair) for pair in zip(scores, np.split(drawn[at], edges), strict=True)]
        differences = [difference(samples[0], sample, design, name in undirected) for sample in samples[1:]]
        found[name] = ([float(one.mean()) for one in scores], [one.tolist() for one in scores], differences)
    return found


def _stack(runs: Sequence[OneRun]) -> Callable[[Floats], Floats]:
    """One statistic (W, n) -> (R, W) of the metric of R runs."""
    return lambda weights: np.stack([run(weights) for run in runs])


def picture_of(row: Row) -> str:
    """What stands or falls together: the questions about a picture; one without picture stands alone."""
    return str(row["image_id"]) or f"question {row['index']}"
