"""DreamLIP (arXiv 2403.17007): several texts per picture, most of them sub-captions of long synthetic captions, and a
grouping loss that ties each sub-caption to the patches it speaks of.

L = multi-positive InfoNCE (global) + grouping_weight * grouping InfoNCE (sub-captions against grouped patches).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from encoders.config import DreamlipOptions, EncoderConfig
from encoders.data.captions import dreamlip_texts
from encoders.data.pairs import Texts
from encoders.data.samples import Sample
from encoders.data.tokenizers import CaptionTokenizer
from encoders.dual_encoder import INITIAL_LOGIT_SCALE, unit
from encoders.losses import grouped, info_nce, multi_positive, within_image
from encoders.objective import Batch, Objective


class Dreamlip(Objective):
    """Reads `images` (B,3,H,H), `text_ids` (B,K,L) and `text_lengths` (B*K). With raw: always the first of the K texts
    is the raw caption, which takes no part in the grouping."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.options = config.dreamlip or DreamlipOptions()
        self.weights = {"contrast": 1.0, "grouping": self.options.grouping_weight}
        if self.options.grouping_weight and self.options.own_temperature:
            self.grouping_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    @staticmethod
    def texts(sample: Sample, tokenizer: CaptionTokenizer, config: EncoderConfig, rng: np.random.Generator) -> Texts:
        captions = dreamlip_texts(sample, config.dreamlip or DreamlipOptions(), rng)
        return {"text_ids": [tokenizer.encode(caption, config.text.length) for caption in captions]}

    def encode(self, batch: Batch, sums: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        patch_tokens, image = self.vision(self.normalise(batch["images"]))
        ids = batch["text_ids"]
        texts = self.encode_text(ids.flatten(0, 1), batch["text_lengths"]).unflatten(
            0, ids.shape[:2]
        )  # (B*K,E) -> (B,K,E)
        features = {"image": unit(image), "texts": texts}
        if not self.options.grouping_weight or (not sums and self.options.grouping_negatives == "image"):
            return features, {}
        sub_captions = texts[:, self.first_drawn :]
        patches = self.vision.project_patches(patch_tokens)  # (B,N,E)
        vectors = grouped(patches, sub_captions, self.options.grouping_norm, self.options.sigma)  # (B,K,E)
        if self.options.grouping_negatives == "batch":
            return features | {"grouped": vectors}, {}
        return features, {"grouping": within_image(vectors, sub_captions, self._grouping_factor())}

    def contrast(self, features: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = {"contrast": multi_positive(features["image"], features["texts"], scales["logit_scale"])}
        if "grouped" in features:
            sub_captions = features["texts"][:, self.first_drawn :]
            scale = scales["grouping_scale" if self.options.own_temperature else "logit_scale"]
            losses["grouping"] = info_nce(features["grouped"].flatten(0, 1), sub_captions.flatten(0, 1), scale)
        return losses

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        if not self.options.grouping_weight or self.options.grouping_negatives == "batch":
            return {}
        rows, texts = batch["text_ids"].shape[:2]
        return {"grouping": torch.tensor(float(rows * (texts - self.first_drawn)), device=self.logit_scale.device)}

    def scales(self) -> dict[str, Tensor]:
        own = self.options.grouping_weight and self.options.own_temperature
        return super().scales() | ({"grouping_scale": self._grouping_factor()} if own else {})

    @property
    def first_drawn(self) -> int:
        """Texts before the K drawn ones."""
        return int(self.options.raw == "always")

    def _grouping_factor(self) -> Tensor:
        return self.factor(self.grouping_scale if self.options.own_temperature else self.logit_scale)
