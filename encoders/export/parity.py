"""The parity certificate: what an exported folder computes, loaded by transformers, against the source's own
implementation on fixed pictures, per dtype and layer.

Outputs are compared token by token; of a folded tower's hidden states each token's channel mean is taken away first
(fold.py) and the raw difference stated beside it. Shapes: B pictures, N patches, D width, E joint embedding.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoImageProcessor, CLIPVisionModel

from encoders.config import PreprocessConfig, VisionConfig
from encoders.errors import ParityError
from encoders.export.command import model_config
from encoders.export.image_head import image_embedding
from encoders.pretrained import load_strict
from encoders.sources.source import Source, evaluation_pixels
from encoders.vision import VisionTower

LAYERS = ("hidden_states[-2]", "last_hidden_state", "pooler_output")
EMBEDDING = "image_embeds"  # before it is normalised
HIDDEN = LAYERS[:2]
PICTURES = 2
MAX_RELATIVE_ERROR = 1e-5
"""float32: largest absolute difference over the largest activation."""
MIN_COSINE = 0.99999
"""float32: of any token."""
MAX_ROUNDING_RATIO = 2.0
"""bfloat16: the folder's RMS error against float32, over that of the source's own weights in bfloat16. The same weights
give 1; a fold rounds other numbers, but as many of them and no more coarsely."""
MAX_PIXEL_ERROR = 1e-4
"""Of the image processor, in units of the normalised picture; one step of 8 bits is about 0.015."""

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """What the exported folder has to compute."""

    vision: VisionConfig
    picture: Tensor
    """uint8 (3,H',W'), not square."""
    processed: Tensor
    """(1,3,H,W), normalised: the picture as the source itself makes pixels of it."""
    pixels: Tensor
    """(B,3,H,W), normalised."""
    float32: Outputs
    """By the source's own implementation."""
    bfloat16: Outputs
    """By our tower with the source's weights in bfloat16."""

    @property
    def folded(self) -> bool:
        """Whether the folder has to fold a missing norm."""
        return not self.vision.pre_norm


class TowerOutputs(nn.Module):
    """Our own tower's layers and embedding, as a module of its own so that it can run with other weights."""

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor, interpolate: bool = False) -> Outputs:
        """Normalised pixels (B,3,H,W) -> LAYERS and EMBEDDING."""
        output = self.tower.model(pixels, interpolate_pos_encoding=interpolate, output_hidden_states=True)
        return _layers(output) | {EMBEDDING: self.tower.embed(output.last_hidden_state)}


def expect(source: Source) -> Expected:
    """Run the source's implementation at its own resolution."""
    pixels = _pixels(source.tower, source.preprocess)
    with torch.inference_mode():
        picture = _picture(source.tower.config.image_size)
        return _expected(source, pixels, source.reference(pixels), picture, source.reference_pixels(picture))


def expect_resized(source: Source, image_size: int, hf: bool) -> tuple[Expected, dict[str, Any]]:
    """Resize `source.tower` in place and return what it computes then, after proving it at its own resolution.

    `hf` resizes as transformers does, and transformers is the reference. Also returns that first comparison.
    Raises UsageError if `image_size` is not a multiple of the patch size, ParityError if our tower is not the source's.
    """
    replace(source.tower.config, image_size=image_size)  # refuses a size that does not fit, before anything is run
    pixels = _pixels(source.tower, source.preprocess)
    tower = TowerOutputs(source.tower)
    with torch.inference_mode():
        reference = source.reference(pixels)
        proof = compare(reference, tower(pixels), folded=False)
        _refuse_float32(proof, "our reading of the source, before it is resized,")
        picture = _picture(source.tower.config.image_size)
        ours = evaluation_pixels(source.preprocess, source.tower.config.image_size, picture)
        _refuse_pixels(ours, source.reference_pixels(picture), "our reading of the source, before it is resized,")
        pixels = _normalised(fixed_images(image_size), source.preprocess)
        by_transformers = hf and source.tower.config.position_table == "learned"
        outputs = tower(pixels, interpolate=True) if by_transformers else {}
        source.tower.resize(image_size, "hf" if hf else "open_clip")
        outputs = outputs or tower(pixels)
        picture = _picture(image_size)
        processed = evaluation_pixels(source.preprocess, image_size, picture)
    return _expected(source, pixels, outputs, picture, processed), proof


