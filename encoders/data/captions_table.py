"""Captions in a CSV file, found by the content of a column (a URL or a path), never by row number.

The file is read once for where its rows begin; those 16 bytes a row are kept beside it and mapped into memory.
"""

import csv
import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np

from encoders.data.index import place_for
from encoders.data.samples import MAX_TEXT, BadSample
from encoders.errors import DataError

VERSION = 1
csv.field_size_limit(MAX_TEXT)


class CsvFile:
    """The rows of a CSV file with a header line, by number. Raises DataError if the file or a column is missing, and
    when it is read after it has changed."""

    def __init__(self, file: Path, columns: list[str], by: str | None, cache: Path | None):
        if not file.is_file():
            raise DataError(f"table {file} does not exist")
        self.file, self.by = file, by
        self._stamp = _stamp(file.stat())
        with self._opened() as stream:
            self.header: list[str] = next((cells for _, cells in _rows(stream)), [])
        missing = [column for column in columns if column not in self.header]
        if missing:
            found = ", ".join(self.header)[:300] or "no header"
            raise DataError(f"{file} has no column {', '.join(missing)}; it has {found}")
        self._index_file = place_for(file.parent, cache) / f"{file.name}.{_hash(by or '') & 0xFFFFFFFF:08x}.npy"
        self._rows: np.ndarray | None = None
        self._table()

    def __len__(self) -> int:
        return len(self._table())

    def read(self, row: int) -> dict[str, str]:
        """A row by its place in the index. Raises ValueError if it has more or fewer cells than the header."""
        offset = int(self._table()[row, 1])
        with self._opened() as stream:
            stream.seek(offset)
            content = next((cells for _, cells in _rows(stream)), [])
        if len(content) != len(self.header):
            raise ValueError(f"{len(content)} cells at byte {offset}, where the header has {len(self.header)}")
        return dict(zip(self.header, content, strict=True))

    def places(self, value: str) -> range:
        """Rows that may hold this value in the column `by`."""
        hashes, wanted = self._table()[:, 0], np.int64(_hash(value))
        return range(*(int(np.searchsorted(hashes, wanted, side=side)) for side in ("left", "right")))

    def fingerprint(self) -> str:
        named = f"{self.file.name} {self._stamp[0]} {self.header} {len(self)}"
        return hashlib.sha256(named.encode(errors="backslashreplace")).hexdigest()

    def _opened(self) -> BinaryIO:
        stream = self.file.open("rb")
        if _stamp(os.fstat(stream.fileno())) != self._stamp:
            stream.close()
            raise DataError(f"{self.file} is not what it was when it was indexed; start again to index it anew")
        return stream

    def _table(self) -> np.ndarray:
        """(hash of the column `by`, offset) of each row, int64 (rows, 2); sorted, or in file order without `by`."""
        if self._rows is not None:
            return self._rows
        size, time = self._stamp
        stamp = [[VERSION, size], [time, 0]]
        found = _mapped(self._index_file)
        if found is None or found[:2].tolist() != stamp:
            rows = self._scan()
            self._index_file.parent.mkdir(parents=True, exist_ok=True)
            aside = self._index_file.with_name(f".{self._index_file.name}.{uuid4().hex}.partial")
            with aside.open("wb") as stream:
                np.save(stream, np.concatenate([np.array(stamp, dtype=np.int64), rows]))
            aside.replace(self._index_file)
            found = _mapped(self._index_file)
            assert found is not None
        self._rows = found[2:]
        return self._rows

    def _scan(self) -> np.ndarray:
        place = self.header.index(self.by) if self.by is not None else None
        found = array("q")
        with self._opened() as stream:
            rows = _rows(stream)
            next(rows)
            for offset, cells in rows:
                value = cells[place] if place is not None and place < len(cells) else ""
                found.extend((_hash(value) if place is not None else 0, offset))
        table = np.frombuffer(found, dtype=np.int64).reshape(-1, 2)
        return table[np.lexsort(table.T[::-1])] if place is not None else table

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_rows": None}


class CaptionTable:
    """The captions of a CSV file by what its column `by` holds."""

    def __init__(self, file: Path, columns: list[str], by: str, cache: Path | None = None):
        self._csv, self.by = CsvFile(file, [by, *columns], by, cache), by

    def row(self, value: object, shard: str, key: str) -> dict[str, str]:
        """The one row of a value. Raises BadSample if there is none, more than one, or it is damaged."""
        if not isinstance(value, str) or not value:
            raise BadSample("no join value", shard, key, f"found {value!r:.80}")
        try:
            rows = [self._csv.read(place) for place in self._csv.places(value)]
        except ValueError as error:
            raise BadSample("damaged caption row", shard, key, str(error)) from error
        rows = [row for row in rows if row[self.by] == value]
        if len(rows) != 1:
            detail = f"{len(rows)} rows of {self._csv.file.name} have {self.by} {value!r:.120}"
            raise BadSample("several caption rows" if rows else "no caption row", shard, key, detail)
        return rows[0]

    def fingerprint(self) -> str:
        return self._csv.fingerprint()


def _rows(stream: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """(byte offset, cells) of each row from here on. One that is not CSV has no cells; the next begins with the line
    after its first, since a quote that is never closed swallows the lines that follow."""
    start = position = stream.tell()

    def lines() -> Iterator[str]:
        nonlocal position
        for line in stream:
            text = line.removeprefix(b"\xef\xbb\xbf") if position == 0 else line
            position += len(line)
            yield text.decode("utf-8", "surrogateescape")  # bytes that are no text make a caption unreadable

    broken = True
    while broken:
        try:
            for cells in csv.reader(lines(), strict=True):
                if cells:
                    yield start, cells
                start = position
            broken = False
        except csv.Error:
            yield start, []
            stream.seek(start)
            start = position = start + len(stream.readline())


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    """(bytes, time of the last change)"""
    return stat.st_size, stat.st_mtime_ns


def _mapped(file: Path) -> np.ndarray | None:
    """An .npy as a file mapped into memory; None if it is missing or damaged."""
    try:
        found: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.ndim == 2 and len(found) >= 2 and found.dtype == np.int64 else None


def _hash(value: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True
    )
