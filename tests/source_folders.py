"""Tiny folders of encoders as open_clip and transformers write them, and the proof that a source of ours computes what
open_clip's own model does.

Random weights are perturbed, so that no norm, bias or table is at its initial value.
"""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from encoders.data.tokenizers import CaptionTokenizer
from encoders.sources.source import Source

BOUND = 1e-5  # of the largest activation
SIZE, TOKENS = 32, 12
VISION = {"image_size": SIZE, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
TEXT = {"context_length": TOKENS, "vocab_size": 560, "width": 32, "heads": 2, "layers": 2}
MEAN_POOL = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
BERT = {"no_causal_mask": True, "pool_type": "last", "hf_tokenizer_name": "bert-base-uncased"}
EPS, TANH = {"norm_kwargs": {"eps": 1e-6}}, {"act_kwargs": {"approximate": "tanh"}}
CLIPS = {"vision_cfg": MEAN_POOL | EPS, "text_cfg": BERT | EPS | TANH | {"tokenizer_mode": "clips", "vocab_size": 90}}
CAPTIONS = ["a red square", "two big dogs left of a tree.", "A cat & a house"]
SQUASH = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear", "resize_mode": "squash"}


def config_of(given: dict[str, Any]) -> dict[str, Any]:
    """A tiny `model_cfg`; `given` wins."""
    towers = {"vision_cfg": VISION | given.get("vision_cfg", {}), "text_cfg": TEXT | given.get("text_cfg", {})}
    return {"embed_dim": 16} | given | towers


def perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def write_open_clip(folder: Path, model_cfg: dict[str, Any], preprocess: dict[str, Any] | None = None) -> nn.Module:
    """open_clip's own model with its folder in the Hub's layout."""
    torch.manual_seed(0)
    arguments = {name: value for name, value in model_cfg.items() if name != "custom_text"}
    own_text = model_cfg.get("custom_text", False)
    model: nn.Module = (open_clip.CustomTextCLIP if own_text else open_clip.CLIP)(**arguments)
    perturb(model)
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return model.eval()


def write_clip(folder: Path, model_class: Any = CLIPModel, **vision: Any) -> nn.Module:
    """A folder as transformers writes it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    image = sizes | {"intermediate_size": 64, "image_size": SIZE, "patch_size": 8, "layer_norm_eps": 1e-6}
    text = sizes | {"intermediate_size": 128, "vocab_size": 560, "max_position_embeddings": TOKENS}
    text |= {"bos_token_id": 558, "eos_token_id": 559, "hidden_act": "gelu"}
    whole = CLIPConfig(text_config=text, vision_config=image | {"hidden_act": "gelu"} | vision, projection_dim=16)
    model: nn.Module = model_class(whole if model_class is CLIPModel else whole.vision_config)
    perturb(model)
    model.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(folder)
    return model.eval()


def write_tokenizer(folder: Path, kind: str) -> CaptionTokenizer:
    tokenizer = CaptionTokenizer.train(CAPTIONS, 90 if kind == "bert" else 560, kind)
    tokenizer.save(folder)
    return tokenizer


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def block_outputs(visual: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Of every block, by hooks: (B,1+N,D)."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: found.append(out)) for block in visual.transformer.resblocks
    ]
    visual(pixels)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def check_image_side(source: Source, model: nn.Module) -> None:
    """Our tower and the source's reference, against hooks in open_clip's own model."""
    size = source.tower.config.image_size
    pixels = torch.rand(2, 3, 3, 3)
    pixels = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic") * 4 - 2 + torch.randn(()) * 0.1
    *_, before_last, last = block_outputs(model.visual, pixels)
    wanted = {
        "hidden_states[-2]": before_last,
        "last_hidden_state": last,
        "pooler_output": model.visual.ln_post(last[:, 0]),
        "image_embeds": model.encode_image(pixels),
    }
    output = source.tower.model(pixels, output_hidden_states=True)
    ours = {
        "hidden_states[-2]": output.hidden_states[-2],
        "last_hidden_state": output.last_hidden_state,
        "pooler_output": output.pooler_output,
        "image_embeds": source.tower(pixels)[1],
    }
    reference = source.reference(pixels)
    for name, value in wanted.items():
        assert relative(ours[name], value) <= BOUND, name
        assert relative(reference[name], value) <= 1e-6, name
