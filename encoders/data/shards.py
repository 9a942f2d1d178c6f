"""Webdataset tars as a random-access list of samples, and the order in which training visits them.

A folder of `*.tar` is scanned once (headers only); a sample is then two reads at known offsets. The order is a pure
function of (seed, epoch, step), so a resumed run computes its position and reads nothing again.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from encoders.errors import DataError, UsageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
SYNTHETIC = "synthetic"  # the captioner of a shard that does not name its own
OPEN_SHARDS = 64


@dataclass(frozen=True)
class Sample:
    """One picture, still encoded, with its web caption and its synthetic ones: captioner -> caption, in file order,
    empty where a set has none."""

    key: str
    shard: str
    image: bytes
    web: str
    short: dict[str, str]
    long: dict[str, str]


class BadSample(Exception):
    """A sample that cannot be used: counted by `reason` and named, never substituted in silence."""

    def __init__(self, reason: str, shard: str, key: str, detail: str):
        super().__init__(f"{shard}: sample {key!r}: {reason} ({detail})")
        self.reason, self.shard, self.key = reason, shard, key


class Member(NamedTuple):
    """Where a tar member's content lies in its shard."""

    offset: int
    size: int


class Entry(NamedTuple):
    """Where a sample lies."""

    shard: int
    key: str
    image: Member
    text: Member


class TarSamples:
    """All samples of a folder of tars, by shard name and place in the shard. Picklable; files open on first use."""

    def __init__(self, folder: Path):
        self.shards = list_shards(folder)
        self.entries = [entry for i, shard in enumerate(self.shards) for entry in scan(shard, i)]
        self._streams: dict[int, BinaryIO] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSample if the json is not an object, the web caption is missing, or a caption is empty or no
        string. Who needs a short or long caption says so when it is missing: some sets have only one of them."""
        entry = self.entries[index]
        shard = self.shards[entry.shard].name
        try:
            text = json.loads(self._read(entry.shard, entry.text))
        except ValueError as error:
            raise BadSample("unreadable json", shard, entry.key, str(error)) from error
        if not isinstance(text, dict):
            raise BadSample("unreadable json", shard, entry.key, f"not an object but {text!r:.80}")
        web = _caption(text.get("web"), "web", shard, entry.key)
        short, long = (_by_captioner(text.get(name), name, shard, entry.key) for name in ("short", "long"))
        return Sample(entry.key, shard, self._read(entry.shard, entry.image), web, short, long)

    def _read(self, shard: int, member: Member) -> bytes:
        if shard not in self._streams:
            if len(self._streams) >= OPEN_SHARDS:
                self._streams.pop(next(iter(self._streams))).close()
            self._streams[shard] = self.shards[shard].open("rb")
        # pread and not seek: forked loader workers share the file's position.
        return os.pread(self._streams[shard].fileno(), member.size, member.offset)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_streams": {}}  # open files do not travel to loader workers


def _caption(value: Any, name: str, shard: str, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadSample(f"no {name} caption", shard, key, f"found {value!r:.80}")
    try:
        value.encode()  # half a surrogate pair passes json, but no tokenizer
    except UnicodeEncodeError as error:
        raise BadSample(f"unreadable {name} caption", shard, key, str(error)) from error
    return value


def _by_captioner(value: Any, name: str, shard: str, key: str) -> dict[str, str]:
    """A json's `short` or `long`, a caption or captions by captioner, as the latter; empty if the json lacks it."""
    if value is None:
        return {}
    captions = value if isinstance(value, dict) and value else {SYNTHETIC: value}
    return {captioner: _caption(caption, name, shard, key) for captioner, caption in captions.items()}


def list_shards(folder: Path) -> list[Path]:
    """The tars of a folder, sorted. Raises DataError if there are none."""
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist; write scenes with `python -m encoders.data.scenes OUT`")
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(f"data folder {folder} holds no .tar shard; point the config's data section at one that does")
    return shards


def scan(shard: Path, index: int) -> list[Entry]:
    """Read a tar's headers. Raises DataError if it is truncated, empty, or a sample lacks its picture or its json."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                key, suffix = split_name(info.name)
                parts = samples.setdefault(key, {})
                if suffix in parts:
                    raise DataError(f"{shard}: member {info.name!r} occurs twice; write the shard again")
                parts[suffix] = Member(info.offset_data, info.size)
            whole = _ends_properly(shard, tar.offset)
    except tarfile.TarError as error:
        raise DataError(
            f"{shard} is damaged or truncated after {len(samples)} samples ({error}); write it again or remove it"
        ) from error
    if not whole:
        raise DataError(f"{shard} is truncated after {len(samples)} samples; write it again or remove it")
    if not samples:
        raise DataError(f"{shard} holds no sample; remove it")
    return [_entry(shard, index, key, parts) for key, parts in samples.items()]


def split_name(member: str) -> tuple[str, str]:
    """(key, suffix) of a member as webdataset splits it: at the first dot of its last path part."""
    folder, slash, name = member.removeprefix("./").rpartition("/")
    stem, _, suffix = name.partition(".")
    return folder + slash + stem, suffix.lower()


def _entry(shard: Path, index: int, key: str, parts: dict[str, Member]) -> Entry:
    images = [suffix for suffix in IMAGE_SUFFIXES if suffix in parts]
    if len(images) != 1 or "json" not in parts:
        wanted = f"one of .{', .'.join(IMAGE_SUFFIXES)} and a .json"
        raise DataError(f"{shard}: sample {key!r} has members {sorted(parts)[:5]} but needs {wanted}")
    return Entry(index, key, parts[images[0]], parts["json"])


def _ends_properly(shard: Path, end_of_members: int) -> bool:
    """A whole tar has at least one block of zeros after its last member; a cut one usually has not."""
    with shard.open("rb") as stream:
        stream.seek(max(end_of_members - tarfile.BLOCKSIZE, 0))
        return tarfile.NUL * tarfile.BLOCKSIZE in stream.read(2 * tarfile.BLOCKSIZE)


class StepOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, sample id) for one rank, from `start` to `steps`; micro-batches of a step follow each other.

    Every epoch is a fresh permutation of all samples; the last incomplete global batch of an epoch is dropped. Global
    batch t holds the same samples whatever the number of ranks.
    """

    def __init__(
        self, samples: int, global_batch: int, steps: int, seed: int, *, rank: int, world: int, micro_batches: int = 1
    ):
        if global_batch % (world * micro_batches):
            raise UsageError(
                f"batch_size {global_batch} does not divide into {world} rank(s) x {micro_batches} micro-batch(es)"
            )
        if samples < global_batch:
            raise UsageError(
                f"{samples} training samples are fewer than one batch of {global_batch}; lower the batch size"
            )
        self.samples, self.global_batch, self.steps, self.seed = samples, global_batch, steps, seed
        self.rank, self.world, self.micro_batches = rank, world, micro_batches
        self.start = 0
        self._cached: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    def __len__(self) -> int:
        return (self.steps - self.start) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            epoch, ids = self.global_ids(step)
            mine = ids[self.rank :: self.world]
            for micro in np.split(mine, self.micro_batches):
                yield [(epoch, int(i)) for i in micro]

    def global_ids(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, sample ids of the global batch) of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return epoch, self._permutation(epoch)[place * self.global_batch : (place + 1) * self.global_batch]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.samples))
        return self._cached[1]
