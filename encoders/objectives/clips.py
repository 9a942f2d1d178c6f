"""CLIPS (arXiv 2411.16828): web caption and a short piece of the synthetic one against the image, plus a captioner.

L = alpha * (InfoNCE(image, web) + InfoNCE(image, short piece)) / 2 + beta * L_gen (equations 1 to 5).
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from encoders.captioner import ClipsCaptioner
from encoders.config import ClipsOptions, EncoderConfig
from encoders.data.captions import any_of, cut
from encoders.data.pairs import Texts
from encoders.data.samples import Sample
from encoders.data.tokenizers import NO_TARGET, CaptionTokenizer
from encoders.dual_encoder import unit
from encoders.losses import info_nce
from encoders.objective import Batch, Objective


class Clips(Objective):
    """Reads `images` (B,3,H,H), `web_ids` and `piece_ids` (B,L) with lengths, `targets` (B,Q; -100: none)."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        options = config.clips or ClipsOptions()
        self.weights = {"contrast": options.alpha, "caption": options.beta}
        self.contrasted = {"both": ("web", "piece"), "web": ("web",), "synthetic": ("piece",)}[options.texts]
        self.captioner = None
        if config.captioner is not None:
            text = config.text
            self.captioner = ClipsCaptioner(
                config.captioner, config.vision.width, text.width, text.kind, text.vocab_size
            )

    @staticmethod
    def texts(sample: Sample, tokenizer: CaptionTokenizer, config: EncoderConfig, rng: np.random.Generator) -> Texts:
        """Where the synthetic caption has no sentence the web caption stands in for piece and target."""
        options = config.clips or ClipsOptions()
        caption = any_of(sample, "long", rng)
        piece = cut(options.cut, caption, tokenizer, options.cut_tokens, rng)
        web = tokenizer.words(sample.web)
        drawn: dict[str, list[int]] = {}
        if options.texts != "synthetic" or config.captioner is not None:
            drawn["web_ids"] = tokenizer.lay_out(web, config.text.length)
        if options.texts != "web":
            drawn["piece_ids"] = tokenizer.lay_out(piece or web, config.text.length)
        if config.captioner is not None:
            drawn["targets"] = tokenizer.encode_target(caption if piece else sample.web, config.captioner.tokens)
        return drawn

    def encode(self, batch: Batch, sums: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        patch_tokens, image = self.vision(self.normalise(batch["images"]))
        features = {"image": unit(image)}
        if "piece" in self.contrasted:
            features["piece"] = self.encode_text(batch["piece_ids"], batch["piece_lengths"])
        if self.captioner is None:
            if "web" in self.contrasted:
                features["web"] = self.encode_text(batch["web_ids"], batch["web_lengths"])
            return features, {}
        web = self.text.with_states(batch["web_ids"], batch["web_lengths"])
        if "web" in self.contrasted:
            features["web"] = unit(web.pooled)
        return features, {"caption": self.captioner(patch_tokens, web, batch["targets"])} if sums else {}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        return {"caption": (batch["targets"] != NO_TARGET).sum()} if self.captioner is not None else {}

    def contrast(self, features: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = [info_nce(features["image"], features[name], scales["logit_scale"]) for name in self.contrasted]
        return {"contrast": torch.stack(losses).mean()}
