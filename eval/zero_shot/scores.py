"""Zero-shot scores as pure functions of features: retrieval, classification, segmentation. Used during training and
after it. Features come L2-normalised.

Shapes: n pictures, m texts, C classes, T templates, W windows of one picture, g patches a side, E joint embedding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders.errors import ModelError

QUERIES = 1024  # ranked at once: bounds the memory, not the result
CLASSES = 32  # upsampled at once, likewise
IGNORED = -1  # a pixel that no score counts


def check_finite(*features: Tensor) -> None:
    """Raise ModelError if a feature is not finite."""
    if not all(feature.isfinite().all() for feature in features):
        raise ModelError("the encoder gives features that are not finite; look at the run's last losses")


def retrieval_hits(captions: Sequence[str], owners: Sequence[int] | None = None, shared: bool = True) -> Tensor:
    """Which text is a hit for which picture: (n,m) bool.

    captions: the m texts; owners: the picture 0..n-1 of each, by default text i belongs to picture i. A picture's own
    texts are hits. `shared` adds every text that reads like one of them, as generated captions often do; the published
    COCO and Flickr30k figures count own texts only.
    """
    group: dict[str, int] = {}
    texts = [group.setdefault(caption, len(group)) for caption in captions] if shared else range(len(captions))
    kind = torch.tensor(list(texts))
    owner = torch.arange(len(captions)) if owners is None else torch.tensor(owners)
    says = torch.zeros(int(owner.max()) + 1, int(kind.max()) + 1, dtype=torch.bool)  # (n, different texts)
    says[owner, kind] = True
    return says[:, kind]  # (n,m)


def retrieval_ranks(
    image: Tensor,
    text: Tensor,
    captions: Sequence[str],
    owners: Sequence[int] | None = None,
    shared: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rank of the first hit for every query, image->text (n,) and text->image (m,), int64; 0 is a hit at 1.

    image (n,E), text (m,E); `captions`, `owners` and `shared` say what a hit is, see `retrieval_hits`. A rank counts
    the candidates that are no hit and score no lower than the best hit, so ties go against the query. A rank below k
    is a hit at k as CLIP's papers count it: any of the picture's captions among the first k. Raises ModelError if a
    feature is not finite.
    """
    check_finite(image, text)
    hit = retrieval_hits(captions, owners, shared)
    image, text = image.float().cpu(), text.float().cpu()
    return _ranks(image, text, hit), _ranks(text, image, hit.T)


def _ranks(queries: Tensor, candidates: Tensor, hit: Tensor) -> Tensor:
    ranks = []
    for some, its_hits in zip(queries.split(QUERIES), hit.split(QUERIES), strict=True):
        similarity = some @ candidates.T
        best = similarity.masked_fill(~its_hits, -torch.inf).max(dim=1, keepdim=True).values
        ranks.append(((similarity >= best) & ~its_hits).sum(dim=1))
    return torch.cat(ranks)


def recalls(i2t: Tensor, t2i: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of queries whose first hit is among the first k, both ways: {"i2t_r1": ..., "t2i_r10": ...}."""
    return {
        f"{way}_r{k}": (ranks < k).double().mean().item() for way, ranks in (("i2t", i2t), ("t2i", t2i)) for k in ks
    }


def chance_r1(captions: Sequence[str], owners: Sequence[int] | None = None, shared: bool = True) -> float:
    """R@1 of random guessing, the same both ways: the mean share of candidates that are a hit."""
    hit = retrieval_hits(captions, owners, shared)
    return int(hit.count_nonzero()) / hit.numel()


def class_embeddings(prompts: Tensor) -> Tensor:
    """One embedding per class from those of its prompts: (C,T,E) -> their mean, normalised again, (C,E)."""
    check_finite(prompts)
    return F.normalize(prompts.float().mean(dim=1), dim=-1)


def accuracies(image: Tensor, classes: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """`top1`, `top5` and `class_mean` (top-1 per class, averaged over the classes that have pictures).

    image (n,E), classes (C,E), labels: the class 0..C-1 of each picture. Of classes that tie the first wins, as with
    argmax. Raises ModelError if a feature is not finite.
    """
    check_finite(image, classes)
    truth = torch.tensor(labels)[:, None]  # (n,1)
    scores = image.float().cpu() @ classes.float().cpu().T  # (n,C)
    own = scores.gather(1, truth)
    before = torch.arange(len(classes)) < truth
    ranks = ((scores > own) | ((scores == own) & before)).sum(dim=1)  # (n,)
    right = (ranks == 0).double()
    per_class = [right[truth[:, 0] == label].mean() for label in truth.unique()]
    return {
        "top1": right.mean().item(),
        "top5": (ranks < 5).double().mean().item(),
        "class_mean": torch.stack(per_class).mean().item(),
    }


def segment(patches: Tensor, classes: Tensor, places: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor:
    """The best class of every pixel, (h,w) int64: patches times classes, upsampled bilinearly, argmax.

    patches (W,g*g,E) row-major, classes (C,E). Window i is the square of side min(h,w) whose top left pixel is
    places[i]; together they cover the picture of `size` (h,w), and where they overlap their scores add up (all classes
    alike, so that the best of the sum is that of the mean).
    """
    check_finite(patches, classes)
    grid, side = round(patches.shape[1] ** 0.5), min(size)
    scores = (patches.float() @ classes.float().T).transpose(1, 2).unflatten(2, (grid, grid))  # (W,C,g,g)
    best = scores.new_full(size, -torch.inf)
    winner = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for first in range(0, len(classes), CLASSES):
        some = scores[:, first : first + CLASSES]
        canvas = scores.new_zeros(some.shape[1], *size)  # (some classes,h,w)
        for window, (top, left) in zip(some, places, strict=True):
            up = F.interpolate(window[None], (side, side), mode="bilinear", align_corners=False)[0]
            canvas[:, top : top + side, left : left + side] += up
        top_score, top_class = canvas.max(dim=0)
        better = top_score > best
        best, winner = torch.where(better, top_score, best), torch.where(better, first + top_class, winner)
    return winner


def confusion(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Counted pixels by true class (row) and predicted class (column), (C,C) int64; IGNORED ones are left out."""
    counted = truth != IGNORED
    cells = truth[counted] * classes + prediction[counted]
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes)


def mean_iou(matrix: Tensor) -> float:
    """Intersection over union, averaged over the classes that the labels show; `matrix` is of a whole set."""
    matrix = matrix.double()
    intersection = matrix.diagonal()
    union = matrix.sum(dim=0) + matrix.sum(dim=1) - intersection
    shown = matrix.sum(dim=1) > 0
    return (intersection[shown] / union[shown]).mean().item()


def chance_miou(matrix: Tensor) -> float:
    """Mean IoU of guessing every pixel at random, for the labels that `matrix` counts."""
    truth = matrix.sum(dim=1, keepdim=True).double()  # (C,1)
    return mean_iou((truth / len(matrix)).expand(-1, len(matrix)))
