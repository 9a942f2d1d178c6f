"""AdamW as the recipes state it, and a learning rate that is a pure function of the step."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from train.config import OptimConfig


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: weights of linear and convolution layers decay, everything else does not
    (embeddings, position tables, learnable tokens, norms, biases, temperature)."""
    matrices = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for parameter in [module.weight]
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p not in matrices], "weight_decay": 0.0},
    ]


def build(groups: list[dict[str, Any]], config: OptimConfig) -> AdamW:
    """AdamW over parameter groups; a group's own `lr` wins over the config's."""
    groups = [{"lr": config.lr, "weight_decay": config.weight_decay, **group} for group in groups if group["params"]]
    for group in groups:
        group["peak_lr"] = group["lr"]
    return AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: int) -> float:
    """Set every group's rate for optimizer step `step` (from 0) of `steps`; returns the first group's."""
    factor = schedule(step, steps, warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then cosine to zero at `steps`; a factor in [0, 1]."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
