"""Checkpoints that survive a kill at any moment: written aside, synced, hashed, renamed; only then are old ones pruned.

A checkpoint holds what cannot be rebuilt: trainable parameters, optimizer state, random states of every rank, the step
(from which the data position follows) and the ledger. Only safetensors and JSON.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from encoders import manifest
from encoders.errors import DataError, UsageError
from train.config import FREE_RUN_KEYS

FOLDER = "checkpoints"


@dataclass
class Progress:
    """Where a run stands: optimizer steps done, and the ledger of the samples seen."""

    step: int
    ledger: dict[str, Any]


def save(
    out: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    keep: int,
    accelerator: Accelerator,
) -> None:
    """Write checkpoint `step`, then prune all but the newest `keep`. Every rank must call it."""
    folder = out / FOLDER
    final = folder / f"step-{progress.step:08d}"
    aside = folder / f".{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    save_file(_random_state(), aside / f"random-{accelerator.process_index:05d}.safetensors")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_file(_trainable(model), aside / "model.safetensors")
        save_file(_optimizer_state(model, optimizer), aside / "optimizer.safetensors")
        manifest.write_json(aside / "progress.json", vars(progress))
        manifest.seal(aside, "checkpoint", config)
        if final.exists():  # a damaged checkpoint that the resume passed over
            shutil.rmtree(final)
        aside.rename(final)
        manifest.fsync_directory(folder)
        for old in [other for other in _complete(out) if other.name <= final.name][:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def newest(out: Path) -> Path | None:
    """The newest checkpoint whose files match their hashes, or None if there is no checkpoint at all.

    A damaged one is passed over with a warning. Raises DataError if all are damaged.
    """
    candidates = _complete(out)
    for checkpoint in reversed(candidates):
        try:
            manifest.verify(checkpoint, full=True)
            return checkpoint
        except DataError as error:
            print(f"warning: {checkpoint.name} is damaged and is passed over: {error}")
    if candidates:
        raise DataError(f"every checkpoint in {out / FOLDER} is damaged; remove the folder to start again")
    return None


def load(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    accelerator: Accelerator,
) -> Progress:
    """Restore model, optimizer and this rank's random state. Raises UsageError if the config asks for another run."""
    differences = changed(manifest.read(checkpoint, "checkpoint").config, config)
    if differences:
        raise UsageError(f"cannot resume {checkpoint}: the config has changed: {'; '.join(differences)}")
    device = str(accelerator.device)
    _restore(_trainable_parameters(model), load_file(checkpoint / "model.safetensors", device=device))
    _restore_optimizer(model, optimizer, load_file(checkpoint / "optimizer.safetensors", device=device))
    random = checkpoint / f"random-{accelerator.process_index:05d}.safetensors"
    if random.is_file():
        _set_random_state(load_file(random))
    else:
        print(
            f"note: {checkpoint.name} has no random state for rank {accelerator.process_index}: more ranks than before"
        )
    return Progress(**json.loads((checkpoint / "progress.json").read_text()))


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that differ between two resolved configs, apart from those that cannot change a result."""
    old, new = _flat(before), _flat(json.loads(json.dumps(now, default=str)))
    free = tuple(f"run.{name}" for name in FREE_RUN_KEYS)
    names = sorted(name for name in old.keys() | new.keys() if not name.endswith(free))
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _complete(out: Path) -> list[Path]:
    return sorted((out / FOLDER).glob("step-*"))


def _trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in _trainable_parameters(model).items()}


def _restore(parameters: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    if parameters.keys() != saved.keys():
        odd = sorted(parameters.keys() ^ saved.keys())[:3]
        raise UsageError(f"the checkpoint's trainable parameters are not this run's (for example {', '.join(odd)})")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{field}": value.detach().cpu().contiguous()
        for name, parameter in _trainable_parameters(model).items()
        for field, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    parameters = _trainable_parameters(model)
    for name, value in saved.items():
        parameter, _, field = name.rpartition("/")
        optimizer.state[parameters[parameter]][field] = value


def _random_state() -> dict[str, Tensor]:
    # Data order and augmentation carry their own generators; only torch's global ones (dropout) remain.
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
