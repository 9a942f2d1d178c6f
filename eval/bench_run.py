"""One benchmark of eval-mllm: asked, scored by lmms-eval's own task, checked, and the self-check of the answers."""

import argparse
import time
from typing import TYPE_CHECKING, Any

from encoders.errors import EvaluationIncomplete, SwapError
from eval.benches.answers import Row, checked_metrics, collect_rows, printed_metrics
from eval.benches.benchmarks import Bench, point
from eval.benches.lmms_tasks import cause, task_manager

if TYPE_CHECKING:  # these take 10 seconds to import
    from lmms_eval.api.task import Task

    from eval.answering.lmms_model import EncoderSwapLlava

SHOWN = 5  # differing answers that a message names


def run_bench(
    bench: Bench, task: "Task", lm: "EncoderSwapLlava", limit: int | None, allow_errors: bool = False
) -> tuple[list[Row], dict[str, Any]]:
    """Ask and score one benchmark: its rows and its entry in results.json.

    The entry lists the questions without answer under `failed`; they count as wrong, and the figures are then computed
    from the rows alone. Raises EvaluationIncomplete if lmms-eval could not score the answers.
    """
    from lmms_eval.evaluator import simple_evaluate

    if limit is not None and bench.task == "mme":
        limit += limit % 2  # scored in pairs
    available = len(task.eval_docs)
    questions = available if limit is None else min(limit, available)
    lm.max_new_tokens = bench.max_new_tokens
    start = time.perf_counter()
    options = argparse.Namespace(output_path=".", process_with_media=False)  # scoring need not decode pictures again
    try:
        output = simple_evaluate(
            lm, tasks=[task], task_manager=task_manager(), limit=limit, bootstrap_iters=0, cli_args=options
        )
    except SwapError:
        raise
    except Exception as error:
        raise EvaluationIncomplete(f"{bench.name}: lmms-eval could not score the answers ({cause(error)})") from error
    seconds = time.perf_counter() - start
    reasons = {failure.question.row: failure.reason for failure in lm.failures}
    rows = collect_rows(bench, output["samples"][bench.task], lm.image_ids, questions, reasons.keys())
    printed = printed_metrics(output["results"][bench.task])
    metrics = checked_metrics(bench, rows, printed) if not reasons else point(bench, rows)
    return rows, {
        "task": bench.task,
        "metrics": metrics,
        "scored_by": list(bench.metrics),
        "headline": list(bench.headline),
        "percent": bench.percent,
        "questions": questions,
        "of_questions": bench.questions or available,  # more: the scores are of a part
        "images": len({row["image_id"] for row in rows}),
        "answered": len(rows) - len(reasons),
        "empty": sum(row["empty"] for row in rows),
        "unparsed": sum(row["unparsed"] for row in rows),
        "failed": [
            {"index": row["index"], "question_id": row["question_id"], "reason": reasons[row["index"]]}
            for row in rows
            if row["index"] in reasons
        ],
        "seconds": round(seconds, 2),
        "cost": {**lm.costs(), "seconds_score": round(seconds - lm.seconds, 2)},
        "protocol": {"max_new_tokens": str(bench.max_new_tokens), **bench.protocol},
    }


def self_check(bench: Bench, lm: "EncoderSwapLlava", count: int) -> dict[str, Any]:
    """How many of `count` questions have another answer when asked alone.

    Raises EvaluationIncomplete listing them in float32, where none may differ.
    """
    try:
        checked, differing = lm.check(count)
    except SwapError:
        raise
    except Exception as error:
        raise EvaluationIncomplete(
            f"{bench.name}: the self-check failed ({cause(error)}); the answers are kept: the same command without "
            "--self-check ends without it"
        ) from error
    flips = [{"index": question.row, "batched": ours, "alone": alone} for question, ours, alone in differing]
    if flips and lm.team.dtype == "float32":
        told = "; ".join(f"row {flip['index']}: {flip['batched']!r}, alone {flip['alone']!r}" for flip in flips[:SHOWN])
        raise EvaluationIncomplete(
            f"{bench.name}: {len(flips)} of {checked} questions have another answer when asked alone, and that in "
            f"float32: {told}"
        )
    rate = len(flips) / checked if checked else 0.0
    print(f"{bench.name}: self-check: {len(flips)} of {checked} answers differ when asked alone ({rate:.1%})")
    return {"questions": checked, "different": len(flips), "flip_rate": rate, "flips": flips}
