"""Encoders of others: each becomes our tower and computes what open_clip or transformers, run as they are, compute;
what cannot is refused with the reason.

Random weights are perturbed, so that no norm, bias or table is at its initial value.
"""

import errno
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from accelerate.state import AcceleratorState
from encoder_runs import BERT_TEXT, CLIP_TEXT, write_run
from hub_server import HubServer, serve
from pair_shards import write_shards
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from encoders import encoder_run, manifest
from encoders.config import EncoderConfig, TextConfig, VisionConfig
from encoders.data.tokenizers import CaptionTokenizer, pad_texts
from encoders.errors import ModelError, ParityError, UsageError
from encoders.export.command import export
from encoders.export.parity import fixed_images
from encoders.objectives import build
from encoders.pretrained import load_strict
from encoders.sources.source import Source, evaluation_pixels, open_source
from encoders.vision import resize_table, sincos2d_table

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


def config_of(given: dict[str, Any], vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT) -> dict[str, Any]:
    """A tiny `model_cfg`; `given` wins."""
    towers = {"vision_cfg": vision | given.get("vision_cfg", {}), "text_cfg": text | given.get("text_cfg", {})}
    return {"embed_dim": 16} | given | towers


def perturb(model: nn.Module, fixed: tuple[str, ...] = ()) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in fixed and parameter.requires_grad:
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


def write_tokenizer(folder: Path, kind: str) -> CaptionTokenizer:
    tokenizer = CaptionTokenizer.train(CAPTIONS, 90 if kind == "bert" else 560, kind)
    tokenizer.save(folder)
    return tokenizer


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


@torch.no_grad()
def check_text_side(source: Source, model: nn.Module, ids: Tensor, lengths: list[int]) -> None:
    assert source.model is not None
    assert source.model.vision is source.tower
    assert relative(source.model.text(ids, lengths), model.encode_text(ids)) <= BOUND
    assert relative(source.reference_text(ids, lengths), model.encode_text(ids)) <= 1e-6
    assert source.model.logit_scale.item() == pytest.approx(model.logit_scale.item())


FAMILIES: dict[str, dict[str, Any]] = {
    "clip": {},
    "quick gelu": {"quick_gelu": True},
    "custom text": {"custom_text": True},
    "eps": {"vision_cfg": EPS, "text_cfg": EPS},
    "tanh": {"vision_cfg": TANH, "text_cfg": TANH},
    "mean pool, norm before": {"vision_cfg": {"pool_type": "avg"}},
    "mean pool, norm after": {"vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True}},
    "wide mlp": {"vision_cfg": {"mlp_ratio": 4.9231}},
    "head width": {"vision_cfg": {"head_width": 8}},
    "layer scale": {"vision_cfg": {"ls_init_value": 0.1}},
    "no norm before the blocks": {"vision_cfg": {"no_ln_pre": True}},
    "fixed table of open_clip": {"vision_cfg": {"pos_embed_type": "sin_cos_2d"}},
    "custom blocks": {"vision_cfg": {"block_type": "custom"}},
    "patch dropout": {"vision_cfg": {"patch_dropout": 0.5}},
    "CLIPS": CLIPS,
    "CLIPS, custom text": CLIPS | {"custom_text": True},
    "CLIPS of the first release": {"vision_cfg": MEAN_POOL, "text_cfg": BERT | {"context_length": 80}},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_open_clip_models_compute_as_in_open_clip(name: str, tmp_path: Path) -> None:
    config = config_of(FAMILIES[name])
    model = write_open_clip(tmp_path, config)
    source = open_source(str(tmp_path))
    check_image_side(source, model)
    length, vocabulary = config["text_cfg"]["context_length"], config["text_cfg"]["vocab_size"]
    lengths = [length, length - 3, 4]
    ids = torch.randint(1, vocabulary - 1, (3, length))
    bert = config["text_cfg"].get("no_causal_mask", False)
    for row, count in enumerate(lengths):
        ids[row, count:] = 0
        ids[row, -1 if bert else count - 1] = vocabulary - 1  # the end token has the highest id
    check_text_side(source, model, ids, lengths)
    assert source.family == ("clips" if name.startswith("CLIPS") else "open_clip")
    assert not [name for name, tensor in source.model.named_buffers() if tensor.is_meta]
    assert all(tensor.dtype == torch.float32 for tensor in source.model.state_dict().values())


BIG = {
    "ViT-B-16": {},
    "ViT-B-16-quickgelu": {},
    "ViT-L-14": {},
    "ViT-L-14-CLIPA-336": {"text_cfg": {"context_length": 80}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BIG)
def test_models_of_real_size_compute_as_in_open_clip(name: str, tmp_path: Path) -> None:
    """A CLIPA tower with CLIPS' text length is CLIPS."""
    config = open_clip.get_model_config(name)
    config["text_cfg"] |= BIG[name].get("text_cfg", {})
    model = write_open_clip(tmp_path, config)
    source = open_source(str(tmp_path))
    check_image_side(source, model)
    ids = torch.randint(1, 30_000, (2, config["text_cfg"]["context_length"]))
    ids[:, -1] = 31_999 if name.endswith("336") else 49_407
    check_text_side(source, model, ids, [ids.shape[1]] * 2)


@pytest.fixture
def bare_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, nn.Module]]:
    """Writes the weights of a tiny model that open_clip knows by name for the time of the test."""
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIG_PATHS", [])
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", {})

    def write(name: str, given: dict[str, Any], file: str, save: Callable[[dict[str, Tensor], Path], None]) -> Any:
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(config_of(given)))
        open_clip.add_model_config(tmp_path / "configs")
        model = write_open_clip(tmp_path / "whole", config_of(given))
        save(model.state_dict(), tmp_path / file)
        return tmp_path / file, model

    return write


