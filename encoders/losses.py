"""Contrastive and captioning losses as pure functions. Every rank passes its own rows; the losses are over the global
batch, and the mean of the ranks' losses (as DDP averages gradients) is the loss of one big batch.

Shapes: B local batch, W ranks, E joint embedding, M labelled positions, V vocabulary.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All ranks' rows, in rank order; gradients of every rank flow back to the rows' owner."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """(B,E) of this rank -> (W*B,E) of all ranks, differentiable. Every rank must bring the same B."""
    return _Gather.apply(x) if _distributed() else x


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over the global batch (CLIPS equation 1). image, text: L2-normalised (B,E), row i of one
    belongs to row i of the other; logit_scale: the factor 1/temperature itself, not its logarithm."""
    rank = dist.get_rank() if _distributed() else 0
    labels = torch.arange(len(image), device=image.device) + rank * len(image)
    image, text = image.float(), text.float()
    with torch.autocast(image.device.type, enabled=False):  # bfloat16 logits would be rounded to sixteenths
        image_logits = logit_scale * image @ gather(text).T  # (B,E) x (E,W*B) -> (B,W*B)
        text_logits = logit_scale * text @ gather(image).T
    return (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2


def caption_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of (M,V) logits against (M,) targets, summed and divided by the targets in the global batch."""
    total = torch.tensor(float(len(targets)), device=logits.device)
    world = 1
    if _distributed():
        dist.all_reduce(total)
        world = dist.get_world_size()
    # DDP averages over ranks; the factor `world` makes that average the global sum over the global count.
    return F.cross_entropy(logits.float(), targets, reduction="sum") * world / total.clamp(min=1)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
