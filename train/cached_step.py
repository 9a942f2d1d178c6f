"""An exact large contrastive batch on few devices: embeddings first, then the loss, then the gradients (GradCache,
arXiv 2101.06983). One more forward pass buys a batch of any size; the loss and every gradient are those of one big
batch.
"""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from encoders.objective import Cached, Objective

Batch = dict[str, Any]


def cached_step(
    model: Objective, module: nn.Module, micro_batches: list[Batch], accelerator: Accelerator
) -> dict[str, Tensor]:
    """Forward and backward passes of one optimizer step; `module` is `model`, possibly wrapped. Returns the figures of
    the whole batch, `loss` among them."""
    states, features = [], []
    with torch.no_grad(), accelerator.autocast():
        for batch in micro_batches:
            states.append(_random_state(accelerator.device))
            features.append(model.encode(batch, sums=False)[0])
    whole = {name: torch.cat([part[name] for part in features]).requires_grad_() for name in features[0]}
    scales = {name: scale.detach().requires_grad_() for name, scale in model.scales().items()}
    losses = model.contrast(whole, scales)
    model.total(losses).backward()

    share = len(micro_batches)
    terms = [model.terms(batch) for batch in micro_batches]
    rows = {name: _gradient(value).chunk(share) for name, value in whole.items()}
    own: dict[str, Tensor] = {}
    for place, batch in enumerate(micro_batches):
        cached = Cached(
            features={name: gradients[place] for name, gradients in rows.items()},
            scales={name: _gradient(scale) / share for name, scale in scales.items()},
            terms={name: torch.stack([counts[name] for counts in terms]).sum() for name in terms[0]},
        )
        _set_random_state(states[place], accelerator.device)
        with nullcontext() if place == share - 1 else accelerator.no_sync(module):
            output = module(batch, cached)
            accelerator.backward(output["loss"])
        for name in terms[0]:
            own[name] = own.get(name, torch.zeros_like(output[name])) + output[name]
    figures = {name: loss.detach() for name, loss in losses.items()} | own
    return {"loss": model.total(figures), **figures, **{name: scale.detach().clone() for name, scale in scales.items()}}


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
