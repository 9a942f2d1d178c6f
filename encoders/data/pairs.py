"""Samples -> training tensors. Every random draw is a function of (seed, epoch, sample id), so neither workers, ranks
nor a resume change what a sample looks like.

A bad sample's slot takes a spare (again a function of seed, epoch and id); what was bad, why, and which spare stood in
travels inside the batch to the ledger.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from encoders.config import EncoderConfig
from encoders.data.samples import BadSample, Sample, Samples
from encoders.data.tokenizers import NO_TARGET, CaptionTokenizer, pad_texts
from encoders.data.transforms import PictureTooLarge, decode, eval_transform, train_transform
from encoders.errors import DataError

Texts = Mapping[str, list[int] | list[list[int]]]
"""Unpadded ids of one sample: names ending in "_ids" hold one text or a list of K; "targets" the captioner's target."""
TextDraw = Callable[[Sample, CaptionTokenizer, EncoderConfig, np.random.Generator], Texts]
SPARES = (10, 40)  # from the same shard, from all
SPARE_DRAWS = 10  # tells the generator of spares from that of the sample's own draws


class TrainingPairs(Dataset[dict[str, Any]]):
    """(epoch, sample id) -> one sample's `images` uint8 (3,H,H) and the objective's unpadded token ids."""

    def __init__(
        self, samples: Samples, config: EncoderConfig, tokenizer: CaptionTokenizer, texts: TextDraw, seed: int
    ):
        self.samples, self.config, self.tokenizer, self.texts, self.seed = samples, config, tokenizer, texts, seed
        self._ends = np.cumsum(samples.sizes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """Raises DataError if the sample and all of its spares are bad."""
        epoch, wanted = item
        try:
            return {**self._load(epoch, wanted), "sample_id": wanted, "bad": []}
        except BadSample as error:
            found = error
        for spare in self._spares(epoch, wanted):
            try:
                example = self._load(epoch, spare)
            except BadSample:
                continue  # counted where it comes itself, once an epoch
            report = {"id": wanted, "reason": found.reason, "shard": found.shard, "key": found.key, "epoch": epoch}
            report |= {"spare": self.samples.key(spare), "spare_id": spare}
            return {**example, "sample_id": spare, "bad": [report]}
        raise DataError(f"sample {wanted} and its {sum(SPARES)} spares are all bad: {found}; check the data")

    def _spares(self, epoch: int, wanted: int) -> list[int]:
        """Samples that may stand in: first from the same shard, which is at hand, then from all."""
        rng = np.random.default_rng([self.seed, epoch, wanted, SPARE_DRAWS])
        shard = int(np.searchsorted(self._ends, wanted, side="right"))
        first = self._ends[shard] - self.samples.sizes[shard]
        near, anywhere = SPARES
        drawn = [*rng.integers(first, self._ends[shard], near), *rng.integers(len(self), size=anywhere)]
        return [int(spare) for spare in drawn]

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
    except PictureTooLarge as error:
        raise BadSample("oversized image", sample.shard, sample.key, str(error)) from error
    except RuntimeError as error:
        reason = str(error).split(": ")[-1].strip()
        raise BadSample("undecodable image", sample.shard, sample.key, reason) from error


def collate(examples: Sequence[Mapping[str, Any]], config: EncoderConfig) -> dict[str, Any]:
    """Examples of TrainingPairs -> a batch of B.

    `images` uint8 (B,3,H,H); for each X_ids, X_ids int64 (B,L) or (B,K,L) and X_lengths, a list of their numbers of
    real tokens (image-major); `targets` int64 (B, longest), -100 after a target's end; the lists `sample_ids` and
    `bad` (reports).
    """
    batch: dict[str, Any] = {"images": torch.stack([example["images"] for example in examples])}
    for name in examples[0]:
        texts = [example[name] for example in examples]
        if name.endswith("_ids"):
            several = isinstance(texts[0][0], list)  # K texts per image
            rows = [row for of_image in texts for row in of_image] if several else texts
            ids = pad_texts(rows, config.text)
            batch[name] = ids.unflatten(0, (len(texts), -1)) if several else ids  # (B*K,L) -> (B,K,L)
            batch[f"{name.removesuffix('_ids')}_lengths"] = [len(row) for row in rows]
        elif name == "targets":
            batch[name] = pad_sequence([torch.tensor(row) for row in texts], batch_first=True, padding_value=NO_TARGET)
    batch["sample_ids"] = [example["sample_id"] for example in examples]
    batch["bad"] = [report for example in examples for report in example["bad"]]
    return batch


def evaluation_set(samples: Samples, config: EncoderConfig, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """Held-out pairs, whole; the query is the sample's first short caption, or its web caption if it has none.

    `images` uint8 (n,3,H,H), `short_ids` (n,L); `short_lengths`, `captions` and `keys` are lists of n. Raises
    DataError for a bad sample: an evaluation never replaces one.
    """
    images, ids, captions, keys = [], [], [], []
    for index in range(len(samples)):
        try:
            sample = samples[index]
            images.append(eval_transform(decode_sample(sample), config.vision.image_size, config.preprocess))
        except BadSample as error:
            raise DataError(f"held-out {error}; an evaluation set must be whole") from error
        query = next(iter(sample.short.values()), sample.web)
        ids.append(tokenizer.encode(query, config.text.length))
        captions.append(query)
        keys.append(sample.key)
    return {
        "images": torch.stack(images),
        "short_ids": pad_texts(ids, config.text),
        "short_lengths": [len(row) for row in ids],
        "captions": captions,
        "keys": keys,
    }
