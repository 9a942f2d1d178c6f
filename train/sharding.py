"""What FSDP2 needs of us: which layers to shard, parameters it can shard, and a whole model where a stage looks at one.

Its set-up is Accelerate's (train/profiles/fsdp2.yaml). Gathered parameters keep their own precision: autocast computes
in bfloat16 as it does under DDP, so both give the same model.
"""

import copy
import os

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def is_asked_for() -> bool:
    """Whether the launcher's profile is one of FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def plugin() -> FullyShardedDataParallelPlugin | None:
    """Accelerate's FSDP options as the launcher's profile set them; None without such a profile."""
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy()) if is_asked_for() else None


def layers(module: nn.Module) -> list[str]:
    """Class names of the repeated layers: whatever stands in a ModuleList. Each is gathered and freed by itself."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    return sorted({type(layer).__name__ for part in lists for layer in part})


def scalars_to_vectors(module: nn.Module) -> None:
    """FSDP2 takes no parameter without a dimension; a temperature becomes a vector of one."""
    for parameter in module.parameters():
        if parameter.dim() == 0:
            parameter.data = parameter.data.reshape(1)


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def enter_by(module: nn.Module, methods: tuple[str, ...]) -> None:
    """Let these methods gather parameters as `forward` does."""
    for name in methods:
        register_fsdp_forward_method(module, name)


def blueprint(module: nn.Module) -> nn.Module:
    """A copy without memory for its parameters, made before sharding, that `whole` can fill."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, memo=dict(empty))


def whole(sharded: nn.Module, plan: nn.Module, device: torch.device, keep: bool) -> nn.Module | None:
    """An ordinary module with the gathered parameters, on `device`; None on ranks that do not `keep` it.

    Every rank must call it. Needs the memory of the whole model where it is kept.
    """
    plain = copy.deepcopy(plan) if keep else None
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for name, parameter in sharded.named_parameters(remove_duplicate=False):
        if id(parameter) not in made:
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if plain is not None:
                value = full.detach().to(device).reshape(plain.get_parameter(name).shape)
                made[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
        if plain is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(owner), leaf, made[id(parameter)])
    return plain.to(device) if plain is not None else None
