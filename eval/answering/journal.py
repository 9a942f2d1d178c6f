"""The answers of a run that has not finished: appended batch by batch, each line durable before the next is asked.

They lie in a hidden folder beside the results folder, in one file per identity of the model; a line is good if its
checksum is. A killed run leaves at most one torn line, which the next one cuts off.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import encoders
import llava_adapter
from encoders import manifest
from encoders.errors import EvaluationIncomplete, UsageError

DIGEST = 16  # letters of a line's checksum


class Journal:
    """Lines by key. Later lines of a key replace earlier ones."""

    def __init__(self, file: Path) -> None:
        self.lines: dict[str, Any] = {}
        self.file = file
        known = file.read_bytes() if file.is_file() else b""
        good = 0
        for line in known.splitlines(keepends=True):
            digest, _, body = line.removesuffix(b"\n").partition(b" ")
            if not line.endswith(b"\n") or digest != _digest(body):
                break
            key, value = json.loads(body)
            self.lines[key] = value
            good += len(line)
        self._stream: IO[bytes] = file.open("ab")
        if good < len(known):
            self._stream.truncate(good)

    def append(self, key: str, value: Any) -> None:
        """Add a line and wait until the disk has it. Raises EvaluationIncomplete if it cannot take it."""
        body = json.dumps([key, value], ensure_ascii=False).encode()
        try:
            self._stream.write(_digest(body) + b" " + body + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise cannot_write(self.file, error) from error
        self.lines[key] = value

    def close(self) -> None:
        """Let the file go."""
        self._stream.close()


@contextmanager
def working_place(out: Path) -> Iterator[Path]:
    """The hidden folder of the run that will write `out`, for this process alone.

    Raises UsageError if it cannot be made, or another process is at it. Whoever finishes removes it with `clear`.
    """
    place = out.with_name(f".{out.name}.answers")
    try:
        (place / "images").mkdir(parents=True, exist_ok=True)
        opened = (place / "lock").open("a")
    except OSError as error:
        raise UsageError(f"answers cannot be kept beside {out} ({error}); choose another --out") from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another eval-mllm is writing {out}; wait for it or choose another --out") from error
        except OSError as error:
            raise UsageError(
                f"{place / 'lock'} cannot be locked against a second run ({error}); choose an --out on a "
                "file system with locks"
            ) from error
        yield place


def clear(place: Path) -> None:
    """Remove a working place whose answers are in a finished results folder."""
    shutil.rmtree(place, ignore_errors=True)


def cannot_write(file: Path, error: OSError) -> EvaluationIncomplete:
    """The error of a disk that is full, or was taken away."""
    return EvaluationIncomplete(
        f"cannot write {file}: {error}; make room and run the same command again, which goes on from what is written"
    )


def identity(model: Path, settings: Mapping[str, Any]) -> str:
    """Hash of what decides an answer besides the question: the model's folder by content (weights, processor, chat
    template, generation settings), how it is asked, the libraries, and our own code that loads and asks. What scores or
    compares answers leaves them as they are.

    Raises DataError if the folder has a manifest that is not true of it.
    """
    # In full: a copy may have the size and the time of other weights.
    sealed = manifest.verify(model, full=True).files if (model / manifest.MANIFEST).is_file() else {}
    digest = hashlib.sha256()
    for file in sorted(model.iterdir()):
        if file.suffix in FILES and file.name != manifest.MANIFEST:
            content = sealed[file.name].sha256 if file.name in sealed else manifest.fingerprint(file)
            digest.update(f"\0{file.name}\0{content}".encode())
    for part in CODE:
        for file in sorted(part.glob("*.py")) if part.is_dir() else [part]:
            digest.update(f"\0{file.name}\0{manifest.fingerprint(file)}".encode())  # wherever it is installed
    versions = manifest.library_versions() | {name: metadata.version(name) for name in LIBRARIES}
    digest.update(json.dumps([settings, versions], sort_keys=True).encode())
    return digest.hexdigest()


FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")  # of a model folder; not its logs or its card
LIBRARIES = ("tokenizers", "pillow", "datasets", "numpy", "jinja2")  # that prompts and pixels also come from
CODE = (
    Path(__file__).parent,
    Path(__file__).parent.parent / "benches" / "lmms_tasks.py",  # which picture a question shows
    Path(llava_adapter.__file__).parent / "save.py",
    Path(encoders.__file__).parent / "pretrained.py",
)


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:DIGEST].encode()
