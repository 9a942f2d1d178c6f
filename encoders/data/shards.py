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
from encoders.data.order import WINDOW
from encoders.data.remote import Shard, is_remote, stats_of
from encoders.data.samples import MAX_IMAGE, MAX_TEXT, BadSample, Fields, Sample, build, parse_json
from encoders.data.shard_cache import ShardCache
from encoders.data.spec import Columns, read_columns
from encoders.data.tar_headers import Member
from encoders.errors import DataError

OPEN_SHARDS = 300
MISSING = ShardIndex.empty("it was there when the set was listed")


class TarSamples:
    """The samples of a folder of tars, or of the shards listed in a file of `python -m encoders.data.index`: by shard
    name and place in the shard. Picklable; files open on first use.

    Raises DataError if there is no shard or no sample.
    """

    window = WINDOW

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
        self.path = path
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
        listed = [self._listed(int(shard)) for shard in shards]
        self.cache.ahead([shard for shard in listed if is_remote(shard.url)])

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
            reason = "missing shard" if found is MISSING else "damaged tar" if found.damage else "missing sample"
            detail = f"{self.index.counts[shard]} samples were announced; {found.damage or f'it holds {len(found)}'}"
            raise BadSample(reason, name, f"sample {place}", detail)
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
        self._close_some()
        listed = self._listed(shard)
        found, file = self._fetched(listed) if is_remote(listed.url) else self._local(listed)
        if len(found) > self.index.counts[shard] and not found.damage:
            file.close()
            raise DataError(
                f"{listed.url} holds {len(found)} samples, not {self.index.counts[shard]} as {stats_of(listed.url)} "
                f"says; remove that file and {self._again()}"
            )
        self._open[shard] = found, file
        return self._open[shard]

    def _close_some(self) -> None:
        """Close files that the cache removed, whose room is only now free, and the least recently used of many."""
        for shard, (_, file) in list(self._open.items()):
            if os.fstat(file.fileno()).st_nlink == 0:
                self._open.pop(shard)[1].close()
        while len(self._open) >= OPEN_SHARDS:
            self._open.popitem(last=False)[1][1].close()

    def _fetched(self, listed: Shard) -> tuple[ShardIndex, BinaryIO]:
        try:
            return self.cache.opened(listed)
        except FileNotFoundError:
            return MISSING, open(os.devnull, "rb", buffering=0)  # kept as others are, so that it is not asked for again

    def _local(self, listed: Shard) -> tuple[ShardIndex, BinaryIO]:
        path = Path(self.index.root, listed.url)
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise DataError(f"{path} is gone since it was indexed; {self._again()}") from error
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != (listed.size, listed.stamp):
            file.close()
            raise DataError(f"{path} is not what it was when it was indexed; {self._again()}")
        return index_shard(file, place_for(path.parent, self._index_cache) / f"{path.name}.npz"), file

    def _listed(self, shard: int) -> Shard:
        return Shard(self.index.name(shard), int(self.index.bytes[shard]), int(self.index.stamps[shard]))

    def _again(self) -> str:
        """How the set is indexed anew."""
        if self.index.root:
            return "start again, which indexes it anew"
        return f"write {self.path} again with `python -m encoders.data.index`"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}  # open files do not travel to loader workers


def _read_list(file: Path) -> SetIndex:
    found = SetIndex.load(file)
    if found is None:
        raise DataError(f"{file} is no list of shards; write it with `python -m encoders.data.index URL... --out FILE`")
    return found
