"""Where the samples of tars lie: read from headers once, kept in small numpy files, trusted while size and mtime stay.

One file per shard holds its members (tens of bytes a sample), loaded while the shard is in use; one file per set holds
names, sizes, stamps and counts, all that the order needs (tens of bytes a shard).
    python -m encoders.data.index FOLDER                  index a folder of tars before the first run does it
    python -m encoders.data.index URL... --out FILE       list shards that lie elsewhere; FILE is then the data set
"""

import argparse
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from encoders.data.tar_headers import Damage, Member, members
from encoders.errors import DataError, UsageError, run_command

VERSION = 2
FAULTS = ("", "duplicate key", "split key", "damaged tar")
FOLDER = ".index"
SET = "shards.npz"
SHARD_ARRAYS = {
    *("stamp", "suffixes", "damage", "keys", "key_ends", "faults"),
    *("member_ends", "suffix", "offsets", "sizes"),
}
SET_ARRAYS = {"version", "folder", "names", "name_ends", "bytes", "stamps", "counts"}
Track = Callable[[Sequence[Any]], Iterable[Any]]


class ShardIndex:
    """The samples of one tar: members by key and suffix. A key that comes twice, comes apart or is cut has a fault."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self._arrays = arrays
        self.suffixes: list[str] = arrays["suffixes"].tolist()
        self.damage = str(arrays["damage"])

    def __len__(self) -> int:
        return len(self._arrays["faults"])

    def key(self, place: int) -> str:
        return _piece(self._arrays["keys"], self._arrays["key_ends"], place)

    def fault(self, place: int) -> str:
        """Why the sample cannot be used, or an empty text."""
        return FAULTS[self._arrays["faults"][place]]

    def parts(self, place: int) -> dict[str, Member]:
        """Suffix -> member."""
        ends = self._arrays["member_ends"]
        rows = range(ends[place - 1] if place else 0, ends[place])
        names, offsets, sizes = (self._arrays[name] for name in ("suffix", "offsets", "sizes"))
        return {self.suffixes[names[row]]: Member(int(offsets[row]), int(sizes[row])) for row in rows}

    def save(self, file: Path, size: int, mtime: int) -> None:
        save_arrays(file, {**self._arrays, "stamp": np.array([VERSION, size, mtime])})

    @classmethod
    def load(cls, file: Path, size: int, mtime: int) -> "ShardIndex | None":
        """None if there is none for a shard of this size and time."""
        arrays = load_arrays(file, SHARD_ARRAYS)
        if arrays is None or arrays.pop("stamp").tolist() != [VERSION, size, mtime]:
            return None
        return cls(arrays)

    @classmethod
    def empty(cls, damage: str) -> "ShardIndex":
        """Of a shard in which nothing can be found."""
        return _packed({}, {}, damage)


def scan(stream: BinaryIO, length: int) -> ShardIndex:
    """Read a tar's headers. Damage is no error: every sample before it is there, and one with the fault says where."""
    samples: dict[str, dict[str, Member]] = {}
    faults: dict[str, str] = {}
    last, damage = "", ""
    try:
        for name, member in members(stream, length):
            key, suffix = split_name(name)
            if not key:
                continue
            if key in samples and suffix in samples[key]:
                faults[key] = "duplicate key"
            elif key in samples and key != last:
                faults.setdefault(key, "split key")
            samples.setdefault(key, {})[suffix] = member
            last = key
    except Damage as found:
        damage = str(found)
        hit = _hit(samples, found)
        samples.setdefault(hit, {})
        faults[hit] = "damaged tar"
    return _packed(samples, faults, damage)


def _hit(samples: dict[str, dict[str, Member]], damage: Damage) -> str:
    """The key that stands for a damage: of the cut member, of a last sample that is a picture only or lacks what the
    one before it has, or one of its own."""
    keys = list(samples)[-2:]
    if damage.member is not None and (key := split_name(damage.member)[0]):
        return key
    if keys and (len(samples[keys[-1]]) == 1 or set(samples[keys[-1]]) < set(samples[keys[0]])):
        return keys[-1]
    return f"after {keys[-1]}" if keys else "at its start"


