"""The benchmarks: for each, lmms-eval's task, our settings, the protocol notes a reader needs, and its metrics.

A metric is a pure function of the answered rows and of a weight per row, vectorised over bootstrap draws; with unit
weights it equals what lmms-eval's task prints under the same name. Whether one answer is correct is decided by
lmms-eval's own `process_results` (or its exact_match), never here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders.errors import DataError, UsageError
from eval.bootstrap import Floats


@dataclass(frozen=True)
class Columns:
    """The rows of one benchmark as arrays of equal length n, in the order of the questions."""

    correct: Floats  # (n,) 0..1
    prediction: NDArray[np.str_]  # (n,) lower case, stripped
    target: NDArray[np.str_]  # (n,) lower case, stripped
    category: NDArray[np.str_]  # (n,)
    question_id: NDArray[np.str_]  # (n,)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "Columns":
        """Take the columns out of rows of a samples.jsonl."""
        return cls(
            correct=np.array([row["correct"] for row in rows], dtype=np.float64),
            prediction=np.array([str(row["prediction"]).lower().strip() for row in rows], dtype=np.str_),
            target=np.array([str(row["target"]).lower().strip() for row in rows], dtype=np.str_),
            category=np.array([str(row["category"]) for row in rows], dtype=np.str_),
            question_id=np.array([str(row["question_id"]) for row in rows], dtype=np.str_),
        )


Metric = Callable[[Columns, Floats], Floats]  # weights (draws, n) -> scores (draws,)


@dataclass(frozen=True)
class Bench:
    """One benchmark. `headline` names the metrics a summary leads with; `percent` metrics are fractions of 1."""

    name: str
    task: str  # lmms-eval's
    max_new_tokens: int
    protocol: Mapping[str, str]  # what makes its numbers comparable to others, or not
    metrics: Mapping[str, Metric]
    headline: tuple[str, ...]
    percent: bool
    questions: int  # in the full-size benchmark
    images: int
    folders: tuple[str, ...]  # the dataset folders the task loads, relative to a data folder
    id_column: str = "question_id"
    category_column: str | None = None
    undirected: tuple[str, ...] = ()  # metrics of which neither more nor less is better


def exact_match(columns: Columns, weights: Floats) -> Floats:
    """Mean of `correct`; POPE's accuracy and the exact_match of GQA and TextVQA."""
    return weighted_mean(columns.correct, weights)


def pope_precision(columns: Columns, weights: Floats) -> Floats:
    """Of the questions answered "yes", the share whose truth is yes; 0 if none was."""
    said_yes = weights @ (columns.prediction == "yes").astype(np.float64)
    return _ratio(_true_positives(columns, weights), said_yes)


def pope_recall(columns: Columns, weights: Floats) -> Floats:
    """Of the questions whose truth is yes and whose answer is yes or no, the share answered "yes".

    As in lmms-eval, an answer that is neither is left out; only the accuracy counts it as wrong.
    """
    missed = (columns.prediction == "no") & (columns.target == "yes")
    hits = _true_positives(columns, weights)
    return _ratio(hits, hits + weights @ missed.astype(np.float64))


def pope_f1_score(columns: Columns, weights: Floats) -> Floats:
    """Harmonic mean of precision and recall over all questions together."""
    precision, recall = pope_precision(columns, weights), pope_recall(columns, weights)
    return _ratio(2 * precision * recall, precision + recall)


def pope_predicted_yes_ratio(columns: Columns, weights: Floats) -> Floats:
    """Share of answers that are "yes": 0.5 is unbiased. lmms-eval's pope_yes_ratio is that of the ground truth."""
    return weighted_mean((columns.prediction == "yes").astype(np.float64), weights)


def mme_perception_score(columns: Columns, weights: Floats) -> Floats:
    """Sum over the perception categories of acc + acc+, 0..2000; NaN if there is no such question."""
    return _mme_score(columns, weights, np.isin(columns.category, MME_PERCEPTION))


def mme_cognition_score(columns: Columns, weights: Floats) -> Floats:
    """Sum over all other categories of acc + acc+, 0..800; NaN if there is no such question."""
    return _mme_score(columns, weights, ~np.isin(columns.category, MME_PERCEPTION))


def mme_total_score(columns: Columns, weights: Floats) -> Floats:
    """Perception + cognition."""
    return mme_perception_score(columns, weights) + mme_cognition_score(columns, weights)


MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)

