"""Both our towers as open_clip reads them: open_clip_config.json and open_clip_model.safetensors.

Shapes: D width, E joint embedding.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from encoders.config import PreprocessConfig, TextConfig
from encoders.sources.open_clip_config import TOKENIZER_BESIDE
from encoders.text import TextTower
from encoders.vision import VisionTower

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
ACT_KWARGS = {"gelu": None, "gelu_tanh": {"approximate": "tanh"}, "quick_gelu": None}

Pairs = Iterator[tuple[str, Tensor]]


def why_not(tower: VisionTower, text: TextConfig) -> str | None:
    """Why open_clip cannot compute what these towers do; None if it can."""
    if text.kind == "bert" and text.padding == "packed":
        return (
            "nothing attends to padding in its text tower (text.padding: packed), while open_clip's bidirectional ones "
            "always attend to it; train with text.padding: reference what others' tools are to score"
        )
    if (text.activation == "quick_gelu") != (tower.config.activation == "quick_gelu"):
        return "only one of its towers has quick_gelu, which open_clip sets for both"
    vision = tower.config
    if int(vision.width * (vision.mlp_width / vision.width)) != vision.mlp_width:
        return (
            f"open_clip multiplies the width by mlp_ratio, and no such ratio makes {vision.mlp_width} of {vision.width}"
        )
    return None


def model_config(
    tower: VisionTower, text: TextConfig, preprocess: PreprocessConfig, eot: int, own_tokenizer: bool
) -> dict[str, Any]:
    """open_clip_config.json. `eot` is the id that ends a text; `own_tokenizer` is false for CLIP's own vocabulary."""
    vision = tower.config
    image_config: dict[str, Any] = {
        "image_size": vision.image_size,
        "layers": vision.layers,
        "width": vision.width,
        "head_width": vision.width // vision.heads,
        "mlp_ratio": vision.mlp_width / vision.width,
        "patch_size": vision.patch_size,
        "no_ln_pre": not vision.pre_norm,
        "pool_type": "avg" if vision.pool == "mean" else "tok",
        "final_ln_after_pool": vision.norm_after_pool,
        "pos_embed_type": "sin_cos_2d" if vision.position_table == "sincos2d" else "learnable",
        "norm_kwargs": {"eps": vision.norm_eps},
        "act_kwargs": ACT_KWARGS[vision.activation],
    }
    text_config: dict[str, Any] = {
        "context_length": text.length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "norm_kwargs": {"eps": text.norm_eps},
        "act_kwargs": ACT_KWARGS[text.activation],
    }
    if text.kind == "bert":
        text_config |= {"no_causal_mask": True, "pool_type": "last", "tokenizer_mode": "clips"}
    elif own_tokenizer:  # in CLIP's vocabulary the end token has the largest id, which open_clip pools by default
        text_config |= {"pool_type": "eos", "eos_id": eot}
    if own_tokenizer:
        text_config["hf_tokenizer_name"] = TOKENIZER_BESIDE
    pictures = {
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": "squash" if preprocess.resize == "squash" else "shortest",
    }
    quick = vision.activation == "quick_gelu"
    model = {"embed_dim": tower.projection.out_features, "quick_gelu": quick, "vision_cfg": image_config}
    return {"model_cfg": {**model, "text_cfg": text_config}, "preprocess_cfg": pictures}


def state_dict(tower: VisionTower, text: TextTower, logit_scale: Tensor) -> dict[str, Tensor]:
    """Both towers under open_clip's names."""
    return {
        **{f"visual.{name}": tensor for name, tensor in _vision(tower)},
        **dict(_text(text)),
        "logit_scale": logit_scale.detach().reshape(()),
    }


def _vision(tower: VisionTower) -> Pairs:
    state = tower.model.state_dict()
    yield "conv1.weight", state["embeddings.patch_embedding.weight"]
    yield "class_embedding", state["embeddings.class_embedding"]
    yield "positional_embedding", state["embeddings.position_embedding.weight"]
    yield "proj", tower.projection.weight.T  # (E,D) -> (D,E)
    norms = {"post_layernorm": "ln_post"} | ({"pre_layrnorm": "ln_pre"} if tower.config.pre_norm else {})
    for kind in ("weight", "bias"):
        for ours, theirs in norms.items():
            yield f"{theirs}.{kind}", state[f"{ours}.{kind}"]
        for i in range(tower.config.layers):
            ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            parts = [state[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            yield f"{theirs}.attn.in_proj_{kind}", torch.cat(parts)  # 3 x (D,...) -> (3D,...)
            yield f"{theirs}.attn.out_proj.{kind}", state[f"{ours}.self_attn.out_proj.{kind}"]
            yield f"{theirs}.ln_1.{kind}", state[f"{ours}.layer_norm1.{kind}"]
            yield f"{theirs}.ln_2.{kind}", state[f"{ours}.layer_norm2.{kind}"]
            yield f"{theirs}.mlp.c_fc.{kind}", state[f"{ours}.mlp.fc1.{kind}"]
            yield f"{theirs}.mlp.c_proj.{kind}", state[f"{ours}.mlp.fc2.{kind}"]


def _text(text: TextTower) -> Pairs:
    state = text.state_dict()
    yield "token_embedding.weight", state["tokens.weight"]
    yield "positional_embedding", state["positions"]
    yield "text_projection", state["projection.weight"].T  # (E,D) -> (D,E)
    for kind in ("weight", "bias"):
        yield f"ln_final.{kind}", state[f"norm.{kind}"]
        for i in range(text.config.layers):
            ours, theirs = f"blocks.{i}", f"transformer.resblocks.{i}"
            yield f"{theirs}.attn.in_proj_{kind}", state[f"{ours}.qkv.{kind}"]
            yield f"{theirs}.attn.out_proj.{kind}", state[f"{ours}.out.{kind}"]
            yield f"{theirs}.ln_1.{kind}", state[f"{ours}.norm1.{kind}"]
            yield f"{theirs}.ln_2.{kind}", state[f"{ours}.norm2.{kind}"]
            yield f"{theirs}.mlp.c_fc.{kind}", state[f"{ours}.fc1.{kind}"]
            yield f"{theirs}.mlp.c_proj.{kind}", state[f"{ours}.fc2.{kind}"]
