"""Our metrics against lmms-eval's own scoring and aggregation, on scripted answers and on resampled ones."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from encoders.errors import DataError, UsageError
from eval.benchmarks import BENCHES, MME_PERCEPTION, Columns, point, resolve, sample_score

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
    assert set(point(BENCHES["mme"], rows)) == {"mme_perception_score"}
    with pytest.raises(DataError, match=r"count/.* has 1"):
        point(BENCHES["mme"], rows[:-1])


@pytest.mark.parametrize(
    ("bench", "file", "limit"),
    [
        ("mme", "mme/mme.yaml", "max_new_tokens: 16"),
        ("pope", "pope/pope.yaml", "max_new_tokens: 128"),
        ("gqa", "gqa/gqa.yaml", "max_new_tokens: 16"),
        ("textvqa", "textvqa/_default_template_textvqa_yaml", None),
    ],
)
def test_what_we_say_of_the_tasks_is_true(bench: str, file: str, limit: str | None) -> None:
    text = (TASKS / file).read_text()
    assert f"dataset_path: {BENCHES[bench].folders[0]}\n" in text
    assert limit in text if limit else "max_new_tokens" not in text
    if "exact_match" in BENCHES[bench].metrics:
        everything = text + (TASKS / "textvqa/textvqa_val.yaml").read_text()
        assert "metric: exact_match\n    aggregation: mean" in everything
        rows = [{"correct": c, "prediction": "", "target": "", "category": "", "question_id": 0} for c in (0.9, 0.3, 0)]
        assert point(BENCHES[bench], rows) == {"exact_match": pytest.approx(0.4)}


def test_resolve_lists_the_known_names() -> None:
    assert [bench.name for bench in resolve("pope, mme,pope")] == ["pope", "mme"]
    for names in ("mme,popee", "", ","):
        with pytest.raises(UsageError, match="mme, pope, gqa, textvqa"):
            resolve(names)
