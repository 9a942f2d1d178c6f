"""Checkpoints that survive a kill at any moment and a full disk: written aside, synced, hashed, renamed; only then are
old ones pruned.

A checkpoint holds what cannot be rebuilt: trainable parameters, optimizer state, random states of every rank, the step
(from which data position and learning rate follow) and the ledger.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from encoders import manifest
from encoders.errors import DataError, UsageError
from train import random_state, training_state
from train.config import FREE_RUN_KEYS
from train.ledger import Ledger
from train.tracking import tell

FOLDER = "checkpoints"
PARTIAL = ".partial"
SEAL = "seal.json"  # sha256 of the manifest, which holds those of all others
SLACK = 2**20  # bytes beside the tensors: random states, ledger, manifest


@dataclass
class Progress:
    """Where a run stands: optimizer steps done, and the state of its ledger."""

    step: int
    ledger: dict[str, Any]


def save(
    out: Path,
    step: int,
    ledger: Ledger,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    keep: int,
    accelerator: Accelerator,
) -> bool:
    """Write checkpoint `step`, then prune all but the newest `keep`. Every rank must call it, with its ledger gathered.

    Returns False, with a warning, if it could not be written (a full disk, say): what was there before is untouched.
    """
    folder = out / FOLDER
    final = folder / f"step-{step:08d}"
    aside = folder / f".{final.name}{PARTIAL}"
    main = accelerator.is_main_process

    def make_room() -> None:
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(f".*{PARTIAL}"):
            shutil.rmtree(leftover)
        needed, free = training_state.size(model, optimizer) + SLACK, shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"needs {needed / 2**20:.1f} MiB but only {free / 2**20:.1f} MiB are free")
        aside.mkdir()
        ledger.write()

    def write_random_state() -> None:
        save_file(random_state.capture(), aside / f"random-{accelerator.process_index:05d}.safetensors")

    def seal() -> None:
        manifest.write_json(aside / "progress.json", asdict(Progress(step, ledger.state())))
        manifest.seal(aside, "checkpoint", identity, files=_files(aside))
        manifest.write_json(aside / SEAL, manifest.fingerprint(aside / manifest.MANIFEST))
        if final.exists():  # a damaged checkpoint that the resume passed over
            _remove(final)
        aside.rename(final)
        manifest.fsync_directory(folder)
        manifest.fsync_directory(out)
        for old in [other for other in _complete(out) if other.name <= final.name][:-keep]:
            _remove(old)

    problem = (
        _together(accelerator, make_room if main else _nothing)
        or _together(accelerator, write_random_state)
        or _together(accelerator, lambda: training_state.write(aside, model, optimizer, main))
        or _together(accelerator, seal if main else _nothing)
    )
    if problem and main:
        shutil.rmtree(aside, ignore_errors=True)  # gives its space back; what stays is removed by the next save
        last = max((other.name for other in _complete(out)), default="none")
        tell(f"warning: checkpoint {final.name} was not written ({problem}); the last good one is {last}")
    return not problem


def newest(out: Path) -> Path | None:
    """The newest checkpoint whose files match their hashes, or None if there is no checkpoint at all.

    A damaged one is passed over with a warning. Raises DataError if all are damaged.
    """
    candidates = _complete(out)
    for checkpoint in reversed(candidates):
        try:
            _verify(checkpoint)
            return checkpoint
        except (DataError, OSError) as error:
            print(f"warning: {checkpoint.name} is damaged and is passed over: {error}")
    if candidates:
        raise DataError(f"every checkpoint in {out / FOLDER} is damaged; remove the folder to start again")
    return None


def _verify(checkpoint: Path) -> None:
    """Raise DataError if a byte of a checkpoint is not the one that was written."""
    seal = checkpoint / SEAL
    sealed = manifest.verify(checkpoint, full=True)
    if strange := sorted(set(_files(checkpoint)) - sealed.files.keys()):
        raise DataError(f"{checkpoint} holds {strange[0]}, which was not written with it")
    if (
        not seal.is_file()
        or seal.read_bytes() != f'"{manifest.fingerprint(checkpoint / manifest.MANIFEST)}"\n'.encode()
    ):
        raise DataError(f"{checkpoint / manifest.MANIFEST} is not the one that {seal} was written for")


def newest_for_all(out: Path, accelerator: Accelerator) -> Path | None:
    """`newest`, hashed once, by the main process, for all ranks. Every rank must call it."""
    found: list[Path | DataError | None] = [None]
    if accelerator.is_main_process:
        try:
            found = [newest(out)]
        except DataError as error:
            found = [error]
    [answer] = broadcast_object_list(found)
    if isinstance(answer, DataError):
        raise answer
    return answer


def load(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    accelerator: Accelerator,
) -> Progress:
    """Restore model, optimizer and this rank's random state from a checkpoint that `newest` returned.

    Raises UsageError if `identity` (config and data) is another run's.
    """
    refuse_another_run(checkpoint, manifest.read(checkpoint, "checkpoint").config, identity)
    training_state.read(checkpoint, model, optimizer, accelerator.device)
    random = checkpoint / f"random-{accelerator.process_index:05d}.safetensors"
    if random.is_file():
        random_state.restore(load_file(random))
    else:
        print(
            f"note: {checkpoint.name} has no random state for rank {accelerator.process_index}: more ranks than before"
        )
    return Progress(**json.loads((checkpoint / "progress.json").read_text()))


def refuse_another_run(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UsageError if `folder` was written by a run with other settings."""
    if differences := changed(before, now):
        raise UsageError(
            f"cannot resume {folder}: the config has changed: {'; '.join(differences)}; "
            "go back to the settings it began with, or choose another out"
        )


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that differ between two resolved configs, apart from those that cannot change a result."""
    old, new = _flat(before), _flat(json.loads(json.dumps(now, default=str)))
    free = tuple(f"run.{name}" for name in FREE_RUN_KEYS)
    names = sorted(name for name in old.keys() | new.keys() if not name.endswith(free))
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _files(checkpoint: Path) -> list[str]:
    """All files but manifest and seal. The index of shards is a hidden one, and a pickle: hashed like the rest."""
    files = (file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if file.is_file())
    return sorted(name for name in files if name not in (manifest.MANIFEST, SEAL))


def _complete(out: Path) -> list[Path]:
    return sorted((out / FOLDER).glob("step-*"))


def _remove(checkpoint: Path) -> None:
    """A kill while removing must not leave half a checkpoint under its name."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old{PARTIAL}")
    os.rename(checkpoint, aside)
    shutil.rmtree(aside)


def _together(accelerator: Accelerator, work: Callable[[], None]) -> str:
    """Do this rank's part. Returns, on every rank, the first complaint of any rank, or an empty string."""
    problem = ""
    try:
        work()
    except (OSError, SafetensorError, CheckpointException) as error:
        problem = f"rank {accelerator.process_index}: {error}"
    return next(filter(None, gather_object([problem])), "")


def _nothing() -> None:
    """The part of a rank that only waits."""


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