def test_a_training_checkpoint_and_its_towers_name(bare_file: Callable[..., tuple[Path, nn.Module]]) -> None:
    def save(state: dict[str, Tensor], file: Path) -> None:
        extras = {"logit_scale_local": torch.ones(()), "multi_classifier.W": torch.ones(1, 4, 16)}
        wrapped = {f"module.{name}": tensor for name, tensor in (state | extras).items()}
        torch.save({"epoch": 32, "name": "vitb16", "state_dict": wrapped, "optimizer": {"lr": 1e-3}}, file)

    file, model = bare_file("ViT-T-8", {}, "cc3m.pt", save)
    source = open_source(str(file), "ViT-T-8")
    check_image_side(source, model)
    assert source.model is not None
    assert source.family == "dreamlip"
    assert any("logit_scale_local" in note for note in source.provenance["notes"])
    with pytest.raises(UsageError, match="add --model-name"):
        open_source(str(file))
    with pytest.raises(UsageError, match="no model config ViT-T-9"):
        open_source(str(file), "ViT-T-9")


@pytest.mark.parametrize("prefix", ["visual.", ""])
def test_an_image_tower_alone(prefix: str, bare_file: Callable[..., tuple[Path, nn.Module]]) -> None:
    def save(state: dict[str, Tensor], file: Path) -> None:
        visual = {n.removeprefix("visual."): t for n, t in state.items() if n.startswith("visual.")}
        save_file({prefix + name: tensor for name, tensor in visual.items()}, file)

    file, model = bare_file("ViT-T-8", CLIPS, "visual.safetensors", save)
    source = open_source(str(file), "ViT-T-8")
    check_image_side(source, model)
    assert source.model is source.tokenizer is None
    assert source.provenance["notes"] == ["the text tower is left out: the weights are those of an image tower alone"]


def test_openai_weights_under_a_gelu_config_are_refused(bare_file: Callable[..., tuple[Path, nn.Module]]) -> None:
    sizes = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12), "vocab_size": torch.tensor(560)}
    for name, given in (("ViT-T-8", {}), ("ViT-T-8-quickgelu", {"quick_gelu": True})):
        file, model = bare_file(name, given, "openai.pt", lambda state, file: torch.save(state | sizes, file))
        if given:
            check_image_side(open_source(str(file), name), model)
        else:
            with pytest.raises(ModelError, match="OpenAI's weights, trained with quick_gelu"):
                open_source(str(file), name)


