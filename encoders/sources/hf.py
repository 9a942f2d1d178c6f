"""transformers' CLIP folders (CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection) -> our towers: configs, image
processors, weights."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from encoders.config import PreprocessConfig, TextConfig, VisionConfig
from encoders.errors import ModelError, UsageError
from encoders.export import image_head
from encoders.export.fold import FOLDED
from encoders.pretrained import refuse_what_else_loads
from encoders.sources.open_clip_config import three_numbers
from encoders.sources.tower_weights import check_table
from encoders.weights.files import Weights, inside
from encoders.weights.values import is_folded

WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh", "quick_gelu"]] = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
SIGLIP = "it has no class token and pools by attention; use its SiglipVisionModel as it is"
INSTEAD = {"siglip": SIGLIP, "siglip_vision_model": SIGLIP, "siglip2": SIGLIP, "siglip2_vision_model": SIGLIP}
REFOLD = (
    "this is a folded tower, with embeddings so tiny that its first norm does nothing; exporting or training it again "
    "would break it: name the run or the weights that it was exported from"
)
PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor")
"""What is left unsaid has other defaults in any other."""
RESCALE = 1 / 255
OLD_EOS = 2
"""As eos_token_id: wrong in OpenAI's own configs, and read by transformers as `the largest id`."""
BESIDE = ("logit_scale", "visual_projection.weight", "position_ids")
"""Names of tensors that stand outside the towers."""
RESAMPLE: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a foreign folder. Raises ModelError if it is none, or asks for code of its own to be run."""
    file = inside(folder, name)
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold an object of keys and values")
    if _asks_for_code(content):
        raise ModelError(
            f"{file} has an `auto_map`: it asks for code of its own to be run, which this toolkit never does"
        )
    return content


def weights_file(folder: Path) -> Path:
    """The weights of a folder; safetensors before pickles. Raises ModelError if there are none."""
    found = next((name for name in WEIGHTS if inside(folder, name).is_file()), None)
    if found is None:
        raise ModelError(f"{folder} has a config.json but none of {', '.join(WEIGHTS)}")
    return folder / found


def read_configs(folder: Path) -> tuple[VisionConfig, TextConfig | str]:
    """config.json as ours; for the text tower, or why there is none or ours cannot be it.

    Raises ModelError for another kind of model, or one that loads more than it holds.
    """
    from transformers import CLIPConfig, CLIPVisionConfig

    where, raw = folder / "config.json", read_json(folder, "config.json")
    refuse_what_else_loads(folder, raw)
    kind = raw.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        why = INSTEAD.get(str(kind), "needed is `clip` or `clip_vision_model`")
        raise ModelError(f"{where}: model_type is {kind!r}, which a CLIPVisionModel cannot be: {why}")
    if raw.get(FOLDED):
        raise ModelError(f"{where}: {REFOLD}")
    try:
        if odd := [name for name in ("vision_config", "text_config") if not isinstance(raw.get(name), dict | None)]:
            raise TypeError(f"{odd[0]} must be an object of keys and values")
        whole = CLIPConfig.from_dict(raw) if kind == "clip" else None
        vision = whole.vision_config if whole is not None else CLIPVisionConfig.from_dict(raw)
        text = _text_config(whole.text_config) if whole is not None else "it is an image tower alone"
        return _vision_config(vision, where), text
    except (TypeError, ValueError, AttributeError, UsageError) as error:  # StrictDataclass errors are ValueErrors
        raise ModelError(f"{where}: {error}") from error


def read_vision(weights: Weights, config: VisionConfig) -> dict[str, Tensor]:
    """State dict of our VisionTower; `projection.weight` only if the model has one.

    Raises ModelError if the weights miss something, hold more than the tower, or have another shape.
    """
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in weights) else ""
    table = f"{prefix}embeddings.position_embedding.weight"
    check_table(weights.shape(table), config, weights.file)
    parts = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
    names = [name for name in weights if name.startswith(prefix) and not (prefix == "" and name in BESIDE)]
    kept = [name for name in names if not name.endswith("position_ids")]
    if odd := [name for name in kept if not name.startswith(tuple(prefix + part for part in parts))]:
        raise ModelError(
            f"{weights.file} holds {len(odd)} tensors of the image tower that CLIPVisionModel does not have "
            f"({', '.join(odd[:3])}); what it computes with them cannot be told"
        )
    state = {f"model.{name.removeprefix(prefix)}": weights.tensor(name) for name in kept}
    norm = [weights.headers.get(f"{prefix}pre_layrnorm.{kind}") for kind in ("weight", "bias")]
    if norm[0] is not None and norm[1] is not None and is_folded(norm[0], norm[1]):
        raise ModelError(f"{weights.file}: {REFOLD}")
    if "visual_projection.weight" in weights:
        state["projection.weight"] = weights.tensor("visual_projection.weight")
    return state


def left_out(weights: Weights) -> list[str]:
    """Tensors that belong to neither tower: heads of an objective."""
    known = ("vision_model.", "text_model.", "text_projection.", *BESIDE)
    whole = any(name.startswith("vision_model.") for name in weights)
    return [name for name in weights if not name.startswith(known)] if whole else []


def text_end(folder: Path) -> int | None:
    """The id at which transformers pools a text; None if that is the largest one, or there is no text tower."""
    from transformers import CLIPConfig

    raw = read_json(folder, "config.json")
    if raw["model_type"] != "clip":
        return None
    text: Any = CLIPConfig.from_dict(raw).text_config
    return None if text.eos_token_id == OLD_EOS else text.eos_token_id


def read_text(weights: Weights, config: TextConfig) -> dict[str, Tensor] | str:
    """State dict of our TextTower, or why the weights are not those of one."""
    if "text_model.final_layer_norm.weight" not in weights:
        return "the weights are those of an image tower alone"
    wanted = list(_text_names(config.layers))
    found = {name for name in weights if name.startswith(("text_model.", "text_projection."))}
    known = {name for _, names in wanted for name in names}
    if odd := sorted(name for name in found ^ known if not name.endswith("position_ids")):
        return f"its weights and its config disagree about {', '.join(odd[:3])}"
    return {ours: torch.cat([weights.tensor(name) for name in names]) for ours, names in wanted}


def read_preprocess(folder: Path, image_size: int) -> PreprocessConfig:
    """preprocessor_config.json (or what transformers 5 nests in processor_config.json) as ours.

    Raises ModelError if there is none, as no default would be safe, or if it does what ours cannot.
    """
    if inside(folder, "preprocessor_config.json").is_file():
        where, raw = folder / "preprocessor_config.json", read_json(folder, "preprocessor_config.json")
    elif inside(folder, "processor_config.json").is_file():
        where = folder / "processor_config.json"
        raw = read_json(folder, "processor_config.json").get("image_processor", {})
        if not isinstance(raw, dict):
            raise ModelError(f"{where}: image_processor is {raw!r}, needed is an object of keys and values")
    else:
        raise ModelError(f"{folder} has no preprocessor_config.json, so its mean and std are unknown; put it there")
    _refuse_other_processors(raw, where)
    off = [key for key in ("do_resize", "do_rescale", "do_normalize") if not raw.get(key, True)]
    mean, std, resample = raw.get("image_mean", []), raw.get("image_std", []), raw.get("resample", 3)
    if off or resample not in list(RESAMPLE) or not (three_numbers(mean) and three_numbers(std)):
        raise ModelError(
            f"{where}: needed are resizing, rescaling and normalising with three means and standard deviations, "
            f"bilinear or bicubic; found {', '.join(off) or 'nothing'} switched off, resample {resample}, mean {mean}, "
            f"std {std}"
        )
    return PreprocessConfig(
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        interpolation=RESAMPLE[resample],
        resize=_resize(raw, image_size, where),
        crop_area=(0.9, 1.0),
    )


def exported_head(
    folder: Path, state: Mapping[str, Tensor], config: VisionConfig
) -> tuple[dict[str, Tensor], VisionConfig]:
    """State dict and config as they are, or, of a folder that export-encoder wrote, with the pooling and the projection
    that it keeps beside the tower."""
    if not inside(folder, image_head.FACTS_FILE).is_file():
        return dict(state), config
    facts = image_head.read_facts(folder)
    told = facts["vision"]
    config = replace(config, pool=told["pool"], norm_after_pool=told["norm_after_pool"])
    if facts["embed_dim"] is None:
        return dict(state), config
    projection = Weights(inside(folder, image_head.PROJECTION_FILE)).tensor(image_head.PROJECTION)
    return {**state, "projection.weight": projection}, config


def _refuse_other_processors(raw: Mapping[str, Any], where: Path) -> None:
    kinds = [raw[key] for key in ("image_processor_type", "feature_extractor_type") if raw.get(key) is not None]
    if odd := [kind for kind in kinds if kind not in PROCESSORS]:
        raise ModelError(
            f"{where}: image_processor_type is {odd[0]!r}, needed is CLIPImageProcessor: what this file leaves out has "
            "other defaults there; state size, crop_size, resample, image_mean and image_std for a CLIPImageProcessor"
        )
    factor = raw.get("rescale_factor", RESCALE)
    if not (isinstance(factor, int | float) and math.isclose(factor, RESCALE, rel_tol=1e-6)):
        raise ModelError(f"{where}: rescale_factor is {factor}, needed is 1/255: towers here take pixels from 0 to 1")
    if raw.get("do_pad"):
        raise ModelError(f"{where}: do_pad is on, and pictures are never padded here")


def _resize(raw: Mapping[str, Any], image_size: int, where: Path) -> Literal["crop", "squash"]:
    size, crop = raw.get("size"), raw.get("crop_size") if raw.get("do_center_crop", True) else None
    square = {"height": image_size, "width": image_size}
    if size == square and crop in (None, square, image_size):
        return "squash"
    if size in (image_size, {"shortest_edge": image_size}) and crop in (square, image_size):
        return "crop"
    raise ModelError(
        f"{where}: size {size} and crop_size {crop} are neither the short side to {image_size} and its centre nor both "
        f"sides to {image_size}, the image_size of config.json"
    )


def _asks_for_code(content: Any) -> bool:
    if isinstance(content, dict):
        return "auto_map" in content or any(_asks_for_code(value) for value in content.values())
    return False


def _vision_config(config: Any, where: Path) -> VisionConfig:
    if config.num_channels != 3:
        raise ModelError(f"{where}: num_channels is {config.num_channels}, pictures here have 3")
    if config.hidden_act not in ACTIVATIONS:
        raise ModelError(f"{where}: hidden_act {config.hidden_act!r} is none of {', '.join(ACTIVATIONS)}")
    return VisionConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_width=config.intermediate_size,
        activation=ACTIVATIONS[config.hidden_act],
        norm_eps=config.layer_norm_eps,
    )


def _text_config(config: Any) -> TextConfig | str:
    if config.hidden_act not in ACTIVATIONS:
        return f"its hidden_act {config.hidden_act!r} is none of {', '.join(ACTIVATIONS)}"
    if config.intermediate_size != 4 * config.hidden_size:
        return "its MLP is not four times as wide"
    try:
        return TextConfig(
            kind="clip",
            vocab_size=config.vocab_size,
            length=config.max_position_embeddings,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            activation=ACTIVATIONS[config.hidden_act],
            norm_eps=config.layer_norm_eps,
        )
    except (UsageError, ZeroDivisionError) as error:
        return str(error)


def _text_names(layers: int) -> Iterator[tuple[str, list[str]]]:
    """Our names and theirs; query, key and value are joined in ours."""
    embeddings = "text_model.embeddings"
    yield "tokens.weight", [f"{embeddings}.token_embedding.weight"]
    yield "positions", [f"{embeddings}.position_embedding.weight"]
    yield "projection.weight", ["text_projection.weight"]
    block = {"layer_norm1": "norm1", "self_attn.out_proj": "out", "layer_norm2": "norm2", "mlp.fc1": "fc1"}
    for kind in ("weight", "bias"):
        yield f"norm.{kind}", [f"text_model.final_layer_norm.{kind}"]
        for i in range(layers):
            theirs = f"text_model.encoder.layers.{i}"
            yield f"blocks.{i}.qkv.{kind}", [f"{theirs}.self_attn.{x}_proj.{kind}" for x in "qkv"]
            for name, ours in {**block, "mlp.fc2": "fc2"}.items():
                yield f"blocks.{i}.{ours}.{kind}", [f"{theirs}.{name}.{kind}"]
