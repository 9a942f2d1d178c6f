"""Small results folders as eval-mllm leaves them, for the tests of compare-runs."""

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from encoders import manifest
from eval.benches.benchmarks import BENCHES, point

Row = dict[str, Any]
SETTINGS: Row = {
    "eval": {"dtype": "bfloat16", "limit": None, "allow_errors": False},
    "model": {"llm": "tiny", "encoder": {"objective": "clip", "fingerprint": "0a", "path": "nowhere"}},
    "data": {"pope": "d0"},
    "versions": {"lmms-eval": "0.7.3", "torch": "2.14.1"},
}
COST = {
    "seconds_encode": 1.0,
    "seconds_answer": 2.0,
    "seconds_score": 0.5,
    "prompt_tokens": 7000,
    "new_tokens": 240,
    "answers_reused": 0,
    "peak_memory_bytes": 2**30,
    "pictures": 30,
}
SPLITS = ("adversarial", "popular", "random")


def pope_rows(images: int, per_image: int, right: Callable[[int, int], bool], **extra: Any) -> list[Row]:
    """Yes/no questions in turn, of the three splits in turn, answered as `right(image, question)` says."""
    rows = []
    for index in range(images * per_image):
        image, question = divmod(index, per_image)
        target = ("yes", "no")[index % 2]
        correct = right(image, question)
        prediction = target if correct else {"yes": "no", "no": "yes"}[target]
        rows.append(
            {
                "bench": "pope",
                "index": index,
                "question_id": str(index),
                "image_id": f"{image:04x}",
                "category": SPLITS[question % 3],
                "prompt": f"Is there a cat in picture {image}?\nAnswer the question using a single word or phrase.",
                "answer": prediction.title(),
                "prediction": prediction,
                "target": target,
                "correct": float(correct),
                "empty": False,
                "unparsed": False,
            }
            | extra
        )
    return rows


def mme_rows(sizes: dict[str, int], right: Callable[[str, int, int], bool]) -> list[Row]:
    """Categories of so many pictures each, two questions a picture, answered as `right(category, picture, 0 | 1)`."""
    rows: list[Row] = []
    for category, pictures in sizes.items():
        for picture in range(pictures):
            for question in range(2):
                target = ("Yes", "No")[question]
                correct = right(category, picture, question)
                prediction = target.lower() if correct else {"Yes": "no", "No": "yes"}[target]
                rows.append(
                    {
                        "bench": "mme",
                        "index": len(rows),
                        "question_id": f"{category}/{picture}",
                        "image_id": f"{category.replace('_', '')}{picture}",
                        "category": category,
                        "prompt": f"Is this right? {question}",
                        "answer": prediction,
                        "prediction": prediction,
                        "target": target,
                        "correct": float(correct),
                        "empty": False,
                        "unparsed": False,
                    }
                )
    return rows


def write_results(
    path: Path,
    rows: list[Row],
    settings: Row | None = None,
    encoder: str = "0a",
    failed: tuple[int, ...] = (),
    **entry: Any,
) -> Path:
    """A results folder; `entry` replaces what results.json says of its benchmarks."""
    benches = {}
    for name in dict.fromkeys(row["bench"] for row in rows):
        of_bench = [row for row in rows if row["bench"] == name]
        benches[name] = {
            "task": BENCHES[name].task,
            "metrics": point(BENCHES[name], of_bench) | {"printed_only": 0.25},
            "questions": len(of_bench),
            "images": len({row["image_id"] for row in of_bench}),
            "answered": len(of_bench),
            "empty": 0,
            "unparsed": 0,
            "failed": [{"index": index, "question_id": str(index), "reason": "it broke"} for index in failed],
            "protocol": {"max_new_tokens": 16},
            "dataset": "local d0",
            "cost": COST,
        } | entry
    results = {
        "model": {"path": str(path.parent / "llava"), "fingerprint": f"{path.name:0<12}{encoder}"},
        "encoder": {
            "fingerprint": encoder * 32,
            "vision_config": {"image_size": 96},
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        "settings": settings or SETTINGS,
        "benches": benches,
    }
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(results))
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "images").mkdir()
    for image_id in {row["image_id"] for row in rows}:
        (path / "images" / f"{image_id}.jpg").write_bytes(picture())
    manifest.seal(path, "results", {})
    return path


@cache
def picture() -> bytes:
    """A JPEG thumbnail."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(content, "JPEG")
    return content.getvalue()


def changed(**parts: Row) -> Row:
    """The common settings with some of them replaced: changed(eval={"dtype": "float32"})."""
    settings: Row = json.loads(json.dumps(SETTINGS))
    for name, part in parts.items():
        settings[name] |= part
    return settings


def two_runs(folder: Path, images: int = 60) -> tuple[Path, Path]:
    """A bad run and a good one on the same pictures with 6 questions each."""
    rng = np.random.default_rng(0)
    skill = rng.random((2, images, 6)) < np.array([0.5, 0.9])[:, None, None]
    tables = [
        pope_rows(images, 6, lambda image, question, of=run: bool(skill[of, image, question])) for run in range(2)
    ]
    return write_results(folder / "a", tables[0]), write_results(folder / "b", tables[1], encoder="0b")


def rewrite(path: Path, change: Callable[[list[Row]], list[Row]]) -> None:
    """Replace the answers of a results folder and seal it again."""
    rows = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    manifest.seal(path, "results", {})
