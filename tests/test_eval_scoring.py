"""Scripted answers: our rows and metrics against lmms-eval's own figures, on local copies in the tasks' schemas."""

import argparse
import random
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_sets import ANSWERS, gqa_images, picture, questions_of, write_benches, write_repository
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate

from eval.benches.answers import Row, checked_metrics, collect_rows, printed_metrics
from eval.benches.benchmarks import BENCHES, bench_of, point, recorded_bench
from eval.benches.lmms_tasks import load_task, task_manager
from eval.benches.scoring import score_samples
from eval.benches.staging import located, staged


class Scripted(lmms):
    """Says what it is told, in the order of the rows, and keeps what it was shown."""

    def __init__(self, answers: Sequence[str]) -> None:
        super().__init__()
        self.answers = answers
        self.shown: list[list[Any]] = []
        self.prompts: list[str] = []

    def generate_until(self, requests: list[Instance]) -> list[str]:
        for text, _, doc_to_visual, row, task, split in (request.args for request in requests):
            self.prompts.append(text)
            self.shown.append(doc_to_visual(self.task_dict[task][split][row]))
        return [self.answers[request.args[3]] for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benches(tmp_path_factory.mktemp("benches"))


@cache
def scored(
    name: str, data: Path, answers: tuple[str, ...] | None = None, failed: tuple[int, ...] = ()
) -> tuple[list[Row], dict[str, float], Scripted]:
    """Rows, what lmms-eval printed, and the model."""
    bench = bench_of(name)
    model = Scripted(answers or ANSWERS[bench.name])
    options = argparse.Namespace(output_path=".", process_with_media=False)
    with staged([bench], located([bench], data)):
        output = simple_evaluate(
            model, tasks=[load_task(bench)], task_manager=task_manager(), bootstrap_iters=0, cli_args=options
        )
        rows = collect_rows(
            bench,
            output["samples"][bench.task],
            dict.fromkeys([(bench.task, at) for at in range(len(model.answers))], "picture"),
            len(model.answers),
            failed,
        )
    return rows, printed_metrics(output["results"][bench.task]), model


# Of each bench, by question: what lmms-eval's scoring gave, and which answers it could not read.
EXPECTED: dict[str, tuple[dict[str, float], list[float], list[int]]] = {
    # existence: Yes./no -> both; count: YES, it is/Maybe not (neither yes nor no in its first four letters)
    "mme": (
        {"mme_perception_score": 200 + 50 + 50, "mme_cognition_score": 0, "mme_perception_acc": 100 + 50 + 50},
        [1, 1, 1, 0, 1, 0, 0, 0],
        [3, 5, 6, 7],
    ),
    "pope": (
        {"pope_accuracy": 3 / 9, "pope_precision": 2 / 3, "pope_recall": 2 / 3, "pope_predicted_yes_ratio": 3 / 9},
        [1, 0, 1, 0, 0, 1, 0, 0, 0],
        [3, 4, 6, 7],
    ),
    "gqa": ({"exact_match": 3 / 8}, [1, 0, 1, 0, 0, 0, 1, 0], []),
    "chartqa": ({"relaxed_human_split": 0.5, "relaxed_augmented_split": 0.0}, [1, 0, 1, 0, 0, 0], []),
}


needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="NoCaps is scored with Java, which is not here")
ALL = [pytest.param(name, marks=needs_java) if "java" in bench.requires else name for name, bench in BENCHES.items()]


@pytest.mark.parametrize("name", ALL)
def test_rows_give_back_the_figures_that_lmms_eval_prints(name: str, data: Path) -> None:
    bench = BENCHES[name]
    rows, printed, model = scored(name, data)
    ours = point(bench, rows)
    assert set(bench.headline) <= set(printed)
    for metric in set(ours) & set(printed):
        assert ours[metric] == pytest.approx(printed[metric], abs=1e-9)
    assert checked_metrics(bench, rows, printed) == {**ours, **printed}
    assert [row["answer"] for row in rows] == ANSWERS[name]
    assert sum(row["empty"] for row in rows) == 1
    if name in EXPECTED:
        figures, correct, unparsed = EXPECTED[name]
        assert {metric: ours[metric] for metric in figures} == pytest.approx(figures)
        assert [row["correct"] for row in rows] == correct
        assert [row["index"] for row in rows if row["unparsed"]] == unparsed
    # Each question was asked about its own pictures.
    wanted = [
        [picture.convert("RGB").tobytes() for picture in pictures_of(name, document)] for document in questions_of(name)
    ]
    assert [[picture.tobytes() for picture in shown] for shown in model.shown] == wanted


def pictures_of(name: str, document: dict[str, Any]) -> list[Any]:
    if name == "gqa":
        return [next(row["image"] for row in gqa_images() if row["id"] == document["imageId"])]
    if name == "mmmu":
        return [document[f"image_{n}"] for n in range(1, 8) if document[f"image_{n}"] is not None]
    return [document["image"]]


