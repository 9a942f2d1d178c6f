"""From lmms-eval's samples to our rows: one per question, with the picture's identity, checked against its figures.

A row has: bench, index, question_id, image_id, category (the sub-task), prompt, answer (as generated), prediction (as
scored), target, correct (0..1; of a caption its CIDEr; null if the task scores no single answer), empty, unparsed (the
benchmark's scoring could read no answer out of it).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from encoders.errors import DataError, EvaluationIncomplete
from eval.benches.benchmarks import Bench, point
from eval.benches.scoring import Sample, Score, score_samples

TOLERANCE = 1e-9
Row = dict[str, Any]


def collect_rows(
    bench: Bench,
    samples: Sequence[Sample],
    image_ids: Mapping[tuple[str, int], str],
    questions: int,
    failed: Collection[int] = (),
) -> list[Row]:
    """The rows of a bench in the order of its questions, from lmms-eval's logged samples.

    `image_ids` maps (task, index) to the picture's id; `failed` are the questions that got no answer: they count as
    wrong. Raises EvaluationIncomplete unless each of the first `questions` questions has exactly one answer.
    """
    # lmms-eval logs a sample for a question without answer too; `resps` holds, per request, its answers.
    answers = Counter(sample["doc_id"] for sample in samples for request in sample["resps"] for _ in request)
    wrong = [index for index in range(questions) if answers[index] != 1]
    if wrong or len(samples) != questions:
        raise EvaluationIncomplete(
            f"{bench.name}: {answers.total()} answers to {questions} questions; not exactly one to: {wrong[:5]}; "
            "no score is given for a part of a benchmark"
        )
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    rows = [
        _row(bench, sample, score, image_ids)
        for sample, score in zip(ordered, score_samples(bench, ordered), strict=True)
    ]
    for index in failed:
        rows[index] |= {"answer": "", "prediction": "", "correct": 0.0, "empty": True, "unparsed": False}
    return rows


def printed_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """The figures that lmms-eval's task printed, under its names, without its standard errors."""
    metrics = {}
    for key, value in results.items():
        name, _, _ = key.partition(",")  # of a task's filters there is one
        if "," in key and isinstance(value, int | float) and "_stderr" not in name:
            metrics[name] = float(value)
    return metrics


def checked_metrics(bench: Bench, rows: Sequence[Row], printed: Mapping[str, float]) -> dict[str, float]:
    """The printed figures and our own further ones.

    Raises EvaluationIncomplete if the rows do not give back every figure of the bench that lmms-eval printed: then a
    comparison made from the rows would not be about that benchmark.
    """
    ours = point(bench, rows)
    if not (set(ours) & set(printed) if bench.metrics else printed):
        raise EvaluationIncomplete(
            f"{bench.name}: lmms-eval printed {sorted(printed)}, none of {sorted(bench.metrics)}"
        )
    for name in set(ours) & set(printed):
        if not abs(ours[name] - printed[name]) <= TOLERANCE:
            raise EvaluationIncomplete(
                f"{bench.name}: {name} is {ours[name]!r} from the rows but lmms-eval printed {printed[name]!r}"
            )
    return {**ours, **printed}


def _row(bench: Bench, sample: Sample, score: Score, image_ids: Mapping[tuple[str, int], str]) -> Row:
    document, index = sample["doc"], sample["doc_id"]
    for column in (bench.id_column, bench.category_column):
        if column is not None and column not in document:
            raise DataError(f"{bench.name}: question {index} has no column {column!r}; it has {sorted(document)}")
    answer = sample["resps"][0][0]
    return {
        "bench": bench.name,
        "index": index,
        "question_id": str(document[bench.id_column] if bench.id_column is not None else index),
        "image_id": image_ids[bench.task, index],
        "category": score.category,
        "prompt": sample["arguments"][0],
        "answer": answer,
        "prediction": sample["filtered_resps"][0],
        "target": _target(sample),
        "correct": score.correct,
        "empty": not answer.strip(),
        "unparsed": score.unparsed,
    }


def _target(sample: Sample) -> str:
    """The true answer, or all references of a caption; of TextVQA's ten the most frequent."""
    target, answers = sample["target"], sample["doc"].get("answers")
    if isinstance(target, list):
        return "\n".join(str(reference) for reference in target)
    return str(Counter(answers).most_common(1)[0][0] if answers else target)
