"""Image tower, text tower and temperature: what every contrastive objective shares, and what zero-shot evaluation uses.

Shapes: B batch, H image side, N patches, L text tokens, E joint embedding.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.config import EncoderConfig
from encoders.text import TextTower
from encoders.vision import VisionTower

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
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("mean", torch.tensor(config.preprocess.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.preprocess.std).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,H) -> pixel_values (B,3,H,H), float."""
        return (images.float() / 255 - self.mean) / self.std

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 (B,3,H,H) -> L2-normalised (B,E)."""
        return F.normalize(self.vision(self.normalise(images))[1].float(), dim=-1)

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """(B,L) -> L2-normalised (B,E)."""
        return F.normalize(self.text(input_ids)[1].float(), dim=-1)

    def resize(self, image_size: int) -> None:
        """Take pictures of another size from now on: position table and config change together."""
        self.vision.resize(image_size)
        self.config = replace(self.config, vision=self.vision.config)

    def scale(self) -> Tensor:
        """1/temperature, at most 100 as in CLIP: the parameter itself is held there, so that it can come back."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return self.logit_scale.exp()
