"""Benchmark tables as lmms-eval's own pope, mme, gqa and textvqa_val tasks read them.

Each function turns scenes into rows, keyed by (config, split) of the data set. A row's "image" holds the number of its
scene; the writer puts the encoded picture in its place.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

from encoders.data.scenes import captions, questions
from encoders.data.scenes.world import Scene, World

Row = dict[str, Any]
Tables = dict[tuple[str, str], list[Row]]  # (config, split) -> rows

POPE_CATEGORIES = ("random", "popular", "adversarial")
POPE_POOL = 5  # "popular" and "adversarial" draw from this many of the likeliest absent classes
MME_END = " Please answer yes or no."
GQA_PER_IMAGE = 3
TEXTVQA_ANSWERS = 10


def bench_scenes(world: World, bench: str, count: int) -> list[Scene]:
    """The first `count` scenes of a benchmark's own stream; for TextVQA the first with a printed word."""
    scenes: list[Scene] = []
    index = 0
    while len(scenes) < count:
        scene = world.scene(bench, index)
        if bench != "textvqa" or scene.word is not None:
            scenes.append(scene)
        index += 1
    return scenes


def pope(scenes: Sequence[Scene], rng: random.Random, names: Sequence[str]) -> Tables:
    """Six questions an image: in each category one class that is there and one that is not."""
    frequent = Counter(name for scene in scenes for name in scene.counts)
    together = Counter(pair for scene in scenes for pair in permutations(scene.counts, 2))
    rows: list[Row] = []
    for number, scene in enumerate(scenes):
        there = rng.sample(list(scene.counts), len(scene.counts))
        missing = rng.sample([name for name in names if name not in scene.counts], len(names) - len(there))
        beside = {name: sum(together[shown, name] for shown in there) for name in missing}
        for turn, category in enumerate(POPE_CATEGORIES):
            likeliest = {
                "random": missing,
                "popular": sorted(missing, key=lambda name: -frequent[name])[:POPE_POOL],
                "adversarial": sorted(missing, key=lambda name: -beside[name])[:POPE_POOL],
            }[category]
            wrong = rng.choice(likeliest)
            missing.remove(wrong)
            for name, answer in ((there[turn % len(there)], "yes"), (wrong, "no")):
                rows.append(
                    {
                        "id": str(len(rows)),
                        "question_id": str(len(rows) + 1),
                        "question": questions.presence(name, answer).text,
                        "answer": answer,
                        "image_source": scene.key,
                        "image": number,
                        "category": category,
                    }
                )
    full = {("Full", category): [row for row in rows if row["category"] == category] for category in POPE_CATEGORIES}
    return {("default", "test"): rows, **full}


def mme(scenes: Sequence[Scene], rng: random.Random, names: Sequence[str]) -> Tables:
    """For each category that fits an image one question to answer with yes and one with no."""
    rows: list[Row] = []
    for number, scene in enumerate(scenes):
        for category, pair in questions.yes_no_questions(scene, rng, names).items():
            for question in pair:
                rows.append(
                    {
                        "question_id": f"{category}/{scene.key}.jpg",
                        "image": number,
                        "question": question.text + MME_END,
                        "answer": question.answer.capitalize(),
                        "category": category,
                    }
                )
    return {("default", "test"): rows}


def gqa(scenes: Sequence[Scene], rng: random.Random, names: Sequence[str]) -> Tables:
    """Three questions an image: the background, and two of counts, places, sizes and relations."""
    instructions: list[Row] = []
    for scene in scenes:
        background, *others = questions.open_questions(scene, rng)
        for question in (background, *rng.sample(others, GQA_PER_IMAGE - 1)):
            instructions.append(
                {
                    "id": f"{len(instructions):08d}",
                    "imageId": scene.key,
                    "question": question.text,
                    "isBalanced": True,
                    "answer": question.answer,
                    "fullAnswer": captions.short(scene),
                }
            )
    images = [{"id": scene.key, "image": number} for number, scene in enumerate(scenes)]
    return {
        ("testdev_balanced_instructions", "testdev"): instructions,
        ("testdev_balanced_images", "testdev"): images,
    }


def textvqa(scenes: Sequence[Scene], rng: random.Random, names: Sequence[str]) -> Tables:
    """Two questions an image, each with ten equal answers; every scene has a printed word."""
    rows: list[Row] = []
    for number, scene in enumerate(scenes):
        assert scene.word is not None
        for text in questions.WORD_QUESTIONS:
            rows.append(
                {
                    "image_id": scene.key,
                    "question_id": len(rows),
                    "question": text.lower(),
                    "image": number,
                    "answers": [scene.word] * TEXTVQA_ANSWERS,
                    "ocr_tokens": [scene.word.upper()],
                    "set_name": "val",
                }
            )
    return {("default", "validation"): rows}


# Folder of the data set (and stream of its scenes) -> the function that writes its tables.
BENCHES: dict[str, Callable[[Sequence[Scene], random.Random, Sequence[str]], Tables]] = {
    "POPE": pope,
    "MME": mme,
    "GQA": gqa,
    "textvqa": textvqa,
}