def _packed(samples: dict[str, dict[str, Member]], faults: dict[str, str], damage: str) -> ShardIndex:
    suffixes = sorted({suffix for parts in samples.values() for suffix in parts})
    number = {suffix: i for i, suffix in enumerate(suffixes)}
    rows = [(number[suffix], *member) for parts in samples.values() for suffix, member in parts.items()]
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    keys, key_ends = pack(samples)
    return ShardIndex(
        {
            "suffixes": np.array(suffixes, dtype=np.str_),
            "damage": np.array(damage),
            "keys": keys,
            "key_ends": key_ends,
            "faults": np.array([FAULTS.index(faults.get(key, "")) for key in samples], dtype=np.uint8),
            "member_ends": np.cumsum([len(parts) for parts in samples.values()], dtype=np.uint32),
            "suffix": table[:, 0].astype(np.uint16 if len(suffixes) < 2**16 else np.uint32),
            "offsets": table[:, 1].copy(),
            "sizes": table[:, 2].copy(),
        }
    )


def split_name(member: str) -> tuple[str, str]:
    """(key, suffix) of a member as webdataset splits it: at the first dot of its last path part. Both are empty if the
    member is of no sample: hidden, as macOS's `._` files, or without a suffix."""
    folder, slash, name = member.removeprefix("./").rpartition("/")
    stem, dot, suffix = name.partition(".")
    if not stem or not dot:
        return "", ""
    return folder + slash + stem, suffix.lower()


class SetIndex:
    """The shards of a set: names (below `root`, or URLs), sizes in bytes, stamps, and numbers of samples.

    A stamp tells whether a shard is still the one that was indexed: the time of a local one, the version of a remote
    one (negative).
    """

    def __init__(self, root: str, arrays: dict[str, np.ndarray]):
        self.root, self._arrays = root, arrays
        self._folder = str(arrays["folder"])
        self.bytes, self.stamps, self.counts = (arrays[name] for name in ("bytes", "stamps", "counts"))

    @classmethod
    def of(cls, root: str, names: Sequence[str], rows: Sequence[tuple[int, int, int]] | np.ndarray) -> "SetIndex":
        """From (size, stamp, samples) of each shard, int64 (shards,3)."""
        folder, slash, _ = os.path.commonprefix(names).rpartition("/")  # noqa: RUF071 (names are URLs too)
        blob, ends = pack(name.removeprefix(folder + slash) for name in names)
        bytes_, stamps, counts = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        arrays = {"folder": np.array(folder + slash), "names": blob, "name_ends": ends, "bytes": narrow(bytes_)}
        return cls(root, {**arrays, "stamps": stamps.copy(), "counts": counts.copy()})

    def __len__(self) -> int:
        return len(self.counts)

    def name(self, shard: int) -> str:
        return self._folder + _piece(self._arrays["names"], self._arrays["name_ends"], shard)

    def fingerprint(self) -> str:
        """Equal for the same shards, wherever they lie and whenever they were copied there."""
        digest = hashlib.sha256()
        for array in (self._arrays["names"], self._arrays["name_ends"], self.bytes, self.counts):
            digest.update(array.tobytes() + b"\0")
        digest.update(np.minimum(self.stamps, 0).tobytes())  # versions, but no times
        return digest.hexdigest()

    def save(self, file: Path) -> None:
        save_arrays(file, {**self._arrays, "version": np.array(VERSION)})

    @classmethod
    def load(cls, file: Path, root: str = "") -> "SetIndex | None":
        """None if the file is not there or is no index of this version."""
        arrays = load_arrays(file, SET_ARRAYS)
        if arrays is None or arrays.pop("version").tolist() != VERSION:
            return None
        return cls(root, arrays)


