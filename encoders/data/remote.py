"""Shards that lie elsewhere (any fsspec URL): listed once with their sizes, versions and counts, then copied whole."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from random import SystemRandom
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import fsspec

from encoders.data.index import SetIndex, Track, scan
from encoders.errors import DataError, UsageError

STATS = "_stats.json"
CHUNK = 250  # shards that are counted between two steps of the progress bar
COUNTERS = 16
PAUSES = (1, 2, 4, 8, 16, 32, 64, 120)  # seconds between tries: four minutes, about
HOPELESS = (PermissionError, NotImplementedError, TypeError, ValueError)  # not tried again
NOT_THERE = (403, 404, 410)  # web status; 403 is what S3 says to those who may not list
VERSIONS = (  # what file systems call the version of a content, or else its time
    *("ETag", "etag", "md5Hash", "Content-MD5", "blob_id", "generation"),
    *("LastModified", "Last-Modified", "last_modified", "mtime", "created"),
)
T = TypeVar("T")


class Shard(NamedTuple):
    """A shard of a list: its URL, bytes, and which version of its content was listed."""

    url: str
    size: int
    stamp: int


class _Listed(NamedTuple):
    shard: Shard
    filesystem: Any
    path: str
    stats: str | None
    """The file in which img2dataset counted it, where there is one."""


def is_remote(name: str) -> bool:
    """Whether a shard's name is a URL."""
    return "://" in name


def index_urls(patterns: Sequence[str], track: Track) -> SetIndex:
    """List shards by URL, folder or pattern (*, {000..123}). A count comes from img2dataset's `_stats.json` beside the
    shard, or else from reading the shard. Raises UsageError for a URL that is none, DataError if nothing is there."""
    urls = [url for pattern in patterns for url in expanded(pattern)]
    with ThreadPoolExecutor(COUNTERS) as pool:
        found = {one.shard.url: one for listed in pool.map(_listed, urls) for one in listed}
        every = list(found.values())
        chunks = [every[i : i + CHUNK] for i in range(0, len(every), CHUNK)]
        counts = [count for chunk in track(chunks) for count in pool.map(_counted, chunk)]
    rows = [(one.shard.size, one.shard.stamp, count) for one, count in zip(every, counts, strict=True)]
    return SetIndex.of("", list(found), rows)


def expanded(pattern: str) -> list[str]:
    """A pattern's {000..123} written out; webdataset's notation."""
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span is None:
        return [pattern]
    first, last = span.groups()
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [pattern[: span.start()] + number + rest for number in numbers for rest in expanded(pattern[span.end() :])]


def copy(shard: Shard, file: Path) -> None:
    """Fetch a shard whole. Raises FileNotFoundError if it is not there any more, DataError if it cannot be fetched or
    is not what was listed."""
    filesystem, path = _filesystem(shard.url)

    def attempt() -> None:
        filesystem.get_file(path, str(file))
        info = _file_info(filesystem, path)
        if info is None:
            raise OSError("it was there and is not any more")
        if (info["size"], _stamp(info)) != (shard.size, shard.stamp):
            raise DataError(
                f"{shard.url} is not what it was when it was listed (then {shard.size} bytes, now {info['size']}); "
                "list the set again with `python -m encoders.data.index`"
            )
        if file.stat().st_size != shard.size:
            raise OSError(f"cut after {file.stat().st_size} of {shard.size} bytes")

    _retried(shard.url, attempt)


def _listed(pattern: str) -> list[_Listed]:
    """The shards of a URL, folder or pattern with *."""
    filesystem, path = _filesystem(pattern)
    infos = _retried(pattern, lambda: _infos(filesystem, path))
    if not infos:
        raise DataError(f"{pattern}: no shard there; give the URL of a tar, of a folder of tars, or a pattern with *")
    unsized = [name for name, info in infos.items() if info["size"] is None]
    if unsized:
        raise DataError(f"{unsized[0]}: the server does not say how large it is, so a cut copy could not be told")
    stats = _retried(pattern, lambda: _stats_files(filesystem, list(infos)))
    listed = []
    for name in sorted(infos):
        if is_remote(pattern):
            shard = Shard(filesystem.unstrip_protocol(name), infos[name]["size"], _stamp(infos[name]))
        else:
            shard = Shard(str(Path(name).resolve()), infos[name]["size"], Path(name).stat().st_mtime_ns)
        listed.append(_Listed(shard, filesystem, name, stats.get(name)))
    return listed


