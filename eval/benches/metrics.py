"""The metrics of the benchmarks: pure functions of the answered rows and of a weight per row, vectorised over draws.

With unit weights each equals what lmms-eval's task prints under the same name, to 1e-9. Whether one answer is correct
is decided by lmms-eval's own `process_results` (or its exact_match), never here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders.errors import DataError

Floats = NDArray[np.float64]

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

MMMU_DIGITS = 5


@dataclass(frozen=True)
class Columns:
    """The rows of one benchmark as arrays of equal length n, in the order of the questions."""

    correct: Floats  # (n,) 0..1; a caption's CIDEr may exceed 1
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


def exact_match(columns: Columns, weights: Floats) -> Floats:
    """Mean of `correct`: whatever a task prints that is the mean of one score per question."""
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


def mme_score(perception: bool, acc: bool = True, acc_plus: bool = True) -> Metric:
    """A metric of MME's perception (0..2000) or cognition (0..800) categories; NaN if no question is of that kind.

    Of the two questions on a picture, acc is 100 x the share answered correctly, acc+ is 100 if both are. A category
    contributes the mean over its pictures, and the categories are summed.
    """

    def metric(columns: Columns, weights: Floats) -> Floats:
        member = np.isin(columns.category, MME_PERCEPTION) == perception
        rows = np.flatnonzero(member)
        if not rows.size:
            return np.full(len(weights), np.nan)
        pairs, pair_of_row, first = _mme_pairs(columns, rows)
        right = np.bincount(pair_of_row, weights=columns.correct[rows])  # (pairs,) 0, 1 or 2
        value = 50 * right * acc + 100 * (right == 2) * acc_plus
        score = np.zeros(len(weights))
        for category in np.unique(pairs[:, 0]):
            among = pairs[:, 0] == category
            # Both questions of a pair ask about one picture and so carry one weight.
            weight = weights[:, first[among]]  # (draws, pairs of the category)
            score += _ratio(weight @ value[among], weight.sum(axis=1))
        return score

    return metric


mme_perception_score = mme_score(perception=True)
mme_cognition_score = mme_score(perception=False)


def mme_total_score(columns: Columns, weights: Floats) -> Floats:
    """Perception + cognition."""
    return mme_perception_score(columns, weights) + mme_cognition_score(columns, weights)


def mmmu_acc(columns: Columns, weights: Floats) -> Floats:
    """Share of correct answers, rounded to the five digits that lmms-eval prints.

    Summed subject by subject, in the order in which subjects appear, so that the last digit rounds alike.
    """
    right, asked = np.zeros(len(weights)), np.zeros(len(weights))
    for subject in dict.fromkeys(columns.category):
        member = columns.category == subject
        here = weights[:, member]  # (draws, questions of the subject)
        count = here.sum(axis=1)
        right += _ratio(here @ columns.correct[member], count) * count
        asked += count
    score: Floats = np.round(_ratio(right, asked), MMMU_DIGITS)
    return score


def mean_where(category: str, inside: bool = True) -> Metric:
    """A metric: the mean of `correct` over the rows of one category, or of all others; NaN if there is none."""

    def metric(columns: Columns, weights: Floats) -> Floats:
        member = (columns.category == category) == inside
        if not member.any():
            return np.full(len(weights), np.nan)
        return weighted_mean(columns.correct[member], weights[:, member])

    return metric


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Mean of values (n,) under each row of weights (draws, n): (draws,)."""
    return _ratio(weights @ values, weights.sum(axis=1))


def _true_positives(columns: Columns, weights: Floats) -> Floats:
    return weights @ ((columns.prediction == "yes") & (columns.target == "yes")).astype(np.float64)


def _mme_pairs(columns: Columns, rows: NDArray[np.intp]) -> tuple[NDArray[np.str_], NDArray[np.intp], NDArray[np.intp]]:
    """The pairs (pairs, 2) of category and question_id among `rows`, the pair of each row, the first row of each pair.

    Raises DataError for a question_id that does not have exactly two questions.
    """
    keys = np.stack([columns.category[rows], columns.question_id[rows]], axis=1)  # (n, 2)
    pairs, place, pair_of_row, size = np.unique(
        keys, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    if (odd := np.flatnonzero(size != 2)).size:
        category, question = pairs[odd[0]]
        raise DataError(
            f"MME asks two questions per question_id, but {category}/{question} has {size[odd[0]]}; use an even limit"
        )
    return pairs, pair_of_row.reshape(-1), rows[place]  # numpy 2.0 returns the inverse as (n, 1)


def _ratio(above: Floats, below: Floats) -> Floats:
    """above / below, and 0 where there is nothing to divide by, as lmms-eval has it."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
