"""Contrastive, grouping and captioning losses as pure functions. Every rank passes its own rows; the losses are over
the global batch, and the mean of the ranks' losses (as DDP averages gradients) is the loss of one big batch.

Nothing here holds a matrix of all pairs: what is large is computed in tiles, and again in the backward pass.
Shapes: B local batch, W ranks, E joint embedding, K texts, N patches, M labelled positions, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

TILE = 2**22  # numbers in the largest matrix that is held at a time: 16 MiB of float32
CUDA_TILE = 2**26  # 256 MiB: small products leave a GPU idle


def per_term(total: Tensor, terms: Tensor) -> Tensor:
    """A rank's sum of loss terms over the mean number of terms per rank: the mean over ranks of the result, as DDP
    averages gradients, is the mean over all terms. Every rank must call it."""
    terms = terms.to(total)
    if _distributed():
        dist.all_reduce(terms)
        terms = terms / dist.get_world_size()
    return total / terms.clamp(min=torch.finfo(terms.dtype).tiny)


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
    """(B,...) of this rank -> (W*B,...) of all ranks, differentiable. Every rank must bring the same B."""
    return _Gather.apply(x) if _distributed() else x


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over the global batch (CLIPS equation 1). image, text: L2-normalised (B,E), row i of one
    belongs to row i of the other; logit_scale: the factor 1/temperature itself, not its logarithm."""
    precise = torch.promote_types(image.dtype, torch.float32)  # bfloat16 logits would be rounded to sixteenths
    return _StreamedInfoNCE.apply(image.to(precise), gather(text.to(precise)), logit_scale.to(precise))


