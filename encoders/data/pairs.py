"""Samples -> training tensors. Every random draw is a function of (seed, epoch, sample id), so neither workers, ranks
nor a resume change what a sample looks like.

A bad sample's slot takes a spare (again a function of seed, epoch and id); what was bad, why, and which spare stood in
travels inside the batch to the ledger.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from encoders.config import EncoderConfig
from encoders.data.shards import BadSample, Sample, TarSamples
from encoders.data.tokenizers import CaptionTokenizer
from encoders.data.transforms import decode, eval_transform, train_transform
from encoders.errors import DataError

TextDraw = Callable[[Sample, CaptionTokenizer, EncoderConfig, np.random.Generator], dict[str, list[int]]]
SPARES = 10


class TrainingPairs(Dataset[dict[str, Any]]):
    """(epoch, sample id) -> one sample's `images` uint8 (3,H,H) and the objective's token ids."""

    def __init__(
        self, samples: TarSamples, config: EncoderConfig, tokenizer: CaptionTokenizer, texts: TextDraw, seed: int
    ):
        self.samples, self.config, self.tokenizer, self.texts, self.seed = samples, config, tokenizer, texts, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """Raises DataError if the sample and all of its spares are bad."""
        epoch, wanted = item
        spares = np.random.default_rng([self.seed, epoch, wanted, SPARES]).integers(len(self), size=SPARES)
        bad: list[dict[str, Any]] = []
        for index in (wanted, *(int(i) for i in spares)):
            try:
                example = self._load(epoch, index)
            except BadSample as error:
                bad.append({"reason": error.reason, "shard": error.shard, "key": error.key, "epoch": epoch})
                continue
            for report in bad:
                report["spare"] = self.samples.entries[index].key
            return {**example, "sample_id": index, "bad": bad}
        names = ", ".join(f"{report['shard']}/{report['key']} ({report['reason']})" for report in bad[:3])
        raise DataError(f"sample {wanted} and its {SPARES} spares are all bad: {names}, ...; check the shards")

    def _load(self, epoch: int, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, epoch, index])
        sample = self.samples[index]
        image = decode_sample(sample)
        pixels = train_transform(image, self.config.vision.image_size, self.config.preprocess, rng)
        return {"images": pixels, **self.texts(sample, self.tokenizer, self.config, rng)}


def decode_sample(sample: Sample) -> Tensor:
    """The sample's picture, uint8 (3,H,W). Raises BadSample if it does not decode."""
    try:
        return decode(sample.image)
    except RuntimeError as error:
        reason = str(error).split(": ")[-1].strip()
        raise BadSample("undecodable image", sample.shard, sample.key, reason) from error


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack pixels and ids; `sample_ids` and `bad` (reports) stay lists."""
    batch: dict[str, Any] = {"images": torch.stack([example["images"] for example in examples])}
    for name in examples[0]:
        if name.endswith("_ids"):
            batch[name] = torch.tensor([example[name] for example in examples])
    batch["sample_ids"] = [example["sample_id"] for example in examples]
    batch["bad"] = [report for example in examples for report in example["bad"]]
    return batch


@dataclass
class Ledger:
    """What the run saw: samples used, and every bad one by reason, shard and key. Saved with each checkpoint."""

    max_bad_fraction: float
    seen: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)

    def record(self, batch: dict[str, Any]) -> None:
        """Count a batch that is being trained on. Raises DataError above the allowed share of bad samples."""
        self.seen += len(batch["sample_ids"])
        self.bad.extend(batch["bad"])
        if len(self.bad) > self.max_bad_fraction * max(self.seen, 100):
            named = "; ".join(f"{r['shard']}/{r['key']}: {r['reason']}" for r in self.bad[-3:])
            raise DataError(
                f"{len(self.bad)} of {self.seen} samples are bad, more than data.max_bad_fraction "
                f"{self.max_bad_fraction} allows ({self.by_reason()}; last: {named}); mend the shards"
            )

    def by_reason(self) -> dict[str, int]:
        """Bad samples per reason."""
        reasons = [report["reason"] for report in self.bad]
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def evaluation_set(samples: TarSamples, config: EncoderConfig, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """Held-out pairs, whole: `images` uint8 (n,3,H,H), `short_ids` (n,L), `captions` and `keys` (lists).

    Raises DataError for a bad sample: an evaluation never replaces one.
    """
    images, ids, captions, keys = [], [], [], []
    for index in range(len(samples)):
        try:
            sample = samples[index]
            images.append(eval_transform(decode_sample(sample), config.vision.image_size, config.preprocess))
        except BadSample as error:
            raise DataError(f"held-out {error}; an evaluation set must be whole") from error
        ids.append(tokenizer.encode(sample.short, config.text.length))
        captions.append(sample.short)
        keys.append(sample.key)
    return {"images": torch.stack(images), "short_ids": torch.tensor(ids), "captions": captions, "keys": keys}
