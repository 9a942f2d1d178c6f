"""Tiny objectives and random batches for them, shared by tests that compare gradients."""

from dataclasses import replace
from typing import Any

import torch

from encoders.config import (
    CaptionerConfig,
    ClipsOptions,
    DreamlipOptions,
    EncoderConfig,
    TextConfig,
    VisionConfig,
)

VISION = VisionConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_width=64)
BERT = TextConfig(vocab_size=40, length=8, width=32, layers=1, heads=2)
CLIP = replace(BERT, kind="clip", activation="gelu")
CAPTIONER = CaptionerConfig(tokens=6, width=32, layers=1, heads=2)
PAPER = replace(VISION, pre_norm=False, pool="mean", norm_after_pool=True, position_table="sincos2d", norm_eps=1e-6)

CONFIGS = {
    "clips": EncoderConfig(objective="clips", embed_dim=16, vision=PAPER, text=BERT, captioner=CAPTIONER),
    "clips cross": EncoderConfig(
        objective="clips",
        embed_dim=16,
        vision=VISION,
        text=replace(BERT, padding="reference"),
        captioner=replace(CAPTIONER, fusion="cross"),
        clips=ClipsOptions(texts="synthetic"),
    ),
    "coca": EncoderConfig(objective="coca", embed_dim=16, vision=VISION, text=CLIP, captioner=CAPTIONER),
    "dreamlip": EncoderConfig(
        objective="dreamlip", embed_dim=16, vision=VISION, text=CLIP, dreamlip=DreamlipOptions(k=3)
    ),
    "dreamlip batch": EncoderConfig(
        objective="dreamlip",
        embed_dim=16,
        vision=VISION,
        text=CLIP,
        dreamlip=DreamlipOptions(k=2, raw="pool", grouping_negatives="batch", grouping_norm="softmax"),
    ),
}
TEXTS = {"dreamlip": 4, "dreamlip batch": 2}


def random_batch(name: str, rows: int) -> dict[str, Any]:
    """A batch of CONFIGS[name] from torch's random state; texts and targets have unequal lengths."""
    config = CONFIGS[name]
    batch: dict[str, Any] = {"images": torch.randint(256, (rows, 3, 16, 16), dtype=torch.uint8)}
    slots = config.text.length
    if config.objective == "clips":
        for key in ("web", "piece"):
            batch[f"{key}_ids"] = torch.randint(5, 40, (rows, slots))
            batch[f"{key}_lengths"] = torch.randint(4, slots + 1, (rows,)).tolist()
        batch["targets"] = torch.randint(5, 40, (rows, CAPTIONER.tokens))
        for row, length in enumerate(torch.randint(1, CAPTIONER.tokens + 1, (rows,)).tolist()):
            batch["targets"][row, length:] = -100
    else:
        texts = TEXTS.get(name)
        batch["text_ids"] = torch.randint(5, 40, (rows, slots) if texts is None else (rows, texts, slots))
        batch["text_lengths"] = torch.randint(4, slots + 1, (rows * (texts or 1),)).tolist()
    return batch


def part(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Some rows of a batch."""
    whole = len(batch["images"])
    first, last = rows.start, rows.stop
    return {
        name: value[first * len(value) // whole : last * len(value) // whole]
        if name.endswith("lengths")
        else value[rows]
        for name, value in batch.items()
    }
