"""Bytes of a picture -> uint8 pixels. Training crops and colours are drawn from the generator handed in; evaluation
equals the exported image processor. Everything stays uint8 until the device."""

import io
import math
import re
import struct
import warnings

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode

from encoders.config import JitterConfig, PreprocessConfig

MAX_PIXELS = 2**25
"""Refused by the header alone, as the next two: so no picture takes more than 0.5 GiB or 2 seconds to decode."""
MAX_ASPECT = 100  # long side to short side: a resize that keeps it makes that many squares
MAX_SCANS = 32  # of a JPEG, each of which runs over the whole picture; encoders write up to 18
JPEG = b"\xff\xd8"
PNG = b"\x89PNG\r\n\x1a\n"
# JPEG markers that start a frame and hold its size, and those that stand alone, without a length.
FRAME_STARTS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
STANDALONE = frozenset(range(0xD0, 0xD9)) | {0x01}
SCAN = re.compile(rb"\xff\xda\0(\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # marker, length, components: no chance find

# torchvision 0.29 announces a move of its decoders to torchcodec, which is the same code and, for now, no faster:
# `python benchmarks/loader.py` compares them.
warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")


class PictureTooLarge(RuntimeError):
    """A picture whose size or number of scans would cost a decoder too much."""


def decode(image: bytes) -> Tensor:
    """JPEG, PNG or WebP bytes -> uint8 RGB (3,H,W), byte-equal to Pillow's `convert("RGB")`; 16-bit samples keep their
    high byte. Raises PictureTooLarge before decoding, RuntimeError for anything else that is not a whole picture; a
    JPEG must have its end marker."""
    height, width = picture_size(image)
    if height * width > MAX_PIXELS:
        raise PictureTooLarge(f"its header announces {width} x {height} pixels, more than {MAX_PIXELS}")
    if max(height, width) > MAX_ASPECT * min(height, width) > 0:
        raise PictureTooLarge(f"its header announces {width} x {height} pixels, sides of more than {MAX_ASPECT} : 1")
    if image.startswith(PNG):
        return _decode_png(image, height, width)
    if image.startswith(JPEG) and (scans := sum(1 for _ in SCAN.finditer(image))) > MAX_SCANS:
        raise PictureTooLarge(f"a JPEG of {scans} scans, more than {MAX_SCANS}")
    return decode_image(torch.frombuffer(bytearray(image), dtype=torch.uint8), mode=ImageReadMode.RGB)


def _decode_png(image: bytes, height: int, width: int) -> Tensor:
    """By Pillow: torchvision's decoder ends the process (SIGSEGV) at most damaged PNGs."""
    try:
        with Image.open(io.BytesIO(image), formats=["PNG"]) as picture:
            if picture.size != (width, height):  # nothing is decoded yet; Pillow takes the last of several headers
                raise ValueError(f"a second header announces {picture.width} x {picture.height} pixels")
            if picture.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip at 255
                grey = torch.from_numpy(np.asarray(picture, dtype=np.int32) >> 8).to(torch.uint8)
                return grey.expand(3, -1, -1)  # (H,W) -> (3,H,W)
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)  # (H,W,3) -> (3,H,W)
    except Exception as error:  # Pillow's, for a broken file: of every kind, AssertionError and IndexError among them
        raise RuntimeError(f"not a whole PNG ({error})") from error


def picture_size(image: bytes) -> tuple[int, int]:
    """(height, width) from the header of a JPEG, PNG or WebP. Raises RuntimeError if there is none.

    Reads what the decoders read: the first frame header of a JPEG, the first chunk of a PNG or WebP.
    """
    if not image:
        raise RuntimeError("the picture has no bytes")
    try:
        if image.startswith(JPEG):
            return _jpeg_size(image)
        if image.startswith(PNG):
            return _png_size(image)
        if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
            return _webp_size(image)
    except (IndexError, struct.error) as error:
        raise RuntimeError("the picture's header is cut") from error
    raise RuntimeError("neither a JPEG, a PNG nor a WebP picture")


def _png_size(image: bytes) -> tuple[int, int]:
    if image[8:16] != b"\0\0\0\x0dIHDR":
        raise RuntimeError("a PNG that does not begin with its header")
    width, height = struct.unpack_from(">II", image, 16)
    return height, width


def _jpeg_size(image: bytes) -> tuple[int, int]:
    place = 2
    while True:
        place = image.find(b"\xff", place)
        if place < 0:
            raise RuntimeError("a JPEG without a frame header")
        marker = image[place + 1]
        if marker in (0x00, 0xFF):  # a stuffed byte outside of any segment; a fill byte before a marker
            place += 1 if marker else 2
        elif marker in STANDALONE:
            place += 2
        elif marker in FRAME_STARTS:
            height, width = struct.unpack_from(">HH", image, place + 5)
            return height, width
        else:
            place += 2 + struct.unpack_from(">H", image, place + 2)[0]


def _webp_size(image: bytes) -> tuple[int, int]:
    kind = image[12:16]
    if kind == b"VP8X":  # extended: canvas size less one, 24 bits each
        return int.from_bytes(image[27:30], "little") + 1, int.from_bytes(image[24:27], "little") + 1
    if kind == b"VP8L":  # lossless: width and height less one, 14 bits each
        bits = struct.unpack_from("<I", image, 21)[0]
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind != b"VP8 ":  # which a decoder may take for a bare stream of another size
        raise RuntimeError(f"a WebP whose first chunk is {kind!r}")
    width, height = struct.unpack_from("<HH", image, 26)  # lossy: 14 bits each below two of scaling
    return height & 0x3FFF, width & 0x3FFF


def train_transform(image: Tensor, size: int, config: PreprocessConfig, rng: np.random.Generator) -> Tensor:
    """Random resized crop, then colour jitter if the config has one: uint8 (3,H,W) -> uint8 (3,size,size)."""
    top, left, height, width = _draw_crop(image.shape[1], image.shape[2], config, rng)
    # Only the crop is resized. Laid out as pixels (H,W,3) it takes the resize's fast path; a view of strides does not.
    crop = image[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    mode = InterpolationMode(config.interpolation)
    resized = TF.resize(crop, [size, size], interpolation=mode, antialias=True)
    return resized if config.jitter is None else colour_jitter(resized, config.jitter, rng)


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
    """Short side to `size` and the centre, or all squashed into the square: uint8 (3,H,W) -> uint8 (3,size,size);
    CLIPImageProcessor's way."""
    sides = [size, size] if config.resize == "squash" else [size]
    resized = TF.resize(image, sides, interpolation=InterpolationMode(config.interpolation), antialias=True)
    top, left = ((side - size) // 2 for side in resized.shape[-2:])  # torchvision's own rounds some up
    return TF.crop(resized, top, left, size, size)


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
