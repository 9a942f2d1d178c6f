"""CoCa (arXiv 2205.01917) as the CLIPS paper compares with it: the same text, web or synthetic, contrasted and
captioned.

L = InfoNCE + caption_weight * next-token cross-entropy, each token from the picture and the tokens before it.
"""

import torch
from torch import Tensor

from encoders.captioner import CocaCaptioner
from encoders.config import EncoderConfig, MixOptions
from encoders.data.tokenizers import NO_TARGET
from encoders.dual_encoder import unit
from encoders.objective import Batch
from encoders.objectives.clipa import Clipa


class Coca(Clipa):
    """Reads what Clip reads; the captioner's targets are the text itself."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        assert config.captioner is not None  # EncoderConfig refuses coca without one
        self.weights = {"contrast": 1.0, "caption": (config.mix or MixOptions()).caption_weight}
        self.captioner = CocaCaptioner(config.captioner, config.vision.width, config.text.width, config.text.vocab_size)

    def encode(self, batch: Batch, sums: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        patch_tokens, image = self.vision(self.normalise(batch["images"]))
        text = self.text.with_states(batch["text_ids"], batch["text_lengths"])
        features = {"image": unit(image), "text": unit(text.pooled)}
        if not sums:
            return features, {}
        targets = next_tokens(batch["text_ids"], batch["text_lengths"])
        return features, {"caption": self.captioner(patch_tokens, text.states[:, :-1], targets)}

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        tokens = sum(length - 1 for length in batch["text_lengths"])
        return {"caption": torch.tensor(float(tokens), device=self.logit_scale.device)}


def next_tokens(input_ids: Tensor, lengths: list[int]) -> Tensor:
    """(B,L) -> (B,L-1): the id after each position, -100 from a row's last real token on."""
    places = torch.arange(1, input_ids.shape[1], device=input_ids.device)
    real = places < torch.tensor(lengths, device=input_ids.device)[:, None]  # (B,L-1)
    return input_ids[:, 1:].where(real, NO_TARGET)
