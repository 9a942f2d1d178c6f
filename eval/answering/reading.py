"""From questions to rounds: pictures read and preprocessed once, prompts built, what questions share told apart.

Runs in threads, ahead of the model.
"""

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from encoders.errors import DataError, ModelError
from eval.answering.chat_model import ChatProcessor
from eval.answering.journal import cannot_write
from eval.answering.pictures import Pictures, picture_id
from eval.answering.prefix import split_prompt
from eval.answering.rounds import Prefix, Round, Row

THUMBNAIL = 256  # pixels
ROUND_BATCHES = 4  # more to sort by length; fewer to lose when a run is killed
T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Question:
    """A question of a task: `place` among all that are asked, `row` of the task's split."""

    place: int
    task: str
    row: int
    text: str
    max_new_tokens: int
    pictures: Pictures
    source: str  # questions of equal source show the same pictures


@dataclass(frozen=True)
class Chunk:
    """Questions that are read together: all on the same pictures are in one chunk."""

    questions: list[Question]

    @cached_property
    def key(self) -> str:
        """Identity of what is asked, found without reading a picture."""
        asked = [[q.task, q.row, q.text, q.max_new_tokens, q.source] for q in self.questions]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Asked:
    """A question in a batch."""

    question: Question
    image_id: str
    prompt_tokens: int


@dataclass(frozen=True)
class Reading:
    """A chunk ready for the model: rounds, who stands where in their batches, and what cannot be asked and why."""

    chunk: Chunk
    rounds: list[tuple[Round, list[list[Asked]]]]
    failed: list[tuple[Question, str, str]]  # image id, reason


def chunks(questions: Sequence[Question], batch_size: int) -> Iterator[Chunk]:
    """Questions of one answer limit, pictures in the order first shown: up to a batch of pictures, and up to four
    batches of questions unless one picture has more."""
    first: dict[str, int] = {}
    for question in questions:
        first.setdefault(question.source, question.place)
    ordered = sorted(questions, key=lambda question: (question.max_new_tokens, first[question.source], question.place))
    for _, alike in groupby(ordered, key=lambda question: question.max_new_tokens):
        waiting: list[Question] = []
        sources = 0
        for _, of_source in groupby(alike, key=lambda question: question.source):
            group = list(of_source)
            if waiting and (sources == batch_size or len(waiting) + len(group) > ROUND_BATCHES * batch_size):
                yield Chunk(waiting)
                waiting, sources = [], 0
            waiting, sources = waiting + group, sources + 1
        yield Chunk(waiting)


@dataclass(frozen=True)
class Reader:
    """Reads chunks for one model."""

    chat: ChatProcessor
    image_tokens: int
    batch_size: int
    thumbnails: Path | None

    def read(self, chunk: Chunk) -> Reading:
        """Everything the model needs to answer a chunk.

        Raises LooksAtMore if questions of one source may show different pictures, ModelError if the processor's
        pictures do not have one size.
        """
        pixels: dict[str, NDArray[np.float32]] = {}
        failed: list[tuple[Question, str, str]] = []
        alike: dict[int, list[tuple[Asked, tuple[str, ...], list[int]]]] = defaultdict(list)  # by number of pictures
        for source, group in groupby(chunk.questions, key=lambda question: question.source):
            questions = list(group)
            try:
                pictures = questions[0].pictures.read(questions[0].row)
            except DataError as error:
                image_id = self._unreadable(source)
                failed += [(question, image_id, str(error)) for question in questions]
                continue
            names = tuple(self._take(picture, pixels) for picture in pictures)
            for question in questions:
                try:
                    ids = self._prompt_ids(question.text, len(names))
                except ModelError as error:
                    failed.append((question, "_".join(names), str(error)))
                else:
                    alike[len(names)].append((Asked(question, "_".join(names), len(ids)), names, ids))
        return Reading(chunk, [self._round(asked, pixels) for _, asked in sorted(alike.items())], failed)

    def _prompt_ids(self, text: str, pictures: int) -> list[int]:
        # As everywhere, a text may itself say where its pictures stand; else they come first.
        marks = 0 < text.count(self.chat.processor.image_token) == pictures
        return self.chat.prompt_ids(self.chat.prompt(text, pictures, marks), self.image_tokens)

    def _take(self, picture: Image.Image, pixels: dict[str, NDArray[np.float32]]) -> str:
        name = picture_id(picture)
        if name not in pixels:
            pixels[name] = self.chat.pixels([picture]).numpy()
            if self.thumbnails is not None:
                save_thumbnail(picture, self.thumbnails / f"{name}.jpg")
        return name

    def _unreadable(self, source: str) -> str:
        name = source[:16]
        if self.thumbnails is not None:
            save_thumbnail(Image.new("RGB", (THUMBNAIL, THUMBNAIL), "grey"), self.thumbnails / f"{name}.jpg")
        return name

    def _round(
        self, asked: list[tuple[Asked, tuple[str, ...], list[int]]], pixels: dict[str, NDArray[np.float32]]
    ) -> tuple[Round, list[list[Asked]]]:
        """All questions of a chunk on the same number of pictures; in batches of like length."""
        pictures = list(dict.fromkeys(name for _, names, _ in asked for name in names))
        shapes = {pixels[name].shape for name in pictures}
        if len(shapes) > 1:
            raise ModelError(f"the image processor gives pictures of different sizes: {sorted(shapes)}")
        prefixes: dict[tuple[tuple[int, ...], tuple[str, ...]], int] = {}
        rows = []
        for one, names, ids in asked:
            prefix, suffix = split_prompt(ids, self.chat.config.image_token_id)
            place = prefixes.setdefault((prefix, names), len(prefixes)) if names else 0
            rows.append((Row(suffix, place), one))
        rows.sort(key=lambda row: (len(row[0].suffix), row[1].question.place))
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return (
            Round(
                pixels=np.concatenate([pixels[name] for name in pictures]) if pictures else None,
                prefixes=[Prefix(ids, tuple(map(pictures.index, names))) for ids, names in prefixes],
                batches=[[row for row, _ in batch] for batch in batches],
                max_new_tokens=asked[0][0].question.max_new_tokens,
            ),
            [[one for _, one in batch] for batch in batches],
        )


def ahead(threads: Executor, function: Callable[[T], S], items: Iterable[T], count: int) -> Iterator[S]:
    """`function` of each item in order, `count` of them worked on ahead."""
    waiting: deque[Future[S]] = deque()
    left = iter(items)
    while True:
        waiting.extend(threads.submit(function, item) for item in islice(left, count - len(waiting)))
        if not waiting:
            return
        yield waiting.popleft().result()


def save_thumbnail(picture: Image.Image, file: Path) -> None:
    """Write a JPEG of at most 256 pixels a side. Raises EvaluationIncomplete if the disk does not take it."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    try:
        small.save(file, quality=85)
    except OSError as error:
        raise cannot_write(file, error) from error
