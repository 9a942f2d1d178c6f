"""Small copies of the benchmarks' datasets in the schemas and layouts of their repositories, with scripted answers.

As on the Hub, a README also lists splits and columns that no task needs; their files are not written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from PIL import Image

OWNER = "lmms-lab-encoder"
Rows = list[dict[str, Any]]


def picture(seed: int) -> Image.Image:
    """Noise of 48 x 40 pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def write_repository(
    folder: Path, tables: Mapping[tuple[str, str], Rows], absent: Mapping[str, str] | None = None
) -> None:
    """A dataset repository: a parquet file per (config, split), and the README that lists them and `absent` ones
    (config -> split)."""
    configs: dict[str, dict[str, Any]] = {}
    infos: dict[str, dict[str, Any]] = {}
    for (config, split), rows in tables.items():
        place = "data" if config == "default" else config
        (folder / place).mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list(rows)
        for column in table.column_names:
            if column.startswith("image") and not isinstance(table.features[column], datasets.Value):
                table = table.cast_column(column, datasets.Image())
        table.to_parquet(folder / place / f"{split}-00000-of-00001.parquet")
        _list(configs, infos, config, split, f"{place}/{split}-*", len(rows))
        infos[config]["features"] = table.features._to_yaml_list()
    for config, split in (absent or {}).items():
        _list(configs, infos, config, split, f"{config}/{split}-*", 10_000)
    front = {"license": "other", "dataset_info": list(infos.values()), "configs": list(configs.values())}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# About\n\n--- \n")


def _list(configs: dict[str, Any], infos: dict[str, Any], config: str, split: str, path: str, rows: int) -> None:
    configs.setdefault(config, {"config_name": config, "data_files": []})["data_files"].append(
        {"split": split, "path": path}
    )
    infos.setdefault(config, {"config_name": config, "splits": []})["splits"].append(
        {"name": split, "num_bytes": 1, "num_examples": rows}
    )


def mme() -> Rows:
    kinds = ["existence", "count", "OCR", "code_reasoning"]
    return [
        {
            "question_id": f"{kinds[pair]}/{pair}.png",
            "image": picture(pair),
            "question": f"Is it {turn}? Please answer yes or no.",
            "answer": ["Yes", "No"][turn],
            "category": kinds[pair],
        }
        for pair in range(4)
        for turn in range(2)
    ]


def pope() -> Rows:
    return [
        {
            "id": str(at),
            "question_id": str(at + 1),
            "question": f"Is there a star {at} in the image?",
            "answer": "yes" if at % 2 == 0 else "no",
            "image_source": f"COCO_{at}",
            "image": picture(at % 3),
            "category": ["adversarial", "popular", "random"][at % 3],
        }
        for at in range(9)
    ]


WORDS = ("red", "Green", "café", "dog", "two", "tree", "it's a car", "10")


def gqa() -> Rows:
    return [
        {"id": f"2{at}", "imageId": f"n{at % 3}", "question": f"What is it {at}?", "answer": word, "isBalanced": True}
        for at, word in enumerate(WORDS)
    ]


def gqa_images() -> Rows:
    return [{"id": f"n{at}", "image": picture(at)} for at in (2, 0, 1)]  # not in the order of the questions


def textvqa() -> Rows:
    return [
        {
            "image_id": f"i{at}",
            "question_id": 34602 + at,
            "question": f"what is written {at}?",
            "image": picture(at % 3),
            "answers": [word] * (2 + at) + ["apple", "the car", "Red"] + ["unanswerable"] * (5 - at),
            "ocr_tokens": [word.upper(), "1999"],
            "set_name": "val",
        }
        for at, word in enumerate(WORDS[:6])
    ]


