"""What an objective is: towers, the texts it draws from a sample, and its losses in two parts.

`contrast` compares pictures with the whole global batch and needs only embeddings; `encode` also gives the losses that
a sample has by itself. The split is what lets a step cache embeddings and train an exact large batch on few devices.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoders.config import EncoderConfig
from encoders.data.pairs import Texts
from encoders.data.samples import Sample
from encoders.data.tokenizers import CaptionTokenizer
from encoders.dual_encoder import DualEncoder
from encoders.losses import per_term

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Cached:
    """What a second forward pass needs of the first: the contrastive loss' gradients, and terms of the other losses."""

    features: Mapping[str, Tensor]
    """Of this micro-batch' features."""
    scales: Mapping[str, Tensor]
    """Of the temperatures, as this micro-batch' share."""
    terms: Mapping[str, Tensor]
    """Of this rank's whole batch."""


class Objective(DualEncoder, ABC):
    """forward(batch) -> {"loss": scalar, ...figures to log}. A subclass says which texts, which features, which
    losses; what it learns is in parameters, as checkpoints keep nothing else."""

    weights: Mapping[str, float]
    """Loss name -> weight in the total."""

    @staticmethod
    @abstractmethod
    def texts(sample: Sample, tokenizer: CaptionTokenizer, config: EncoderConfig, rng: np.random.Generator) -> Texts:
        """The token ids drawn from one sample: `X_ids` (one text, or K) for the text tower, `targets` for a
        captioner."""

    @abstractmethod
    def encode(self, batch: Batch, sums: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(features that `contrast` compares, each with a row per picture; sums of the losses a picture has by itself).
        `sums` False leaves those out."""

    @abstractmethod
    def contrast(self, features: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses over the global batch."""

    def scales(self) -> dict[str, Tensor]:
        """Every learned number that `contrast` uses, ready to use (1/temperature, not its logarithm), by name."""
        return {"logit_scale": self.factor(self.logit_scale)}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """How many terms each of `encode`'s sums has; the same names."""
        return {}

    def forward(self, batch: Batch, cached: Cached | None = None) -> dict[str, Tensor]:
        """One batch' loss and figures. With `cached`, `loss` has the gradient of this micro-batch' share of a larger
        batch and the figures are those of its own sums."""
        features, sums = self.encode(batch)
        scales = self.scales()
        losses = {}
        if cached is None:
            with torch.autocast(
                self.logit_scale.device.type, enabled=False
            ):  # bfloat16 would round logits to sixteenths
                losses = self.contrast(features, scales)
        terms = self.terms(batch) if cached is None else cached.terms
        losses |= {name: per_term(total, terms[name]) for name, total in sums.items()}
        loss = self.total(losses)
        if cached is not None:
            for name, gradient in cached.features.items():
                loss = loss + (features[name] * gradient).sum()
            for name, gradient in cached.scales.items():
                loss = loss + scales[name] * gradient
        figures = {name: value.detach().clone() for name, value in (losses | scales).items()}
        return {"loss": loss, **figures}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum."""
        device = self.logit_scale.device
        return sum((self.weights[name] * loss for name, loss in losses.items()), torch.zeros((), device=device))