def certify(expected: Expected, folder: Path) -> dict[str, Any]:
    """The content of parity.json: compare the folder, loaded by transformers, with what is expected of it.

    Raises ParityError above a bound, ModelError if a weight is missing, unexpected or of the wrong shape.
    """
    _check_config(expected, folder)
    _check_keys(folder)
    pixels_error = _check_processor(expected, folder)
    tower = load_strict(CLIPVisionModel, folder, torch.float32).eval()
    float32 = compare(expected.float32, _folder_outputs(folder, tower, expected.pixels), expected.folded)
    _refuse_float32(float32, f"{folder}")
    tower.bfloat16()
    bfloat16 = compare(expected.float32, _folder_outputs(folder, tower, expected.pixels), expected.folded)
    own = compare(expected.float32, expected.bfloat16, expected.folded)
    for name, layer in bfloat16.items():
        layer["source_rms_error"] = own[name]["rms_error"]
        layer["rounding_ratio"] = layer["rms_error"] / own[name]["rms_error"]
        if not layer["rounding_ratio"] <= MAX_ROUNDING_RATIO:
            raise ParityError(
                f"{folder} differs from its source at {name} in bfloat16: {layer}; allowed is {MAX_ROUNDING_RATIO} "
                "times the source's own rounding error"
            )
    return {
        "pictures": len(expected.pixels),
        "image_size": expected.pixels.shape[-1],
        "folded": expected.folded,
        "keys": {"missing": 0, "unexpected": 0},  # load_strict lets nothing else pass
        "pixels": {"max_abs_error": pixels_error, "bound": MAX_PIXEL_ERROR},
        "float32": {"bound": {"max_relative_error": MAX_RELATIVE_ERROR, "min_cosine": MIN_COSINE}, "layers": float32},
        "bfloat16": {"bound": {"rounding_ratio": MAX_ROUNDING_RATIO}, "layers": bfloat16},
        "float16": "unusable: the folded patch kernel is below its range" if expected.folded else "not measured",
    }


