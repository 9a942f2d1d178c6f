"""Label maps of semantic segmentation: how a folder of them is described, and from a map's values to classes.

A folder says what it is in segmentation.json. VOC-20, whose map values 1..20 are the classes:
{"images": "JPEGImages", "labels": "SegmentationClass", "list": "ImageSets/Segmentation/val.txt",
 "classes": "classes.txt", "first_label": 1, "ignore": [0, 255]}
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from encoders.errors import DataError
from eval.zero_shot.scores import IGNORED

FOLDER_FILE = "segmentation.json"
KEYS = {
    "images": "folder of the pictures",
    "labels": "folder of the label maps, png, named like their pictures",
    "classes": "list of names, or a text file with one name a line",
    "first_label": "value of the first class in the maps",
    "ignore": "values that do not count",
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """A segmentation folder: (picture, label map) files, class names, map value -> place in the names or IGNORED."""

    pairs: list[tuple[Path, Path]]
    classes: list[str]
    table: dict[int, int]


def read_layout(folder: Path) -> Layout:
    """Read a folder's segmentation.json and find its files. Raises DataError if it or anything it names is missing."""
    file = folder / FOLDER_FILE
    if not file.is_file():
        told = "; ".join(f"{key}: {what}" for key, what in KEYS.items())
        raise DataError(f"{file} is missing; it describes the set as json: {told}; optional: list: text file of names")
    content = read_json(file)
    if not isinstance(content, dict) or not set(KEYS) <= set(content) <= {*KEYS, "list"}:
        raise DataError(f"{file} must have the keys {', '.join(KEYS)}, may have `list`, and no others")
    classes, first, ignored = content["classes"], content["first_label"], content["ignore"]
    if isinstance(classes, str):
        classes = _lines(folder / classes)
    classes = check_names(classes, file)
    if not isinstance(first, int) or not isinstance(ignored, list) or not all(isinstance(v, int) for v in ignored):
        raise DataError(f"{file}: first_label must be a whole number and ignore a list of them")
    table = {first + place: place for place in range(len(classes))} | dict.fromkeys(ignored, IGNORED)
    return Layout(_pairs(folder, content), classes, table)


def _pairs(folder: Path, content: Mapping[str, Any]) -> list[tuple[Path, Path]]:
    images, labels = folder / content["images"], folder / content["labels"]
    for part in (images, labels):
        if not part.is_dir():
            raise DataError(f"{part} is missing, which {folder / FOLDER_FILE} names")
    names = (
        _lines(folder / content["list"]) if "list" in content else sorted(path.stem for path in labels.glob("*.png"))
    )
    pictures = {path.stem: path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    for name in names:
        if name not in pictures:
            raise DataError(f"{images} has no picture for {name}; an evaluation set must be whole")
        if not (labels / f"{name}.png").is_file():
            raise DataError(f"{labels / f'{name}.png'} is missing; an evaluation set must be whole")
    return [(pictures[name], labels / f"{name}.png") for name in names]


def read_labels(read: Callable[[], bytes], table: Mapping[int, int], name: str) -> Labels:
    """A png of one value a pixel (grey or palette) -> places in the class list, (h,w) int64.

    Raises DataError if it does not decode, holds colours, or has a value that `table` lacks.
    """
    try:
        values = np.asarray(Image.open(io.BytesIO(read())))
    except (OSError, SyntaxError) as error:  # SyntaxError is Pillow's for a broken png
        raise DataError(f"{name}: the label map does not decode ({error}); fetch it again") from error
    if values.ndim != 2:
        raise DataError(
            f"{name}: the label map has {values.shape} values; it must hold one class number a pixel, no colours"
        )
    found = [int(value) for value in np.unique(values)]
    unknown = [value for value in found if value not in table]
    if unknown:
        raise DataError(
            f"{name}: the label map has the values {unknown[:5]}, beyond the {len(set(table.values()) - {IGNORED})} "
            "classes and what is ignored; correct classes, first_label or ignore"
        )
    lookup = np.zeros(max(found) + 1, dtype=np.int64)
    for value in found:
        lookup[value] = table[value]
    return lookup[values]


def read_json(file: Path) -> Any:
    """The content of a json file. Raises DataError if it is missing or is not json."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as json ({error})") from error


def check_names(names: Any, file: Path) -> list[str]:
    """Class names as a list of texts. Raises DataError otherwise."""
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"{file}: the classes must be a list of names, none empty")
    return names


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error})") from error
