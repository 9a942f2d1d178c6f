"""Files of conversations as sequences of `Conversation`: LLaVA and ShareGPT json (or json lines), and tables, which are
folders of `datasets.Dataset.save_to_disk` or of parquet files.

A json is read and checked whole, then kept packed: the objects of 665,000 conversations would be copied into every
loader process. A table's rows are read, and checked, when they are drawn.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from encoders.data.order import Shards, Unsharded
from encoders.data.tables import DatasetRows, ParquetRows, Rows
from encoders.errors import DataError, UsageError
from llava_adapter.data.conversations import Conversation, Findings, parse
from llava_adapter.data.pictures import Finder

Missing = Literal["error", "skip"]
COLUMNS = ("id", "source", "conversations", "messages", "texts", "images", "image")


class Chats(Protocol):
    """Conversations by number. Picklable."""

    findings: Findings
    shards: Shards
    """How they lie on their disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation:
        """With its pictures as `Path` or bytes. Raises DataError for a damaged one."""


def read_chats(chats: Path, images: Path, missing: Missing = "error") -> Chats:
    """Open a json file, or a folder of one of the table formats; image paths start from `images`.

    An entry whose picture is not there is an error, or with "skip" left out and counted in `findings`. Raises DataError
    naming the file, entry and fault.
    """
    if chats.is_dir():
        return TableChats(chats, images)
    return FileChats(chats, images, missing)


class FileChats:
    """The conversations of a json file."""

    def __init__(self, file: Path, images: Path, missing: Missing):
        self.findings, finder = Findings(), Finder(images)
        packed = bytearray()
        ends = []
        for number, entry in enumerate(_entries(file)):
            where = f"{file}, entry {number}"
            chat = parse(entry, where, self.findings.mended)
            looked_up = [(path, finder.find(path)) for path in chat.pictures]
            found = [file for _, file in looked_up if file is not None]
            if len(found) < len(looked_up):
                lost = next(path for path, file in looked_up if file is None)
                if missing == "error":
                    raise DataError(
                        f"{where} (id {chat.id!r}): image {images / lost} does not exist; check the image root, or "
                        "leave such entries out, counted, with data.missing: skip"
                    )
                self.findings.missing[chat.source] += 1
                continue
            if any(path.name != Path(told).name for path, told in zip(found, chat.pictures, strict=True)):
                self.findings.resuffixed[chat.source] += 1
            self.findings.kept[chat.source] += 1
            record = [chat.id, chat.source, chat.messages, [str(path) for path in found]]
            packed += json.dumps(record, ensure_ascii=False).encode()
            ends.append(len(packed))
        if not ends:
            raise DataError(f"{file} leaves no conversation: every one lacks a picture below {images}")
        self._packed, self._ends = bytes(packed), np.array([0, *ends], dtype=np.int64)
        self.shards: Shards = Unsharded(len(ends))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        start, end = self._ends[index : index + 2]
        name, source, messages, paths = json.loads(self._packed[start:end])
        return Conversation(name, source, tuple(messages), tuple(map(Path, paths)))


def _entries(file: Path) -> Iterator[Any]:
    """Of a json list, or of json lines."""
    try:
        text = file.read_text()
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist; pass a json file in LLaVA's conversation format") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}") from error
    try:
        lines = text.split("\n") if text.lstrip().startswith("{") and "\n" in text.strip() else None
        entries = [json.loads(line) for line in lines if line.strip()] if lines is not None else json.loads(text)
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{file} does not hold a non-empty list of conversations")
    yield from entries


class TableChats:
    """The conversations of a table. Its `findings` count only what has been drawn in this process."""

    def __init__(self, folder: Path, images: Path):
        self.findings, self._finder, self.folder = Findings(), Finder(images), folder
        self._rows = _open_rows(folder)
        # A parquet file's rows are read by groups: drawn from everywhere, each would cost its whole group.
        self.shards: Shards = Unsharded(self._rows.sizes, self._rows.window)

    def __len__(self) -> int:
        return int(self._rows.sizes.sum())

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        where = f"{self.folder / self._rows.where(index)}, row {index}"
        try:
            row = self._rows.row(index)
        except ValueError as error:
            raise DataError(f"{where} is damaged: {error}") from error
        chat = parse({name: value for name, value in row.items() if value is not None}, where, self.findings.mended)
        pictures = [self._finder.find(one) if isinstance(one, str) else one for one in chat.pictures]
        if None in pictures:
            lost = chat.pictures[pictures.index(None)]
            raise DataError(f"{where}: image {self._finder.root / lost} does not exist; check the image root")
        return Conversation(chat.id, chat.source, chat.messages, tuple(pictures))


def _open_rows(folder: Path) -> Rows:
    """A folder of either kind, with those of our columns that it has."""
    info = folder / "dataset_info.json"
    if info.is_file():
        try:
            features = list(json.loads(info.read_text())["features"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{info} does not tell the columns ({error!r}); save the data set again") from error
        return DatasetRows(folder, _known(features, folder))
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"{folder} is neither a folder of Dataset.save_to_disk nor one of parquet files")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError("parquet files need the extra: pip install 'encoder-swap[tables]'") from error
    try:
        names = parquet.read_schema(files[0]).names
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{files[0]} is no parquet file: {error}; fetch it again") from error
    return ParquetRows(folder, _known(names, folder))


def _known(names: Any, folder: Path) -> list[str]:
    found = [name for name in COLUMNS if name in names]
    if not set(found) & {"conversations", "messages", "texts"}:
        raise DataError(f"{folder} has none of the columns conversations, messages, texts; found {', '.join(names)}")
    return found
