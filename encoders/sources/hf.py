"""transformers' CLIP folders (CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection) -> our towers, and
transformers itself as the reference.

Shapes: B batch, N patches, D width, E joint embedding.
"""

import json
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
from encoders.sources.tower_weights import check_table
from encoders.weights.files import Weights, inside

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

    Raises ModelError for another kind of model.
    """
    from transformers import CLIPConfig, CLIPVisionConfig

    where, raw = folder / "config.json", read_json(folder, "config.json")
    kind = raw.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        why = INSTEAD.get(str(kind), "needed is `clip` or `clip_vision_model`")
        raise ModelError(f"{where}: model_type is {kind!r}, which a CLIPVisionModel cannot be: {why}")
    if raw.get(FOLDED):
        raise ModelError(f"{where}: {REFOLD}")
    try:
        whole = CLIPConfig.from_dict(raw) if kind == "clip" else None
        vision = whole.vision_config if whole is not None else CLIPVisionConfig.from_dict(raw)
        text = _text_config(whole.text_config, where) if whole is not None else "it is an image tower alone"
        return _vision_config(vision, where), text
    except (TypeError, ValueError, UsageError) as error:  # StrictDataclass errors are ValueErrors
        raise ModelError(f"{where}: {error}") from error


def read_vision(weights: Weights, config: VisionConfig) -> dict[str, Tensor]:
    """State dict of our VisionTower; `projection.weight` only if the model has one.

    Raises ModelError if the weights miss something, hold more than the tower, or have another shape.
    """
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in weights) else ""
    table = f"{prefix}embeddings.position_embedding.weight"
    check_table(weights.shape(table), config, weights.file)
    parts = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
    names = [name for name in weights if name.startswith(tuple(prefix + part for part in parts))]
    kept = [name for name in names if not name.endswith("position_ids")]
    state = {f"model.{name.removeprefix(prefix)}": weights.tensor(name) for name in kept}
    norm = state.get("model.pre_layrnorm.weight")
    if norm is not None and _is_folded(norm, state["model.pre_layrnorm.bias"]):
        raise ModelError(f"{weights.file}: {REFOLD}")
    if "visual_projection.weight" in weights:
        state["projection.weight"] = weights.tensor("visual_projection.weight")
    return state


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
    else:
        raise ModelError(f"{folder} has no preprocessor_config.json, so its mean and std are unknown; put it there")
    off = [key for key in ("do_resize", "do_rescale", "do_normalize") if not raw.get(key, True)]
    mean, std, resample = raw.get("image_mean", []), raw.get("image_std", []), raw.get("resample", 3)
    if off or resample not in RESAMPLE or not all(isinstance(v, list) and len(v) == 3 for v in (mean, std)):
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


def reference(folder: Path, has_projection: bool, pixels: Tensor) -> dict[str, Tensor]:
    """The image tower's outputs for normalised pixels (B,3,H,W), by transformers from the folder itself."""
    from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

    model_class: Any = CLIPVisionModelWithProjection if has_projection else CLIPVisionModel
    if read_json(folder, "config.json")["model_type"] == "clip" and has_projection:
        model_class = CLIPModel
    model, info = model_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    if lost := sorted(name for name in info["missing_keys"] if not name.startswith(("text_", "logit_scale"))):
        raise ModelError(f"{folder}: transformers misses {', '.join(lost[:3])} in the weights")
    tower = model.vision_model if has_projection else model
    with torch.inference_mode():
        output = tower.eval()(pixel_values=pixels, output_hidden_states=True)
        outputs = {
            "hidden_states[-2]": output.hidden_states[-2],
            "last_hidden_state": output.last_hidden_state,
            "pooler_output": output.pooler_output,
        }
        if has_projection:
            outputs["image_embeds"] = model.visual_projection(output.pooler_output)
        elif inside(folder, image_head.FACTS_FILE).is_file():
            outputs["image_embeds"] = image_head.image_embedding(folder, model, output)
        return outputs


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
    return VisionConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_width=config.intermediate_size,
        activation=_activation(config, where),
        norm_eps=config.layer_norm_eps,
    )


def _text_config(config: Any, where: Path) -> TextConfig | str:
    if config.intermediate_size != 4 * config.hidden_size:
        return "its MLP is not four times as wide"
    return TextConfig(
        kind="clip",
        vocab_size=config.vocab_size,
        length=config.max_position_embeddings,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        activation=_activation(config, where),
        norm_eps=config.layer_norm_eps,
    )


def _activation(config: Any, where: Path) -> Literal["gelu", "gelu_tanh", "quick_gelu"]:
    if config.hidden_act not in ACTIVATIONS:
        raise ModelError(f"{where}: hidden_act {config.hidden_act!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config.hidden_act]


def _is_folded(weight: Tensor, bias: Tensor) -> bool:
    """export-encoder's stand-in for a missing norm: one large factor for every channel, and no shift."""
    return bool((weight == weight[0]).all() and weight[0] > 100 and not bias.any())


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
