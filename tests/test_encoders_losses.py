"""Losses against open_clip and naive float64 loops that follow the papers' formulas term by term."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import two_process_step
from torch import Tensor, nn

from encoders import losses
from encoders.losses import caption_loss, grouped, grouped_patches, info_nce, multi_positive, within_image


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def naive_info_nce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Row by row: -log of the positive's share among all texts, and among all images."""
    total = torch.zeros((), dtype=image.dtype)
    for i in range(len(image)):
        to_texts = torch.stack([scale * image[i] @ text[j] for j in range(len(text))])
        to_images = torch.stack([scale * image[j] @ text[i] for j in range(len(text))])
        total = total - (to_texts[i] - to_texts.logsumexp(0) + to_images[i] - to_images.logsumexp(0)) / 2
    return total / len(image)


@pytest.fixture(params=[2**22, 20], ids=["one tile", "many tiles"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "TILE", request.param)


@pytest.mark.usefixtures("tile")
def test_info_nce_and_gradients_equal_open_clip_and_the_formula() -> None:
    torch.manual_seed(0)
    inputs = unit(12, 16), unit(12, 16), torch.tensor(14.3, dtype=torch.float64)
    exact = with_gradients(naive_info_nce, *inputs)
    for ours, naive in zip(with_gradients(info_nce, *inputs), exact, strict=True):
        torch.testing.assert_close(ours, naive, rtol=0, atol=1e-10)
    single = [x.float() for x in inputs]
    theirs = with_gradients(open_clip.ClipLoss(), *single)
    for ours, reference in zip(with_gradients(info_nce, *single), theirs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_logits_are_float32_under_autocast() -> None:
    image, text = unit(12, 16, dtype=torch.float32), unit(12, 16, dtype=torch.float32)
    scale = torch.tensor(90.0)
    exact = with_gradients(info_nce, image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = with_gradients(info_nce, image, text, scale)
    assert all(a.equal(b) for a, b in zip(rounded, exact, strict=True))


def test_multi_positive_is_the_mean_over_texts() -> None:
    torch.manual_seed(1)
    inputs = unit(5, 8), unit(5, 3, 8), torch.tensor(9.0, dtype=torch.float64)

    def naive(image: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        return sum(naive_info_nce(image, texts[:, k], scale) for k in range(3)) / 3

    for ours, theirs in zip(with_gradients(multi_positive, *inputs), with_gradients(naive, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def naive_grouping(patches: Tensor, texts: Tensor, norm: str, sigma: float) -> Tensor:
    """DreamLIP section 3.3, one weight at a time."""
    rows = []
    for v, t in zip(patches, texts, strict=True):
        row = []
        for sub_caption in t:
            s = [float(sub_caption @ patch) for patch in v]
            if norm == "minmax":
                s = [(x - min(s)) / (max(s) - min(s)) for x in s]
            else:
                s = [math.exp(x) / sum(math.exp(y) for y in s) for x in s]
            bound = sigma if sigma >= 0 else 1 / len(v)
            s = [x if x >= bound else 0.0 for x in s]
            mixed = sum(x / sum(s) * patch for x, patch in zip(s, v, strict=True))
            row.append(mixed / mixed.norm())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize(("norm", "sigma"), [("minmax", 0.0), ("minmax", 0.4), ("minmax", -1.0), ("softmax", -1.0)])
def test_grouping_is_that_of_the_paper(norm: str, sigma: float) -> None:
    torch.manual_seed(2)
    patches, texts = unit(3, 7, 8), unit(3, 4, 8)
    ours = grouped_patches(patches, texts, norm, sigma)
    torch.testing.assert_close(ours, naive_grouping(patches, texts, norm, sigma), rtol=0, atol=1e-10)


def test_grouping_a_few_pictures_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    patches, texts = torch.randn(5, 7, 8, dtype=torch.float64), unit(5, 4, 8)
    pull = torch.randn(5, 4, 8, dtype=torch.float64)

    def whole(p: Tensor, t: Tensor) -> Tensor:
        return (grouped_patches(F.normalize(p, dim=-1), t, "minmax", 0.1) * pull).sum()

    def streamed(p: Tensor, t: Tensor) -> Tensor:
        return (grouped(p, t, "minmax", 0.1) * pull).sum()

    expected = with_gradients(whole, patches, texts)
    monkeypatch.setattr(losses, "TILE", 2 * 7 * 8)
    for ours, theirs in zip(with_gradients(streamed, patches, texts), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_a_picture_of_equal_patches_has_a_grouping_without_nans() -> None:
    patches = unit(1, 1, 8).expand(2, 5, 8).clone().requires_grad_()
    texts = unit(2, 3, 8)
    grouped_patches(patches, texts, "minmax", 0.0).sum().backward()
    assert patches.grad is not None
    assert patches.grad.isfinite().all()


def test_grouping_contrast_within_the_image() -> None:
    torch.manual_seed(3)
    inputs = unit(3, 4, 8), unit(3, 4, 8), torch.tensor(14.0, dtype=torch.float64)

    def naive(vectors: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        return sum(4 * naive_info_nce(v, t, scale) for v, t in zip(vectors, texts, strict=True))

    for ours, theirs in zip(with_gradients(within_image, *inputs), with_gradients(naive, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("tile")
def test_caption_loss_is_the_sum_over_targets() -> None:
    torch.manual_seed(4)
    head = nn.Linear(6, 11, bias=False).double()
    hidden, targets = torch.randn(7, 6, dtype=torch.float64), torch.randint(11, (7,))

    def naive(h: Tensor) -> Tensor:
        return -sum((head.weight @ h[i]).log_softmax(0)[targets[i]] for i in range(7))

    expected = [*with_gradients(naive, hidden), head.weight.grad]
    head.zero_grad()
    ours = [*with_gradients(lambda h: caption_loss(h, head, targets), hidden), head.weight.grad]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    assert caption_loss(hidden[:0], head, targets[:0]).item() == 0  # a batch without any target


def test_two_processes_equal_one() -> None:
    """Loss and every gradient on 2 ranks equal those on 1, for objectives that between them use every loss; with and
    without cached features."""
    script = Path(__file__).parent / "two_process_step.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("largest gradient difference") == 2 * len(two_process_step.NAMES), finished.stdout
