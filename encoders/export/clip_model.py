"""Both our towers as transformers' CLIPModel, where its architecture allows: the image embedding is the class token,
the text tower is causal. Shapes: D width, E joint embedding."""

from typing import Any

from torch import Tensor

from encoders.config import TextConfig, VisionConfig
from encoders.text import TextTower
from encoders.vision import ACTIVATIONS

FOLDER = "clip"
"""Inside the exported folder; `from_pretrained(folder, subfolder="clip")`."""


def why_not(vision: VisionConfig, text: TextConfig) -> str | None:
    """Why CLIPModel cannot compute what these towers do; None if it can."""
    if vision.pool != "class":
        return "CLIPModel embeds a picture by its class token, this encoder by the mean of its patches"
    if text.kind != "clip":
        return "CLIPModel's text tower is causal, this one is bidirectional"
    return None


def model_config(vision: dict[str, Any], text: TextConfig, bos: int, eot: int) -> dict[str, Any]:
    """config.json of a CLIPModel around `vision`, the config of our exported CLIPVisionModel."""
    own = ("architectures", "dtype", "torch_dtype")
    embed_dim = vision["projection_dim"]
    text_config = {
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": 4 * text.width,
        "projection_dim": embed_dim,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.length,
        "hidden_act": ACTIVATIONS[text.activation],
        "layer_norm_eps": text.norm_eps,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "pad_token_id": eot,
        "bos_token_id": bos,
        "eos_token_id": eot,  # where a text is pooled
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": embed_dim,
        "logit_scale_init_value": 2.6592,
        "initializer_factor": 1.0,
        "vision_config": {key: value for key, value in vision.items() if key not in own},
        "text_config": text_config,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def state_dict(
    vision: dict[str, Tensor], projection: Tensor, text: TextTower, logit_scale: Tensor
) -> dict[str, Tensor]:
    """`vision` is the exported CLIPVisionModel's, `vision_model.*`; `projection` (E,D) the image projection."""
    ours = text.state_dict()
    state = {
        **vision,
        "visual_projection.weight": projection,
        "text_projection.weight": ours["projection.weight"],
        "text_model.embeddings.token_embedding.weight": ours["tokens.weight"],
        "text_model.embeddings.position_embedding.weight": ours["positions"],
        "logit_scale": logit_scale.detach().reshape(()),
    }
    block = {
        "norm1": "layer_norm1",
        "out": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    for kind in ("weight", "bias"):
        state[f"text_model.final_layer_norm.{kind}"] = ours[f"norm.{kind}"]
        for i in range(text.config.layers):
            layer = f"text_model.encoder.layers.{i}"
            for name, part in zip(
                "qkv", ours[f"blocks.{i}.qkv.{kind}"].chunk(3), strict=True
            ):  # (3D,...) -> 3 x (D,...)
                state[f"{layer}.self_attn.{name}_proj.{kind}"] = part
            state |= {f"{layer}.{theirs}.{kind}": ours[f"blocks.{i}.{mine}.{kind}"] for mine, theirs in block.items()}
    return state
