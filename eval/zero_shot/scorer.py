"""Scores an encoder on evaluation sets: reads pictures in threads, encodes them with the run's own preprocessing, and
leaves the figures to `scores`. For the command `eval-encoder` and, through `open_sets`, for a training loop.

Shapes: B batch, W windows, N patches, C classes, T templates, E joint embedding.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, TypeVar

import torch
from torch import Tensor

from encoders.config import PreprocessConfig
from encoders.data.tokenizers import CaptionTokenizer, pad_texts
from encoders.data.transforms import decode, eval_transform
from encoders.dual_encoder import DualEncoder
from encoders.errors import DataError, UsageError
from eval.zero_shot.labels import Labels
from eval.zero_shot.prompts import DEFAULT_SET, Template, templates
from eval.zero_shot.scores import (
    accuracies,
    chance_miou,
    chance_r1,
    class_embeddings,
    confusion,
    mean_iou,
    recalls,
    retrieval_ranks,
    segment,
)
from eval.zero_shot.sets import ClassificationData, Example, RetrievalData, SegmentationData, SetData, read_set
from eval.zero_shot.spec import ZeroShotSpec

READERS = min(8, os.cpu_count() or 1)  # threads that decode
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class ZeroShotSet:
    """An evaluation set that is open: every file it names was found."""

    spec: ZeroShotSpec
    data: SetData
    prompts: list[Template]

    @property
    def name(self) -> str:
        """The set's name in results."""
        return self.spec.label

    @property
    def sizes(self) -> dict[str, int]:
        """Pictures, and captions or classes."""
        pictures = {"pictures": len(self.data.examples)}
        if isinstance(self.data, RetrievalData):
            return pictures | {"captions": sum(len(example.answer) for example in self.data.examples)}
        return pictures | {"classes": len(self.data.classes)}

    @property
    def protocol(self) -> str:
        """What a reader must know before setting the figures beside published ones."""
        prompts = f"prompts {self.spec.templates or DEFAULT_SET}, averaged per class"
        match self.data:
            case RetrievalData(shared=True):
                return "hits are all captions that read like one of the picture's own"
            case RetrievalData():
                return "hits are the picture's own captions"
            case ClassificationData():
                return prompts
            case SegmentationData():
                return f"{prompts}; each pixel takes the class nearest to its patches, nothing is trained for it"

    @torch.no_grad()
    def score(
        self, model: DualEncoder, tokenizer: CaptionTokenizer, device: torch.device, batch_size: int
    ) -> dict[str, float]:
        """The figures of a model that is on `device`, fractions of 1, with those of guessing as chance_*.

        Retrieval: i2t_r1 ... t2i_r10. Classification: top1, top5, class_mean. Segmentation: miou, pixel_accuracy.
        Raises DataError for a picture or label map that does not decode, ModelError for features that are not finite.
        """
        training = model.training
        model.eval()
        try:
            encoder = _Encoder(model, tokenizer, device, batch_size)
            match self.data:
                case RetrievalData():
                    return _score_retrieval(self.data, encoder)
                case ClassificationData():
                    return _score_classification(self.data, self.prompts, encoder)
                case SegmentationData():
                    return _score_segmentation(self.data, self.prompts, encoder)
        finally:
            model.train(training)


def open_sets(specs: Sequence[ZeroShotSpec]) -> list[ZeroShotSet]:
    """Open evaluation sets, so that what is wrong with one shows before a model is loaded or trained.

    Raises DataError if a set is missing or malformed, UsageError if two sets of a task have one name or a package that
    is needed is not installed.
    """
    for (task, name), count in Counter((spec.task, spec.label) for spec in specs).items():
        if count > 1:
            raise UsageError(f"{count} {task} sets are called {name!r}; give each a name of its own with name=...")
    return [
        ZeroShotSet(spec, _limited(read_set(spec), spec.limit), templates(spec.templates or DEFAULT_SET))
        for spec in specs
    ]


