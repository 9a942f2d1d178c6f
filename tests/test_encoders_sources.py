"""What can be a source, our own runs and exports among them; an export that has misread its source is refused."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from encoder_runs import BERT_TEXT, CLIP_TEXT, write_run
from PIL import Image
from source_folders import (
    BOUND,
    CAPTIONS,
    SIZE,
    SQUASH,
    TOKENS,
    config_of,
    edit,
    perturb,
    relative,
    write_clip,
    write_open_clip,
    write_tokenizer,
)
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPVisionModel

from encoders import encoder_run, manifest
from encoders.config import EncoderConfig, TextConfig, VisionConfig
from encoders.data.tokenizers import CaptionTokenizer, pad_texts
from encoders.errors import ModelError, ParityError, UsageError
from encoders.export.command import export
from encoders.export.parity import fixed_images
from encoders.objectives import build
from encoders.sources.source import evaluation_pixels, open_source


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


def test_a_folder_with_open_clips_config_and_transformers_weights_is_transformers(tmp_path: Path) -> None:
    write_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config_of({})}))
    assert open_source(str(tmp_path)).family == "hf-clip"


def test_what_is_no_source_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no id on the Hub"):
        open_source(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="no id on the Hub"):
        open_source("a/b/c")
    with pytest.raises(ModelError, match=r"no open_clip_config\.json and no config\.json"):
        open_source(str(tmp_path))


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
