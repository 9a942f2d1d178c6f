"""Whole training steps against open_clip's, the same weights, batch and precision on both sides, equal losses first.

    python benchmarks/training_step.py [--step clip|dreamlip|both] [--rounds 5] [--bf16]

clip: ViT-S/16, text padded to 77 on both sides, so nothing is packed. dreamlip: ViT-B/16 with K=8 sub-captions; ours is
packed, the rival is open_clip's CLIP with 9 texts padded to 77 and the losses computed densely, as published.
Both sides update with fused AdamW.
"""

import argparse

import open_clip
import torch
import torch.nn.functional as F
from measure import Bar, announce, check_equal, conclude, cpu_seconds, median_ratio
from rival import clip_config, open_clip_twin, optimizer_step, random_images, random_lengths, random_texts
from torch import Tensor, nn

from encoders.config import DreamlipOptions
from encoders.objectives import build
from encoders.objectives.dreamlip import Dreamlip

K = 8


class PaddedDreamlip(nn.Module):
    """DreamLIP as open_clip's trainer would run it: every text padded, every similarity matrix held."""

    def __init__(self, ours: Dreamlip):
        super().__init__()
        self.clip = open_clip_twin(ours)
        self.clip.visual.output_tokens = True
        self.grouping_scale = nn.Parameter(ours.grouping_scale.detach().clone())
        self.clip_loss = open_clip.ClipLoss()

    def forward(self, pixel_values: Tensor, ids: Tensor) -> Tensor:
        """(B,3,H,H) and (B,1+K,L) -> the loss."""
        pooled, tokens = self.clip.visual(pixel_values)
        image = F.normalize(pooled, dim=-1)
        patches = F.normalize(tokens @ self.clip.visual.proj, dim=-1)  # (B,N,E)
        texts = self.clip.encode_text(ids.flatten(0, 1), normalize=True).unflatten(0, ids.shape[:2])  # (B,1+K,E)
        scale = self.clip.logit_scale.exp()
        contrast = torch.stack([self.clip_loss(image, text, scale) for text in texts.unbind(1)]).mean()
        return contrast + self._grouping(patches, texts[:, 1:])

    def _grouping(self, patches: Tensor, texts: Tensor) -> Tensor:
        similarity = texts @ patches.mT  # (B,K,N)
        low, high = similarity.amin(-1, keepdim=True), similarity.amax(-1, keepdim=True)
        weight = (similarity - low) / (high - low)
        weight = weight / weight.sum(-1, keepdim=True)
        vectors = F.normalize(weight @ patches, dim=-1)  # (B,K,E)
        logits = self.grouping_scale.exp() * vectors @ texts.mT  # (B,K,K)
        labels = torch.arange(texts.shape[1]).repeat(len(texts))
        to_texts, to_vectors = logits.flatten(0, 1), logits.mT.flatten(0, 1)
        return (F.cross_entropy(to_texts, labels) + F.cross_entropy(to_vectors, labels)) / 2


def clip_step(images: int, rounds: int, bf16: bool) -> Bar:
    """Plain CLIP, nothing packed on either side."""
    model = build(clip_config("s16", 224, "reference"))
    twin, clip_loss = open_clip_twin(model), open_clip.ClipLoss()
    pictures, lengths = random_images(images, 224), random_lengths(images, 18, 77)
    batch = {"images": pictures, "text_ids": random_texts(lengths, model.config.text), "text_lengths": lengths}
    pixel_values = model.normalise(pictures)  # open_clip's loader gives these; ours are made within the step
    print(f"CLIP ViT-S/16, {images} images, text padded to 77 on both sides, {precision(bf16)}")
    steps = {
        "ours": optimizer_step(model, lambda: model(batch)["loss"], "cpu", bf16),
        "open_clip": optimizer_step(twin, lambda: clip_loss(*twin(pixel_values, batch["text_ids"])), "cpu", bf16),
    }
    check_equal("loss", steps["ours"](), steps["open_clip"](), 1e-2 if bf16 else 1e-5)
    seconds = cpu_seconds(steps, rounds)
    faster = median_ratio(seconds["open_clip"], seconds["ours"])
    return Bar("CLIP ViT-S/16 step over open_clip's, times as fast", faster, "at least", 0.97)


def dreamlip_step(images: int, rounds: int, bf16: bool) -> Bar:
    """DreamLIP, packed against padded."""
    model = build(clip_config("b16", 224, "packed", DreamlipOptions(k=K)))
    assert isinstance(model, Dreamlip)
    padded = PaddedDreamlip(model)
    pictures, lengths = random_images(images, 224), random_lengths(images * (1 + K), 20, 77)
    ids = random_texts(lengths, model.config.text).unflatten(0, (images, 1 + K))
    batch = {"images": pictures, "text_ids": ids, "text_lengths": lengths}
    pixel_values = model.normalise(pictures)
    mean = sum(lengths) / len(lengths)
    print(f"DreamLIP ViT-B/16 K={K}, {images} images, mean {mean:.1f} tokens of 77, {precision(bf16)}")
    steps = {
        "packed": optimizer_step(model, lambda: model(batch)["loss"], "cpu", bf16),
        "open_clip, padded": optimizer_step(padded, lambda: padded(pixel_values, ids), "cpu", bf16),
    }
    check_equal("loss", steps["packed"](), steps["open_clip, padded"](), 1e-2 if bf16 else 1e-5)
    seconds = cpu_seconds(steps, rounds)
    faster = median_ratio(seconds["open_clip, padded"], seconds["packed"])
    return Bar(f"DreamLIP K={K} ViT-B/16 step over open_clip-style padded, times as fast", faster, "at least", 1.6)


def precision(bf16: bool) -> str:
    return "bfloat16 autocast" if bf16 else "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=("clip", "dreamlip", "both"), default="both")
    parser.add_argument("--clip-images", type=int, default=8, help="batch of the clip step")
    parser.add_argument("--dreamlip-images", type=int, default=4, help="batch of the dreamlip step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast instead of in float32")
    options = parser.parse_args()
    announce()
    torch.manual_seed(0)
    bars = []
    if options.step != "dreamlip":
        bars.append(clip_step(options.clip_images, options.rounds, options.bf16))
    if options.step != "clip":
        bars.append(dreamlip_step(options.dreamlip_images, options.rounds, options.bf16))
    conclude(bars)


if __name__ == "__main__":
    main()
