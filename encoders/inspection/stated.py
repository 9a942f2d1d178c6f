"""What the config files beside an encoder's weights state about it: transformers', open_clip's and our runs' own.

A value that a transformers config leaves out stays unstated: the class default (quick_gelu, 1e-5) says nothing about
how the weights were trained. What open_clip's config leaves out are open_clip's own fixed defaults.
"""

from dataclasses import dataclass
from pathlib import Path

from encoders.config import EncoderConfig, PreprocessConfig, VisionConfig
from encoders.errors import ModelError
from encoders.inspection.fields import Fields
from encoders.inspection.image_processor import Size, read_pictures
from encoders.sources import open_clip_config
from encoders.sources.open_clip_config import OPEN_CLIP_WEIGHTS

TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
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
    pictures: Size | None = None
    """What the image processor gives; the tower needs both sides to be image_size."""
    uneven: bool = False
    """Whether the image processor leaves pictures as wide or high as they are."""
    folded: bool | None = None
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
        return _run(folder / "encoder.json")
    return Stated()


def _run(file: Path) -> Stated:
    try:
        config = EncoderConfig.read(file)
        return _ours(f"encoder-run ({config.objective})", config.vision, config.preprocess)
    except (AttributeError, IndexError, TypeError, ArithmeticError) as error:
        raise ModelError(f"{file} is not the config of an encoder run ({error!r})") from error


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
    content = Fields.read(file)
    sections = content.section("model_cfg"), content.section("preprocess_cfg")
    model, preprocess_cfg = (section.values if section else {} for section in sections)
    vision_cfg, text_cfg = (Fields(file, model).section(key) for key in ("vision_cfg", "text_cfg"))
    if vision_cfg is None or text_cfg is None:
        raise ModelError(f"{file} describes no two towers (model_cfg.vision_cfg and text_cfg)")
    family = open_clip_config.family(model)
    title = "open_clip" if family == "open_clip" else f"open_clip ({family})"
    try:
        vision = open_clip_config.vision_config(model, str(file))
        preprocess = open_clip_config.preprocess_config(preprocess_cfg, family, str(file))
    except ModelError as error:
        return Stated(family=title, refusal=str(error))
    return _ours(title, vision, preprocess)


def _transformers(folder: Path) -> Stated:
    config = Fields.read(folder / "config.json")
    vision = config.section("vision_config") or config
    pictures, family = read_pictures(folder), config.text("model_type") or "config.json without a model_type"
    return Stated(
        family=family,
        image_size=vision.whole("image_size"),
        patch_size=vision.whole("patch_size"),
        width=vision.whole("hidden_size"),
        layers=vision.whole("num_hidden_layers"),
        heads=vision.whole("num_attention_heads"),
        mlp_width=vision.whole("intermediate_size"),
        activation=vision.text("hidden_act"),
        norm_eps=vision.number("layer_norm_eps"),
        pre_norm=True,
        folded=vision.flag("folded"),
        pooling=_transformers_pooling(folder, family),
        mean=pictures.mean,
        std=pictures.std,
        resize=pictures.resize,
        pictures=pictures.size,
        uneven=pictures.uneven,
        refusal=_refusal(config, vision),
    )


def _transformers_pooling(folder: Path, family: str) -> str | None:
    """Of a LLaVA nothing is pooled."""
    if family not in ("clip", "clip_vision_model"):
        return None
    vision = Fields.read(folder / "encoder.json").section("vision") if (folder / "encoder.json").is_file() else None
    if vision is None:
        return CLASS_TOKEN
    return _pooling(vision.text("pool") or "class", vision.flag("norm_after_pool") or False)


def _refusal(config: Fields, vision: Fields) -> str | None:
    if any("auto_map" in each.values for each in (config, vision)):
        return f"{config.file} has an auto_map: it asks for code of its own"
    kind = vision.text("model_type") or ""
    if kind.startswith("siglip"):
        return f"{config.file} describes a SigLIP tower ({kind}), which no CLIPVisionModel can be; use it as it is"
    return None
