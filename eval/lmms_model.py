"""Our lmms-eval model: questions grouped by picture, each picture encoded once, no failure turned into an answer.

`eval-mllm` builds it; plain lmms-eval finds it by the entry point in lmms_plugin.py:
`python -m lmms_eval --model encoder_swap_llava --model_args pretrained=DIR,dtype=float32 --batch_size 32 ...`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from encoders.errors import DataError, EvaluationIncomplete, SwapError, UsageError
from eval.chat_model import ChatModel

THUMBNAIL = 256  # pixels


@dataclass(frozen=True)
class Question:
    """A request of lmms-eval, with the identity of its picture."""

    place: int  # among the requests
    request: Instance
    task: str
    row: int  # of the task's split
    text: str
    image_id: str
    max_new_tokens: int


class EncoderSwapLlava(lmms):
    """A LLaVA folder behind lmms-eval's interface, for tasks that ask about one picture and decode greedily.

    An answer ends at `max_new_tokens` or at the task's own limit, whichever is smaller. `image_ids` maps (task, row)
    to the picture's id; with `thumbnails` a small JPEG of every picture is written there as `<image_id>.jpg`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 32,
        device: str = "auto",
        dtype: str = "auto",
        max_new_tokens: int = 1024,
        thumbnails: str | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = int(batch_size)
        # lmms-eval deletes every torch module it finds in our attributes after a run; ChatModel is none.
        self.chat = ChatModel(Path(pretrained), device, dtype)
        self.max_new_tokens = max_new_tokens
        self.thumbnails = Path(thumbnails) if thumbnails is not None else None
        self.image_ids: dict[tuple[str, int], str] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer per request, in their order. Raises EvaluationIncomplete naming the first question of a batch
        that could not be answered, DataError naming a question whose picture cannot be read."""
        with Progress(*COLUMNS) as progress:
            reading = progress.add_task("reading pictures", total=len(requests))
            questions = []
            for place, request in enumerate(requests):
                questions.append(self._question(place, request))
                progress.advance(reading)
            answers: dict[int, str] = {}
            names = ", ".join(dict.fromkeys(question.task for question in questions))
            asking = progress.add_task(f"{names}: answering", total=len(requests))
            features: dict[str, Tensor] = {}  # of the pictures of one batch
            for batch in batches(questions, self.batch_size):
                try:
                    features = self._features(batch, features)
                    answers |= self._answers(batch, features)
                except SwapError:
                    raise
                except Exception as error:
                    first = batch[0]
                    raise EvaluationIncomplete(
                        f"{first.task}: no answers to {len(batch)} questions from row {first.row} on "
                        f"({first.text!r}, picture {first.image_id}): {type(error).__name__}: {error}"
                    ) from error
                progress.advance(asking, len(batch))
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: the tasks this model is for are scored by what it says."""
        raise NotImplementedError("encoder_swap_llava answers generate_until tasks only")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: one question, one answer."""
        raise NotImplementedError("encoder_swap_llava answers single-round tasks only")

    def _question(self, place: int, request: Instance) -> Question:
        text, settings, _, row, task, _ = request.args
        if settings.get("do_sample", False) or settings.get("num_beams", 1) != 1:
            raise UsageError(f"{task} asks for sampling or beams; encoder_swap_llava decodes greedily only")
        image_id = picture_id(self._picture(request))
        self.image_ids[task, row] = image_id
        limit = min(self.max_new_tokens, settings.get("max_new_tokens", self.max_new_tokens))
        return Question(place, request, task, row, text, image_id, limit)

    def _picture(self, request: Instance) -> Image.Image:
        """The RGB picture of a request. Pictures are read when needed: thousands of them do not fit in memory."""
        _, _, doc_to_visual, row, task, split = request.args
        try:
            pictures = doc_to_visual(self.task_dict[task][split][row])
        except OSError as error:
            raise DataError(f"{task}: the picture of row {row} ({split}) cannot be read: {error}") from error
        if len(pictures) != 1 or not isinstance(pictures[0], Image.Image):
            raise UsageError(
                f"{task}: row {row} ({split}) does not show exactly one picture, which is all LLaVA-1.5 takes"
            )
        picture: Image.Image = pictures[0]
        return picture.convert("RGB")

    def _features(self, batch: Sequence[Question], known: dict[str, Tensor]) -> dict[str, Tensor]:
        """Image features of the batch by image id; a batch starts with the picture the one before ended with."""
        wanted = {question.image_id: question.request for question in batch}
        pictures = {name: self._picture(request) for name, request in wanted.items() if name not in known}
        if self.thumbnails is not None:
            for name, picture in pictures.items():
                save_thumbnail(picture, self.thumbnails / f"{name}.jpg")
        new = self.chat.encode(list(pictures.values())) if pictures else []
        found = known | dict(zip(pictures, new, strict=True))
        return {name: found[name] for name in wanted}

    def _answers(self, batch: Sequence[Question], features: dict[str, Tensor]) -> dict[int, str]:
        texts = self.chat.answer(
            [self.chat.prompt(question.text) for question in batch],
            [features[question.image_id] for question in batch],
            batch[0].max_new_tokens,
        )
        return {question.place: text for question, text in zip(batch, texts, strict=True)}


COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Batches of questions of one answer limit, the questions on one picture next to each other."""
    first_shown: dict[str, int] = {}
    for question in questions:
        first_shown.setdefault(question.image_id, question.place)
    ordered = sorted(questions, key=lambda question: (question.max_new_tokens, first_shown[question.image_id]))
    for _, alike in groupby(ordered, key=lambda question: question.max_new_tokens):
        group = list(alike)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def picture_id(picture: Image.Image) -> str:
    """Identity of a picture: of its size and its pixels, whatever file they came in."""
    digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()[:16]


def save_thumbnail(picture: Image.Image, file: Path) -> None:
    """Write a JPEG of at most 256 pixels a side."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, quality=85)
