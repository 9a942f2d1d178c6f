"""Copies of remote shards in a bounded folder, fetched ahead of use.

All processes of a machine share the folder: one fetches a shard, the others wait for it.
"""

import fcntl
import hashlib
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

from encoders.data.index import ShardIndex, index_shard, user_cache
from encoders.data.remote import Shard, copy
from encoders.errors import DataError

FETCHERS = 4


class ShardCache:
    """Copies of remote shards in a folder of at most `gigabytes`; the least recently used go first.

    A copy is named by what it is a copy of, and has its name only when whole. Of the lock files, whose number is
    fixed, one is held by who fetches.
    """

    def __init__(self, folder: Path | None, gigabytes: float):
        self.folder = (folder or user_cache()) / "shards"
        self.room = int(gigabytes * 2**30)
        self._coming: deque[Shard] = deque()

    def opened(self, shard: Shard) -> tuple[ShardIndex, BinaryIO]:
        """The index and the open local copy of a shard, fetched if need be. What is open stays readable when it is
        removed to make room.

        Raises FileNotFoundError if there is no such shard, DataError if it cannot be fetched or has changed.
        """
        digest = hashlib.sha256(f"{shard.url} {shard.size} {shard.stamp}".encode()).hexdigest()[:32]
        file = self.folder / f"{digest}-{shard.size}.tar"
        stream = _open_copy(file, shard.size)
        if stream is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._lock(file)):
                stream = _open_copy(file, shard.size) or self._fetch(shard, file)
        return index_shard(stream, self._index(file)), stream

    def ahead(self, shards: Sequence[Shard]) -> None:
        """Fetch these in the background, in this order, as far as they fit beside those of the machine's other ranks;
        instead of what is left of the call before."""
        self._coming.clear()
        share = self.room // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        taken = accumulate(shard.size for shard in shards)
        self._coming = deque(shard for shard, total in zip(shards, taken, strict=True) if total <= share)
        for _ in range(FETCHERS):  # daemons: a process that is told to stop does not wait for them
            Thread(target=self._fetch_all, args=(self._coming,), daemon=True).start()

    def _fetch_all(self, coming: deque[Shard]) -> None:
        while True:
            try:
                shard = coming.popleft()
            except IndexError:
                return
            try:
                self.opened(shard)[1].close()
            except (FileNotFoundError, DataError):
                continue  # told when the shard is read

    def _fetch(self, shard: Shard, file: Path) -> BinaryIO:
        """Copy a shard to a file, whole or not at all. Its lock is held."""
        aside = file.with_suffix(".partial")
        self._reserve(shard.size, aside)
        try:
            copy(shard, aside)
            with _locked(self._room_lock()):  # or it might be removed before it is opened
                aside.replace(file)
                stream = _open_copy(file, shard.size)
                assert stream is not None
                return stream
        finally:
            aside.unlink(missing_ok=True)

    def _reserve(self, size: int, aside: Path) -> None:
        """Make room for one more file, and take it. If all room is taken by what is being fetched, wait."""
        if size > self.room:
            raise DataError(
                f"a shard of {size / 2**30:.3g} GiB does not fit into a cache of {self.room / 2**30:.3g} GiB; raise "
                "cache_gb"
            )
        while True:
            with _locked(self._room_lock()):
                if self._make_room(size, self._lock(aside)):
                    return aside.touch()
            time.sleep(0.2)

    def _make_room(self, size: int, mine: Path) -> bool:
        """Remove the least recently used copies until one more fits, and what dead processes left; whether it fits."""
        reserved = 0
        for aside in self.folder.glob("*.partial"):
            lock = self._lock(aside)
            if lock == mine or _is_free(lock):
                aside.unlink()
            else:
                reserved += int(aside.stem.partition("-")[2])
        copies = sorted((file.stat().st_atime_ns, file.stat().st_size, file) for file in self.folder.glob("*.tar"))
        free = self.room - reserved - sum(copy[1] for copy in copies)
        for _, bytes_, file in copies:
            if free >= size:
                break
            file.unlink()
            free += bytes_
        for index in self._index(self.folder).parent.glob("*.npz"):
            if not (self.folder / f"{index.stem}.tar").exists():
                index.unlink()
        return free >= size

    def _lock(self, file: Path) -> Path:
        return self.folder / f"{file.name[:2]}.lock"

    def _room_lock(self) -> Path:
        return self.folder / "room.lock"

    def _index(self, file: Path) -> Path:
        return self.folder / "index" / f"{file.stem}.npz"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_coming": deque()}


def _open_copy(file: Path, size: int) -> BinaryIO | None:
    """None if there is no whole copy. Its access time says when it was used last, on every file system."""
    try:
        stream = file.open("rb", buffering=0)
    except FileNotFoundError:
        return None
    stat = os.fstat(stream.fileno())
    if stat.st_size != size:
        stream.close()
        return None
    os.utime(stream.fileno(), ns=(time.time_ns(), stat.st_mtime_ns))
    return stream


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Only one process or thread of this machine at a time."""
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)  # closing is not enough: a child forked meanwhile has it open too


def _is_free(lock: Path) -> bool:
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(stream, fcntl.LOCK_UN)
        return True