def test_a_name_of_open_clips_brings_the_preprocessing_of_its_weights(tmp_path: Path) -> None:
    from encoders.sources.open_clip import named_config

    _, clipa = named_config("ViT-L-14-CLIPA")
    assert (clipa["mean"], clipa["interpolation"], clipa["resize_mode"]) == (
        (0.485, 0.456, 0.406),
        "bilinear",
        "squash",
    )
    _, clip = named_config("ViT-B-16")
    assert (clip["mean"][0], clip["interpolation"], clip["resize_mode"]) == (0.48145466, "bicubic", "shortest")


def test_preprocessing_is_the_sources_own(tmp_path: Path) -> None:
    write_open_clip(tmp_path, config_of({}), SQUASH)
    preprocess = open_source(str(tmp_path)).preprocess
    assert (preprocess.mean, preprocess.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    assert (preprocess.interpolation, preprocess.resize) == ("bilinear", "squash")
    write_open_clip(tmp_path, config_of({}))
    preprocess = open_source(str(tmp_path)).preprocess
    assert (preprocess.mean[0], preprocess.interpolation, preprocess.resize) == (0.48145466, "bicubic", "crop")
    write_open_clip(tmp_path, config_of({}), {"resize_mode": "longest"})
    with pytest.raises(ModelError, match="resize_mode 'longest' pads"):
        open_source(str(tmp_path))


def test_a_fixed_table_is_known_by_its_values_and_regenerated(tmp_path: Path) -> None:
    write_open_clip(tmp_path, config_of(CLIPS))
    learned = open_source(str(tmp_path)).tower
    assert learned.config.position_table == "learned"
    table = learned.position_table.detach().clone()
    learned.resize(48)
    assert learned.position_table.equal(resize_table(table, 6))
    weights = load_file(tmp_path / "open_clip_model.safetensors")
    weights["visual.positional_embedding"] = sincos2d_table(4, 32).bfloat16()
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    fixed = open_source(str(tmp_path)).tower
    assert fixed.config.position_table == "sincos2d"
    assert not fixed.position_table.requires_grad
    assert fixed.position_table.equal(weights["visual.positional_embedding"].float())  # as stored, until it is resized
    fixed.resize(48)
    assert fixed.position_table.equal(sincos2d_table(6, 32))
    fixed(torch.randn(1, 3, 48, 48))


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


@pytest.mark.parametrize(("scale", "clamped"), [(100.0, True), (130.0, False)])
def test_a_temperature_beyond_the_usual_bound_is_not_clamped(scale: float, clamped: bool, tmp_path: Path) -> None:
    write_open_clip(tmp_path, config_of({}))
    file = tmp_path / "open_clip_model.safetensors"
    save_file(load_file(file) | {"logit_scale": torch.tensor([scale]).log()}, file)
    model = open_source(str(tmp_path)).model
    assert model.config.clamp_logit_scale == clamped
    assert model.factor(model.logit_scale).item() == pytest.approx(scale, rel=1e-5)


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


def test_tokenizers_give_the_sources_own_ids(tmp_path: Path) -> None:
    """CLIP's vocabulary comes with open_clip; CLIPS' lies beside the weights, in either of two forms."""
    write_open_clip(tmp_path, config_of({"text_cfg": {"vocab_size": 49408}}))
    source = open_source(str(tmp_path))
    assert source.tokenizer is not None
    texts = [*CAPTIONS, "café &amp; naïve   “quotes” isn't 42!", "<end_of_text> 日本 🙂"]
    rows = [source.tokenizer.encode(text, TOKENS) for text in texts]
    theirs = open_clip.SimpleTokenizer(context_length=TOKENS)(texts[:-1])
    assert pad_texts(rows[:-1], source.model.config.text).equal(theirs)
    assert max(rows[-1][1:-1]) < 49406  # a caption that spells a special token is text

    clips = tmp_path / "clips"
    write_open_clip(clips, config_of(CLIPS))
    assert re.search("no tokenizer lies beside .*vocab.txt", open_source(str(clips)).provenance["notes"][0])
    trained = write_tokenizer(clips, "bert")
    assert open_source(str(clips)).tokenizer.encode(CAPTIONS[0], TOKENS) == trained.encode(CAPTIONS[0], TOKENS)
    vocabulary = json.loads((clips / "tokenizer.json").read_text())["model"]["vocab"]
    (clips / "tokenizer.json").unlink()
    (clips / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    read = open_source(str(clips)).tokenizer
    assert [read.encode(text, TOKENS) for text in texts] == [trained.encode(text, TOKENS) for text in texts]


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


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


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
    edit(folder / "open_clip_config.json")
    config = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps(config | {"model_cfg": config["model_cfg"] | changes}))


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


def test_a_text_tower_that_ends_its_texts_elsewhere_than_its_tokenizer_is_left_out(tmp_path: Path) -> None:
    write_clip(tmp_path)
    tokenizer = write_tokenizer(tmp_path, "clip")
    config = json.loads((tmp_path / "config.json").read_text())
    for end, kept in ((tokenizer.eos, True), (2, True), (7, False)):  # 2 stands for the largest id
        edit(tmp_path / "config.json", text_config=config["text_config"] | {"eos_token_id": end})
        source = open_source(str(tmp_path))
        assert (source.model is not None) == kept
    assert "pooled at id 7, where its tokenizer ends them with" in source.provenance["notes"][0]


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


def test_a_folder_with_open_clips_config_and_transformers_weights_is_transformers(tmp_path: Path) -> None:
    write_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config_of({})}))
    assert open_source(str(tmp_path)).family == "hf-clip"


