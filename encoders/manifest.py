"""The on-disk contract between stages: one directory, one `manifest.json`.

A manifest says what kind of artifact the directory holds, the resolved config that made it, the sha256 of every
file, the fingerprints of the parents it was made from, its metrics and the library versions. A directory without
a manifest is not finished. Nothing is ever decided from a path's name.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from encoders.errors import DataError, UsageError

MANIFEST = "manifest.json"
KINDS = ("scenes", "llm", "encoder-run", "encoder", "llava", "results", "checkpoint")
VERSIONED = ("torch", "torchvision", "transformers", "accelerate", "peft", "safetensors", "lmms-eval")


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact. `mtime_ns` only spares re-hashing; identity is the sha256."""

    sha256: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Parent:
    """An artifact or file this one was made from."""

    path: str
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """The content of a `manifest.json`."""

    kind: str
    config: dict[str, Any]
    files: dict[str, FileEntry]
    parents: dict[str, Parent] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""

    @property
    def fingerprint(self) -> str:
        """sha256 of the kind and of every file's name and content; dates, paths and versions play no part."""
        digest = hashlib.sha256(self.kind.encode())
        for name, entry in sorted(self.files.items()):
            digest.update(f"\0{name}\0{entry.sha256}".encode())
        return digest.hexdigest()


@dataclass
class Draft:
    """A directory that is being written: put files under `path`, figures into `metrics`."""

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)


@contextmanager
def create(
    out: Path, kind: str, config: Mapping[str, Any], parents: Mapping[str, Path] | None = None, overwrite: bool = False
) -> Iterator[Draft]:
    """Write an artifact aside and rename it to `out` once it is complete: readers never see half of it.

    Raises UsageError if `out` exists and is not empty, unless `overwrite` is set and it holds an artifact of this kind.
    """
    refuse_to_clobber(out, kind, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        draft = Draft(aside)
        yield draft
        seal(aside, kind, config, parents, draft.metrics)
        if out.exists():
            old = out.with_name(f".{out.name}.{os.getpid()}.old")
            out.rename(old)
            aside.rename(out)
            shutil.rmtree(old)
        else:
            aside.rename(out)
        fsync_directory(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_to_clobber(out: Path, kind: str, overwrite: bool) -> None:
    """Raise UsageError if writing an artifact of `kind` to `out` would destroy something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise UsageError(f"{out} exists and is not an artifact of this toolkit; choose another output directory")
    found = read(out).kind
    if found != kind:
        raise UsageError(f"{out} holds a {found!r} artifact, not {kind!r}; choose another output directory")
    if not overwrite:
        raise UsageError(f"{out} already holds a finished {kind!r} artifact; pass --overwrite to replace it")


def seal(
    path: Path,
    kind: str,
    config: Mapping[str, Any],
    parents: Mapping[str, Path] | None = None,
    metrics: Mapping[str, Any] | None = None,
    files: Iterable[str] | None = None,
) -> Manifest:
    """Hash the files under `path` (or only the relative names in `files`) and write its manifest: it is finished."""
    if kind not in KINDS:
        raise ValueError(f"unknown artifact kind {kind!r}; known: {', '.join(KINDS)}")
    names = sorted(files) if files is not None else _files_below(path)
    manifest = Manifest(
        kind=kind,
        config=json.loads(json.dumps(config, default=str)),
        files={name: _entry(path / name) for name in names},
        parents={role: Parent(str(p), fingerprint(p)) for role, p in (parents or {}).items()},
        metrics=dict(metrics or {}),
        versions=library_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_json(path / MANIFEST, _to_json(manifest))
    mode = (path / MANIFEST).stat().st_mode
    for name in names:
        (path / name).chmod(mode)  # safetensors writes 0600; an artifact is as readable as the umask says
    return manifest


def read(path: Path, kind: str | None = None) -> Manifest:
    """Read an artifact's manifest. Raises DataError if there is none, or if it is not of the wanted kind."""
    file = path / MANIFEST
    if not file.is_file():
        state = "does not exist" if not path.exists() else f"has no {MANIFEST}: its stage did not finish"
        raise DataError(f"{path} {state}; run the stage that writes it" + (f" (wanted: {kind!r})" if kind else ""))
    try:
        raw = json.loads(file.read_text())
        raw["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
        raw["parents"] = {role: Parent(**parent) for role, parent in raw["parents"].items()}
        manifest = Manifest(**raw)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a manifest ({error}); write the artifact again") from error
    if kind is not None and manifest.kind != kind:
        raise DataError(f"{path} holds a {manifest.kind!r} artifact where {kind!r} is needed")
    return manifest


def verify(path: Path, full: bool = False) -> Manifest:
    """Check an artifact's files against its manifest: by size and mtime, by sha256 where those differ or if `full`.

    Raises DataError naming the first file that is missing or changed.
    """
    manifest = read(path)
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise DataError(f"{file} is missing although {path / MANIFEST} lists it; write the artifact again")
        stat = file.stat()
        same = stat.st_size == entry.size and stat.st_mtime_ns == entry.mtime_ns
        if (full or not same) and (stat.st_size != entry.size or _sha256(file) != entry.sha256):
            raise DataError(f"{file} is not the file that {path / MANIFEST} describes; write the artifact again")
    return manifest


def fingerprint(path: Path) -> str:
    """Identity of an input: an artifact's fingerprint, a file's sha256, or for a foreign folder (an LLM from
    elsewhere) the names, sizes and times of its files and the content of those below 1 MiB."""
    if path.is_file():
        return _sha256(path)
    if (path / MANIFEST).is_file():
        return read(path).fingerprint
    if not path.is_dir():
        raise DataError(f"{path} does not exist")
    digest = hashlib.sha256()
    for name in _files_below(path):
        stat = (path / name).stat()
        content = _sha256(path / name) if stat.st_size < 2**20 else str(stat.st_mtime_ns)
        digest.update(f"\0{name}\0{stat.st_size}\0{content}".encode())
    return digest.hexdigest()


def write_json(file: Path, content: Any) -> None:
    """Write JSON so that after a crash the old or the new content is there, never a part."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with aside.open("w") as stream:
            json.dump(content, stream, indent=2, sort_keys=True)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_directory(file.parent)


def fsync_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide results, without importing them."""
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _files_below(path: Path) -> list[str]:
    """Hidden files (an index beside shards, a half-written file) are no content."""
    files = (p.relative_to(path) for p in path.rglob("*") if p.is_file())
    shown = (p.as_posix() for p in files if not any(part.startswith(".") for part in p.parts))
    return sorted(name for name in shown if name != MANIFEST)


def _entry(file: Path) -> FileEntry:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    stat = file.stat()
    return FileEntry(_sha256(file), stat.st_size, stat.st_mtime_ns)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "kind": manifest.kind,
        "config": manifest.config,
        "files": {name: vars(entry) for name, entry in manifest.files.items()},
        "parents": {role: vars(parent) for role, parent in manifest.parents.items()},
        "metrics": manifest.metrics,
        "versions": manifest.versions,
        "created": manifest.created,
    }