def index_folder(folder: Path, cache: Path | None, track: Track = iter) -> SetIndex:
    """The index of a folder's tars; shards that are new or have changed are read. Raises DataError if there is none."""
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist; write scenes with `python -m encoders.data.scenes OUT`")
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat() for entry in entries if entry.name.endswith(".tar") and entry.is_file()}
    if not found:
        raise DataError(f"data folder {folder} holds no .tar shard; point the config's data section at one that does")
    where = place_for(folder, cache)
    known: dict[str, tuple[int, int, int]] = {}
    before = SetIndex.load(where / SET, str(folder))
    if before is not None:
        rows = np.stack([before.bytes, before.stamps, before.counts], axis=1).tolist()
        known = {before.name(shard): tuple(row) for shard, row in enumerate(rows)}
    names = sorted(found)
    stale = [name for name in names if known.get(name, ())[:2] != (found[name].st_size, found[name].st_mtime_ns)]
    for name in track(stale):
        with (folder / name).open("rb") as stream:
            count = len(index_shard(stream, where / f"{name}.npz"))
        known[name] = (found[name].st_size, found[name].st_mtime_ns, count)
    if before is None or stale or len(before) != len(names):
        before = SetIndex.of(str(folder), names, [known[name] for name in names])
        before.save(where / SET)
    if not before.counts.sum():
        raise DataError(f"the tars of data folder {folder} hold no sample")
    return before


def index_shard(stream: BinaryIO, file: Path) -> ShardIndex:
    """The index of an open tar: from `file`, or read now and kept there."""
    stat = os.fstat(stream.fileno())
    index = ShardIndex.load(file, stat.st_size, stat.st_mtime_ns)
    if index is None:
        index = scan(stream, stat.st_size)
        index.save(file, stat.st_size, stat.st_mtime_ns)
    return index


def place_for(folder: Path, cache: Path | None) -> Path:
    """Where a folder's index is kept: beside its shards, or in a cache folder if one is given or needed."""
    beside = folder / FOLDER
    if cache is None and os.access(beside if beside.exists() else folder, os.W_OK):
        return beside
    return (cache or user_cache()) / "index" / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]


def user_cache() -> Path:
    """The user's cache folder for this toolkit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "encoder-swap"


def pack(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Texts as one run of bytes (uint8) and where each ends."""
    encoded = [text.encode() for text in texts]
    blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    return blob, narrow(np.cumsum([len(text) for text in encoded], dtype=np.int64))


def narrow(numbers: np.ndarray) -> np.ndarray:
    """Numbers of at least 0 in 4 bytes each, if they fit."""
    return numbers.astype(np.uint32 if numbers.max(initial=0) < 2**32 else np.int64)


def _piece(blob: np.ndarray, ends: np.ndarray, place: int) -> str:
    return blob[ends[place - 1] if place else 0 : ends[place]].tobytes().decode()


def save_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz aside and rename it; processes and machines that do so at once write the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    try:
        with aside.open("xb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def load_arrays(file: Path, names: set[str]) -> dict[str, np.ndarray] | None:
    """An .npz of these arrays, never unpickled; None if it is missing, damaged or another, for it can be made again."""
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = dict(content)
    except Exception:  # numpy and zipfile fail in many ways
        return None
    return arrays if set(arrays) == names else None


def main() -> None:
    """Index what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m encoders.data.index", description=__doc__)
    parser.add_argument("shards", nargs="+", help="a folder of tars; with --out also URLs or patterns (*, {000..123})")
    parser.add_argument("--out", type=Path, help="file to write; give it as the path of a data set")
    parser.add_argument("--cache", type=Path, help="folder for the index of a folder that cannot be written to")
    options = parser.parse_args()
    from encoders.data.progress import bar
    from encoders.data.remote import index_urls

    if options.out is not None:
        found = index_urls(options.shards, bar("indexing"))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        found.save(options.out)
    elif len(options.shards) == 1 and Path(options.shards[0]).is_dir():
        found = index_folder(Path(options.shards[0]), options.cache, bar("indexing"))
    else:
        raise UsageError("shards that are not one folder of tars need --out FILE")
    print(f"{len(found):,} shards, {int(found.counts.sum()):,} samples, {int(found.bytes.sum()) / 2**30:,.2f} GiB")


if __name__ == "__main__":
    run_command(main)
