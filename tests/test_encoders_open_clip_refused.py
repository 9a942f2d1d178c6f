"""Encoders of open_clip that cannot be ours, or are damaged: refused, or their text side left out, with the reason."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from source_folders import (
    BERT,
    MEAN_POOL,
    TEXT,
    check_image_side,
    config_of,
    edit,
    write_clip,
    write_open_clip,
    write_tokenizer,
)
from torch import Tensor, nn
from transformers import CLIPVisionModel

from encoders.errors import ModelError
from encoders.export.command import export
from encoders.sources.source import open_source

REFUSED_VISION = {
    "SigLIP": (
        {"timm_model_name": "vit_base_patch16_siglip_224"},
        "no class token and pools by attention. Use its Sig",
    ),
    "EVA": ({"timm_model_name": "eva02_large_patch14_clip_224"}, "SwiGLU"),
    "timm": ({"timm_model_name": "convnext_base"}, "timm's convnext_base.*laion/CLIP-ViT-L-14"),
    "ResNet": ({"layers": [3, 4, 6, 3]}, "ResNet"),
    "CoCa": ({"attentional_pool": True}, "attention pool"),
    "qk norm": ({"qk_norm": True}, "qk_norm is True"),
    "head scales": ({"scale_heads": True}, "scale_heads"),
    "inner norm": ({"scale_attn_inner": True}, "no such step"),
    "no pool": ({"pool_type": "none"}, "gives no image embedding"),
    "rectangle": ({"image_size": [32, 48]}, "square input only"),
    "unknown": ({"input_patchnorm": True}, "has input_patchnorm, which open_clip 3.3 does not know"),
    "norm": ({"norm_kwargs": {"elementwise_affine": False}}, "may hold `eps` and nothing else"),
    "activation": ({"act_kwargs": {"approximate": "sin"}}, "no activation of open_clip's"),
    "size": ({"image_size": 33}, "not a multiple"),
    "width": ({"width": "32"}, "str"),
    "no layers": ({"layers": 0}, "vision.layers is 0"),
    "list of norm_kwargs": ({"norm_kwargs": [1]}, r"norm_kwargs is \[1\], needed is an object"),
    "eps in words": ({"norm_kwargs": {"eps": "x"}}, "eps is 'x', needed is a number"),
    "no eps": ({"norm_kwargs": {"eps": 0}}, "norm_eps 0.0 must be above 0"),
}


@pytest.mark.parametrize("name", REFUSED_VISION)
def test_towers_that_no_clip_vision_model_can_be_are_refused(name: str, tmp_path: Path) -> None:
    given, reason = REFUSED_VISION[name]
    write_open_clip(tmp_path, config_of({}))
    config = {"model_cfg": config_of({"vision_cfg": given}), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"open_clip_config\.json.*{reason}"):
        open_source(str(tmp_path))


def larger(state: dict[str, Tensor]) -> None:
    state["visual.positional_embedding"] = torch.randn(1 + 36, 32)


MISMATCHED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "lost pre-norm": (lambda s: s.pop("visual.ln_pre.weight"), "no tensor visual.ln_pre.weight"),
    "lost block": (lambda s: s.pop("visual.transformer.resblocks.2.ln_1.bias"), r"resblocks\.2\.ln_1\.bias"),
    "336 weights, 224 config": (larger, r"position table is \[37, 32\].*need \[17, 32\]"),
    "another block": (
        lambda s: s.update({"visual.transformer.resblocks.3.ln_1.bias": torch.ones(32)}),
        r"does not account for \(visual\.transformer\.resblocks\.3\.ln_1\.bias",
    ),
    "transposed kernel": (
        lambda s: s.update({"visual.conv1.weight": s["visual.conv1.weight"].permute(1, 0, 2, 3).contiguous()}),
        "patch_embedding",
    ),
    "attention pool": (lambda s: s.update({"visual.attn_pool.query": torch.ones(1)}), "an attention pool"),
    "timm's trunk": (lambda s: s.update({"visual.trunk.cls_token": torch.ones(1)}), "an image tower of timm's"),
    "EVA's blocks": (lambda s: s.update({"visual.blocks.0.mlp.w1": torch.ones(1)}), "an EVA or timm tower"),
    "NaN": (lambda s: s["visual.proj"].fill_(torch.nan), r"visual\.proj holds NaN"),
}


@pytest.mark.parametrize("name", MISMATCHED)
def test_weights_that_are_not_what_the_config_says_are_refused(name: str, tmp_path: Path) -> None:
    change, reason = MISMATCHED[name]
    write_open_clip(tmp_path, config_of({}))
    file = tmp_path / "open_clip_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    with pytest.raises(ModelError, match=rf"(?s)open_clip_model\.safetensors.*{reason}"):
        open_source(str(tmp_path))


def test_an_embedding_of_another_width_is_refused(tmp_path: Path) -> None:
    write_open_clip(tmp_path, config_of({}))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config_of({}) | {"embed_dim": 24}}))
    with pytest.raises(ModelError, match="embed_dim is 24, but .* projects to 16"):
        open_source(str(tmp_path))


def test_a_norm_that_the_config_denies_is_refused(tmp_path: Path) -> None:
    write_open_clip(tmp_path, config_of({}))
    config = {"model_cfg": config_of({"vision_cfg": {"no_ln_pre": True}})}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"does not account for \(visual\.ln_pre"):
        open_source(str(tmp_path))


LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "CLIPA": ({"vision_cfg": MEAN_POOL, "text_cfg": BERT}, "lays out or tokenizes"),
    "multilingual": (
        {"text_cfg": {"pool_type": "eos", "eos_id": 2, "hf_tokenizer_name": "x"}},
        "lays out or tokenizes",
    ),
    "class token": ({"text_cfg": {"embed_cls": True}, "custom_text": True}, "learned class token"),
    "projection bias": ({"text_cfg": {"proj_bias": True}}, "not a plain matrix"),
    "narrow mlp": ({"text_cfg": {"mlp_ratio": 2.0}}, "four times"),
    "layer scale": ({"text_cfg": {"ls_init_value": 0.1}}, "scales its layers"),
    "qk norm": ({"text_cfg": {"qk_norm": True}}, "further steps"),
    "sigmoid loss": ({"init_logit_bias": -10}, "sigmoid loss"),
    "canonical texts": ({"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, "lays out or tokenizes"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_text_tower_that_ours_is_not_is_left_out_and_said_so(name: str, tmp_path: Path) -> None:
    given, reason = LEFT_OUT[name]
    config = config_of(given)
    model = write_open_clip(tmp_path, config)
    source = open_source(str(tmp_path))
    assert source.model is source.tokenizer is None
    [note] = source.provenance["notes"]
    assert reason in note
    check_image_side(source, model)
    assert source.family == ("clipa" if name == "CLIPA" else "open_clip")


BROKEN_TEXT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer is left out: .*cannot be read as"),
    "temperature": (lambda f: change_state(f, lambda s: s.pop("logit_scale")), "holds no tensor logit_scale"),
    "NaN": (lambda f: change_state(f, lambda s: s["ln_final.bias"].fill_(torch.nan)), r"ln_final\.bias holds NaN"),
    "shape": (
        lambda f: change_state(f, lambda s: s.update(text_projection=torch.ones(8, 16))),
        "text tower is left out",
    ),
    "null": (lambda f: change_config(f, text_cfg=None), "text_cfg is None, needed is an object"),
    "eps": (lambda f: change_config(f, text_cfg=TEXT | {"norm_kwargs": {"eps": None}}), "eps is None"),
    "length": (lambda f: change_config(f, text_cfg=TEXT | {"context_length": 3}), "leaves no room for words"),
    "heads": (lambda f: change_config(f, text_cfg=TEXT | {"heads": 0}), "text tower is left out"),
}


def change_state(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / "open_clip_model.safetensors")
    change(state)
    save_file(state, folder / "open_clip_model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "open_clip_config.json"
    edit(file, model_cfg=json.loads(file.read_text())["model_cfg"] | changes)


@pytest.mark.parametrize("name", BROKEN_TEXT)
def test_a_broken_text_side_leaves_the_image_tower(name: str, tmp_path: Path) -> None:
    model = write_open_clip(tmp_path, config_of({}))
    write_tokenizer(tmp_path, "clip")
    change, reason = BROKEN_TEXT[name]
    change(tmp_path)
    source = open_source(str(tmp_path))
    check_image_side(source, model)
    [note] = source.provenance["notes"]
    assert re.search(reason, note)
    with pytest.raises(ModelError, match=f"(?s)--with-text: .*{reason}"):
        export(str(tmp_path), tmp_path / "out", with_text=True)


def test_other_files_of_others_that_are_damaged_are_named(tmp_path: Path) -> None:
    write_open_clip(tmp_path / "a", config_of({}))
    for broken, reason in (({"vision_cfg": None}, "vision_cfg is None"), ({"vision_cfg": [1]}, r"vision_cfg is \[1\]")):
        change_config(tmp_path / "a", **broken)
        with pytest.raises(ModelError, match=reason):
            open_source(str(tmp_path / "a"))
    for broken, reason in ((["a"], r"preprocess_cfg is \['a'\]"), ({"mean": ["a", 0, 0]}, "three numbers")):
        write_open_clip(tmp_path / "a", config_of({}))
        edit(tmp_path / "a" / "open_clip_config.json", preprocess_cfg=broken)
        with pytest.raises(ModelError, match=reason):
            open_source(str(tmp_path / "a"))
    write_clip(tmp_path / "b", CLIPVisionModel)
    (tmp_path / "b" / "encoder.json").write_text('{"vision": {"pool": "x", "norm_after_pool": 1}, "embed_dim": null}')
    with pytest.raises(ModelError, match=r"encoder\.json does not describe"):
        open_source(str(tmp_path / "b"))


def test_links_out_of_a_folder_and_code_in_its_weights_are_refused(tmp_path: Path) -> None:
    model = write_open_clip(tmp_path / "folder", config_of({}))
    file = tmp_path / "folder" / "open_clip_model.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="leads out of its folder"):
        open_source(str(tmp_path / "folder"))
    file.unlink()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "folder" / "open_clip_pytorch_model.bin")
    with pytest.raises(ModelError, match="TorchScript archive"):
        open_source(str(tmp_path / "folder"))
    torch.save(model.state_dict(), tmp_path / "folder" / "open_clip_pytorch_model.bin")
    check_image_side(open_source(str(tmp_path / "folder")), model)
