"""CLIPS (arXiv 2411.16828): web caption and a short piece of the synthetic one against the image, plus a captioner.

L = (InfoNCE(image, web) + InfoNCE(image, short piece)) / 2 + beta * L_gen.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from encoders.captioner import Captioner
from encoders.config import EncoderConfig
from encoders.data.captions import sentences, short_piece
from encoders.data.shards import Sample
from encoders.data.tokenizers import CaptionTokenizer
from encoders.dual_encoder import DualEncoder
from encoders.losses import caption_loss, info_nce


class Clips(DualEncoder):
    """forward(batch) with `images` uint8 (B,3,H,H), `web_ids`, `piece_ids` (B,L), `target_ids` (B,T; -100: none)."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        assert config.captioner is not None  # EncoderConfig refuses clips without one
        self.caption_weight = config.captioner.weight
        self.captioner = Captioner(config.captioner, config.vision.width, config.text.width, config.text.vocab_size)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `loss` (scalar) and figures to log."""
        patch_tokens, image = self.vision(self.normalise(batch["images"]))
        web_states, web = self.text(batch["web_ids"])
        _, piece = self.text(batch["piece_ids"])
        image, web, piece = (F.normalize(x.float(), dim=-1) for x in (image, web, piece))  # each (B,E)
        scale = self.scale()
        contrast = (info_nce(image, web, scale) + info_nce(image, piece, scale)) / 2
        generation = caption_loss(*self.captioner(patch_tokens, web_states, batch["target_ids"]))
        loss = contrast + self.caption_weight * generation
        figures = {"contrast": contrast.detach(), "caption": generation.detach(), "logit_scale": scale.detach()}
        return {"loss": loss, **figures}

    @staticmethod
    def texts(
        sample: Sample, tokenizer: CaptionTokenizer, config: EncoderConfig, rng: np.random.Generator
    ) -> dict[str, list[int]]:
        """The token ids that this objective draws from one sample: the web caption, a short piece of the long one, and
        the long one as target. Where it has no sentence the web caption stands in for piece and target."""
        assert config.captioner is not None
        web = tokenizer.words(sample.web)
        pieces = [tokenizer.words(sentence) for sentence in sentences(sample.long)]
        piece = short_piece(pieces, config.piece_tokens, rng)
        return {
            "web_ids": tokenizer.lay_out(web, config.text.length),
            "piece_ids": tokenizer.lay_out(piece or web, config.text.length),
            "target_ids": tokenizer.encode_target(sample.long if pieces else sample.web, config.captioner.tokens),
        }
