"""How a picture becomes the tower's square: mean, std, size, interpolation are the encoder's, geometry the recipe's.

`crop` (short side resized, centre kept) is a stock CLIPImageProcessor. `pad` (made square with the mean colour, nothing
cut off) is a stock LlavaImageProcessor with do_pad, which CLIPImageProcessor cannot say; transformers 4.57 and 5 have
both. The processor is saved with the LLaVA, so training and evaluation call the same one.
"""

from pathlib import Path
from typing import Any, Literal

from transformers import CLIPImageProcessor, LlavaImageProcessor, LlavaProcessor

from encoders.errors import ModelError

Geometry = Literal["crop", "pad"]
FILE = "preprocessor_config.json"


def read_image_processor(encoder: Path, image_size: int) -> CLIPImageProcessor:
    """The preprocessing that the encoder was trained with: it travels with the encoder, never a class default.

    Raises ModelError if the folder has none, or one for other than `image_size` pixels a side.
    """
    file = encoder / FILE
    if not file.is_file():
        raise ModelError(f"{encoder} has no {FILE}, so its mean, std and size are unknown")
    processor = CLIPImageProcessor.from_pretrained(encoder, local_files_only=True)
    crop = processor.crop_size
    if not processor.do_center_crop or (crop["height"], crop["width"]) != (image_size, image_size):
        raise ModelError(
            f"{file}: images are cropped to {crop['height']}x{crop['width']} (do_center_crop "
            f"{processor.do_center_crop}) but config.json has image_size {image_size}; export the encoder again"
        )
    return processor


def with_geometry(
    processor: CLIPImageProcessor | LlavaImageProcessor, geometry: Geometry
) -> CLIPImageProcessor | LlavaImageProcessor:
    """A processor of the same mean, std, size and interpolation that crops, or that pads to a square."""
    side = processor.crop_size["height"]
    settings: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": processor.resample,
        "do_center_crop": True,  # of a padded picture it takes all
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": processor.rescale_factor,
        "do_normalize": True,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
    }
    if geometry == "pad":
        return LlavaImageProcessor(do_pad=True, **settings)
    return CLIPImageProcessor(**settings)


def geometry_of(processor: CLIPImageProcessor | LlavaImageProcessor) -> Geometry:
    """What a processor does."""
    return "pad" if isinstance(processor, LlavaImageProcessor) and processor.do_pad else "crop"


def image_token_count(processor: LlavaProcessor) -> int:
    """Number of image tokens of one image: its patches, with the class token kept or dropped."""
    crop = processor.image_processor.crop_size
    patches = (crop["height"] // processor.patch_size) * (crop["width"] // processor.patch_size)
    dropped = 1 if processor.vision_feature_select_strategy == "default" else 0
    return patches + processor.num_additional_image_tokens - dropped