def fixed_images(size: int, pictures: int = PICTURES) -> Tensor:
    """Coloured pictures, the same for everyone: uint8 (B,3,size,size). Like photographs they have a 1/f spectrum (noise
    of many octaves) and edges (things that lie over each other)."""
    generator = torch.Generator().manual_seed(0)
    image = torch.full((pictures, 3, size, size), 0.5)
    cells = 2
    while cells <= size:
        octave = torch.randn(pictures, 3, cells, cells, generator=generator) * (0.45 / cells**0.75)
        image += F.interpolate(octave, size=(size, size), mode="bilinear", align_corners=False)
        cells *= 2
    for picture in image:
        for _ in range(12):
            top, left, height, width = (torch.rand(4, generator=generator) * size).long().tolist()
            colour = torch.rand(3, 1, 1, generator=generator)
            thing = picture[:, top : top + height // 2, left : left + width // 2]
            thing.copy_(0.4 * (thing - 0.5) + colour)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def compare(expected: Outputs, found: Outputs, folded: bool) -> dict[str, dict[str, float]]:
    """Per layer: largest absolute difference, the same over the largest activation, RMS difference over RMS activation,
    lowest cosine of a token; `folded` takes channel means away from hidden states and keeps the raw figures as `raw_*`.
    """
    layers = {}
    for name, ours in expected.items():
        theirs = found[name].float()
        layers[name] = _difference(ours, theirs)
        if folded and name in HIDDEN:
            raw = {f"raw_{measure}": value for measure, value in layers[name].items()}
            layers[name] = _difference(_centred(ours), _centred(theirs)) | raw
    return layers


def _expected(source: Source, pixels: Tensor, layers: Outputs, picture: Tensor, processed: Tensor) -> Expected:
    rounded = {f"tower.{name}": tensor.bfloat16() for name, tensor in source.tower.state_dict().items()}
    with torch.inference_mode():
        if EMBEDDING not in layers:
            layers = layers | {EMBEDDING: source.tower.embed(layers["last_hidden_state"])}
        bfloat16 = functional_call(TowerOutputs(source.tower), rounded, (pixels.bfloat16(),))
    return Expected(source.tower.config, picture, processed, pixels, layers, bfloat16)


def _folder_outputs(folder: Path, tower: CLIPVisionModel, pixels: Tensor) -> Outputs:
    with torch.inference_mode():
        output = tower(pixel_values=pixels.to(tower.dtype), output_hidden_states=True)
        return _layers(output) | {EMBEDDING: image_embedding(folder, tower, output)}


def _check_config(expected: Expected, folder: Path) -> None:
    """What outputs may hide: an epsilon of 1e-5 for 1e-6 moves those of a trained tower less than rounding does."""
    found = json.loads((folder / "config.json").read_text())
    wanted = model_config(expected.vision, expected.float32[EMBEDDING].shape[-1], expected.folded)
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            raise ParityError(
                f"{folder / 'config.json'}: {name} is {found.get(name)!r}, of the source it is {wanted.get(name)!r}"
            )


def _check_keys(folder: Path) -> None:
    """transformers 5 reads bare names too; 4 would find none of its own and start at random."""
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        foreign = [name for name in stored.keys() if not name.startswith("vision_model.")]  # noqa: SIM118 (no dict)
    if foreign:
        raise ParityError(f"{folder / 'model.safetensors'}: {foreign[0]} must be called vision_model.{foreign[0]}")


def _check_processor(expected: Expected, folder: Path) -> float:
    """Largest difference between the pixels of the folder's image processor and the source's own."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="torchvision", local_files_only=True)
    found = processor(expected.picture, return_tensors="pt")["pixel_values"]  # (1,3,H,W)
    return _refuse_pixels(found, expected.processed, f"{folder / 'preprocessor_config.json'}")


def _refuse_pixels(found: Tensor, wanted: Tensor, what: str) -> float:
    """The largest difference. Raises ParityError above the bound."""
    error = (found - wanted).abs().max().item() if found.shape == wanted.shape else float("inf")
    if not error <= MAX_PIXEL_ERROR:
        raise ParityError(
            f"{what} makes pixels {tuple(found.shape)} that differ by {error:.2g} from the source's "
            f"{tuple(wanted.shape)}; the bound is {MAX_PIXEL_ERROR}"
        )
    return error


def _refuse_float32(layers: Mapping[str, Mapping[str, float]], what: str) -> None:
    for name, layer in layers.items():
        if not (layer["max_relative_error"] <= MAX_RELATIVE_ERROR and layer["min_cosine"] >= MIN_COSINE):
            raise ParityError(
                f"{what} differs from the source at {name}: {dict(layer)}; allowed are {MAX_RELATIVE_ERROR} of the "
                f"largest activation and a cosine of {MIN_COSINE}"
            )


def _layers(output: Any) -> Outputs:
    return dict(zip(LAYERS, (output.hidden_states[-2], output.last_hidden_state, output.pooler_output), strict=True))


def _picture(size: int) -> Tensor:
    """uint8 (3,1.5*size,2*size)."""
    return fixed_images(2 * size, 1)[0, :, : size + size // 2]


def _pixels(tower: VisionTower, preprocess: PreprocessConfig) -> Tensor:
    return _normalised(fixed_images(tower.config.image_size), preprocess)


def _normalised(images: Tensor, preprocess: PreprocessConfig) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (images.float() / 255 - mean) / std


def _centred(tokens: Tensor) -> Tensor:
    return tokens - tokens.mean(-1, keepdim=True)


def _difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    error = ours - theirs
    return {
        "max_abs_error": error.abs().max().item(),
        "max_relative_error": (error.abs().max() / ours.abs().max()).item(),
        "rms_error": (error.pow(2).mean() / ours.pow(2).mean()).sqrt().item(),
        "min_cosine": F.cosine_similarity(ours.double(), theirs.double(), dim=-1).min().item(),
    }
