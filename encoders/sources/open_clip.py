"""open_clip's state dicts (CLIPS, CLIPA, DreamLIP, LAION, ...) -> our towers, and open_clip itself as the reference.

Tensors are read one at a time and assigned; what the image tower does not expect is an error, never left out.
Shapes: B batch, N patches, D width, E joint embedding.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms import CenterCrop, Resize

from encoders.config import TextConfig, VisionConfig
from encoders.errors import ModelError, UsageError
from encoders.sources.tower_weights import check_table, is_sincos2d
from encoders.weights.files import Weights

Take = Callable[[str], Tensor]
Pairs = Iterator[tuple[str, Tensor]]
# Trained beside the towers by some: DreamLIP's local temperature and tag classifier.
DREAMLIP_EXTRAS = ("logit_scale_local", "multi_classifier.")
# What state dicts carry beside weights: buffers, and the sizes in OpenAI's.
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
NOT_WEIGHTS = ("attn_mask", "text.attn_mask", *OPENAI_SIZES)
FOREIGN_KEYS = {
    "visual.trunk.": "an image tower of timm's",
    "visual.layer1.": "a ResNet",
    "visual.blocks.": "an EVA or timm tower",
    "visual.attn_pool": "an attention pool (CoCa, SigLIP)",
    "visual.head.": "an attention pool (SigLIP)",
}


def read_vision(weights: Weights, config: VisionConfig) -> tuple[dict[str, Tensor], VisionConfig]:
    """State dict of our VisionTower, and its config with the kind of position table that was found.

    Raises ModelError if the weights hold anything the tower does not, miss something, or have another shape.
    """
    prefix = _vision_prefix(weights)
    _refuse_foreign(weights, prefix)
    check_table(weights.shape(f"{prefix}positional_embedding"), config, weights.file)
    used: set[str] = set()

    def take(name: str) -> Tensor:
        used.add(prefix + name)
        return weights.tensor(prefix + name)

    scaled = f"{prefix}transformer.resblocks.0.ls_1.gamma" in weights
    state = dict(_vision_pairs(take, config, scaled))
    if left := [name for name in weights if name.startswith(prefix) and name not in (*used, *NOT_WEIGHTS)]:
        raise ModelError(
            f"{weights.file} holds {len(left)} tensors of the image tower that its config does not account for "
            f"({', '.join(left[:3])}); the tower computes something else than the config says"
        )
    if is_sincos2d(state["model.embeddings.position_embedding.weight"], config):
        config = replace(config, position_table="sincos2d")
    return state, config


def read_text(weights: Weights, config: TextConfig) -> dict[str, Tensor] | str:
    """State dict of our TextTower, or why the weights are not those of one."""
    prefix = "text." if "text.token_embedding.weight" in weights else ""
    if f"{prefix}token_embedding.weight" not in weights:
        return "the weights are those of an image tower alone"
    wanted = dict(_text_names(prefix, config.layers))
    own = ("token_embedding.", "transformer.", "ln_final.", "positional_embedding", "text_projection", "cls_emb")
    found = {name for name in weights if name.startswith(tuple(prefix + part for part in own))}
    if odd := sorted(found ^ set(wanted)):
        return f"its weights and its config disagree about {', '.join(odd[:3])}"
    state = {ours: weights.tensor(name) for name, ours in wanted.items()}
    state["projection.weight"] = state["projection.weight"].T.contiguous()  # (D,E) -> (E,D)
    return state


def is_dreamlip(weights: Weights) -> bool:
    """Whether DreamLIP's own heads lie beside the towers."""
    return any(name.startswith(DREAMLIP_EXTRAS) for name in weights)


def left_out(weights: Weights) -> list[str]:
    """Tensors that belong to neither tower: heads of an objective."""
    if not _vision_prefix(weights):
        return []
    towers = ("visual.", "text.", "transformer.", "token_embedding.", "ln_final.", "positional_embedding")
    known = (*towers, "text_projection", "logit_bias", *NOT_WEIGHTS)
    return [name for name in weights if not name.startswith(known) and name != "logit_scale"]


def refuse_openai_without_quick_gelu(weights: Weights, config: VisionConfig) -> None:
    """OpenAI's state dicts are told by the sizes in them; with another activation they would compute nonsense."""
    if all(name in weights for name in OPENAI_SIZES) and config.activation != "quick_gelu":
        raise ModelError(
            f"{weights.file} holds OpenAI's weights, trained with quick_gelu, but the config says {config.activation}; "
            "name the -quickgelu config, such as --model-name ViT-B-16-quickgelu"
        )