def _infos(filesystem: Any, path: str) -> dict[str, dict[str, Any]]:
    """Path -> what the file system says about it."""
    single = None if "*" in path else _file_info(filesystem, path)
    if single is not None:
        return {path: single}
    found: dict[str, dict[str, Any]] = filesystem.glob(
        path if "*" in path else f"{path.rstrip('/')}/*.tar", detail=True
    )
    return found


def _file_info(filesystem: Any, path: str) -> dict[str, Any] | None:
    """What a file system says about a file; None if there is none."""
    try:
        info: dict[str, Any] = filesystem.info(path)
    except FileNotFoundError as error:
        # fsspec calls every failure of a web server "not found"; the cause is what it was.
        if error.__cause__ is not None and vars(error.__cause__).get("status") not in NOT_THERE:
            raise OSError(repr(error.__cause__)) from error
        return None
    return info if info["type"] == "file" else None


def _stamp(info: dict[str, Any]) -> int:
    """The version of a content as a number; negative, so that it is no file's time."""
    version = next((info[name] for name in VERSIONS if info.get(name)), "")
    # A list and a file's own entry write the same version differently.
    version = str(version.timestamp()) if isinstance(version, datetime) else str(version).strip('"')
    return -1 - (int.from_bytes(hashlib.sha256(version.encode()).digest()[:8], "big") >> 1)


def _stats_files(filesystem: Any, shards: list[str]) -> dict[str, str]:
    """Shard -> the file in which img2dataset counted it, where there is one."""
    wanted = {shard: stats_of(shard) for shard in shards}
    if len(wanted) == 1:  # not every server can list
        return {shard: file for shard, file in wanted.items() if _file_info(filesystem, file) is not None}
    folders = {shard.rpartition("/")[0] for shard in shards}
    there = {file for folder in folders for file in filesystem.glob(f"{folder}/*{STATS}")}
    return {shard: file for shard, file in wanted.items() if file in there}


def stats_of(shard: str) -> str:
    """The file beside a shard in which img2dataset counts it."""
    return f"{shard.removesuffix('.tar')}{STATS}"


def _counted(listed: _Listed) -> int:
    """The number of samples of a shard."""
    file = listed.stats
    if file is None:
        return _retried(listed.shard.url, lambda: _counted_by_reading(listed.filesystem, listed.path))
    content = _retried(file, lambda: listed.filesystem.cat_file(file))
    try:
        return int(json.loads(content)["successes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} does not say how many downloads were successes ({error!r}); remove it") from error


def _counted_by_reading(filesystem: Any, path: str) -> int:
    """Not every server can seek, so the shard is fetched."""
    with TemporaryDirectory() as folder:
        filesystem.get_file(path, f"{folder}/shard.tar")
        with Path(folder, "shard.tar").open("rb") as stream:
            return len(scan(stream, os.fstat(stream.fileno()).st_size))


def _filesystem(url: str) -> tuple[Any, str]:
    if url.startswith("pipe:"):
        raise UsageError(f"{url}: commands are never run for data; give a URL that fsspec can open, such as s3://")
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        return found
    except (ValueError, ImportError) as error:
        raise UsageError(f"{url}: {error}") from error


def _retried(url: str, act: Callable[[], T]) -> T:
    """What `act` returns; its failures are tried again for some minutes. FileNotFoundError passes, as it is none."""
    pauses = iter(PAUSES)
    while True:
        try:
            return act()
        except (FileNotFoundError, DataError):
            raise
        except Exception as error:  # every protocol fails in its own way
            pause = next(pauses, None)
            if pause is None or isinstance(error, HOPELESS):
                raise DataError(f"{url} cannot be read ({type(error).__name__}: {error}); try again later") from error
        time.sleep(pause * SystemRandom().uniform(0.5, 1.5))  # not all ranks at once, nor from the run's own draws
