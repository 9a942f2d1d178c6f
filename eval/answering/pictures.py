"""Which questions show the same pictures, found out without decoding them, and the pictures, decoded once.

A task's `doc_to_visual` may look at more of a question than its picture (to choose, to crop, to draw). It is therefore
given a row that notes what is looked at: what looks at pictures only gives the same pictures for the same bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image

from encoders.errors import DataError

DocToVisual = Callable[[Any], Sequence[Any] | None]


class LooksAtMore(Exception):
    """A task looked at columns that its pictures were not expected to depend on: `refine` makes sources finer."""

    def __init__(self, pictures: "Pictures", columns: set[str]) -> None:
        super().__init__(columns)
        self.pictures, self.columns = pictures, columns

    def refine(self) -> None:
        """Let sources depend on these columns too. Not done where they are noticed: threads read ahead, and a chunk of
        coarse sources must not pass because a later one was read sooner."""
        self.pictures.columns |= self.columns


class Pictures:
    """The pictures of one split of one task, by row of the split; `data` is the identity of the files behind it."""

    def __init__(self, task: str, split: Dataset, doc_to_visual: DocToVisual, data: str) -> None:
        self.task, self.doc_to_visual, self.data = task, doc_to_visual, data
        self.image_columns = {name for name, kind in split.features.items() if isinstance(kind, ImageColumn)}
        for name in self.image_columns:
            split = split.cast_column(name, ImageColumn(decode=False))  # the file's bytes; nothing is copied
        self.split = split
        self.columns = set(self.image_columns)  # what pictures are taken to depend on

    def source(self, row: int) -> str:
        """Rows of equal source show equal pictures, unless `read` raises LooksAtMore."""
        document = self.split[row]
        digest = hashlib.sha256(self.data.encode())
        for name in sorted(self.columns & document.keys()):
            digest.update(f"\0{name}\0".encode())
            digest.update(_bytes(document[name]))
        return digest.hexdigest()

    def read(self, row: int) -> list[Image.Image]:
        """The RGB pictures of a row, in the order that they are shown. Raises DataError if one cannot be read, and
        LooksAtMore if other rows of the same source may show others."""
        document = _Watched(self.split[row], self.image_columns)
        try:
            shown = self.doc_to_visual(document) or []
            if odd := [picture for picture in shown if not isinstance(picture, Image.Image)]:
                raise TypeError(f"it shows a {type(odd[0]).__name__}, which is no picture")
            pictures = [picture.convert("RGB") for picture in shown]
        except Exception as error:  # damaged files raise all kinds of errors
            self._check(document.seen)  # else the rows that seemed alike would fail with this one
            raise DataError(f"{self.task}: the picture of row {row} cannot be read: {_told(error)}") from error
        self._check(document.seen)
        return pictures

    def _check(self, seen: set[str]) -> None:
        if not seen <= self.columns:
            raise LooksAtMore(self, seen)


class _Watched(Mapping[str, Any]):
    """A row that decodes a picture when it is looked at and notes what was."""

    def __init__(self, row: Mapping[str, Any], image_columns: set[str]) -> None:
        self.row, self.image_columns = row, image_columns
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self.row[key]
        self.seen.add(key)
        return ImageColumn().decode_example(value) if key in self.image_columns and value is not None else value

    def __contains__(self, key: object) -> bool:
        return key in self.row

    def __iter__(self) -> Iterator[str]:
        return iter(self.row)

    def __len__(self) -> int:
        return len(self.row)


def picture_id(picture: Image.Image) -> str:
    """Identity of a picture: of its size and its pixels, whatever file they came in."""
    digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()[:16]


def _bytes(value: Any) -> bytes:
    """A value of a row for hashing; of a picture its file's bytes, or its path where it has none."""
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        content: bytes = value["bytes"]
        return content
    return json.dumps(value, default=_plain, sort_keys=True).encode()


def _plain(value: Any) -> str:
    """A value that JSON does not know, by its content: the text of a picture names its address, which others get."""
    if isinstance(value, Image.Image):
        return picture_id(value)
    if isinstance(value, bytes | date | time | timedelta | Decimal):
        return repr(value)
    raise TypeError(f"a {type(value).__name__} decides which picture is shown; eval-mllm cannot tell two of them apart")


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
