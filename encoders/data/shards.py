"""Webdataset tars as a random-access set of samples, on a disk of this machine or elsewhere.

A sample is one read per member at offsets that the index knows. Nothing is unpacked, unpickled or executed.
"""

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from encoders.data.captions_table import CaptionTable
from encoders.data.index import SetIndex, ShardIndex, index_folder, index_shard, place_for
from encoders.data.remote import ShardCache, is_remote
from encoders.data.samples import MAX_IMAGE, MAX_TEXT, BadSample, Fields, Sample, build, parse_json
from encoders.data.spec import Columns, read_columns
from encoders.data.tar_headers import Member
from encoders.errors import DataError

OPEN_SHARDS = 300


class TarSamples:
    """The samples of a folder of tars, or of the shards listed in a file of `python -m encoders.data.index`: by shard
    name and place in the shard. Picklable; files open on first use.

    Raises DataError if there is no shard or no sample.
    """

    def __init__(
        self,
        path: Path,
        columns: Columns | None = None,
        captions: CaptionTable | None = None,
        cache: Path | None = None,
        cache_gb: float = 100.0,
    ):
        self.columns = columns or read_columns("embedded_world")
        self.captions = captions
        self.index = _read_list(path) if path.is_file() else index_folder(path, cache)
        self.cache = ShardCache(cache, cache_gb)
        self._index_cache = cache
        self._ends = np.cumsum(self.index.counts)
        self._open: OrderedDict[int, tuple[ShardIndex, BinaryIO]] = OrderedDict()

    @property
    def sizes(self) -> np.ndarray:
        """Samples of each shard, int64 (shards,)."""
        return self.index.counts

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSample if the sample is damaged, ambiguous or incomplete, DataError if its shard has changed."""
        parts = self._parts(index)
        shard, key = self.shard(index), self.key(index)
        read: dict[str, bytes | None] = {}  # each member once

        def member(column: str, limit: int) -> bytes | None:
            if column not in read:
                read[column] = self._read(index, parts[column], limit) if column in parts else None
            return read[column]

        def field(column: str) -> Any:
            suffix, dot, name = column.partition(".")
            content = member("json" if suffix == "json" and dot else column, MAX_TEXT)
            if content is None:
                raise BadSample(
                    f"no {suffix if suffix == 'json' else column}", shard, key, f"members: {sorted(parts)[:9]}"
                )
            if suffix == "json" and dot:
                return parse_json(content, shard, key).get(name)
            try:
                return content.decode()
            except UnicodeDecodeError as error:
                raise BadSample(f"unreadable {column}", shard, key, str(error)) from error

        captions: Fields = field
        if self.captions is not None:
            assert self.columns.join is not None  # open_samples sees to it
            captions = self.captions.row(field(self.columns.join.sample), shard, key).get
        return build(self.columns, lambda column: member(column, MAX_IMAGE), captions, shard, key)

    def has(self, index: int, suffix: str) -> bool:
        """Whether a sample has a member of this suffix. Raises BadSample if its members cannot be trusted."""
        return suffix in self._parts(index)

    def read(self, index: int, suffix: str) -> bytes:
        """One member of a sample. Raises BadSample if it has none."""
        parts = self._parts(index)
        if suffix not in parts:
            raise BadSample(f"no {suffix}", self.shard(index), self.key(index), f"members: {sorted(parts)[:9]}")
        return self._read(index, parts[suffix], MAX_IMAGE)

    def shard(self, index: int) -> str:
        """The name of the shard a sample lies in."""
        return self.index.name(self._place(index)[0]).rpartition("/")[2]

    def key(self, index: int) -> str:
        shard, place = self._place(index)
        found, _ = self._opened(shard)
        return found.key(place) if place < len(found) else f"sample {place}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.index.fingerprint()} {self.columns}".encode())
        if self.captions is not None:
            digest.update(self.captions.fingerprint().encode())
        return digest.hexdigest()

    def fetch_ahead(self, shards: np.ndarray) -> None:
        """Start fetching those of these shards that lie elsewhere, in the background."""
        listed = [(self.index.name(int(shard)), int(self.index.bytes[shard])) for shard in shards]
        self.cache.ahead([(name, size) for name, size in listed if is_remote(name)])

    def _place(self, index: int) -> tuple[int, int]:
        """(shard, place in it) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - self._ends[shard] + self.index.counts[shard])

    def _parts(self, index: int) -> dict[str, Member]:
        """A sample's members. Raises BadSample if they cannot be trusted."""
        shard, place = self._place(index)
        found, _ = self._opened(shard)
        name = self.shard(index)
        if place >= len(found):
            detail = f"{self.index.counts[shard]} samples were announced; {found.damage or f'it holds {len(found)}'}"
            raise BadSample("damaged tar" if found.damage else "missing sample", name, f"sample {place}", detail)
        if fault := found.fault(place):
            detail = found.damage if fault == "damaged tar" else "the shard holds its members in more than one place"
            raise BadSample(fault, name, found.key(place), detail)
        return found.parts(place)

    def _read(self, index: int, member: Member, limit: int) -> bytes:
        shard, _ = self._place(index)
        if member.size > limit:
            detail = f"{member.size} bytes, more than {limit}"
            raise BadSample("oversized member", self.shard(index), self.key(index), detail)
        # pread and not seek: forked loader workers share the file's position.
        content = os.pread(self._opened(shard)[1].fileno(), member.size, member.offset)
        if len(content) < member.size:
            raise BadSample("damaged tar", self.shard(index), self.key(index), "the shard was cut while in use")
        return content

    def _opened(self, shard: int) -> tuple[ShardIndex, BinaryIO]:
        """A shard's index and open file; the least recently used is closed when there are many."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= OPEN_SHARDS:
            self._open.popitem(last=False)[1][1].close()
        name, size = self.index.name(shard), int(self.index.bytes[shard])
        if is_remote(name):
            file = self.cache.fetched(name, size)
            found = index_shard(file, self.cache.folder / "index")
        else:
            file = Path(self.index.root, name)
            stat = file.stat() if file.is_file() else None
            if stat is None or (stat.st_size, stat.st_mtime_ns) != (size, self.index.mtimes[shard]):
                raise DataError(f"{file} is not what it was when it was indexed; start again to index it anew")
            found = index_shard(file, place_for(file.parent, self._index_cache))
        if len(found) > self.index.counts[shard] and not found.damage:
            raise DataError(f"{name} holds {len(found)} samples, not {self.index.counts[shard]}; index it again")
        self._open[shard] = (found, file.open("rb", buffering=0))
        return self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}  # open files do not travel to loader workers


def _read_list(file: Path) -> SetIndex:
    found = SetIndex.load(file)
    if found is None:
        raise DataError(f"{file} is no list of shards; write it with `python -m encoders.data.index URL... --out FILE`")
    return found