class _StreamedInfoNCE(torch.autograd.Function):
    """Each rank computes the logits of its own images against all texts, tile by tile, and keeps only their
    log-sum-exp; those of the columns are completed over ranks. The upstream gradient must be the same on every rank."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        first = dist.get_rank() * len(image) if _distributed() else 0
        own = texts[first : first + len(image)]
        rows = image.new_empty(len(image))
        columns = image.new_full((len(texts),), -torch.inf)
        with torch.autocast(image.device.type, enabled=False):
            for tile in tiles(len(image), len(texts), image.device):
                logits = scale * image[tile] @ texts.T  # (b,W*B)
                rows[tile] = logits.logsumexp(1)
                columns = torch.logaddexp(columns, logits.logsumexp(0))
                del logits
            positive = scale * (image * own).sum(1)  # (B,)
        columns = _logsumexp_over_ranks(columns)
        ctx.save_for_backward(image, texts, scale, rows, columns)
        ctx.first = first
        return (rows + columns[first : first + len(image)]).mean() / 2 - positive.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, texts, scale, rows, columns = ctx.saved_tensors
        image_grad, texts_grad = torch.empty_like(image), torch.zeros_like(texts)
        scale_grad = torch.zeros_like(scale)
        with torch.autocast(image.device.type, enabled=False):
            for tile in tiles(len(image), len(texts), image.device):
                logits = scale * image[tile] @ texts.T  # (b,W*B)
                slope = (logits - rows[tile, None]).exp_()
                slope += logits.sub_(columns).exp_()
                place = torch.arange(len(slope), device=slope.device)
                slope[place, place + ctx.first + tile.start] -= 2
                slope *= upstream / (2 * len(image))
                pull = slope @ texts  # (b,E)
                image_grad[tile] = scale * pull
                texts_grad.addmm_(slope.T, image[tile])
                scale_grad += (pull * image[tile]).sum()
                del logits, slope  # else the next tile's would be made beside them
        return image_grad, texts_grad.mul_(scale), scale_grad


def tiles(rows: int, columns: int, device: torch.device) -> list[slice]:
    """Slices of rows such that a matrix of one slice and all columns is of bearable size."""
    size = max((CUDA_TILE if device.type == "cuda" else TILE) // columns, 1)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logsumexp_over_ranks(x: Tensor) -> Tensor:
    if not _distributed():
        return x
    largest = x.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    total = (x - largest).exp()
    dist.all_reduce(total)
    return largest + total.log()


def multi_positive(image: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """DreamLIP's global loss: the mean over K texts per picture of the symmetric InfoNCE image <-> k-th text.
    image (B,E), texts (B,K,E), both L2-normalised."""
    return torch.stack([info_nce(image, text, logit_scale) for text in texts.unbind(1)]).mean()


def grouped_patches(patches: Tensor, texts: Tensor, norm: str, sigma: float) -> Tensor:
    """DreamLIP's grouping: for each sub-caption the sum of its picture's patches, weighted by similarity.

    patches (B,N,E) and texts (B,K,E), both L2-normalised -> (B,K,E), L2-normalised. Similarities are normalised over
    the patches by `norm` (minmax or softmax), set to 0 below `sigma` (negative: 1/N) and divided by their sum."""
    patches = patches.to(texts.dtype)
    similarity = texts @ patches.mT  # (B,K,E) x (B,E,N) -> (B,K,N)
    if norm == "minmax":
        low, high = similarity.amin(-1, keepdim=True), similarity.amax(-1, keepdim=True)
        weight = (similarity - low) / _or_one(high - low)
    else:
        weight = similarity.softmax(-1)
    weight = weight.where(weight >= (sigma if sigma >= 0 else 1 / patches.shape[1]), 0.0)
    weight = weight / _or_one(weight.sum(-1, keepdim=True))
    return F.normalize(weight @ patches, dim=-1)  # (B,K,N) x (B,N,E) -> (B,K,E)


def _or_one(divisor: Tensor) -> Tensor:
    """Where there is nothing to divide by (all patches alike, or all below sigma) the weights stay 0, without NaNs."""
    return divisor.where(divisor > 0, 1.0)


def grouped(patches: Tensor, texts: Tensor, norm: str, sigma: float) -> Tensor:
    """`grouped_patches`, a few pictures at a time: neither patch tokens in float32 nor weights are held for the batch.
    patches (B,N,E) need not be normalised."""
    size = max(TILE // patches[0].numel(), 1)

    def group(some_patches: Tensor, some_texts: Tensor) -> Tensor:
        with torch.autocast(some_patches.device.type, enabled=False):
            return grouped_patches(F.normalize(some_patches.to(some_texts.dtype), dim=-1), some_texts, norm, sigma)

    parts = zip(patches.split(size), texts.split(size), strict=True)
    return torch.cat([recomputed(group, p, t) for p, t in parts])


def within_image(grouped_vectors: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE between the K grouped vectors and the K sub-captions of each picture, (B,K,E) both, summed over
    B*K sub-captions: the negatives of one are the other K-1 of its own picture."""
    batch, k = texts.shape[:2]
    labels = torch.arange(k, device=texts.device).expand(batch, k).flatten()
    with torch.autocast(texts.device.type, enabled=False):
        logits = logit_scale * grouped_vectors @ texts.mT  # (B,K,K)
        both = torch.cat([logits, logits.mT]).flatten(0, 1)  # (2*B*K,K)
        return F.cross_entropy(both, labels.repeat(2), reduction="sum") / 2


def caption_loss(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Summed cross-entropy of the head's logits for hidden (M,D) against targets (M,); the head has no bias. Logits are
    computed a chunk of positions at a time; all V of them for all M are never held."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _CaptionLoss.apply(hidden.to(dtype), head.weight.to(dtype), targets)


class _CaptionLoss(torch.autograd.Function):
    """The gradients are those of a sum, so the forward pass takes them while it has a chunk's logits; the backward pass
    only scales them. Matrix products are in the inputs' precision, softmax and sums over chunks in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight, dtype=precise)
        total = hidden.new_zeros((), dtype=precise)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in tiles(len(hidden), len(weight), hidden.device):
                logits = (hidden[chunk] @ weight.T).to(precise)  # (m,V)
                normaliser = logits.logsumexp(1)
                target = targets[chunk, None]
                total += (normaliser - logits.gather(1, target).squeeze(1)).sum()
                slope = logits.sub_(normaliser[:, None]).exp_()  # softmax, in the logits' place
                slope.scatter_add_(1, target, slope.new_full((1, 1), -1.0).expand_as(target))
                slope = slope.to(hidden.dtype)
                hidden_grad[chunk] = slope @ weight
                weight_grad += slope.T @ hidden[chunk]
                del logits, slope
        ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (upstream * hidden_grad).to(hidden_grad.dtype), (upstream * weight_grad).to(weight_grad.dtype), None


def recomputed(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    result: Tensor = checkpoint(function, a, b, use_reentrant=False, preserve_rng_state=False)
    return result


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
