"""Rows of equal source show equal pictures, whatever a task looks at and however its pictures are stored."""

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from encoders.errors import DataError
from eval.answering.pictures import LooksAtMore, Pictures


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def of(rows: list[dict[str, Any]], features: dict[str, Any], show: Callable[[Any], Any]) -> Pictures:
    return Pictures("task", datasets.Dataset.from_list(rows, features=datasets.Features(features)), show, "")


def test_pictures_in_a_list_are_told_apart_by_what_they_show() -> None:
    """datasets hands them out decoded; that two of them lie at one address in turn must not make them one."""
    rows = [{"images": [noise(row // 2)]} for row in range(40)]
    pictures = of(rows, {"images": datasets.List(datasets.Image())}, lambda row: row["images"])
    with pytest.raises(LooksAtMore) as more:
        pictures.read(0)
    more.value.refine()
    sources = [pictures.source(row) for row in range(40)]
    assert len(set(sources)) == 20
    assert sources[::2] == sources[1::2]
    assert sources == [pictures.source(row) for row in range(40)]


def test_a_chunk_read_ahead_does_not_hide_from_the_one_before_it_that_its_sources_are_too_coarse() -> None:
    """As in RefCOCO, where questions on one picture each show another box of it: four questions a chunk."""
    rows = [{"image": noise(row // 4), "left": row} for row in range(8)]
    features = {"image": datasets.Image(), "left": datasets.Value("int64")}
    pictures = of(rows, features, lambda row: [row["image"].crop((row["left"], 0, row["left"] + 8, 8))])
    assert len({pictures.source(row) for row in range(8)}) == 2
    for row in (4, 0):  # two threads; the later chunk's is the quicker
        with pytest.raises(LooksAtMore) as more:
            pictures.read(row)
    more.value.refine()
    assert len({pictures.source(row) for row in range(8)}) == 8
    assert pictures.read(0)[0].size == (8, 8)


def test_a_picture_that_cannot_be_read_costs_only_the_questions_about_it() -> None:
    """As in GQA, whose questions name their pictures: the first row's is damaged, and all rows seemed alike."""
    files = {"good": noise(1)}
    pictures = of(
        [{"name": "bad"}, {"name": "good"}], {"name": datasets.Value("string")}, lambda row: [files[row["name"]]]
    )
    assert pictures.source(0) == pictures.source(1)
    with pytest.raises(LooksAtMore) as more:
        pictures.read(0)
    more.value.refine()
    assert pictures.source(0) != pictures.source(1)
    with pytest.raises(DataError, match="row 0 cannot be read: KeyError: 'bad'"):
        pictures.read(0)
    assert len(pictures.read(1)) == 1
