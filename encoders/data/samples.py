"""THE sample contract: one picture, still encoded, with its captions, whatever format it was read from.

Readers of all formats give the same `Sample` for the same content, and raise the same `BadSample` for what is wrong.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from encoders.data.spec import Columns

SYNTHETIC = "synthetic"  # the captioner of captions that do not name their own
MAX_TEXT = 2**24
MAX_IMAGE = 2**28


@dataclass(frozen=True)
class Sample:
    """One picture, still encoded, with its web caption and its synthetic ones: captioner -> caption, in file order."""

    key: str
    shard: str
    image: bytes
    web: str
    short: dict[str, str]
    long: dict[str, str]


class BadSample(Exception):
    """A sample that cannot be used: counted by `reason` and named, never substituted in silence."""

    def __init__(self, reason: str, shard: str, key: str, detail: str):
        super().__init__(reason, shard, key, detail)  # what a copy from another process is made of
        self.reason, self.shard, self.key, self.detail = reason, shard, key, detail

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key!r}: {self.reason} ({self.detail})"


class Samples(Protocol):
    """A set of samples by number. Picklable; files open on first use. Bad samples have their number too."""

    @property
    def sizes(self) -> np.ndarray:
        """Samples of each shard, int64 (shards,). Numbers run through the shards in this order."""

    @property
    def window(self) -> int:
        """Samples whose shards can be in use at a time, as `order.StepOrder` takes it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSample."""

    def key(self, index: int) -> str:
        """The sample's name, for reports; its place if it has none that can be read. Never raises BadSample."""

    def shard(self, index: int) -> str:
        """The name of the file that it lies in."""

    def fetch_ahead(self, shards: np.ndarray) -> None:
        """Start fetching those of these shards that lie elsewhere, in the background."""

    def fingerprint(self) -> str:
        """sha256 of what the set is made of, which a copy of it shares: names, sizes and counts of its files, and how
        columns are read."""


Fields = Callable[[str], Any]
"""Column -> what a sample holds there, None if nothing."""


def build(columns: Columns, images: Fields, captions: Fields, shard: str, key: str) -> Sample:
    """A sample of what its reader finds. Raises BadSample if the picture or a caption of the mapping is missing, empty
    or not what it should be."""
    web = _caption(captions(columns.web), "web", shard, key)
    short = _by_captioner(columns.short, captions, "short", shard, key)
    long = _by_captioner(columns.long, captions, "long", shard, key)
    found = [image for name in columns.image if (image := images(name)) is not None]
    if len(found) != 1:
        raise BadSample(
            "several images" if found else "no image",
            shard,
            key,
            f"{len(found)} of the columns {', '.join(columns.image)} are there, where one is needed",
        )
    if not isinstance(found[0], bytes) or not found[0]:
        raise BadSample("no image", shard, key, f"found {found[0]!r:.80}")
    return Sample(key, shard, found[0], web, short, long)


def parse_json(content: bytes, shard: str, key: str) -> dict[str, Any]:
    """A json member's object. Raises BadSample if it is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample("unreadable json", shard, key, str(error)) from error
    if not isinstance(value, dict):
        raise BadSample("unreadable json", shard, key, f"not an object but {value!r:.80}")
    return value


def _by_captioner(
    where: str | Mapping[str, str] | None, captions: Fields, name: str, shard: str, key: str
) -> dict[str, str]:
    """The short or the long captions. A column may itself hold captions by captioner."""
    if where is None:
        return {}
    if isinstance(where, str):
        value = captions(where)
        values = value if isinstance(value, dict) and value else {SYNTHETIC: value}
    else:
        values = {captioner: captions(column) for captioner, column in where.items()}
    return {captioner: _caption(caption, name, shard, key) for captioner, caption in values.items()}


def _caption(value: Any, name: str, shard: str, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadSample(f"no {name} caption", shard, key, f"found {value!r:.80}")
    try:
        value.encode()  # half a surrogate pair passes json, but no tokenizer
    except UnicodeEncodeError as error:
        raise BadSample(f"unreadable {name} caption", shard, key, str(error)) from error
    return value
