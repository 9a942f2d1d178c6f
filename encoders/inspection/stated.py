"""What the config files beside an encoder's weights state about it: transformers', open_clip's and our runs' own.

A value that a transformers config leaves out stays unstated: the class default (quick_gelu, 1e-5) says nothing about
how the weights were trained. What open_clip's config leaves out are open_clip's own fixed defaults.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.config import EncoderConfig, PreprocessConfig, VisionConfig
from encoders.errors import ModelError
from encoders.sources import open_clip_config

TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CLASS_TOKEN = "class token, normed"


@dataclass(frozen=True)
class Stated:
    """None where nothing is stated."""

    family: str = "weights only"
    image_size: int | None = None
    patch_size: int | None = None
    width: int | None = None
    layers: int | None = None
    heads: int | None = None
    mlp_width: int | None = None
    activation: str | None = None
    norm_eps: float | None = None
    pre_norm: bool | None = None
    pooling: str | None = None
    """What becomes the image embedding."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: str | None = None
    crop: int | None = None
    """Side of what the image processor gives; the tower needs it equal to image_size."""
    refusal: str | None = None
    """Why this config is none that a CLIPVisionModel can have."""


def read_configs(folder: Path, weights: Path) -> Stated:
    """From the configs in `folder` that belong to this weights file. Raises ModelError for one that is not readable."""
    if weights.name in OPEN_CLIP_WEIGHTS:
        return _open_clip(folder / "open_clip_config.json")
    if weights.name not in TRANSFORMERS_WEIGHTS:
        return Stated()
    if (folder / "config.json").is_file():
        return _transformers(folder)
    if (folder / "encoder.json").is_file():
        config = EncoderConfig.read(folder / "encoder.json")
        return _ours(f"encoder-run ({config.objective})", config.vision, config.preprocess)
    return Stated()


def _ours(family: str, vision: VisionConfig, preprocess: PreprocessConfig) -> Stated:
    resize = "squash" if preprocess.resize == "squash" else "shortest edge + center crop"
    return Stated(
        family=family,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.width,
        layers=vision.layers,
        heads=vision.heads,
        mlp_width=vision.mlp_width,
        activation=vision.activation,
        norm_eps=vision.norm_eps,
        pre_norm=vision.pre_norm,
        pooling=_pooling(vision.pool, vision.norm_after_pool),
        mean=preprocess.mean,
        std=preprocess.std,
        resize=f"{preprocess.interpolation}, {resize}",
    )


def _pooling(pool: str, norm_after_pool: bool) -> str:
    if pool == "class":
        return CLASS_TOKEN
    return "mean of patch tokens, " + ("then the norm" if norm_after_pool else "each normed")


def _open_clip(file: Path) -> Stated:
    content = _json(file)
    model = content.get("model_cfg", {})
    family = open_clip_config.family(model)
    title = "open_clip" if family == "open_clip" else f"open_clip ({family})"
    try:
        vision = open_clip_config.vision_config(model, str(file))
        preprocess = open_clip_config.preprocess_config(content.get("preprocess_cfg", {}), family, str(file))
    except ModelError as error:
        return Stated(family=title, refusal=str(error))
    return _ours(title, vision, preprocess)


def _transformers(folder: Path) -> Stated:
    config = _json(folder / "config.json")
    vision = config.get("vision_config", config)
    processor_file, ours = folder / "preprocessor_config.json", folder / "encoder.json"
    processor = _json(processor_file) if processor_file.is_file() else {}
    pool = _json(ours).get("vision", {}) if ours.is_file() else {}
    return Stated(
        family=str(config.get("model_type", "config.json without a model_type")),
        image_size=vision.get("image_size"),
        patch_size=vision.get("patch_size"),
        width=vision.get("hidden_size"),
        layers=vision.get("num_hidden_layers"),
        heads=vision.get("num_attention_heads"),
        mlp_width=vision.get("intermediate_size"),
        activation=vision.get("hidden_act"),
        norm_eps=vision.get("layer_norm_eps"),
        pre_norm=True,
        pooling=_pooling(pool["pool"], pool["norm_after_pool"]) if pool else CLASS_TOKEN,
        mean=_floats(processor.get("image_mean")),
        std=_floats(processor.get("image_std")),
        resize=_resize(processor),
        crop=_side(processor),
        refusal=f"{folder / 'config.json'} has an auto_map: it asks for code of its own"
        if "auto_map" in config
        else None,
    )


def _resize(processor: dict[str, Any]) -> str | None:
    if not processor.get("do_resize"):
        return None
    interpolation = {2: "bilinear", 3: "bicubic"}.get(processor.get("resample", -1), "filter not stated")
    if _shortest_edge(processor):
        return f"{interpolation}, shortest edge" + (" + center crop" if processor.get("do_center_crop") else "")
    return f"{interpolation}, squash"


def _side(processor: dict[str, Any]) -> int | None:
    """Older processors write sizes as a number, newer ones as a dict."""
    size = processor.get("crop_size" if _shortest_edge(processor) else "size")
    return size.get("height") if isinstance(size, dict) else size


def _shortest_edge(processor: dict[str, Any]) -> bool:
    size = processor.get("size")
    return not isinstance(size, dict) or "shortest_edge" in size


def _floats(values: Any) -> tuple[float, ...] | None:
    return tuple(float(value) for value in values) if values else None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object")
    return content
