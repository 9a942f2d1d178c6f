"""Our metrics against lmms-eval's own scoring and aggregation, on scripted answers and on resampled ones."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from encoders.errors import DataError, UsageError
from eval.benches.benchmarks import BENCHES, bench_of, point, recorded_bench, resolve
from eval.benches.lmms_tasks import read_task
from eval.benches.metrics import MME_PERCEPTION, Columns
from eval.benches.scoring import sample_score

TASKS = Path(str(importlib.util.find_spec("lmms_eval").origin)).parent / "tasks"  # type: ignore[union-attr]
COGNITION = ("code_reasoning", "numerical_calculation", "a category nobody heard of")
POPE_METRICS = ("accuracy", "precision", "recall", "f1_score")


def task_code(name: str) -> ModuleType:
    """A task's utils.py alone: importing the package around it takes seconds."""
    spec = importlib.util.spec_from_file_location(f"lmms_eval_{name}", TASKS / name / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scored(bench: str, docs: list[dict[str, Any]], answers: list[str]) -> list[dict[str, Any]]:
    """Rows of a samples.jsonl, with `correct` from lmms-eval's process_results."""
    code = task_code(bench)
    process = getattr(code, f"{bench}_process_results")
    return [
        {
            **{"question_id": doc["question_id"], "category": doc.get("category", ""), "target": doc["answer"]},
            **{"prediction": answer, "correct": sample_score(BENCHES[bench], process(doc, [answer]))},
            "entries": process(doc, [answer]),
        }
        for doc, answer in zip(docs, answers, strict=True)
    ]


def pope_rows(rng: np.random.Generator, n: int, answers: tuple[str, ...]) -> list[dict[str, Any]]:
    docs = [{"question_id": str(at), "answer": str(rng.choice(["yes", "No "]))} for at in range(n)]
    return scored("pope", docs, [str(rng.choice(answers)) for _ in docs])


def mme_rows(rng: np.random.Generator, pairs: int) -> list[dict[str, Any]]:
    categories = [*MME_PERCEPTION, *COGNITION]
    docs = [
        {"question_id": f"{pair // 2}.png", "category": categories[pair % len(categories)], "answer": answer}
        for pair in range(pairs)
        for answer in ("Yes", "No")
    ]
    return scored("mme", docs, [str(rng.choice(["Yes", "No", "no.", "Yes, it is", "perhaps", ""])) for _ in docs])


@pytest.mark.parametrize("answers", [("Yes", "No", " yes", "Yes.", "", "maybe"), ("no",), ("yes",), ("maybe",)])
def test_pope_equals_lmms_eval(answers: tuple[str, ...]) -> None:
    rows = pope_rows(np.random.default_rng(0), 200, answers)
    ours = point(BENCHES["pope"], rows)
    for name in POPE_METRICS:
        theirs = getattr(task_code("pope"), f"pope_aggregate_{name}")([row["entries"][f"pope_{name}"] for row in rows])
        assert ours[f"pope_{name}"] == pytest.approx(theirs, abs=1e-9)
    said_yes = sum(row["prediction"].lower().strip() == "yes" for row in rows)
    assert ours["pope_predicted_yes_ratio"] == pytest.approx(said_yes / 200)


def test_mme_equals_lmms_eval() -> None:
    rows = mme_rows(np.random.default_rng(1), 130)
    ours = point(BENCHES["mme"], rows)
    total = 0.0
    for name in ("mme_perception_score", "mme_cognition_score"):
        theirs = task_code("mme").mme_aggregate_results(
            [row["entries"][name] for row in rows if name in row["entries"]]
        )
        assert ours[name] == pytest.approx(theirs, abs=1e-9)
        total += theirs
    assert ours["mme_total_score"] == pytest.approx(total, abs=1e-9)
    assert tuple(task_code("mme").eval_type_dict["Perception"]) == MME_PERCEPTION


def test_weights_are_repeated_rows() -> None:
    """A weight of k scores as lmms-eval scores k copies of the question (of the pair, for MME)."""
    rng = np.random.default_rng(2)
    pope, mme = pope_rows(rng, 60, ("yes", "no", "eh")), mme_rows(rng, 39)
    weights = np.stack([rng.integers(0, 4, 60), np.zeros(60, int)]).astype(np.float64)
    for name in POPE_METRICS:
        copies = [
            row["entries"][f"pope_{name}"] for row, k in zip(pope, weights[0], strict=True) for _ in range(int(k))
        ]
        theirs = getattr(task_code("pope"), f"pope_aggregate_{name}")(copies)
        ours = BENCHES["pope"].metrics[f"pope_{name}"](Columns.of(pope), weights)
        assert ours == pytest.approx([theirs, 0.0], abs=1e-9)

    times = rng.integers(0, 3, 39)
    copies = [
        entry | {"question_id": (entry["question_id"], copy)}
        for row, k in zip(mme, np.repeat(times, 2), strict=True)
        for copy in range(k)
        if (entry := row["entries"].get("mme_perception_score"))
    ]
    ours = BENCHES["mme"].metrics["mme_perception_score"](Columns.of(mme), np.repeat(times, 2)[None].astype(np.float64))
    assert ours[0] == pytest.approx(task_code("mme").mme_aggregate_results(copies), abs=1e-9)


def test_mme_of_one_kind_has_no_other_score_and_half_a_pair_is_refused() -> None:
    rows = [row for row in mme_rows(np.random.default_rng(3), 26) if row["category"] == "count"]
    assert all(name.startswith("mme_perception") for name in point(BENCHES["mme"], rows))
    with pytest.raises(DataError, match=r"count/.* has 1"):
        point(BENCHES["mme"], rows[:-1])


def test_mme_acc_and_acc_plus_are_the_parts_of_the_score() -> None:
    rows = mme_rows(np.random.default_rng(4), 130)
    ours = point(BENCHES["mme"], rows)
    for kind in ("perception", "cognition"):
        parts = ours[f"mme_{kind}_acc"] + ours[f"mme_{kind}_acc_plus"]
        assert parts == pytest.approx(ours[f"mme_{kind}_score"])
    existence = [row for row in rows if row["category"] == "existence"]
    right = np.array([row["correct"] for row in existence]).reshape(-1, 2)
    assert point(BENCHES["mme"], existence)["mme_perception_acc"] == pytest.approx(100 * right.mean())
    assert point(BENCHES["mme"], existence)["mme_perception_acc_plus"] == pytest.approx(100 * right.all(axis=1).mean())


@pytest.mark.parametrize("name", BENCHES)
def test_what_we_say_of_the_tasks_is_true(name: str) -> None:
    bench, task = BENCHES[name], read_task(BENCHES[name].task)
    table = bench.tables[0]
    assert task["dataset_path"] == table.repository
    assert task.get("dataset_name", "default") == table.config
    assert task["test_split"] == table.split
    assert task["output_type"] == "generate_until"
    limit = (task.get("generation_kwargs") or {}).get("max_new_tokens")
    if limit != bench.max_new_tokens:
        assert (str(limit) if limit else "no limit") in bench.protocol["max_new_tokens"]
    listed = {entry["metric"] for entry in task["metric_list"]}
    assert set(bench.headline) <= listed & set(bench.metrics)
    # Our metrics are means of a score per question wherever lmms-eval's are, and nowhere else.
    means = {entry["metric"] for entry in task["metric_list"] if entry["aggregation"] == "mean"}
    assert means <= set(bench.metrics)
    kwargs = task.get("lmms_eval_specific_kwargs", {}).get("default", {})
    ours = bench.overrides.get("lmms_eval_specific_kwargs", {}).get("default", kwargs)
    assert {**ours, "ocr": None} == {**kwargs, "ocr": None}
    assert ours.get("ocr", False) == (name == "textvqa_ocr")
    for prompt in (kwargs.get(key) for key in ("post_prompt", "prompt", "multiple_choice_prompt")):
        assert (prompt or "").strip() in bench.protocol["prompt"]


def test_gqa_names_both_tables_that_the_task_reads() -> None:
    images = BENCHES["gqa"].tables[1]
    read = f'load_dataset("{images.repository}", "{images.config}", split="{images.split}", token=True)'
    assert read in (TASKS / "gqa" / "utils.py").read_text()


def test_resolve_lists_the_known_names() -> None:
    assert [bench.name for bench in resolve("pope, mme,pope")] == ["pope", "mme"]
    for names in ("mme,popee", "", ","):
        with pytest.raises(UsageError, match="mme, pope, gqa, textvqa, textvqa_ocr, mmmu, chartqa, nocaps"):
            resolve(names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pope_full", "is a group of lmms-eval's tasks; name those you want: pope_adv, pope_pop, pope_random"),
        ("videomme", "whose questions are a split of a dataset repository on the Hub"),
        ("mmbench_en", "is a group of lmms-eval's tasks|unknown benchmark"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench_of(name)


def test_a_foreign_bench_is_what_its_task_file_says() -> None:
    bench = bench_of("pope_adv")
    assert [(table.repository, table.config, table.split) for table in bench.tables] == [
        ("lmms-lab-encoder/POPE", "Full", "adversarial")
    ]
    assert (bench.max_new_tokens, bench.metrics, bench.questions) == (128, {}, 0)
    assert list(bench_of("ai2d").metrics) == ["exact_match"]
    assert list(bench_of("repcount").metrics) == ["obo"]  # of its errors less is better: not called better for more
    assert recorded_bench("pope", {}) is BENCHES["pope"]
