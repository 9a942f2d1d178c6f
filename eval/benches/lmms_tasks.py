"""lmms-eval's tasks: what their files say, read without importing lmms-eval (which takes 10 seconds), and loading them.

A task runs with lmms-eval's own code for prompts and scoring. Only entries of its config are laid over: those a bench
names, one metric and a filter for NoCaps, and for GQA pictures that are looked up, not copied into every question.
"""

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from encoders.errors import DataError, UsageError
from eval.benches.benchmarks import ANSWER_LIMIT, BENCHES, Bench, Table
from eval.benches.metrics import exact_match

if TYPE_CHECKING:
    from datasets import Dataset
    from lmms_eval.api.task import Task
    from lmms_eval.tasks import TaskManager
    from PIL import Image

INSTALL = "lmms-eval is not installed; install it: pip install 'encoder-swap[eval]'"
FUNCTION = "!function"


def tasks_folder() -> Path:
    """Where lmms-eval keeps its task files. Raises UsageError if it is not installed."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise UsageError(INSTALL)
    return Path(spec.origin).parent / "tasks"


def read_task(name: str) -> dict[str, Any]:
    """The entries of the task file that names this task, with what it includes; functions stay text.

    Raises UsageError if no file does, or if the name is that of a group of tasks.
    """
    line = re.compile(rf"^task\s*:\s*['\"]?{re.escape(name)}['\"]?\s*(#.*)?$", re.MULTILINE)
    group = re.compile(rf"^group\s*:\s*['\"]?{re.escape(name)}['\"]?\s*(#.*)?$", re.MULTILINE)
    for file in sorted(tasks_folder().rglob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if name in text and line.search(text):
            return _read(file)
        if name in text and group.search(text) and isinstance(tasks := _read(file).get("task"), list):
            members = ", ".join(task for task in tasks if isinstance(task, str))
            raise UsageError(f"{name} is a group of lmms-eval's tasks; name those you want: {members}")
    raise UsageError(
        f"unknown benchmark {name!r}; known: {', '.join(BENCHES)}, and every task of lmms-eval by its name "
        "(python -m lmms_eval --tasks list)"
    )


def foreign_bench(name: str) -> Bench:
    """A bench made of what lmms-eval's task file says.

    Its metric is the first that is the plain mean of a score per question; others are printed but not compared.
    Raises UsageError for a task that does not answer in text or whose rows are not one split of a dataset on the Hub.
    """
    task = read_task(name)
    split = task.get("test_split") or task.get("validation_split")
    repository, settings = str(task.get("dataset_path", "")), task.get("dataset_kwargs") or {}
    kind = task.get("output_type")
    if kind != "generate_until":
        raise UsageError(f"{name} is a task of the kind {kind}; eval-mllm answers generate_until tasks only")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or not isinstance(split, str) or settings.get("video"):
        raise UsageError(
            f"{name} reads {repository or 'no dataset'} ({split or 'no split'}); eval-mllm runs tasks whose questions "
            "are a split of a dataset repository on the Hub, with pictures in it"
        )
    filters = task.get("filter_list") or []
    if len(filters) > 1:
        raise UsageError(
            f"{name} scores each answer in {len(filters)} ways (filter_list); eval-mllm takes one at a time"
        )
    means = [
        str(entry["metric"])
        for entry in task.get("metric_list", [])
        if entry.get("aggregation") == "mean" and entry.get("higher_is_better", True)  # more is called better
    ]
    limit = (task.get("generation_kwargs") or {}).get("max_new_tokens", ANSWER_LIMIT)
    return Bench(
        name=name,
        task=name,
        max_new_tokens=int(limit),
        protocol={"split": split.strip(), "scoring": "as lmms-eval's task of this name"},
        metrics=dict.fromkeys(means[:1], exact_match),
        headline=tuple(means[:1]),
        percent=False,
        questions=0,
        images=0,
        tables=(Table(repository, str(task.get("dataset_name") or ""), split.strip()),),
    )


def load_task(bench: Bench) -> "Task":
    """lmms-eval's task with its questions, read from the working directory (`staged`).

    Raises DataError if they cannot be loaded.
    """
    manager = task_manager()
    from lmms_eval.tasks import get_task_dict

    config = {"task": bench.task, **bench.overrides}
    try:
        if bench.task == "gqa":
            config |= {"process_docs": None, "doc_to_visual": gqa_pictures(bench)}
        elif bench.task == "nocaps_val":
            config |= nocaps_config()
        (task,) = get_task_dict([config], manager, "simple").values()
    except Exception as error:
        raise DataError(
            f"{bench.name}: cannot load {', '.join(bench.folders)} for lmms-eval's task {bench.task!r} "
            f"({cause(error)}); check the files, or name a folder that has them with --data"
        ) from error
    return task


@dataclass(frozen=True)
class PicturesById:
    """Stands in for GQA's doc_to_visual: the picture that a question names.

    The task's own way copies each picture as PNG into all its questions first: 14 minutes of a CPU and gigabytes.
    """

    images: "Dataset"
    row: dict[str, int]

    def __call__(self, doc: dict[str, Any]) -> "list[Image.Image]":
        """The one picture of a question, in RGB."""
        return [self.images[self.row[doc["imageId"]]]["image"].convert("RGB")]


def nocaps_config() -> dict[str, Any]:
    """CIDEr alone of the task's seven metrics (the others would start Java twelve times more), on one-line captions."""
    from lmms_eval.tasks.nocaps.utils import nocaps_cider

    from eval.benches.one_line import OneLine

    return {
        "metric_list": [{"metric": "nocaps_CIDEr", "aggregation": nocaps_cider, "higher_is_better": True}],
        "filter_list": [{"name": "none", "filter": [{"function": OneLine}, {"function": "take_first"}]}],
    }


def gqa_pictures(bench: Bench) -> PicturesById:
    """The pictures of GQA's second table."""
    from datasets import load_dataset

    table = bench.tables[1]
    images = load_dataset(table.repository, table.config, split=table.split)
    return PicturesById(images, {name: row for row, name in enumerate(images["id"])})


@cache
def task_manager() -> "TaskManager":
    """lmms-eval's index of its tasks; building it takes seconds."""
    import lmms_eval.models  # noqa: F401 (sets up lmms-eval's logging; else scanning the tasks floods stderr)
    from lmms_eval.tasks import TaskManager

    return TaskManager("WARNING", model_name="encoder_swap_llava")


def _read(file: Path) -> dict[str, Any]:
    """A task file over the files it includes, the first of which counts most."""
    entries = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    included = entries.pop("include", [])
    merged: dict[str, Any] = {}
    for name in reversed([included] if isinstance(included, str) else included):
        merged |= _read(file.parent / name)
    return merged | entries


class _Loader(yaml.SafeLoader):
    """Reads `!function utils.f` as text."""


_Loader.add_constructor(FUNCTION, lambda loader, node: f"{FUNCTION} {node.value}")


def cause(error: BaseException) -> str:
    """What went wrong inside lmms-eval, in words: it retries some steps and then says only that it did."""
    from tenacity import RetryError

    inner = error.last_attempt.exception() if isinstance(error, RetryError) else None
    told = error if inner is None else inner
    return f"{type(told).__name__}: {told}"