def mmmu() -> Rows:
    questions = [
        ("validation_Art_1", "Who painted <image 1>?", "['Monet', 'Manet', 'Miro']", "B", 1),
        ("validation_Art_2", "Compare <image 2> with <image 1>.", "['<image 3>', 'neither', '<image 2>']", "A", 3),
        ("validation_Math_1", "What is the area in <image 1>?", "[]", "24", 1),
        ("validation_Math_2", "Which curve is <image 1>?", "['a sine', 'a cosine']", "A", 1),
        ("validation_Math_3", "And <image 1>?", "['a line', 'a bow']", "B", 1),
        ("validation_Electronics_1", "What is shown in <image 1>?", "[]", "a diode", 1),
        ("validation_Electronics_2", "What is the current in <image 1>?", "['1 A', '2 A', '3 A', '4 A']", "D", 1),
    ]
    return [
        {
            "id": name,
            "question": question,
            "options": options,
            "explanation": "",
            **{f"image_{n}": picture(20 + n) if n <= shown else None for n in range(1, 8)},
            "img_type": "['Paintings']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "question_type": "open" if options == "[]" else "multiple-choice",
            "subfield": "of no interest",
        }
        for name, question, options, answer, shown in questions
    ]


def chartqa() -> Rows:
    truth = ["14", "0.57", "Yes", "Café", "[2014, 2016]", "50%"]
    return [
        {
            "type": "human_test" if at < 4 else "augmented_test",
            "question": f"How much {at}?",
            "answer": answer,
            "image": picture(at),
        }
        for at, answer in enumerate(truth)
    ]


def nocaps() -> Rows:
    scenes = ["a dog on the grass", "two red cars in a street", "a café at night", "a tree", "people at a table"]
    return [
        {
            "image": picture(at),
            "image_coco_url": f"https://nocaps.s3.amazonaws.com/{at}.jpg",
            "image_file_name": f"{at}.jpg",
            "image_id": at,
            "annotations_ids": [3 * at, 3 * at + 1, 3 * at + 2],
            "annotations_captions": [f"{scene}.", f"A photo of {scene}", f"There is {scene}, seen from far."],
        }
        for at, scene in enumerate(scenes)
    ]


ANSWERS: dict[str, list[str]] = {
    # right, wrong, odd-cased, empty, prose, not ASCII
    "mme": ["Yes.", "no", "YES, it is", "Maybe not", "y", "", "I think yes", "ÿes ☂"],
    "pope": ["yes", "yes", " YES\n", "", "No.", "no", "yes, there is", "ja ☂", "NO"],
    "gqa": ["Red.", "blue", "CAFÉ", "", "2", "A tree!", "its a car", "ten ☂"],
    "textvqa": ["red", "GREEN!", "café", "", "2", "apple ☂"],
    "mmmu": ["B", "(a)", "The area is 24.", "", "☂ naïve", "It is a Diode", "So the answer is (D). Not (B)"],
    "chartqa": ["14.5", "0.6", "YES", "", "[2014, 2016] ☂", "0.6"],
    "nocaps": ["A dog on the grass", "a purple elephant", "A CAFÉ AT NIGHT!", "", "people, at a ☂ table"],
}
ANSWERS["textvqa_ocr"] = ANSWERS["textvqa"]


def write_benches(folder: Path) -> Path:
    """All of them below a data folder, in which also splits are listed that nobody fetched."""
    home = folder / OWNER
    write_repository(home / "MME", {("default", "test"): mme()})
    write_repository(home / "POPE", {("default", "test"): pope()}, absent={"Full": "adversarial"})
    questions, images = "testdev_balanced_instructions", "testdev_balanced_images"
    write_repository(
        home / "GQA",
        {(questions, "testdev"): gqa(), (images, "testdev"): gqa_images()},
        absent={"train_all_images": "train"},
    )
    write_repository(home / "textvqa", {("default", "validation"): textvqa()}, absent={"default": "train"})
    write_repository(home / "MMMU", {("default", "validation"): mmmu()}, absent={"default": "dev"})
    write_repository(home / "ChartQA", {("default", "test"): chartqa()})
    write_repository(home / "NoCaps", {("default", "validation"): nocaps()}, absent={"default": "test"})
    return folder


def questions_of(bench: str) -> Rows:
    """The questions of a bench."""
    return {
        "mme": mme,
        "pope": pope,
        "gqa": gqa,
        "textvqa": textvqa,
        "textvqa_ocr": textvqa,
        "mmmu": mmmu,
        "chartqa": chartqa,
        "nocaps": nocaps,
    }[bench]()
