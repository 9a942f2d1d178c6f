"""CLIP: symmetric InfoNCE between the picture and one caption. With the web caption, the baseline arm of every swap."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from torch import Tensor

from encoders.config import ClipOptions, EncoderConfig
from encoders.data.captions import any_of
from encoders.data.pairs import Texts
from encoders.data.samples import Sample
from encoders.data.tokenizers import CaptionTokenizer
from encoders.losses import info_nce
from encoders.objective import Batch, Objective


class Clip(Objective):
    """Reads `images` (B,3,H,H), `text_ids` (B,L), `text_lengths`."""

    weights: Mapping[str, float] = MappingProxyType({"contrast": 1.0})

    @staticmethod
    def texts(sample: Sample, tokenizer: CaptionTokenizer, config: EncoderConfig, rng: np.random.Generator) -> Texts:
        name = (config.clip or ClipOptions()).caption
        caption = sample.web if name == "web" else any_of(sample, name, rng)
        return {"text_ids": tokenizer.encode(caption, config.text.length)}

    def encode(self, batch: Batch, sums: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        image = self.encode_image(batch["images"])
        return {"image": image, "text": self.encode_text(batch["text_ids"], batch["text_lengths"])}, {}

    def contrast(self, features: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"contrast": info_nce(features["image"], features["text"], scales["logit_scale"])}
