"""Shards that lie elsewhere (any fsspec URL): listed once, then fetched whole into a bounded folder ahead of use.

All processes of a machine share the folder: one fetches, the others wait for it.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec

from encoders.data.index import SetIndex, Track, scan, user_cache
from encoders.data.samples import BadSample
from encoders.errors import DataError, UsageError

STATS = "_stats.json"
CHUNK = 500  # stats files that are read at once
TRIES = 4
FETCHERS = 4


def is_remote(name: str) -> bool:
    """Whether a shard's name is a URL."""
    return "://" in name


def index_urls(patterns: Sequence[str], track: Track) -> SetIndex:
    """List shards by URL, folder or pattern. A count comes from img2dataset's `_stats.json` beside the shard, or else
    from reading the shard. Raises UsageError for a URL that is none, DataError if nothing is there."""
    rows: dict[str, tuple[int, int, int]] = {}
    for pattern in patterns:
        filesystem, path = _filesystem(pattern)
        sizes = _listed(filesystem, path, pattern)
        stats = _stats_files(filesystem, sizes)
        paths = sorted(sizes)
        for chunk in track([paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]):
            files = [stats[path] for path in chunk if path in stats]
            read = filesystem.cat(files, on_error="return") if files else {}
            for path in chunk:
                count = _successes(stats[path], read[stats[path]]) if path in stats else _counted(filesystem, path)
                remote = is_remote(pattern)
                name = filesystem.unstrip_protocol(path) if remote else str(Path(path).resolve())
                # No time of a remote shard is kept: its size is checked when it is fetched.
                rows[name] = (sizes[path], 0 if remote else Path(path).stat().st_mtime_ns, count)
    return SetIndex.of("", list(rows), list(rows.values()))


def _listed(filesystem: Any, path: str, pattern: str) -> dict[str, int]:
    """Path -> bytes of the shards of a URL, folder or pattern."""
    single = None if "*" in path else _file_info(filesystem, path)
    if single is not None:
        found = {path: single}
    else:
        found = filesystem.glob(path if "*" in path else f"{path.rstrip('/')}/*.tar", detail=True)
    if not found:
        raise DataError(f"{pattern}: no shard there; give the URL of a tar, of a folder of tars, or a pattern with *")
    unsized = [name for name, info in found.items() if info["size"] is None]
    if unsized:
        raise DataError(f"{unsized[0]}: the server does not say how large it is, so a cut copy could not be told")
    return {name: info["size"] for name, info in found.items()}


def _file_info(filesystem: Any, path: str) -> dict[str, Any] | None:
    """What a file system says about a file; None if there is none."""
    try:
        info: dict[str, Any] = filesystem.info(path)
    except FileNotFoundError:
        return None
    return info if info["type"] == "file" else None


def _stats_files(filesystem: Any, shards: Iterable[str]) -> dict[str, str]:
    """Shard -> the file in which img2dataset counted it, where there is one."""
    wanted = {shard: f"{shard.removesuffix('.tar')}{STATS}" for shard in shards}
    if len(wanted) == 1:  # not every server can list
        return {shard: file for shard, file in wanted.items() if _file_info(filesystem, file) is not None}
    folders = {shard.rpartition("/")[0] for shard in shards}
    there = {file for folder in folders for file in filesystem.glob(f"{folder}/*{STATS}")}
    return {shard: file for shard, file in wanted.items() if file in there}


def _successes(file: str, content: bytes | Exception) -> int:
    try:
        if isinstance(content, Exception):
            raise DataError(f"{file} cannot be read: {content}")
        return int(json.loads(content)["successes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} does not say how many downloads were successes ({error!r}); remove it") from error


def _counted(filesystem: Any, path: str) -> int:
    """Samples of a shard without such a file. Not every server can seek, so it is fetched."""
    with TemporaryDirectory() as folder:
        filesystem.get_file(path, f"{folder}/shard.tar")
        with Path(folder, "shard.tar").open("rb") as stream:
            return len(scan(stream, Path(folder, "shard.tar").stat().st_size))


def _filesystem(url: str) -> tuple[Any, str]:
    if url.startswith("pipe:"):
        raise UsageError(f"{url}: commands are never run for data; give a URL that fsspec can open, such as s3://")
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        return found
    except (ValueError, ImportError) as error:
        raise UsageError(f"{url}: {error}") from error


class ShardCache:
    """Copies of remote shards in a folder of at most `gigabytes`; the least recently used go first."""

    def __init__(self, folder: Path | None, gigabytes: float):
        self.folder = (folder or user_cache()) / "shards"
        self.room = int(gigabytes * 2**30)
        self._pool: ThreadPoolExecutor | None = None

    def fetched(self, url: str, size: int) -> Path:
        """The local copy of a shard, fetched if need be.

        Raises BadSample if there is no such shard, DataError if it cannot be fetched or is not of this size.
        """
        file = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock")):
            if not (file.is_file() and file.stat().st_size == size):
                self._make_room(size, file)
                _fetch(url, size, file)
            os.utime(self._mark(file))  # in use; the copy's own time belongs to its index
        return file

    def ahead(self, shards: Sequence[tuple[str, int]]) -> None:
        """Fetch these (url, bytes) in the background, in this order, as far as they fit. What fails here is told when
        the shard is read."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")
        total = 0
        for url, size in shards:
            total += size
            if total <= self.room:
                self._pool.submit(self.fetched, url, size)

    def _make_room(self, size: int, wanted: Path) -> None:
        """Remove the least recently used copies until one more fits. An open one stays readable for who has it."""
        if size > self.room:
            raise DataError(
                f"a shard of {size / 2**30:.3g} GiB does not fit into a cache of {self.room / 2**30:.3g} GiB; raise "
                "cache_gb"
            )
        with _locked(self.folder / "room.lock"):
            copies = [
                (self._mark(file).stat().st_mtime, file.stat().st_size, file) for file in self.folder.glob("*.tar")
            ]
            taken = sum(bytes_ for _, bytes_, _ in copies)
            for _, bytes_, file in sorted(copies):
                if taken + size <= self.room:
                    return
                if file != wanted:
                    file.unlink()
                    taken -= bytes_

    @staticmethod
    def _mark(file: Path) -> Path:
        """The file whose time says when the copy was used last."""
        return file.with_suffix(".lock")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


def _fetch(url: str, size: int, file: Path) -> None:
    """Copy a URL to a file, whole or not at all; failures are tried again after 1, 2 and 4 seconds."""
    filesystem, path = _filesystem(url)
    aside = file.with_suffix(".partial")
    for attempt in range(TRIES):
        try:
            filesystem.get_file(path, str(aside))
            break
        except FileNotFoundError as error:
            raise BadSample("missing shard", url, "all", "it was there when it was indexed") from error
        except Exception as error:  # every protocol fails in its own way
            if attempt == TRIES - 1:
                raise DataError(
                    f"{url} cannot be fetched ({type(error).__name__}: {error}); go on with --resume"
                ) from error
            time.sleep(2**attempt)
    if aside.stat().st_size != size:
        raise DataError(f"{url} has {aside.stat().st_size} bytes, not {size} as when it was indexed; index it again")
    aside.replace(file)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Only one process or thread of this machine at a time."""
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