def test_ocr_tokens_stand_in_the_prompts_of_textvqa_ocr_alone(data: Path) -> None:
    without, with_tokens = (scored(name, data)[2].prompts for name in ("textvqa", "textvqa_ocr"))
    assert without[0] == "What is written 0?\nAnswer the question using a single word or phrase."
    assert with_tokens[0] == without[0].replace("\n", "\nReference OCR token: RED, 1999\n")


def test_mmmu_letters_that_were_drawn_are_marked(data: Path) -> None:
    rows, _, model = scored("mmmu", data)
    # "(a)" is no option, "" and the third name none; open questions are never drawn.
    assert [row["index"] for row in rows if row["unparsed"]] == [1, 3, 4]
    assert [row["correct"] for row in rows if not row["unparsed"]] == [1, 1, 1, 0]
    assert [row["category"] for row in rows] == ["Art", "Art", "Math", "Math", "Math", "Electronics", "Electronics"]
    assert "<image 2>" in model.prompts[1]
    assert "<image 3>" in model.prompts[1]
    # Looking whether one was drawn draws none: what is scored next is scored as without us.
    random.seed(5)
    state = random.getstate()
    sample = {
        "mmmu_acc": {"question_type": "multiple-choice", "answer": "A", "id": "0", "parsed_pred": ["A"]},
        "doc": {"options": "['x', 'y']"},
        "filtered_resps": ["no letter"],
    }
    sample["mmmu_acc"]["subdomain"] = "Art"  # type: ignore[index]
    assert score_samples(BENCHES["mmmu"], [sample])[0].unparsed
    assert random.getstate() == state


@pytest.mark.parametrize("split", [[(0, 6), (31, 58)], [(3, 7)], [(1, 64)], [(1, 3), (2, 3), (7, 9)], [(5, 320)]])
def test_mmmu_rounds_as_lmms_eval_does(split: list[tuple[int, int]]) -> None:
    """Right of asked, by subject: 31 of 64 is a tie of the fifth digit, decided by the order of the sums."""
    from lmms_eval.tasks.mmmu.utils import mmmu_aggregate_results

    asked = [
        (subject, at < right)
        for subject, (right, count) in zip(("Art", "Math", "History"), split, strict=False)
        for at in range(count)
    ]
    entries = [
        {
            "subdomain": subject,
            "question_type": "open",
            "answer": "yes",
            "id": str(at),
            "parsed_pred": [["yes" if good else "no"]],
        }
        for at, (subject, good) in enumerate(asked)
    ]
    rows = [
        {"correct": float(good), "category": subject, "prediction": "", "target": "", "question_id": ""}
        for subject, good in asked
    ]
    assert point(BENCHES["mmmu"], rows)["mmmu_acc"] == pytest.approx(mmmu_aggregate_results(entries), abs=1e-9)


@needs_java
def test_a_line_break_in_a_caption_does_not_move_those_after_it(data: Path) -> None:
    broken = ["A dog\u2028on the\r\x0bgrass", *ANSWERS["nocaps"][1:]]
    expected, _, _ = scored("nocaps", data)
    rows, printed, _ = scored("nocaps", data, tuple(broken))
    assert [row["correct"] for row in rows] == [row["correct"] for row in expected]
    assert printed["nocaps_CIDEr"] == pytest.approx(np.mean([row["correct"] for row in expected]), abs=1e-9)
    assert rows[0]["answer"] == broken[0]
    assert rows[0]["target"].count("\n") == 2


def test_failed_questions_count_as_wrong(data: Path) -> None:
    rows, _, _ = scored("pope", data, failed=(0, 2))
    assert [row["correct"] for row in rows][:4] == [0, 0, 0, 0]
    assert rows[0]["answer"] == rows[2]["prediction"] == ""
    assert point(BENCHES["pope"], rows)["pope_accuracy"] == pytest.approx(1 / 9)


def test_a_task_that_is_not_listed_runs_by_its_name(data: Path, tmp_path: Path) -> None:
    documents = [
        {"question": f"Which {at}?", "options": ["a cat", "a dog"], "answer": str(at % 2), "image": picture(at)}
        for at in range(4)
    ]
    write_repository(tmp_path / "lmms-lab-encoder" / "ai2d", {("default", "test"): documents})
    bench = bench_of("ai2d")
    rows, printed, model = scored("ai2d", tmp_path, ("A", "B.", "b", ""))
    assert [row["correct"] for row in rows] == [1, 1, 0, 0]
    assert point(bench, rows) == {"exact_match": printed["exact_match"]} == {"exact_match": 0.5}
    assert "Answer with the option's letter" in model.prompts[0]
    read_again = recorded_bench("ai2d", {"task": "ai2d", "protocol": {}, "scored_by": list(bench.metrics)})
    assert point(read_again, rows) == point(bench, rows)
