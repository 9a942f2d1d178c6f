"""The folders a comparison reads: results of eval-mllm and the held-out ranks of encoder runs.

Reading checks that nothing is missing and that the scores follow from the answers; comparing needs that all runs
answered the same questions.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders import manifest
from encoders.errors import DataError
from eval.benchmarks import BENCHES, point

FIELDS = (
    "bench",
    "index",
    "question_id",
    "image_id",
    "category",
    "prompt",
    "answer",
    "prediction",
    "target",
    "correct",
    "empty",
)
SAME_QUESTION = ("prompt", "target", "image_id", "question_id", "category")


@dataclass(frozen=True)
class Run:
    """A results folder: `rows` of each bench by question index."""

    name: str
    path: Path
    results: dict[str, Any]
    rows: dict[str, dict[int, dict[str, Any]]]
    manifest: manifest.Manifest


def load_run(path: Path, name: str) -> Run:
    """Read a results folder.

    Raises DataError if it is damaged or lacks answers, or if its scores do not follow from them.
    """
    seal = manifest.read(path, "results")
    results = json.loads((path / "results.json").read_text()) if (path / "results.json").is_file() else None
    if results is None or not (path / "samples.jsonl").is_file():
        lacking = "results.json" if results is None else "samples.jsonl"
        raise DataError(f"{path} has no {lacking}, so its answers cannot be compared; run eval-mllm again")
    manifest.verify(path)
    rows: dict[str, dict[int, dict[str, Any]]] = {bench: {} for bench in results["benches"]}
    for where, row in _jsonl(path / "samples.jsonl", FIELDS):
        if row["bench"] not in rows or row["index"] in rows[row["bench"]]:
            raise DataError(f"{where}: {row['bench']} question {row['index']} is there twice or of an unlisted bench")
        rows[row["bench"]][row["index"]] = row
    for bench, entry in results["benches"].items():
        if bench not in BENCHES:
            raise DataError(f"{path} holds the unknown benchmark {bench!r}; known: {', '.join(BENCHES)}")
        if not rows[bench] or len(rows[bench]) != entry["questions"]:
            raise DataError(
                f"{path / 'samples.jsonl'} has {len(rows[bench])} of {entry['questions']} answers to {bench}; "
                "run eval-mllm again"
            )
        for metric, score in point(BENCHES[bench], list(rows[bench].values())).items():
            printed = entry["metrics"].get(metric, score)
            if not math.isclose(printed, score, rel_tol=1e-6, abs_tol=1e-6):
                raise DataError(f"{path}: the answers give {metric} {score:.6f}, results.json says {printed:.6f}")
    return Run(name, path, results, rows, seal)


def check_same_questions(runs: Sequence[Run]) -> None:
    """Raise DataError naming the first bench or question that is not the same in all runs."""
    first = runs[0]
    for run in runs[1:]:
        if missing := set(first.rows) ^ set(run.rows):
            raise DataError(
                f"{first.path} and {run.path} did not both run {', '.join(sorted(missing))}; "
                "evaluate them with the same --bench"
            )
        for bench, rows in first.rows.items():
            if missing_rows := rows.keys() ^ run.rows[bench].keys():
                raise DataError(
                    f"{bench} question {min(missing_rows)} is not in both {first.path} and {run.path}; "
                    "evaluate them with the same --data and --limit"
                )
            for index, row in rows.items():
                for key in SAME_QUESTION:
                    if row[key] != (other := run.rows[bench][index][key]):
                        raise DataError(
                            f"{bench} question {index} differs in {key!r}: {row[key]!r} in {first.path}, {other!r} in "
                            f"{run.path}; evaluate them with the same --data"
                        )


def load_picture(path: Path, image_id: str) -> bytes:
    """The JPEG thumbnail of a picture. Raises DataError if the folder lacks it or the id is not one."""
    # The id comes from a file: it must not lead out of the folder.
    if not re.fullmatch(r"\w+", image_id):
        raise DataError(f"{path / 'samples.jsonl'} has the impossible image_id {image_id!r}")
    file = path / "images" / f"{image_id}.jpg"
    if not file.is_file():
        raise DataError(f"{file} is missing although samples.jsonl names it; run eval-mllm again")
    return file.read_bytes()


def load_ranks(path: Path) -> tuple[float, dict[str, tuple[int, int]]]:
    """Chance at R@1, and (image to text, text to image) rank of each held-out pair; 0 is a hit at 1."""
    seal = manifest.read(path, "encoder-run")
    file = path / "retrieval.jsonl"
    if "retrieval" not in seal.metrics or not file.is_file():
        raise DataError(f"{path} has no retrieval scores; train it with held-out scenes")
    ranks = {row["key"]: (row["i2t_rank"], row["t2i_rank"]) for _, row in _jsonl(file, ("key", "i2t_rank", "t2i_rank"))}
    if len(ranks) != seal.metrics["retrieval"]["queries"]:
        raise DataError(f"{file} has {len(ranks)} of {seal.metrics['retrieval']['queries']} pairs; score the run again")
    return float(seal.metrics["retrieval"]["chance_r1"]), ranks


def _jsonl(file: Path, keys: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file with where they stand. Raises DataError for a row that is not JSON or lacks a key."""
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where} is not JSON ({error}); write the folder again") from error
            if missing := [key for key in keys if key not in row]:
                raise DataError(f"{where} lacks {', '.join(missing)}; write the folder again")
            yield where, row
