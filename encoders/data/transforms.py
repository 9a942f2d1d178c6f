"""JPEG bytes -> uint8 pixels. Training crops and colours are drawn from the generator handed in; evaluation equals the
exported image processor. Everything stays uint8 until the device."""

import math
import warnings

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode

from encoders.config import JitterConfig, PreprocessConfig

# torchvision 0.29 announces a move of its decoders to torchcodec; until they go it is byte-equal to Pillow and fastest.
warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")


def decode(image: bytes) -> Tensor:
    """JPEG or PNG bytes -> uint8 RGB (3,H,W). Raises RuntimeError for anything that is not a whole picture."""
    if not image:
        raise RuntimeError("the picture has no bytes")
    return decode_image(torch.frombuffer(bytearray(image), dtype=torch.uint8), mode=ImageReadMode.RGB)


def train_transform(image: Tensor, size: int, config: PreprocessConfig, rng: np.random.Generator) -> Tensor:
    """Random resized crop, then colour jitter if the config has one: uint8 (3,H,W) -> uint8 (3,size,size)."""
    top, left, height, width = _draw_crop(image.shape[1], image.shape[2], config, rng)
    mode = InterpolationMode(config.interpolation)
    crop = TF.resized_crop(image, top, left, height, width, [size, size], interpolation=mode, antialias=True)
    return crop if config.jitter is None else colour_jitter(crop, config.jitter, rng)


def colour_jitter(image: Tensor, config: JitterConfig, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue changed in random order with the config's probability, as torchvision's
    ColorJitter does; then, with a probability of its own, grey: uint8 (3,H,W) -> uint8 (3,H,W)."""
    if rng.random() < config.probability:
        order = rng.permutation(4)
        brightness, contrast, saturation = (
            rng.uniform(max(0.0, 1 - spread), 1 + spread)
            for spread in (config.brightness, config.contrast, config.saturation)
        )
        hue = rng.uniform(-config.hue, config.hue)
        for change in order:
            match change:
                case 0:
                    image = TF.adjust_brightness(image, brightness)
                case 1:
                    image = TF.adjust_contrast(image, contrast)
                case 2:
                    image = TF.adjust_saturation(image, saturation)
                case 3:
                    image = TF.adjust_hue(image, hue)
    if rng.random() < config.grey_probability:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    return image


def eval_transform(image: Tensor, size: int, config: PreprocessConfig) -> Tensor:
    """Short side to `size`, then the centre: uint8 (3,H,W) -> uint8 (3,size,size); CLIPImageProcessor's way."""
    resized = TF.resize(image, [size], interpolation=InterpolationMode(config.interpolation), antialias=True)
    return TF.center_crop(resized, [size, size])


def _draw_crop(
    height: int, width: int, config: PreprocessConfig, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) with area and aspect drawn from the config's ranges; if ten draws miss, the largest
    centred crop whose aspect is within the range, as in torchvision."""
    low, high = (math.log(aspect) for aspect in config.crop_aspect)
    for _ in range(10):
        area = height * width * rng.uniform(*config.crop_area)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    narrowest, widest = config.crop_aspect
    w, h = min(width, round(height * widest)), min(height, round(width / narrowest))
    return (height - h) // 2, (width - w) // 2, h, w
