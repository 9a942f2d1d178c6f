"""The benchmarks: for each, lmms-eval's task, our settings of it, the datasets it reads, its metrics and its protocol.

Two benches of one task with other settings are two benches: their rows never stand in one line of a table. A task that
is not listed here can be named as lmms-eval names it; `foreign_bench` (lmms_tasks.py) reads what its file says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from encoders.errors import UsageError
from eval.benches import metrics
from eval.benches.metrics import Columns, Metric

OWNER = "lmms-lab-encoder"  # of the dataset repositories that lmms-eval's tasks read
ANSWER_LIMIT = 1024  # new tokens where neither the bench nor its task sets a limit, as in lmms-eval's llava_hf


@dataclass(frozen=True)
class Table:
    """Rows that a task reads: one split of one config of a dataset repository, and the columns it needs of it."""

    repository: str
    config: str
    split: str
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bench:
    """One benchmark. `headline` names the metrics a summary leads with; `percent` metrics are fractions of 1.

    `overrides` are laid over the entries of lmms-eval's task file; the task's code stays as it is.
    """

    name: str
    task: str  # lmms-eval's
    max_new_tokens: int
    protocol: Mapping[str, str]  # what makes its numbers comparable to others, or not
    metrics: Mapping[str, Metric]
    headline: tuple[str, ...]
    percent: bool
    questions: int  # in the full-size benchmark; 0: not known
    images: int  # 0: not known
    tables: tuple[Table, ...]  # the questions first
    revision: str = ""  # commit of the dataset that `fetch-benches` takes; "": the newest
    id_column: str | None = None  # None: a question is known by its index
    category_column: str | None = None
    undirected: tuple[str, ...] = ()  # metrics of which neither more nor less is better
    subtasks: bool = False  # the metrics make sense within one category as well
    requires: tuple[str, ...] = ()  # what scoring needs beside Python: "java"
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folders(self) -> tuple[str, ...]:
        """The dataset repositories, which are the folders below a data folder."""
        return tuple(dict.fromkeys(table.repository for table in self.tables))


SHORT_ANSWER = "the question, a line break, Answer the question using a single word or phrase."
TEXTVQA_PROMPT = {"pre_prompt": "", "post_prompt": "\nAnswer the question using a single word or phrase."}
TEXTVQA_COLUMNS = ("image", "question", "question_id", "answers")
TEXTVQA_PROTOCOL = {
    "split": "validation",
    "scoring": "VQA accuracy against ten answers",
    "prompt": SHORT_ANSWER,
    "max_new_tokens": "16 (the task itself sets no limit)",
}


def _textvqa(name: str, ocr: bool, protocol: Mapping[str, str], columns: tuple[str, ...]) -> Bench:
    return Bench(
        name=name,
        task="textvqa_val",
        max_new_tokens=16,
        protocol={**TEXTVQA_PROTOCOL, **protocol},
        metrics={"exact_match": metrics.exact_match},
        headline=("exact_match",),
        percent=True,
        questions=5000,
        images=3166,
        tables=(Table(f"{OWNER}/textvqa", "default", "validation", columns),),
        id_column="question_id",
        overrides={"lmms_eval_specific_kwargs": {"default": {**TEXTVQA_PROMPT, "ocr": ocr}}},
    )


_LISTED = (
    Bench(
        name="mme",
        task="mme",
        max_new_tokens=16,
        protocol={
            "split": "test",
            "scoring": "acc + acc+ per category; an answer counts by its first letters (yes / no)",
            "prompt": SHORT_ANSWER,
        },
        metrics={
            "mme_perception_score": metrics.mme_perception_score,
            "mme_cognition_score": metrics.mme_cognition_score,
            "mme_total_score": metrics.mme_total_score,
            "mme_perception_acc": metrics.mme_score(perception=True, acc_plus=False),
            "mme_perception_acc_plus": metrics.mme_score(perception=True, acc=False),
            "mme_cognition_acc": metrics.mme_score(perception=False, acc_plus=False),
            "mme_cognition_acc_plus": metrics.mme_score(perception=False, acc=False),
        },
        headline=("mme_perception_score", "mme_cognition_score"),
        percent=False,
        questions=2374,
        images=1187,
        tables=(Table(f"{OWNER}/MME", "default", "test", ("image", "question", "answer", "category", "question_id")),),
        revision="d6c9023f017b564f7b3ccccf5348166bce8fdbcd",
        id_column="question_id",
        category_column="category",
        subtasks=True,
    ),
    Bench(
        name="pope",
        task="pope",
        max_new_tokens=16,
        protocol={
            "split": "test (adversarial, popular and random together)",
            "scoring": "the answer must be exactly yes or no; precision, recall and F1 pooled over all questions",
            "prompt": SHORT_ANSWER,
            "max_new_tokens": "16 (the task's own limit is 128)",
        },
        metrics={
            "pope_accuracy": metrics.exact_match,
            "pope_f1_score": metrics.pope_f1_score,
            "pope_precision": metrics.pope_precision,
            "pope_recall": metrics.pope_recall,
            "pope_predicted_yes_ratio": metrics.pope_predicted_yes_ratio,
        },
        headline=("pope_accuracy", "pope_f1_score"),
        percent=True,
        questions=9000,
        images=500,
        tables=(Table(f"{OWNER}/POPE", "default", "test", ("image", "question", "answer", "category", "question_id")),),
        revision="4db1276663dfa5eb8ad16a52d24c31a09e470896",
        id_column="question_id",
        category_column="category",
        undirected=("pope_predicted_yes_ratio",),
        subtasks=True,
    ),
    Bench(
        name="gqa",
        task="gqa",
        max_new_tokens=16,
        protocol={
            "split": "testdev_balanced",
            "scoring": "exact match, case and punctuation ignored",
            "prompt": SHORT_ANSWER,
        },
        metrics={"exact_match": metrics.exact_match},
        headline=("exact_match",),
        percent=True,
        questions=12578,
        images=398,
        tables=(
            Table(f"{OWNER}/GQA", "testdev_balanced_instructions", "testdev", ("id", "imageId", "question", "answer")),
            Table(f"{OWNER}/GQA", "testdev_balanced_images", "testdev", ("id", "image")),
        ),
        id_column="id",
    ),
    _textvqa(
        "textvqa",
        ocr=False,
        protocol={"ocr_tokens": "off (scores with OCR tokens in the prompt are about 12 points higher)"},
        columns=TEXTVQA_COLUMNS,
    ),
    _textvqa(
        "textvqa_ocr",
        ocr=True,
        protocol={
            "prompt": "the question, a line break, Reference OCR token: and the tokens, a line break, Answer the "
            "question using a single word or phrase.",
            "ocr_tokens": "on: the dataset's OCR tokens stand in the prompt, as in LLaVA-1.5's own script",
        },
        columns=(*TEXTVQA_COLUMNS, "ocr_tokens"),
    ),
    Bench(
        name="mmmu",
        task="mmmu_val",
        max_new_tokens=128,
        protocol={
            "split": "validation",
            "scoring": "option letter read from the answer, drawn at random (seed 0) where it names none; open "
            "questions by containment; rounded to five digits",
            "prompt": "all pictures first, then the question with its <image N> marks, options, and Answer with the "
            "option's letter from the given choices directly.",
        },
        metrics={"mmmu_acc": metrics.mmmu_acc},
        headline=("mmmu_acc",),
        percent=True,
        questions=900,
        images=0,  # one to seven a question
        tables=(
            Table(
                f"{OWNER}/MMMU",
                "default",
                "validation",
                ("id", "question", "options", "question_type", "answer", *(f"image_{n}" for n in range(1, 8))),
            ),
        ),
        revision="364f2e2eb107b36e07ff4c5a15f5947a759cef47",
        id_column="id",
        subtasks=True,
    ),
    Bench(
        name="chartqa",
        task="chartqa",
        max_new_tokens=16,
        protocol={
            "split": "test (human and augmented)",
            "scoring": "relaxed: numbers within 5 %, else equal but for case",
            "prompt": "the question, a line break, Answer the question with a single word.",
        },
        metrics={
            "relaxed_overall": metrics.exact_match,
            "relaxed_human_split": metrics.mean_where("human_test"),
            "relaxed_augmented_split": metrics.mean_where("human_test", inside=False),
        },
        headline=("relaxed_overall",),
        percent=True,
        questions=2500,
        images=0,
        tables=(Table(f"{OWNER}/ChartQA", "default", "test", ("image", "question", "answer", "type")),),
        revision="9e63b7df1592a1c2158e735cc1725454aef0d6d9",
        category_column="type",
        subtasks=True,
    ),
    Bench(
        name="nocaps",
        task="nocaps_val",
        max_new_tokens=64,
        protocol={
            "split": "validation",
            "scoring": "CIDEr against ten captions, tokenised by Stanford's PTB tokenizer (Java)",
            "prompt": "Provide a one-sentence caption for the provided image.",
        },
        metrics={"nocaps_CIDEr": metrics.exact_match},
        headline=("nocaps_CIDEr",),
        percent=True,
        questions=4500,
        images=4500,
        tables=(Table(f"{OWNER}/NoCaps", "default", "validation", ("image", "image_id", "annotations_captions")),),
        revision="a26b3fe1e0021164ec430c57c48085d58f2fe922",
        id_column="image_id",
        requires=("java",),
    ),
)
BENCHES: dict[str, Bench] = {bench.name: bench for bench in _LISTED}


def resolve(names: str) -> list[Bench]:
    """The benches named in a comma-separated list, in its order. Raises UsageError listing the known names."""
    wanted = list(dict.fromkeys(name for part in names.split(",") if (name := part.strip())))
    if not wanted:
        raise UsageError(f"no benchmark named; known: {', '.join(BENCHES)}, and every task of lmms-eval by its name")
    return [bench_of(name) for name in wanted]


def bench_of(name: str) -> Bench:
    """The bench of this name, or one made of lmms-eval's task of this name.

    Raises UsageError if there is neither.
    """
    if name in BENCHES:
        return BENCHES[name]
    from eval.benches.lmms_tasks import foreign_bench

    return foreign_bench(name)


def recorded_bench(name: str, entry: Mapping[str, Any]) -> Bench:
    """The bench that an entry of a results.json is about, without asking lmms-eval.

    Of a bench that is not built in, `scored_by` names the metrics that are the mean of `correct`.
    """
    if name in BENCHES:
        return BENCHES[name]
    return Bench(
        name=name,
        task=entry["task"],
        max_new_tokens=0,
        protocol=entry["protocol"],
        metrics=dict.fromkeys(entry["scored_by"], metrics.exact_match),
        headline=tuple(entry["scored_by"]),
        percent=False,
        questions=0,
        images=0,
        tables=(),
    )


def point(bench: Bench, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Every metric of the bench on these rows of a samples.jsonl, except those that no row belongs to."""
    columns = Columns.of(rows)
    ones = np.ones((1, len(rows)))
    scores = {name: float(metric(columns, ones)[0]) for name, metric in bench.metrics.items()}
    return {name: score for name, score in scores.items() if not np.isnan(score)}
