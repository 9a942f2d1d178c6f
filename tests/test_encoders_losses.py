"""Losses against open_clip and naive float64 loops; the captioner's mask against its definition."""

import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from encoders.captioner import Captioner, combination_mask
from encoders.config import CaptionerConfig
from encoders.losses import caption_loss, info_nce


def test_info_nce_and_gradients_equal_open_clip() -> None:
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(12, 16, dtype=torch.float64), dim=-1) for _ in range(2))
    scale = torch.tensor(14.3, dtype=torch.float64)
    results = []
    for loss in (info_nce, open_clip.ClipLoss()):
        inputs = [x.clone().float().requires_grad_() for x in (image, text, scale)]
        value = loss(*inputs)
        value.backward()
        results.append([value.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_logits_are_float32_under_autocast() -> None:
    image, text = (F.normalize(torch.randn(12, 16), dim=-1) for _ in range(2))
    scale = torch.tensor(90.0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = info_nce(image.bfloat16().float(), text.bfloat16().float(), scale)
    exact = info_nce(image.bfloat16().float(), text.bfloat16().float(), scale)
    assert rounded == exact


def test_caption_loss_is_the_mean_over_targets() -> None:
    logits, targets = torch.randn(7, 11), torch.randint(11, (7,))
    expected = -sum(logits[i].double().log_softmax(0)[targets[i]] for i in range(7)) / 7
    torch.testing.assert_close(caption_loss(logits, targets).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("condition", "learnable"), [(3, 4), (1, 1), (5, 2)])
def test_combination_mask_is_that_of_the_paper(condition: int, learnable: int) -> None:
    mask = combination_mask(condition, learnable)
    for i in range(condition + learnable):
        for j in range(condition + learnable):
            both_condition = i < condition and j < condition
            learnable_to_condition = i >= condition and j < condition
            causal = i >= condition and j >= condition and i >= j
            assert bool(mask[i, j]) == (both_condition or learnable_to_condition or causal)


@pytest.fixture
def captioner() -> Captioner:
    torch.manual_seed(1)
    return Captioner(CaptionerConfig(tokens=6, width=32, layers=2, heads=4), 24, 20, 50).double()


def test_captioner_sees_the_condition_and_nothing_later(captioner: Captioner) -> None:
    patches, states = torch.randn(2, 4, 24).double(), torch.randn(2, 5, 20).double()
    targets = torch.tensor([[7, 8, 2, -100, -100, -100], [9, 2, -100, -100, -100, -100]])
    logits, kept = captioner(patches, states, targets)
    assert kept.tolist() == [7, 8, 2, 9, 2]
    # Cutting the queries behind the last target is exact: a longer row elsewhere in the batch changes nothing.
    longer = torch.tensor([[7, 8, 2, 5, 5, 2], [9, 2, -100, -100, -100, -100]])
    torch.testing.assert_close(captioner(patches, states, longer)[0][[0, 1, 2, 6, 7]], logits)
    # Every patch and every text state but the class position is a condition.
    for place in range(4):
        moved = patches.clone()
        moved[:, place] += 1
        assert not torch.allclose(captioner(moved, states, targets)[0], logits)
    for place in range(5):
        moved = states.clone()
        moved[:, place] += 1
        same = torch.allclose(captioner(patches, moved, targets)[0], logits)
        assert same == (place == 4)


def test_two_processes_equal_one() -> None:
    """Loss and every gradient of the clips objective on 2 ranks x 4 pairs equal those on 1 rank x 8 pairs."""
    script = Path(__file__).parent / "two_process_step.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "largest gradient difference" in finished.stdout
