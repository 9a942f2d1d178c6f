"""Export: what is on disk computes what was trained, loads everywhere, and anything else is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, CLIPVisionModel

from encoders import encoder_run, export, manifest
from encoders.config import CaptionerConfig, EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from encoders.data.tokenizers import CaptionTokenizer
from encoders.data.transforms import eval_transform
from encoders.errors import DataError, ModelError, ParityError, UsageError
from encoders.objectives import build

CONFIG = EncoderConfig(
    objective="clips",
    embed_dim=16,
    vision=VisionConfig(image_size=48, patch_size=8, width=32, layers=3, heads=2, mlp_width=64, norm_eps=1e-6),
    text=TextConfig(vocab_size=60, length=8, width=32, layers=1, heads=2),
    captioner=CaptionerConfig(tokens=6, width=32, layers=1, heads=2),
    preprocess=PreprocessConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), interpolation="bicubic"),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished encoder run whose weights are all different from their initial values."""
    torch.manual_seed(0)
    model = build(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path / "run"
    folder.mkdir()
    encoder_run.save(folder, model, CaptionTokenizer.train(["a red square"], 60, "bert"))
    manifest.seal(folder, "encoder-run", {}, metrics={"retrieval": {"i2t_r1": 0.5}})
    return folder


def test_exported_folder_computes_what_was_trained(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    export.export(run, out)
    model, _ = encoder_run.load(run)
    tower, info = CLIPVisionModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    images = export.fixed_images(48)
    pixels = AutoImageProcessor.from_pretrained(out, backend="torchvision")(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, model.normalise(images), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        output = tower(pixels)
        patches, pooled = model.vision(model.normalise(images))
        projected = model.vision.projection(output.pooler_output)
    torch.testing.assert_close(output.last_hidden_state[:, 1:], patches, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(projected, pooled, rtol=1e-5, atol=1e-5)

    keys = load_file(out / "model.safetensors").keys()
    assert all(key.startswith("vision_model.") for key in keys)  # what transformers 4 reads
    config = json.loads((out / "config.json").read_text())
    assert (config["hidden_act"], config["layer_norm_eps"]) == ("gelu", 1e-6)
    parity = json.loads((out / "parity.json").read_text())
    assert set(parity["layers"]) == {"hidden_states[-2]", "last_hidden_state", "pooler_output"}
    assert manifest.read(out, "encoder").parents["run"].fingerprint == manifest.read(run).fingerprint


def test_processor_resizes_as_evaluation_does(run: Path, tmp_path: Path) -> None:
    export.export(run, tmp_path / "encoder")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "encoder", backend="torchvision")
    picture = export.fixed_images(90)[0][:, :70]
    model, _ = encoder_run.load(run)
    ours = model.normalise(eval_transform(picture, 48, CONFIG.preprocess)[None])
    torch.testing.assert_close(processor(picture, return_tensors="pt")["pixel_values"], ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mistake", ["activation", "eps", "table", "norm", "query and key"])
def test_parity_catches_what_export_could_get_wrong(run: Path, tmp_path: Path, mistake: str) -> None:
    model, _ = encoder_run.load(run)
    folder = tmp_path / "encoder"
    folder.mkdir()
    export.write_folder(model, folder)
    export.certify(model, folder)  # right as written
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    if mistake == "activation":
        config["hidden_act"] = "quick_gelu"
    elif mistake == "eps":
        config["layer_norm_eps"] = 1e-3
    elif mistake == "table":
        weights["vision_model.embeddings.position_embedding.weight"][1:] = weights[
            "vision_model.embeddings.position_embedding.weight"
        ][1:].flip(0)
    elif mistake == "norm":
        weights["vision_model.pre_layrnorm.weight"] = torch.ones(32)
    else:
        names = [f"vision_model.encoder.layers.0.self_attn.{x}_proj.weight" for x in "qv"]
        weights[names[0]], weights[names[1]] = weights[names[1]], weights[names[0]]
    manifest.write_json(folder / "config.json", config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParityError, match="differs from the training model"):
        export.certify(model, folder)


def test_sources_that_are_no_encoder_run_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        export.export(tmp_path / "nothing", tmp_path / "out")
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    manifest.seal(scenes, "scenes", {})
    with pytest.raises(DataError, match="'scenes' artifact where 'encoder-run' is needed"):
        export.export(scenes, tmp_path / "out")
    other = replace(CONFIG, vision=replace(CONFIG.vision, image_size=64))
    manifest.write_json(run / "encoder.json", other.to_dict())
    with pytest.raises(ModelError, match="disagree"):
        export.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_refused(run: Path, tmp_path: Path) -> None:
    weights = load_file(run / "model.safetensors")
    weights["vision.projection.weight"][0, 0] = torch.nan
    save_file(weights, run / "model.safetensors")
    with pytest.raises(ModelError, match=r"vision\.projection\.weight is not finite"):
        export.export(run, tmp_path / "out")


def test_out_is_never_clobbered(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a 'encoder-run' artifact"):
        export.export(run, run, overwrite=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not an artifact"):
        export.export(run, mine, overwrite=True)
    export.export(run, tmp_path / "out")
    with pytest.raises(UsageError, match="--overwrite"):
        export.export(run, tmp_path / "out")
    export.export(run, tmp_path / "out", overwrite=True)
    assert (mine / "thesis.txt").read_text() == "years of work"