def test_clips_weights_under_a_config_that_leaves_out_their_epsilon_come_with_a_note(tmp_path: Path) -> None:
    text = CLIPS["text_cfg"]
    for given, expected in (
        (CLIPS, ""),
        (
            {"vision_cfg": MEAN_POOL, "text_cfg": BERT | {"context_length": 80}},
            "no vision norm_kwargs, no text norm_kw",
        ),
        (CLIPS | {"text_cfg": {k: v for k, v in text.items() if k != "act_kwargs"}}, "states no text act_kwargs, so"),
    ):
        write_open_clip(tmp_path, config_of(given))
        notes = open_source(str(tmp_path)).provenance["notes"]
        assert [expected in note for note in notes if "eps" in note] == ([True] if expected else [])


OPENAI_PROCESSOR = {  # as OpenAI's own folders on the Hub have it, but for the size
    "crop_size": SIZE,
    "size": SIZE,
    "resample": 3,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
PICTURES = {
    "transformers": lambda f: write_clip(f, CLIPVisionModel),
    "OpenAI": lambda f: [
        write_clip(f, CLIPVisionModel),
        (f / "preprocessor_config.json").write_text(json.dumps(OPENAI_PROCESSOR)),
    ],
    "open_clip, crop": lambda f: write_open_clip(f, config_of({})),
    "open_clip, squash": lambda f: write_open_clip(f, config_of({}), SQUASH),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_are_those_of_the_sources_own_processor(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an export whose reading of it is wrong is refused."""
    PICTURES[name](tmp_path / "source")
    source = open_source(str(tmp_path / "source"))
    picture = fixed_images(90, 1)[0][:, :60]
    pixels = source.reference_pixels(picture)
    torch.testing.assert_close(pixels, evaluation_pixels(source.preprocess, SIZE, picture), rtol=0, atol=1e-5)
    if "open_clip" in name:
        stated = json.loads((tmp_path / "source" / "open_clip_config.json").read_text())["preprocess_cfg"]
        transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(SIZE, **stated), False)
        theirs = transform(Image.fromarray(picture.permute(1, 2, 0).numpy()))
        assert (pixels[0] - theirs).abs().max() <= 1.5 / 255 / 0.2  # Pillow rounds by a step of 8 bits
    export(str(tmp_path / "source"), tmp_path / "right")
    wrong = replace(source, preprocess=replace(source.preprocess, mean=(0.48, 0.46, 0.41)))
    monkeypatch.setattr("encoders.sources.source.open_source", lambda *_: wrong)
    for size in (SIZE, 48):
        with pytest.raises(ParityError, match="makes pixels"):
            export(str(tmp_path / "source"), tmp_path / "wrong", image_size=size)


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_a_text_tower_that_was_misread_is_not_exported(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong epsilon is in our tower and in what it is exported as; only the source itself knows better."""
    if kind == "open_clip":
        write_open_clip(tmp_path / "source", config_of({}))
    else:
        write_clip(tmp_path / "source")
        whole = json.loads((tmp_path / "source" / "config.json").read_text())
        edit(tmp_path / "source" / "config.json", text_config=whole["text_config"] | {"eos_token_id": 2})
    write_tokenizer(tmp_path / "source", "clip")
    export(str(tmp_path / "source"), tmp_path / "right", with_text=True)
    source = open_source(str(tmp_path / "source"))
    config = replace(source.model.config, text=replace(source.model.config.text, norm_eps=1e-2))
    for module in source.model.text.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-2
    source.model.text.config, source.model.config = config.text, config
    monkeypatch.setattr("encoders.sources.source.open_source", lambda *_: source)
    with pytest.raises(ParityError, match="computes other text embeddings than the source"):
        export(str(tmp_path / "source"), tmp_path / "wrong", with_text=True)


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


def test_a_run_is_a_source(tmp_path: Path) -> None:
    vision = VisionConfig(image_size=SIZE, patch_size=8, width=32, layers=3, heads=2, mlp_width=64, pre_norm=False)
    text = TextConfig(vocab_size=90, length=TOKENS, width=32, layers=1, heads=2)
    torch.manual_seed(0)
    model = build(EncoderConfig(embed_dim=16, vision=replace(vision, pool="mean"), text=text))
    encoder_run.save(tmp_path, model, CaptionTokenizer.train(CAPTIONS, 90, "bert"))
    manifest.seal(tmp_path, "encoder-run", {}, metrics={"retrieval": {"i2t_r1": 0.5}})
    source = open_source(str(tmp_path))
    pixels = torch.randn(2, 3, SIZE, SIZE)
    reference = source.reference(pixels)
    torch.testing.assert_close(reference["image_embeds"], model.eval().vision(pixels)[1])
    assert reference["hidden_states[-2]"].shape == (2, 17, 32)
    assert (source.family, source.parents) == ("run", {"run": tmp_path})
    assert source.provenance["metrics"]["retrieval"]["i2t_r1"] == 0.5
    with pytest.raises(UsageError, match="has no revision"):
        open_source(str(tmp_path), revision="main")
    with pytest.raises(UsageError, match="leave out --model-name"):
        open_source(str(tmp_path), "ViT-B-16")


@torch.no_grad()
def test_an_export_is_a_source_that_pools_as_its_run_did(tmp_path: Path) -> None:
    vision = VisionConfig(image_size=SIZE, patch_size=8, width=32, layers=3, heads=2, mlp_width=64, pool="mean")
    text = TextConfig(vocab_size=90, length=TOKENS, width=32, layers=1, heads=2)
    torch.manual_seed(0)
    model = build(EncoderConfig(embed_dim=16, vision=vision, text=text)).eval()
    perturb(model)
    (tmp_path / "run").mkdir()
    encoder_run.save(tmp_path / "run", model, CaptionTokenizer.train(CAPTIONS, 90, "bert"))
    manifest.seal(tmp_path / "run", "encoder-run", {})
    export(str(tmp_path / "run"), tmp_path / "out")
    source = open_source(str(tmp_path / "out"))
    pixels = torch.randn(2, 3, SIZE, SIZE)
    wanted = model.vision(pixels)[1]
    assert source.tower.config == vision
    assert relative(source.tower(pixels)[1], wanted) <= BOUND
    assert relative(source.reference(pixels)["image_embeds"], wanted) <= BOUND


@pytest.mark.parametrize("kind", ["clip", "bert"])
@torch.no_grad()
def test_an_export_with_text_is_a_source_of_both_towers(kind: str, tmp_path: Path) -> None:
    """Also with a vocabulary of its own, in which the end of a text is not the largest id."""
    text = replace(CLIP_TEXT if kind == "clip" else BERT_TEXT, length=TOKENS)
    run = write_run(tmp_path / "run", text=text)
    if kind == "clip":
        tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
        tokenizer.add_special_tokens(["<|more|>"])
        tokenizer.save(str(run / "tokenizer.json"))
        manifest.seal(run, "encoder-run", {})
    export(str(run), tmp_path / "out", with_text=True)
    source = open_source(str(tmp_path / "out"))
    model, words = encoder_run.load(run)
    assert source.provenance["notes"] == []
    assert source.model.config.text == text
    rows = [words.encode(caption, TOKENS) for caption in CAPTIONS]
    assert [source.tokenizer.encode(caption, TOKENS) for caption in CAPTIONS] == rows
    ids, lengths = pad_texts(rows, text), [len(row) for row in rows]
    for found in (source.model.text(ids, lengths), source.reference_text(ids, lengths)):
        assert relative(found, model.text(ids, lengths)) <= BOUND
    export(str(tmp_path / "out"), tmp_path / "again", with_text=True)


def test_without_open_clip_only_what_needs_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_open_clip(tmp_path, config_of({"text_cfg": {"vocab_size": 49408}}))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    source = open_source(str(tmp_path))
    assert source.tokenizer is None
    assert source.model is not None
    with pytest.raises(UsageError, match=r"encoder-swap\[open-clip\]"):
        source.reference(torch.randn(1, 3, SIZE, SIZE))
    with pytest.raises(UsageError, match=r"encoder-swap\[open-clip\]"):
        open_source(str(tmp_path / "open_clip_model.safetensors"), "ViT-B-16")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub of this process's client, over loopback."""
    with serve("hf_" + "loopback" * 4) as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_" + "loopback" * 4)
        yield running


def upload(folder: Path, repo: str) -> None:
    client = huggingface_hub.HfApi()
    client.create_repo(repo)
    client.upload_folder(repo_id=repo, folder_path=folder)


def test_published_clips_weights_from_the_hub(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one commit, config and weights, but not the second copy of the weights; the tokenizer from where the config
    says; then all of it again without a network."""
    repo = "lab/clips"
    (tmp_path / "words").mkdir()
    tokenizer = write_tokenizer(tmp_path / "words", "bert")
    upload(tmp_path / "words", "lab/words")
    given = CLIPS | {"text_cfg": CLIPS["text_cfg"] | {"hf_tokenizer_name": "lab/words"}}
    model = write_open_clip(tmp_path / "published", config_of(given), SQUASH)
    (tmp_path / "published" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    torch.save(model.state_dict(), tmp_path / "published" / "open_clip_pytorch_model.bin")
    upload(tmp_path / "published", repo)
    commit = server.repos[repo].refs["main"]
    for revision in (None, commit):
        source = open_source(repo, revision=revision)
        assert (source.provenance["base_model"], source.provenance["commit"]) == (repo, commit)
        assert (source.provenance["license"], source.family) == ("apache-2.0", "clips")
        assert source.provenance["notes"] == []
        check_image_side(source, model)
        assert source.tokenizer.encode(CAPTIONS[1], TOKENS) == tokenizer.encode(CAPTIONS[1], TOKENS)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fetched = {file.name for file in source.parents["source"].iterdir()}
    assert "open_clip_model.safetensors" in fetched
    assert "open_clip_pytorch_model.bin" not in fetched
    with pytest.raises(ModelError, match="lab/other is neither on this machine nor to be had from the Hub"):
        open_source("lab/other")


@torch.no_grad()
def test_shards_and_pickles_from_the_hub(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_clip(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    upload(tmp_path / "shards", "lab/shards")
    theirs = write_open_clip(tmp_path / "pickle", config_of({}))
    (tmp_path / "pickle" / "open_clip_model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pickle" / "open_clip_pytorch_model.bin")
    upload(tmp_path / "pickle", "lab/pickle")
    for offline in (False, True):  # and then without the file that comes first, which nobody has
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        check_image_side(open_source("lab/pickle"), theirs)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    pixels = torch.randn(1, 3, SIZE, SIZE)
    found = open_source("lab/shards").tower.model(pixels).last_hidden_state
    assert relative(found, model.vision_model(pixels).last_hidden_state) <= BOUND


def test_a_damaged_card_or_index_on_the_hub_and_a_full_disk(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "card")
    (tmp_path / "card" / "README.md").write_text("---\nlicense: other\nlicense_name: ours\n---\n")
    upload(tmp_path / "card", "lab/card")
    source = open_source("lab/card")
    stated = {name: source.provenance.get(name) for name in ("license", "license_name", "license_link")}
    assert stated == {"license": "other", "license_name": "ours", "license_link": None}
    assert source.provenance["notes"][1:] == []
    (source.parents["source"] / "README.md").write_text("---\nlicense: mit\ntitle: a: b: c\n---\n")
    source = open_source("lab/card")
    assert "license" not in source.provenance
    assert "license is unknown: its README.md has no valid metadata" in source.provenance["notes"][0]
    (tmp_path / "card" / "model.safetensors").unlink()
    (tmp_path / "card" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../evil.safetensors"}}')
    upload(tmp_path / "card", "lab/index")
    with pytest.raises(ModelError, match=r"names '\.\./\.\./evil\.safetensors', which is not"):
        open_source("lab/index")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ModelError, match="cannot be stored: .*No space left.*free space"):
        open_source("lab/card")


def test_what_the_hub_lacks_is_named(server: HubServer, tmp_path: Path) -> None:
    write_open_clip(tmp_path / "published", config_of({}))
    (tmp_path / "published" / "open_clip_model.safetensors").unlink()
    upload(tmp_path / "published", "lab/empty")
    with pytest.raises(ModelError, match=r"holds none of open_clip_model\.safetensors, open_clip_pytorch_model\.bin"):
        open_source("lab/empty")
    with pytest.raises(ModelError, match="revision v9"):
        open_source("lab/empty", revision="v9")
    with pytest.raises(ModelError, match="lab/nothing is neither on this machine"):
        open_source("lab/nothing")


def test_what_is_no_source_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no id on the Hub"):
        open_source(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="no id on the Hub"):
        open_source("a/b/c")
    with pytest.raises(ModelError, match=r"no open_clip_config\.json and no config\.json"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(("kind", "objective"), [("clips", "clips"), ("clip", "clip"), ("clip", "dreamlip")])
def test_published_towers_are_trained_on_at_a_higher_resolution(kind: str, objective: str, tmp_path: Path) -> None:
    from train import loop, pair_task, signals, start
    from train.config import OptimConfig, PairData, ResolutionConfig, RunConfig

    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path / "published"
    given: dict[str, Any] = CLIPS if kind == "clips" else {}
    write_open_clip(folder, config_of(given), SQUASH)
    tokenizer = write_tokenizer(folder, "bert" if kind == "clips" else "clip")
    write_shards(tmp_path / "train", 16)
    write_shards(tmp_path / "held_out", 4, shards=1)
    before = open_source(str(folder))
    config = ResolutionConfig(
        init=str(folder),
        objective="dreamlip" if objective == "dreamlip" else None,
        image_size=48,
        data=PairData(tmp_path / "train", tmp_path / "held_out", tmp_path / "held_out"),
        run=RunConfig(out=tmp_path / "run", steps=1, batch_size=8, workers=0, threads=1, precision="no"),
        optim=OptimConfig(lr=1e-6, weight_decay=0.0),
    )
    start.prepare_folder(config.run)
    accelerator = start.build_accelerator(config.run)
    loop.train(pair_task.finetune_resolution(config), config.run, config.optim, signals.StopRequest(), accelerator)
    after, read = encoder_run.load(tmp_path / "run")
    assert (after.config.objective, after.config.vision.image_size) == (objective, 48)
    assert after.config.preprocess == before.preprocess
    assert after.config.text.padding == ("reference" if kind == "clips" else "packed")
    assert read.encode(CAPTIONS[1], TOKENS) == tokenizer.encode(CAPTIONS[1], TOKENS)
    old, new = before.model.state_dict(), after.state_dict()
    table = "vision.model.embeddings.position_embedding.weight"
    old[table] = resize_table(old[table], 6)
    assert new.keys() - old.keys() == ({"grouping_scale"} if objective == "dreamlip" else set())
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor, rtol=0, atol=2e-6)  # one step of 1e-6
    assert any(not new[name].equal(tensor) for name, tensor in old.items())


def test_towers_that_cannot_be_trained_on_are_refused_with_what_is_missing(tmp_path: Path) -> None:
    from train import pair_task
    from train.config import ResolutionConfig

    write_open_clip(tmp_path / "clipa", config_of({"vision_cfg": MEAN_POOL, "text_cfg": BERT}))
    with pytest.raises(ModelError, match="takes both towers and a tokenizer: the text tower is left out"):
        pair_task.finetune_resolution(ResolutionConfig(init=str(tmp_path / "clipa")))
    write_open_clip(tmp_path / "clips", config_of(CLIPS))
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        pair_task.finetune_resolution(ResolutionConfig(init=str(tmp_path / "clips")))
