"""Zero-shot evaluation as pure functions of features. Retrieval here; used during training and after it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from encoders.errors import ModelError


def retrieval_ranks(image: Tensor, text: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Rank of the first hit for every query, image->text and text->image, each (n,) int64; 0 is a hit at 1.

    image, text: L2-normalised (n,E), row i of one belongs to row i of the other; captions: the n texts. Pictures that
    share a caption are hits for each other. A rank counts the candidates that are no hit and score higher than the best
    hit; ties go against the query. Raises ModelError if a feature is not finite.
    """
    if not (image.isfinite().all() and text.isfinite().all()):
        raise ModelError("the encoder gives features that are not finite; look at the run's last losses")
    group: dict[str, int] = {}
    labels = torch.tensor([group.setdefault(caption, len(group)) for caption in captions])
    hit = labels[:, None] == labels[None, :]  # (n,n), symmetric
    similarity = image.float().cpu() @ text.float().cpu().T
    return _ranks(similarity, hit), _ranks(similarity.T, hit)


def _ranks(similarity: Tensor, hit: Tensor) -> Tensor:
    best = similarity.masked_fill(~hit, -torch.inf).max(dim=1, keepdim=True).values
    return ((similarity >= best) & ~hit).sum(dim=1)


def recalls(i2t: Tensor, t2i: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries whose first hit is among the first k, both ways: {"i2t_r1": ..., "t2i_r10": ...}."""
    return {f"{way}_r{k}": (ranks < k).float().mean().item() for way, ranks in (("i2t", i2t), ("t2i", t2i)) for k in ks}


def chance_r1(captions: Sequence[str]) -> float:
    """R@1 of random guessing: the mean share of candidates that are a hit."""
    counts = [list(captions).count(caption) for caption in captions]
    return sum(counts) / len(counts) ** 2