def reference(weights: Weights, model_cfg: Mapping[str, Any], pixels: Tensor) -> dict[str, Tensor]:
    """The image tower's outputs for normalised pixels (B,3,H,W), by open_clip with its own weights.

    Raises UsageError if open_clip is not installed.
    """
    with torch.device("meta"):  # its weights come next
        model = open_clip_class("CLIP")(
            embed_dim=model_cfg["embed_dim"],
            vision_cfg=dict(model_cfg.get("vision_cfg", {})),
            text_cfg={"layers": 1, "width": 64, "heads": 1, "vocab_size": 1, "context_length": 1},  # not looked at
            quick_gelu=model_cfg.get("quick_gelu", False),
        )
    visual = model.visual.eval()
    prefix = _vision_prefix(weights)
    state = {name: weights.tensor(prefix + name) for name in visual.state_dict()}
    weights.release()
    visual.load_state_dict(state, assign=True)
    visual.output_tokens = False
    with torch.inference_mode():
        output = visual.forward_intermediates(pixels, indices=2, output_fmt="NLC", output_extra_tokens=True)
        classes, patches = output["image_intermediates_prefix"], output["image_intermediates"]
        before_last, last = (torch.cat(pair, dim=1) for pair in zip(classes, patches, strict=True))  # (B,1+N,D)
        return {
            "hidden_states[-2]": before_last,
            "last_hidden_state": last,
            "pooler_output": visual.ln_post(last[:, 0]),
            "image_embeds": output["image_features"],
        }


def reference_text(weights: Weights, model_cfg: Mapping[str, Any], ids: Tensor) -> Tensor:
    """The text tower's embeddings (B,E), not normalised, of ids (B,L), by open_clip with its own weights.

    Raises UsageError if open_clip is not installed.
    """
    with torch.device("meta"):  # its weights come next
        text = open_clip_class("CustomTextCLIP")(
            embed_dim=model_cfg["embed_dim"],
            vision_cfg={"layers": 1, "width": 64, "image_size": 32, "patch_size": 32},  # not looked at
            text_cfg=dict(model_cfg.get("text_cfg", {})),
            quick_gelu=model_cfg.get("quick_gelu", False),
        ).text.eval()
    if text.attn_mask is not None:
        text.attn_mask = text.build_causal_mask()  # no weight, so no file holds it
    prefix = "text." if "text.token_embedding.weight" in weights else ""
    text.load_state_dict({name: weights.tensor(prefix + name) for name in text.state_dict()}, assign=True)
    weights.release()
    with torch.inference_mode():
        embeddings: Tensor = text(ids)
        return embeddings


def reference_pixels(preprocess_cfg: Mapping[str, Any], image_size: int, picture: Tensor) -> Tensor:
    """A uint8 picture (3,H,W) -> normalised pixels (1,3,S,S): open_clip's own evaluation transform, whose steps are
    taken on a tensor, as Pillow rounds otherwise.

    Raises UsageError if open_clip is not installed, ModelError if the transform has a step that is not known here.
    """
    transform = open_clip_class("transform")
    stated = transform.merge_preprocess_dict(transform.PreprocessCfg(), dict(preprocess_cfg)) | {"size": image_size}
    steps = transform.image_transform_v2(transform.PreprocessCfg(**stated), is_train=False).transforms
    *resizing, _, _, normalise = steps  # between them it converts Pillow's pictures
    for step in resizing:
        if isinstance(step, Resize):
            sides = [step.size] if isinstance(step.size, int) else list(step.size)
            picture = TF.resize(picture, sides, interpolation=step.interpolation, antialias=True)
        elif isinstance(step, CenterCrop):
            picture = TF.center_crop(picture, list(step.size))
        else:
            raise ModelError(f"open_clip makes its pictures by {step}, which CLIPImageProcessor cannot do")
    pixels: Tensor = normalise(picture[None].float() / 255)
    return pixels


