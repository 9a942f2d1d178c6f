"""The folders a comparison reads: results of eval-mllm, one or several seeds an arm.

Reading checks that nothing is missing and that the scores follow from the answers; comparing needs that all runs
answered the same questions under the same protocol.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from encoders import manifest
from encoders.errors import DataError
from eval.benches.benchmarks import Bench, point, recorded_bench

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
    "unparsed",
)
ENTRY = ("task", "metrics", "questions", "protocol", "failed", "cost")  # what results.json says of each bench
SAME_QUESTION = ("prompt", "target", "image_id", "question_id", "category")
SAME_PROTOCOL = ("task", "protocol")
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A results folder: `rows` of each bench by question index."""

    name: str
    path: Path
    results: dict[str, Any]
    rows: dict[str, dict[int, Row]]
    manifest: manifest.Manifest

    def bench(self, name: str) -> Bench:
        """The bench of this name as the run was scored by it."""
        return recorded_bench(name, self.results["benches"][name])


@dataclass(frozen=True)
class Arm:
    """What is compared: one run, or several that differ in nothing but the seed."""

    name: str
    runs: tuple[Run, ...]


def load_arm(paths: Sequence[Path], name: str) -> Arm:
    """Read the results folders of an arm. Raises DataError if one is damaged, or if two are of one and the same model.

    A model that counts twice would make the luck of training look smaller than it is.
    """
    runs = tuple(load_run(path, name) for path in paths)
    for one, other in combinations(runs, 2):
        if one.results["model"]["fingerprint"] == other.results["model"]["fingerprint"]:
            raise DataError(
                f"{one.path} and {other.path} are results of the same model (fingerprint "
                f"{one.results['model']['fingerprint'][:12]}), not two seeds of {name!r}; name each model once"
            )
    return Arm(name, runs)


def load_run(path: Path, name: str) -> Run:
    """Read a results folder.

    Raises DataError if it is damaged or lacks answers, or if its scores do not follow from them.
    """
    seal = manifest.read(path, "results")
    lacking = [file for file in ("results.json", "samples.jsonl") if not (path / file).is_file()]
    if lacking:
        raise DataError(f"{path} has no {lacking[0]}, so its answers cannot be compared; run eval-mllm again")
    manifest.verify(path)
    results = json.loads((path / "results.json").read_text())
    rows: dict[str, dict[int, Row]] = {bench: {} for bench in results["benches"]}
    for where, row in read_jsonl(path / "samples.jsonl", FIELDS):
        if row["bench"] not in rows or row["index"] in rows[row["bench"]]:
            raise DataError(f"{where}: {row['bench']} question {row['index']} is there twice or of an unlisted bench")
        rows[row["bench"]][row["index"]] = row
    for bench, entry in results["benches"].items():
        if missing := [key for key in ENTRY if key not in entry]:
            raise DataError(
                f"{path / 'results.json'} says nothing of {bench}'s {', '.join(missing)}; run eval-mllm again"
            )
        if not rows[bench] or len(rows[bench]) != entry["questions"]:
            raise DataError(
                f"{path / 'samples.jsonl'} has {len(rows[bench])} of {entry['questions']} answers to {bench}; "
                "run eval-mllm again"
            )
        for metric, score in point(recorded_bench(bench, entry), list(rows[bench].values())).items():
            printed = entry["metrics"].get(metric, score)
            if not math.isclose(printed, score, rel_tol=1e-6, abs_tol=1e-6):
                raise DataError(f"{path}: the answers give {metric} {score:.6f}, results.json says {printed:.6f}")
    return Run(name, path, results, rows, seal)


def check_comparable(runs: Sequence[Run]) -> None:
    """Raise DataError naming the first thing that makes the scores of two runs incomparable.

    That is another bench, question or protocol, another lmms-eval, or failed questions that one of them did not allow.
    """
    first = runs[0]
    for run in runs[1:]:
        if first.rows.keys() != run.rows.keys():
            raise DataError(
                f"{first.path} has the benchmarks {sorted(first.rows)}, {run.path} has {sorted(run.rows)}; "
                "evaluate them with the same --bench"
            )
        ours, theirs = (one.results["settings"]["versions"].get("lmms-eval") for one in (first, run))
        if ours != theirs:
            raise DataError(
                f"{first.path} was scored by lmms-eval {ours}, {run.path} by {theirs}; evaluate both with one version"
            )
        for bench in first.rows:
            _check_protocol(first, run, bench)
            _check_questions(first, run, bench)
    _check_failures(runs)


def _check_protocol(first: Run, run: Run, bench: str) -> None:
    for key in SAME_PROTOCOL:
        ours, theirs = (one.results["benches"][bench][key] for one in (first, run))
        if ours != theirs:
            raise DataError(
                f"{bench}: the {key} is {json.dumps(ours)} in {first.path} and {json.dumps(theirs)} in {run.path}; "
                "scores under different protocols do not compare, evaluate both with one version of this toolkit"
            )


def _check_questions(first: Run, run: Run, bench: str) -> None:
    if missing := first.rows[bench].keys() ^ run.rows[bench].keys():
        raise DataError(
            f"{bench} question {min(missing)} is not in both {first.path} and {run.path}; "
            "evaluate them with the same --data and --limit"
        )
    for index, row in first.rows[bench].items():
        for key in SAME_QUESTION:
            if row[key] != (other := run.rows[bench][index][key]):
                raise DataError(
                    f"{bench} question {index} differs in {key!r}: {row[key]!r} in {first.path}, {other!r} in "
                    f"{run.path}; evaluate them with the same --data"
                )


def _check_failures(runs: Sequence[Run]) -> None:
    """Failed questions count as wrong: that is a comparison only where every run was told to go on with them."""
    failed = [(run, bench) for run in runs for bench, entry in run.results["benches"].items() if entry["failed"]]
    strict = [run for run in runs if not run.results["settings"]["eval"].get("allow_errors")]
    if failed and strict:
        run, bench = failed[0]
        count = len(run.results["benches"][bench]["failed"])
        raise DataError(
            f"{run.path}: {count} questions of {bench} failed and count as wrong, but {strict[0].path} was evaluated "
            "without --allow-errors; mend the cause and evaluate again, or evaluate all of them with it"
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


def read_jsonl(file: Path, keys: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
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