def _limited(data: SetData, limit: int | None) -> SetData:
    """`limit` examples spread evenly: class folders come one after another, so the first ones show one class."""
    total = len(data.examples)
    if limit is None or limit >= total:
        return data
    return replace(data, examples=[data.examples[place * total // limit] for place in range(limit)])  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Encoder:
    """A model with what it takes to give it pictures and texts. Embeddings come back in float32 on the CPU."""

    model: DualEncoder
    tokenizer: CaptionTokenizer
    device: torch.device
    batch_size: int

    def images(self, examples: Sequence[Example[Any]]) -> Tensor:
        """Centre crops, (n,E)."""
        config = self.model.config

        def load(example: Example[Any]) -> Tensor:
            return eval_transform(picture(example), config.vision.image_size, config.preprocess)  # (3,H,H)

        batches = read_ahead(load, examples, self.batch_size)
        return torch.cat([self.model.encode_image(torch.stack(some).to(self.device)).float().cpu() for some in batches])

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(m,E)."""
        config, features = self.model.config.text, []
        for first in range(0, len(texts), self.batch_size):
            rows = [self.tokenizer.encode(text, config.length) for text in texts[first : first + self.batch_size]]
            ids = pad_texts(rows, config).to(self.device)  # (B,L)
            features.append(self.model.encode_text(ids, [len(row) for row in rows]).float().cpu())
        return torch.cat(features)

    def classes(self, names: Sequence[str], prompts: Sequence[Template]) -> Tensor:
        """(C,E): the mean over the prompts of each class, normalised."""
        texts = self.texts([prompt(name) for name in names for prompt in prompts])  # (C*T,E)
        return class_embeddings(texts.unflatten(0, (len(names), len(prompts))))


def _score_retrieval(data: RetrievalData, encoder: _Encoder) -> dict[str, float]:
    captions = [caption for example in data.examples for caption in example.answer]
    owners = [place for place, example in enumerate(data.examples) for _ in example.answer]
    image, text = encoder.images(data.examples), encoder.texts(captions)
    i2t, t2i = retrieval_ranks(image, text, captions, owners, data.shared)
    return {**recalls(i2t, t2i), "chance_r1": chance_r1(captions, owners, data.shared)}


def _score_classification(data: ClassificationData, prompts: Sequence[Template], encoder: _Encoder) -> dict[str, float]:
    classes = encoder.classes(data.classes, prompts)
    labels = [example.answer for example in data.examples]
    count = len(data.classes)
    return {
        **accuracies(encoder.images(data.examples), classes, labels),
        "chance_top1": 1 / count,
        "chance_top5": min(5 / count, 1.0),
    }


def _score_segmentation(data: SegmentationData, prompts: Sequence[Template], encoder: _Encoder) -> dict[str, float]:
    model, config = encoder.model, encoder.model.config
    classes = encoder.classes(data.classes, prompts).to(encoder.device)

    def load(example: Example[Callable[[], Labels]]) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
        image, truth = picture(example), torch.from_numpy(example.answer())
        if image.shape[1:] != truth.shape:
            sizes = " and ".join("x".join(map(str, reversed(shape))) for shape in (image.shape[1:], truth.shape))
            raise DataError(f"{example.name}: picture and label map differ in size ({sizes}); they must be a pair")
        return *windows(image, config.vision.image_size, config.preprocess), truth

    matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    for batch in read_ahead(load, data.examples, encoder.batch_size):
        crops = torch.cat([some for some, _, _ in batch]).split(encoder.batch_size)
        patches = torch.cat([model.encode_patches(some.to(encoder.device)) for some in crops])  # (windows,N,E)
        counts = [len(some) for some, _, _ in batch]
        for own, (_, places, truth) in zip(patches.split(counts), batch, strict=True):
            prediction = segment(own, classes, places, (truth.shape[0], truth.shape[1]))
            matrix += confusion(prediction.cpu(), truth, len(classes))
    total = int(matrix.sum())
    if total == 0:
        raise DataError(f"{data.examples[0].name} and all others: no pixel belongs to a class; correct what is ignored")
    return {
        "miou": mean_iou(matrix),
        "pixel_accuracy": int(matrix.diagonal().sum()) / total,
        "chance_miou": chance_miou(matrix),
    }


def picture(example: Example[Any]) -> Tensor:
    """The example's picture, uint8 (3,h,w). Raises DataError if it cannot be read or decoded."""
    try:
        return decode(example.image())
    except (OSError, RuntimeError) as error:
        reason = str(error).split(": ")[-1].strip()
        raise DataError(
            f"{example.name}: the picture does not decode ({reason}); fetch it again: a part of a set has no score"
        ) from error


def windows(image: Tensor, size: int, config: PreprocessConfig) -> tuple[Tensor, list[tuple[int, int]]]:
    """The fewest squares that cover a picture, evenly spaced along its longer side, each resized as in evaluation.

    uint8 (3,h,w) -> uint8 (W,3,size,size) and the top left pixel of each. A square picture is one window.
    """
    _, height, width = image.shape
    side, longest = min(height, width), max(height, width)
    count = ceil(longest / side)
    starts = [round(place * (longest - side) / max(count - 1, 1)) for place in range(count)]
    places = [(start, 0) if height > width else (0, start) for start in starts]
    crops = [image[:, top : top + side, left : left + side] for top, left in places]
    return torch.stack([eval_transform(crop, size, config) for crop in crops]), places


def read_ahead(load: Callable[[In], Out], items: Sequence[In], batch_size: int) -> Iterator[list[Out]]:
    """Batches of load(item) in order; threads load the next batch while one is used."""
    with ThreadPoolExecutor(READERS) as pool:
        coming: deque[list[Future[Out]]] = deque()
        for first in range(0, len(items), batch_size):
            coming.append([pool.submit(load, item) for item in items[first : first + batch_size]])
            if len(coming) > 1:
                yield [future.result() for future in coming.popleft()]
        for batch in coming:
            yield [future.result() for future in batch]