def named_config(model_name: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """(model_cfg, preprocess_cfg) of a name of open_clip's. The latter is that of the weights which open_clip's table
    lists for the name, as a bare file does not say how its pictures were made.

    Raises UsageError if open_clip is missing or has no such name, ModelError if its weights differ among themselves.
    """
    if model_name not in open_clip_class("list_models")():
        raise UsageError(f"open_clip has no model config {model_name}; open_clip.list_models() names them")
    tags = open_clip_class("list_pretrained_tags_by_model")(model_name)
    keys = ("mean", "std", "interpolation", "resize_mode")
    listed = [open_clip_class("get_pretrained_cfg")(model_name, tag) for tag in tags]
    ways = {tuple(entry[key] for key in keys) for entry in listed}
    if len(ways) > 1:
        raise ModelError(
            f"the weights that open_clip lists for {model_name} take their pictures in {len(ways)} ways ({ways}); put "
            "the file into a folder with an open_clip_config.json that says which"
        )
    preprocess_cfg = dict(zip(keys, ways.pop(), strict=True)) if ways else {}
    return open_clip_class("get_model_config")(model_name), preprocess_cfg


def open_clip_class(name: str) -> Any:
    """A class, function or module of open_clip's. Raises UsageError naming the extra if it is not installed."""
    try:
        import open_clip
    except ImportError as error:
        raise UsageError("open_clip is not installed; pip install 'encoder-swap[open-clip]'") from error
    return getattr(open_clip, name)


def _vision_prefix(weights: Weights) -> str:
    """`visual.`, or nothing where the file holds an image tower alone."""
    return "visual." if any(name.startswith("visual.") for name in weights) else ""


def _vision_pairs(take: Take, config: VisionConfig, scaled: bool) -> Pairs:
    embeddings = "model.embeddings"
    yield f"{embeddings}.patch_embedding.weight", take("conv1.weight")
    yield f"{embeddings}.class_embedding", take("class_embedding")
    yield f"{embeddings}.position_embedding.weight", take("positional_embedding")
    norms = {"ln_post": "post_layernorm"} | ({"ln_pre": "pre_layrnorm"} if config.pre_norm else {})
    for theirs, ours in norms.items():
        for kind in ("weight", "bias"):
            yield f"model.{ours}.{kind}", take(f"{theirs}.{kind}")
    yield "projection.weight", take("proj").T.contiguous()  # (D,E) -> (E,D)
    for i in range(config.layers):
        yield from _block_pairs(take, f"transformer.resblocks.{i}", f"model.encoder.layers.{i}", scaled)


def _block_pairs(take: Take, theirs: str, ours: str, scaled: bool) -> Pairs:
    for kind in ("weight", "bias"):
        joined = take(f"{theirs}.attn.in_proj_{kind}")  # (3D,...) in the order query, key, value
        for name, part in zip("qkv", joined.chunk(3), strict=True):
            yield f"{ours}.self_attn.{name}_proj.{kind}", part.clone()
        for n in (1, 2):
            yield f"{ours}.layer_norm{n}.{kind}", take(f"{theirs}.ln_{n}.{kind}")
        yield f"{ours}.mlp.fc1.{kind}", take(f"{theirs}.mlp.c_fc.{kind}")
        for n, (last, our_last) in enumerate({"attn.out_proj": "self_attn.out_proj", "mlp.c_proj": "mlp.fc2"}.items()):
            value = take(f"{theirs}.{last}.{kind}")
            if scaled:  # a layer scale is a factor of each output of the layer before it
                gamma = take(f"{theirs}.ls_{n + 1}.gamma")
                value = value * gamma.view(-1, *[1] * (value.dim() - 1))
            yield f"{ours}.{our_last}.{kind}", value


def _text_names(prefix: str, layers: int) -> Iterator[tuple[str, str]]:
    """Their names -> ours; query, key and value lie in one matrix in both."""
    yield f"{prefix}token_embedding.weight", "tokens.weight"
    yield f"{prefix}positional_embedding", "positions"
    yield f"{prefix}text_projection", "projection.weight"
    block = {"ln_1": "norm1", "attn.out_proj": "out", "ln_2": "norm2", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"}
    for kind in ("weight", "bias"):
        yield f"{prefix}ln_final.{kind}", f"norm.{kind}"
        for i in range(layers):
            theirs = f"{prefix}transformer.resblocks.{i}"
            yield f"{theirs}.attn.in_proj_{kind}", f"blocks.{i}.qkv.{kind}"
            yield from ((f"{theirs}.{a}.{kind}", f"blocks.{i}.{b}.{kind}") for a, b in block.items())


def _refuse_foreign(weights: Weights, prefix: str) -> None:
    for part, what in FOREIGN_KEYS.items():
        start = prefix + part.removeprefix("visual.")
        if found := next((name for name in weights if name.startswith(start)), None):
            raise ModelError(f"{weights.file} holds {found}: {what}, which a CLIPVisionModel cannot be")
