"""Encoders of transformers: each becomes our towers and computes what transformers, run as it is, computes; what cannot
is refused with the reason.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from source_folders import BOUND, SIZE, TOKENS, edit, relative, write_clip, write_tokenizer
from torch import nn
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from encoders.errors import ModelError
from encoders.pretrained import load_strict
from encoders.sources.source import open_source


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("model_class", [CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection])
@torch.no_grad()
def test_transformers_models_compute_as_in_transformers(model_class: Any, activation: str, tmp_path: Path) -> None:
    model = write_clip(tmp_path, model_class, hidden_act=activation)
    source = open_source(str(tmp_path))
    pixels = torch.randn(2, 3, SIZE, SIZE)
    tower = model if model_class is CLIPVisionModel else model.vision_model
    wanted, ours, reference = (
        tower(pixels, output_hidden_states=True),
        source.tower.model(pixels, output_hidden_states=True),
        source.reference(pixels),
    )
    assert relative(ours.hidden_states[-2], wanted.hidden_states[-2]) <= BOUND
    assert relative(reference["hidden_states[-2]"], wanted.hidden_states[-2]) <= 1e-6
    for name in ("last_hidden_state", "pooler_output"):
        assert relative(ours[name], wanted[name]) <= BOUND
        assert relative(reference[name], wanted[name]) <= 1e-6
    if model_class is CLIPVisionModel:
        assert isinstance(source.tower.projection, nn.Identity)
        assert "image_embeds" not in reference
    else:
        embeds = model.visual_projection(wanted.pooler_output)
        assert relative(source.tower(pixels)[1], embeds) <= BOUND
        assert relative(reference["image_embeds"], embeds) <= 1e-6
    assert source.family == "hf-clip"
    assert (source.model is None) == (model_class is not CLIPModel)
    if source.model is not None:
        ids = torch.randint(1, 558, (2, TOKENS))
        ids[0, 6], ids[1, -1] = 559, 559
        states = model.text_model(ids).pooler_output
        assert relative(source.model.text(ids, [7, TOKENS]), model.text_projection(states)) <= BOUND
        assert relative(source.reference_text(ids, [7, TOKENS]), model.text_projection(states)) <= 1e-6


@torch.no_grad()
def test_transformers_weights_in_other_files(tmp_path: Path) -> None:
    """Shards, a pickle, and keys without `vision_model.`, as transformers 5 writes an image tower."""
    model = write_clip(tmp_path / "one")
    pixels = torch.randn(1, 3, SIZE, SIZE)
    wanted = model.vision_model(pixels).last_hidden_state
    shutil.copytree(tmp_path / "one", tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    shutil.copytree(tmp_path / "one", tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    for name in ("one", "shards", "pickle"):
        source = open_source(str(tmp_path / name))
        assert relative(source.tower.model(pixels).last_hidden_state, wanted) <= BOUND
        assert relative(source.reference(pixels)["last_hidden_state"], wanted) <= 1e-6
        assert source.model is not None
    shard = next((tmp_path / "shards").glob("model-00001-*"))
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="leads out of its folder"):
        open_source(str(tmp_path / "shards"))
    bare = write_clip(tmp_path / "bare", CLIPVisionModel)
    keys = load_file(tmp_path / "bare" / "model.safetensors").keys()
    assert "embeddings.class_embedding" in keys or "vision_model.embeddings.class_embedding" in keys
    found = open_source(str(tmp_path / "bare")).tower.model(pixels).last_hidden_state
    assert relative(found, bare(pixels).last_hidden_state) <= BOUND


def test_squashing_processors_and_missing_ones(tmp_path: Path) -> None:
    write_clip(tmp_path, CLIPVisionModel)
    square = {"height": SIZE, "width": SIZE}
    edit(tmp_path / "preprocessor_config.json", size=square, do_center_crop=False)
    assert open_source(str(tmp_path)).preprocess.resize == "squash"
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "aside.json")
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json"):
        open_source(str(tmp_path))
    nested = {"image_processor": json.loads((tmp_path / "aside.json").read_text())}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert open_source(str(tmp_path)).preprocess.resize == "squash"


HF_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "SigLIP": ("config.json", {"model_type": "siglip_vision_model"}, "no class token and pools by attention"),
    "DINO": ("config.json", {"model_type": "dinov2"}, "needed is `clip`"),
    "code": ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "asks for code of its own to be run"),
    "code of the processor": ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "evil.P"}}, "code of its own"),
    "folded": ("config.json", {"folded": True}, "folded tower"),
    "activation": ("config.json", {"hidden_act": "relu"}, "hidden_act 'relu' is none of"),
    "channels": ("config.json", {"num_channels": 1}, "num_channels is 1"),
    "size": ("config.json", {"image_size": 48}, r"config\.json"),
    "mean": ("preprocessor_config.json", {"image_mean": None}, "three means"),
    "no normalising": ("preprocessor_config.json", {"do_normalize": False}, "do_normalize switched off"),
    "nearest": ("preprocessor_config.json", {"resample": 0}, "resample 0"),
    "margin": ("preprocessor_config.json", {"size": {"shortest_edge": 40}}, "neither the short side to 32"),
    "another processor": (
        "preprocessor_config.json",
        {"image_processor_type": "ViTImageProcessor"},
        "ViTImageProc.*oth",
    ),
    "older extractor": ("preprocessor_config.json", {"feature_extractor_type": "BlipFeatureExtractor"}, "BlipFeature"),
    "pixels from -1 to 1": ("preprocessor_config.json", {"rescale_factor": 1 / 127.5}, r"rescale_factor is 0\.0078"),
    "padding": ("preprocessor_config.json", {"do_pad": True}, "do_pad is on"),
    "mean in words": ("preprocessor_config.json", {"image_mean": ["a", "b", "c"]}, "three means"),
    "list of filters": ("preprocessor_config.json", {"resample": [3]}, r"resample \[3\]"),
    "nothing nested": ("config.json", {"model_type": "clip", "vision_config": [1]}, "vision_config must be an object"),
    "crop of another size": ("preprocessor_config.json", {"crop_size": {"height": 24, "width": 24}}, "neither"),
}


@pytest.mark.parametrize("name", HF_REFUSED)
def test_transformers_folders_that_cannot_be_used_are_refused(name: str, tmp_path: Path) -> None:
    write_clip(tmp_path, CLIPVisionModel)
    file, changes, reason = HF_REFUSED[name]
    open_source(str(tmp_path))
    edit(tmp_path / file, **changes)
    with pytest.raises(ModelError, match=reason):
        open_source(str(tmp_path))


def test_a_folded_tower_is_known_by_its_weights_too(tmp_path: Path) -> None:
    write_clip(tmp_path, CLIPVisionModel)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    for factor in (200.0, 2.0**6, 2.0**14):  # a fold's is a power of two; for small embeddings a small one
        for name in state:
            if "pre_layrnorm" in name:
                state[name].fill_(factor if name.endswith("weight") else 0.0)
        save_file(state, file, metadata={"format": "pt"})
        if factor == 200.0:
            open_source(str(tmp_path))
            continue
        with pytest.raises(ModelError, match="folded tower"):
            open_source(str(tmp_path))


def test_a_tensor_of_the_tower_that_transformers_would_leave_out_is_refused(tmp_path: Path) -> None:
    write_clip(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"classifier.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    assert (
        "1 tensors of neither tower are left out: classifier.weight" in open_source(str(tmp_path)).provenance["notes"]
    )
    save_file(load_file(file) | {"vision_model.head.probe": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holds 1 tensors of the image tower .* \(vision_model\.head\.probe\)"):
        open_source(str(tmp_path))


LOADS_MORE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "kernel": (lambda f: edit(f / "config.json", attn_implementation="kernels-community/x"), "'kernels-community/x'"),
    "kernel of a part": (
        lambda f: edit(f / "config.json", x={"_attn_implementation": {"y": "a/b"}}),
        "'a/b', code that",
    ),
    "quantised": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "awq"}),
        "quantization_config",
    ),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), r"adapter_config\.json beside config\.json"),
}


@pytest.mark.parametrize("name", LOADS_MORE)
def test_folders_from_which_transformers_would_load_something_else_are_refused(name: str, tmp_path: Path) -> None:
    write_clip(tmp_path, CLIPVisionModel)
    edit(tmp_path / "config.json", attn_implementation="sdpa")
    load_strict(CLIPVisionModel, tmp_path, torch.float32)
    change, reason = LOADS_MORE[name]
    change(tmp_path)
    with pytest.raises(ModelError, match=reason):
        open_source(str(tmp_path))
    with pytest.raises(ModelError, match=reason):
        load_strict(CLIPVisionModel, tmp_path, torch.float32)


def test_a_text_tower_that_ends_its_texts_elsewhere_than_its_tokenizer_is_left_out(tmp_path: Path) -> None:
    write_clip(tmp_path)
    tokenizer = write_tokenizer(tmp_path, "clip")
    config = json.loads((tmp_path / "config.json").read_text())
    for end, kept in ((tokenizer.eos, True), (2, True), (7, False)):  # 2 stands for the largest id
        edit(tmp_path / "config.json", text_config=config["text_config"] | {"eos_token_id": end})
        source = open_source(str(tmp_path))
        assert (source.model is not None) == kept
    assert "pooled at id 7, where its tokenizer ends them with" in source.provenance["notes"][0]
