"""Image tower, text tower and temperature: what every contrastive objective shares, and what zero-shot evaluation uses.

Shapes: B batch, H image side, N patches, L text slots, E joint embedding.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.config import EncoderConfig
from encoders.text import TextTower
from encoders.vision import VisionTower

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


class DualEncoder(nn.Module):
    """Two towers into one joint space. Images come as uint8 and are normalised here, on the device."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision, config.embed_dim)
        self.text = TextTower(config.text, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.register_buffer("mean", torch.tensor(config.preprocess.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.preprocess.std).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,H) -> pixel_values (B,3,H,H), float."""
        return (images.float() / 255 - self.mean) / self.std

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,H) -> L2-normalised (B,E)."""
        return unit(self.vision(self.normalise(images))[1])

    def encode_patches(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,H) -> patch tokens in the joint space, L2-normalised (B,N,E), row by row over the grid."""
        return unit(self.vision.project_patches(self.vision(self.normalise(images))[0]))

    def encode_text(self, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """(B,L) ids and B numbers of real tokens -> L2-normalised (B,E)."""
        return unit(self.text(input_ids, lengths))

    def resize(self, image_size: int) -> None:
        """Take pictures of another size from now on: position table and config change together."""
        self.vision.resize(image_size)
        self.config = replace(self.config, vision=self.vision.config)

    def factor(self, logit_scale: nn.Parameter) -> Tensor:
        """1/temperature. Where the config clamps it, the parameter itself is held at the bound, so that it can come
        back."""
        if self.config.clamp_logit_scale:
            with torch.no_grad():
                logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return logit_scale.exp().reshape(())  # FSDP2 holds it as a vector of one


def unit(x: Tensor) -> Tensor:
    """Last axis to length 1, in float32 or better."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