BENCHES: dict[str, Bench] = {
    "mme": Bench(
        name="mme",
        task="mme",
        max_new_tokens=16,
        protocol={
            "split": "test",
            "scoring": "acc + acc+ per category; an answer counts by its first letters (yes / no)",
        },
        metrics={
            "mme_perception_score": mme_perception_score,
            "mme_cognition_score": mme_cognition_score,
            "mme_total_score": mme_total_score,
        },
        headline=("mme_perception_score", "mme_cognition_score"),
        percent=False,
        questions=2374,
        images=1187,
        folders=("lmms-lab-encoder/MME",),
        category_column="category",
    ),
    "pope": Bench(
        name="pope",
        task="pope",
        max_new_tokens=16,
        protocol={
            "split": "test (adversarial, popular and random together)",
            "scoring": "the answer must be exactly yes or no; precision, recall and F1 pooled over all questions",
            "max_new_tokens": "16 (the task's own limit is 128)",
        },
        metrics={
            "pope_accuracy": exact_match,
            "pope_f1_score": pope_f1_score,
            "pope_precision": pope_precision,
            "pope_recall": pope_recall,
            "pope_predicted_yes_ratio": pope_predicted_yes_ratio,
        },
        headline=("pope_accuracy", "pope_f1_score"),
        percent=True,
        questions=9000,
        images=500,
        folders=("lmms-lab-encoder/POPE",),
        category_column="category",
        undirected=("pope_predicted_yes_ratio",),
    ),
    "gqa": Bench(
        name="gqa",
        task="gqa",
        max_new_tokens=16,
        protocol={"split": "testdev_balanced", "scoring": "exact match, case and punctuation ignored"},
        metrics={"exact_match": exact_match},
        headline=("exact_match",),
        percent=True,
        questions=12578,
        images=398,
        folders=("lmms-lab-encoder/GQA",),
        id_column="id",
    ),
    "textvqa": Bench(
        name="textvqa",
        task="textvqa_val",
        max_new_tokens=16,
        protocol={
            "split": "validation",
            "scoring": "VQA accuracy against ten answers",
            "ocr_tokens": "off (scores with OCR tokens in the prompt are about 12 points higher)",
            "max_new_tokens": "16 (the task itself sets no limit)",
        },
        metrics={"exact_match": exact_match},
        headline=("exact_match",),
        percent=True,
        questions=5000,
        images=3166,
        folders=("lmms-lab-encoder/textvqa",),
    ),
}


def resolve(names: str) -> list[Bench]:
    """The benches named in a comma-separated list, in its order. Raises UsageError listing the known names."""
    wanted = list(dict.fromkeys(name for part in names.split(",") if (name := part.strip())))
    if not wanted:
        raise UsageError(f"no benchmark named; known: {', '.join(BENCHES)}")
    for name in wanted:
        if name not in BENCHES:
            raise UsageError(f"unknown benchmark {name!r}; known: {', '.join(BENCHES)}")
    return [BENCHES[name] for name in wanted]


def point(bench: Bench, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Every metric of the bench on these rows of a samples.jsonl, except those that no row belongs to."""
    columns = Columns.of(rows)
    ones = np.ones((1, len(rows)))
    scores = {name: float(metric(columns, ones)[0]) for name, metric in bench.metrics.items()}
    return {name: score for name, score in scores.items() if not np.isnan(score)}


def sample_score(bench: Bench, results: Mapping[str, Any]) -> float:
    """How correct (0..1) one answer is by the metric entries that lmms-eval recorded for it.

    Raises DataError if it recorded none.
    """
    for name in bench.metrics:
        if name in results:
            entry = results[name]
            return float(entry["score"] if isinstance(entry, Mapping) else entry)
    raise DataError(f"lmms-eval's task {bench.task} scored an answer without any of {', '.join(bench.metrics)}")


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Mean of values (n,) under each row of weights (draws, n): (draws,)."""
    return _ratio(weights @ values, weights.sum(axis=1))


def _true_positives(columns: Columns, weights: Floats) -> Floats:
    return weights @ ((columns.prediction == "yes") & (columns.target == "yes")).astype(np.float64)


def _mme_score(columns: Columns, weights: Floats, member: NDArray[np.bool_]) -> Floats:
    """Per category the mean over question pairs of 100 x share correct + 100 x both correct, summed over categories."""
    rows = np.flatnonzero(member)
    if not rows.size:
        return np.full(len(weights), np.nan)
    keys = np.stack([columns.category[rows], columns.question_id[rows]], axis=1)  # (n, 2)
    pairs, pair_of_row, size = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    pair_of_row = pair_of_row.reshape(-1)  # numpy 2.0 returns (n, 1)
    if (odd := np.flatnonzero(size != 2)).size:
        category, question = pairs[odd[0]]
        raise DataError(
            f"MME asks two questions per question_id, but {category}/{question} has {size[odd[0]]}; use an even limit"
        )
    right = np.bincount(pair_of_row, weights=columns.correct[rows])  # (pairs,) 0, 1 or 2
    value = 50 * right + 100 * (right == 2)
    # Both questions of a pair ask about one picture and so carry one weight.
    first = rows[np.unique(pair_of_row, return_index=True)[1]]
    score = np.zeros(len(weights))
    for category in np.unique(pairs[:, 0]):
        among = pairs[:, 0] == category
        weight = weights[:, first[among]]  # (draws, pairs of the category)
        score += _ratio(weight @ value[among], weight.sum(axis=1))
    return score


def _ratio(above: Floats, below: Floats) -> Floats:
    """above / below, and 0 where there is nothing to divide by, as lmms-eval has it."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
