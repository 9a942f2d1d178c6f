"""Encoders of open_clip: each becomes our towers and computes what open_clip, run as it is, computes."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from source_folders import (
    BERT,
    BOUND,
    CAPTIONS,
    CLIPS,
    EPS,
    MEAN_POOL,
    SIZE,
    SQUASH,
    TANH,
    TOKENS,
    check_image_side,
    config_of,
    relative,
    write_open_clip,
    write_tokenizer,
)
from torch import Tensor, nn

from encoders.data.tokenizers import pad_texts
from encoders.errors import ModelError, UsageError
from encoders.sources.source import Source, open_source
from encoders.vision import resize_table, sincos2d_table


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


@pytest.mark.parametrize(("scale", "clamped"), [(100.0, True), (130.0, False)])
def test_a_temperature_beyond_the_usual_bound_is_not_clamped(scale: float, clamped: bool, tmp_path: Path) -> None:
    write_open_clip(tmp_path, config_of({}))
    file = tmp_path / "open_clip_model.safetensors"
    save_file(load_file(file) | {"logit_scale": torch.tensor([scale]).log()}, file)
    model = open_source(str(tmp_path)).model
    assert model.config.clamp_logit_scale == clamped
    assert model.factor(model.logit_scale).item() == pytest.approx(scale, rel=1e-5)


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
