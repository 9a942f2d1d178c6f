"""CLIP: symmetric InfoNCE between the image and its web caption. The baseline arm of every swap."""

import numpy as np
from torch import Tensor

from encoders.config import EncoderConfig
from encoders.data.shards import Sample
from encoders.data.tokenizers import CaptionTokenizer
from encoders.dual_encoder import DualEncoder
from encoders.losses import info_nce


class Clip(DualEncoder):
    """forward(batch) with `images` uint8 (B,3,H,H) and `web_ids` (B,L)."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `loss` (scalar) and figures to log."""
        scale = self.scale()
        loss = info_nce(self.encode_image(batch["images"]), self.encode_text(batch["web_ids"]), scale)
        return {"loss": loss, "logit_scale": scale.detach()}

    @staticmethod
    def texts(
        sample: Sample, tokenizer: CaptionTokenizer, config: EncoderConfig, rng: np.random.Generator
    ) -> dict[str, list[int]]:
        """The token ids that this objective draws from one sample."""
        return {"web_ids": tokenizer.encode(sample.web, config.text.length)}
