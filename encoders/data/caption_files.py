"""Captions of one shard in SHARD.CAPTIONER.jsonl: a header, then a line per caption in the order of the samples.

While a shard is being captioned, SHARD.CAPTIONER.jsonl.partial takes one durable line per answer: a killed run goes on
from there and asks nothing twice. `merge_shard` writes a tar of samples with their captions by captioner.
"""

import fcntl
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from encoders.data.samples import BadSample, Samples
from encoders.errors import DataError, UsageError
from encoders.manifest import fsync_directory

FAILED = "failed"
"""The problem of a question that was not answered, and is asked again by the next run."""
SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}


@dataclass(frozen=True)
class Entry:
    """One caption, or None and the problem; a caption that was cut off has both."""

    key: str
    kind: str
    caption: str | None
    problem: str = ""
    detail: str = ""


class CaptionFile:
    """The captions of the samples `numbers`, which are a shard: `entries` by (key, kind), without those that failed.

    A context: its end, unless by an exception, puts the file in its place. Raises UsageError if another process writes
    the same file or if it was asked of another model or with other prompts; DataError if it does not fit the shard.
    """

    def __init__(
        self, samples: Samples, shard: str, numbers: range, folder: Path, captioner: str, asked_of: Mapping[str, Any]
    ):
        self.keys = [samples.key(number) for number in numbers]
        if twice := [key for key, times in Counter(self.keys).items() if times > 1]:
            raise DataError(f"{shard} holds {len(twice)} keys twice, as {twice[0]!r}; captions need keys of their own")
        self.file = _file(shard, folder, captioner)
        self.journal = self.file.with_name(self.file.name + ".partial")
        self.header = {"captioner": captioner, **asked_of}
        self.entries: dict[tuple[str, str], Entry] = {}

    def __enter__(self) -> "CaptionFile":
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.journal.open("ab")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise UsageError(f"{self.journal} is being written by another process; give each its own --rank") from None
        for file in (self.file, self.journal):
            if file.is_file():
                header, entries = read(file)
                if header is not None:
                    self._check(file, header, entries)
                self.entries |= entries
        self.entries = {place: entry for place, entry in self.entries.items() if entry.problem != FAILED}
        whole = _whole_lines(self.journal)
        self._stream.truncate(whole)
        if not whole:
            self._write(self.header)
        return self

    def add(self, entry: Entry) -> None:
        """Keep an entry, durably."""
        self.entries[entry.key, entry.kind] = entry
        self._write(asdict(entry))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            place = {key: number for number, key in enumerate(self.keys)}
            aside = self.file.with_name(self.file.name + ".tmp")
            with aside.open("wb") as stream:
                stream.write(_line(self.header))
                for entry in sorted(self.entries.values(), key=lambda one: place[one.key]):
                    stream.write(_line(asdict(entry)))
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(self.file)
            self.journal.unlink()
            fsync_directory(self.file.parent)
        self._stream.close()

    def _write(self, content: Mapping[str, Any]) -> None:
        self._stream.write(_line(content))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _check(self, file: Path, header: Mapping[str, Any], entries: Mapping[tuple[str, str], Entry]) -> None:
        different = [name for name in self.header if header.get(name) != self.header[name]]
        if different:
            name = different[0]
            raise UsageError(
                f"{file} holds captions with {name} {header.get(name)!r}, not {self.header[name]!r}; choose another "
                "--captioner or --out, or remove the file"
            )
        strange = {key for key, _ in entries} - set(self.keys)
        if strange:
            raise DataError(f"{file} has captions for {min(strange)!r}, which its shard does not hold; remove the file")


def read(file: Path) -> tuple[dict[str, Any] | None, dict[tuple[str, str], Entry]]:
    """(header, entries by key and kind), the later line of two; a last line without an end is left out."""
    lines = file.read_bytes()[: _whole_lines(file)].splitlines()
    entries = {}
    try:
        header = json.loads(lines[0]) if lines else None
        for line in lines[1:]:
            entry = Entry(**json.loads(line))
            entries[entry.key, entry.kind] = entry
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} is not a file of captions ({error}); remove it and caption its shard again") from error
    return header, entries


def merge_shard(
    samples: Samples, shard: str, numbers: range, captioners: Sequence[str], captions: Path, out: Path
) -> Counter[str]:
    """Write a shard's samples, KEY.jpg and KEY.json, with these captioners' captions before those they had.

    Keys are percent-encoded. Returns the number of `samples` written, and of what is missing. Raises DataError if the
    shard is not captioned yet, UsageError if its tar exists.
    """
    entries: dict[str, dict[tuple[str, str], Entry]] = {}
    for captioner in captioners:
        file = _file(shard, captions, captioner)
        if not file.is_file():
            raise DataError(f"{file} does not exist: the shard has no captions of {captioner!r} yet; caption it first")
        entries[captioner] = read(file)[1]
    tar_file = out / f"{shard.removesuffix('.tar').replace('/', '_')}.tar"
    if tar_file.exists():
        raise UsageError(f"{tar_file} exists; merge into an empty folder")
    counts: Counter[str] = Counter()
    aside = tar_file.with_name(tar_file.name + ".partial")
    with aside.open("wb") as stream:
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for number in numbers:
                try:
                    sample = samples[number]
                except BadSample as error:
                    counts[f"samples ({error.reason})"] += 1
                    continue
                text: dict[str, Any] = {"web": sample.web}
                for kind, old in (("short", sample.short), ("long", sample.long)):
                    new = {
                        captioner: caption
                        for captioner in entries
                        if (caption := _caption(entries[captioner], sample.key, kind)) is not None
                    }
                    counts[kind] += len(entries) - len(new)
                    text[kind] = new | {
                        captioner: caption for captioner, caption in old.items() if captioner not in new
                    }
                name = _tar_name(sample.key)
                _add(tar, f"{name}.{SUFFIXES.get(sample.image[:2], 'jpg')}", sample.image)
                _add(tar, f"{name}.json", json.dumps(text).encode())
                counts["samples"] += 1
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(tar_file)
    fsync_directory(out)
    return +counts


def _caption(entries: Mapping[tuple[str, str], Entry], key: str, kind: str) -> str | None:
    entry = entries.get((key, kind))
    return None if entry is None else entry.caption


def _tar_name(key: str) -> str:
    """A key, percent-encoded but for letters, digits, _ - ~ and /: two keys never meet, and a reader finds every one,
    although to it a key ends at its first dot and a name that begins with a dot is hidden."""
    name = quote(key, safe="/").replace(".", "%2E")
    return name[:-1] + "%2F" if name.endswith("/") else name


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _file(shard: str, folder: Path, captioner: str) -> Path:
    return folder / f"{shard}.{captioner}.jsonl"


def _whole_lines(file: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return file.read_bytes().rfind(b"\n") + 1


def _line(content: Mapping[str, Any]) -> bytes:
    # Half a surrogate pair, as in a file name of other bytes, becomes its JSON escape.
    return json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
