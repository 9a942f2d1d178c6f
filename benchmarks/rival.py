"""The two sides of a training step: a CLIP-family model of ours, open_clip's with the same weights, random batches.

Shapes: B batch, L text slots, E joint embedding.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from encoders.config import DreamlipOptions, EncoderConfig, TextConfig, VisionConfig, preset
from encoders.data.tokenizers import pad_texts
from encoders.dual_encoder import DualEncoder

LINEAR = {"qkv": "attn.in_proj_", "out": "attn.out_proj.", "fc1": "mlp.c_fc.", "fc2": "mlp.c_proj."}


def clip_config(
    name: str,
    image_size: int,
    padding: Literal["reference", "packed"],
    dreamlip: DreamlipOptions | None = None,
) -> EncoderConfig:
    """A preset with CLIP's towers: 77 tokens of BPE, causal, exact GELU. Trained as CLIP, or as DreamLIP."""
    sizes = preset(name)
    text = TextConfig(
        kind="clip", padding=padding, vocab_size=49408, length=77, activation="gelu", norm_eps=1e-5, **sizes["text"]
    )
    return EncoderConfig(
        objective="dreamlip" if dreamlip else "clip",
        embed_dim=sizes["embed_dim"],
        vision=VisionConfig(image_size=image_size, **sizes["vision"]),
        text=text,
        dreamlip=dreamlip,
    )


def open_clip_twin(model: DualEncoder) -> open_clip.model.CLIP:
    """open_clip's CLIP with this model's weights; `model` must have CLIP's towers."""
    vision, text = model.config.vision, model.config.text
    twin = open_clip.model.CLIP(
        model.config.embed_dim,
        CLIPVisionCfg(
            layers=vision.layers,
            width=vision.width,
            head_width=vision.width // vision.heads,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
        ),
        CLIPTextCfg(
            context_length=text.length,
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
        ),
    )
    twin.load_state_dict(_open_clip_state(model.state_dict(), vision.layers, text.layers))
    return twin


def _open_clip_state(ours: dict[str, Tensor], vision_layers: int, text_layers: int) -> dict[str, Tensor]:
    state = {
        "logit_scale": ours["logit_scale"],
        "token_embedding.weight": ours["text.tokens.weight"],
        "positional_embedding": ours["text.positions"],
        "text_projection": ours["text.projection.weight"].T,
        "visual.class_embedding": ours["vision.model.embeddings.class_embedding"],
        "visual.positional_embedding": ours["vision.model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": ours["vision.model.embeddings.patch_embedding.weight"],
        "visual.proj": ours["vision.projection.weight"].T,
    }
    norms = {"ln_final": "text.norm", "visual.ln_pre": "vision.model.pre_layrnorm"}
    norms["visual.ln_post"] = "vision.model.post_layernorm"
    for kind in ("weight", "bias"):
        state |= {f"{theirs}.{kind}": ours[f"{name}.{kind}"] for theirs, name in norms.items()}
        for i in range(text_layers):
            block, own = f"transformer.resblocks.{i}", f"text.blocks.{i}"
            state |= {f"{block}.{theirs}{kind}": ours[f"{own}.{name}.{kind}"] for name, theirs in LINEAR.items()}
            state |= {f"{block}.ln_{n}.{kind}": ours[f"{own}.norm{n}.{kind}"] for n in (1, 2)}
        for i in range(vision_layers):
            block, own = f"visual.transformer.resblocks.{i}", f"vision.model.encoder.layers.{i}"
            state[f"{block}.attn.in_proj_{kind}"] = torch.cat([ours[f"{own}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
            state[f"{block}.attn.out_proj.{kind}"] = ours[f"{own}.self_attn.out_proj.{kind}"]
            state[f"{block}.mlp.c_fc.{kind}"] = ours[f"{own}.mlp.fc1.{kind}"]
            state[f"{block}.mlp.c_proj.{kind}"] = ours[f"{own}.mlp.fc2.{kind}"]
            state |= {f"{block}.ln_{n}.{kind}": ours[f"{own}.layer_norm{n}.{kind}"] for n in (1, 2)}
    return state


def random_lengths(count: int, mean: float, most: int, seed: int = 0) -> list[int]:
    """Token counts spread as captions' are: a long tail, at least 4 and `most` at most, mean about `mean`."""
    drawn = np.random.default_rng(seed).gamma(4.0, size=count)
    lengths: list[int] = (drawn * mean / drawn.mean()).round().astype(int).clip(4, most).tolist()
    return lengths


def random_texts(lengths: Iterable[int], config: TextConfig) -> Tensor:
    """Padded ids (B,L) of random words with the highest id at the end, where open_clip pools."""
    last = config.vocab_size - 1
    return pad_texts([[*torch.randint(3, last, (length - 1,)).tolist(), last] for length in lengths], config)


def random_images(count: int, size: int) -> Tensor:
    """uint8 (B,3,H,H)."""
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8)


def optimizer_step(model: nn.Module, loss: Callable[[], Tensor], device: str, bf16: bool) -> Callable[[], Tensor]:
    """One training step: forward, backward, fused AdamW. Returns the loss before the update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), weight_decay=0.2, fused=True)

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def on(device: str, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its tensors on the device; lists of lengths stay as they are."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
