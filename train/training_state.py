"""Trainable parameters and optimizer state on disk: two safetensors files, or under FSDP2 one shard per rank by
torch.distributed.checkpoint. Either can be read into a model that is sharded otherwise, or not at all."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from encoders import manifest
from encoders.errors import UsageError
from train.sharding import is_sharded

MODEL, OPTIMIZER, SHARDS = "model.safetensors", "optimizer.safetensors", "shards"
STEP = "step"  # the one field of AdamW's state that has not its parameter's shape


def size(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that `write` will need, over all ranks."""
    tensors = [*parameters(model).values(), *optimizer_state(model, optimizer).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, main: bool) -> None:
    """Into `folder`, durably. Every rank must call it; without FSDP only the main one writes.

    Raises OSError, SafetensorError or CheckpointException.
    """
    if is_sharded(model):
        writer = dcp.FileSystemWriter(folder / SHARDS, sync_files=True)
        dcp.save({"model": parameters(model), "optimizer": optimizer_state(model, optimizer)}, storage_writer=writer)
        if main:
            manifest.fsync_directory(folder / SHARDS)
    elif main:
        save_file(_on_cpu(parameters(model)), folder / MODEL)
        save_file(_on_cpu(optimizer_state(model, optimizer)), folder / OPTIMIZER)


def read(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """From a folder whose hashes were found right: shards hold a pickled index. Every rank must call it.

    Raises UsageError if the trainable parameters are not this model's.
    """
    if (folder / SHARDS).is_dir():
        _read_shards(folder / SHARDS, model, optimizer, device)
        return
    targets = parameters(model)
    saved = load_file(folder / MODEL)
    _refuse_other_names(targets, saved)
    for name, value in saved.items():
        targets[name].copy_(_like(value.to(device), targets[name]))
    for name, value in load_file(folder / OPTIMIZER).items():
        owner, _, field = name.rpartition("/")
        value = value.to(device)
        _set_state(model, optimizer, owner, field, value if field == STEP else _like(value, targets[owner]))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name -> trainable parameter, sharing its memory."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """parameter/field -> tensor of the optimizer, sharing its memory."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        f"{name}/{field}": value
        for name, parameter in trainable.items()
        for field, value in optimizer.state[parameter].items()
    }


def _read_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    targets, states = parameters(model), {}
    _refuse_other_names(targets, {key.removeprefix("model."): None for key in stored if key.startswith("model.")})
    for key, description in stored.items():
        assert isinstance(description, TensorStorageMetadata)  # nothing else is written
        kind, _, name = key.partition(".")
        if kind == "model" and targets[name].shape != description.size:  # a scalar, which FSDP2 holds as a vector
            targets[name] = targets[name].view(description.size)
        elif kind == "optimizer":
            owner, _, field = name.rpartition("/")
            alike = field != STEP and isinstance(targets[owner], DTensor)
            states[name] = torch.zeros_like(targets[owner]) if alike else torch.zeros(description.size, device=device)
    dcp.load(
        {"model": targets, "optimizer": states},
        storage_reader=dcp.FileSystemReader(folder),
        no_dist=not dist.is_initialized(),
    )
    for name, value in states.items():
        owner, _, field = name.rpartition("/")
        alike = field != STEP and not isinstance(value, DTensor)
        _set_state(model, optimizer, owner, field, _like(value, model.get_parameter(owner)) if alike else value)


def _set_state(model: nn.Module, optimizer: torch.optim.Optimizer, owner: str, field: str, value: Tensor) -> None:
    optimizer.state[model.get_parameter(owner)][field] = value


def _like(value: Tensor, target: Tensor) -> Tensor:
    """A saved tensor in the shape and the sharding of the one that it belongs to."""
    value = value.reshape(target.shape)
    return distribute_tensor(value, target.device_mesh, target.placements) if isinstance(target, DTensor) else value


def _refuse_other_names(targets: dict[str, Tensor], saved: dict[str, Tensor] | dict[str, None]) -> None:
    if targets.keys() != saved.keys():
        odd = sorted(targets.keys() ^ saved.keys())[:3]
        raise UsageError(f"the checkpoint's trainable parameters are not this run's (for example {', '.join(odd)})")


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
