"""Export: what is on disk computes what the source computes, loads everywhere, is the same twice, and anything else is
refused."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from encoder_runs import BERT_TEXT, CLIP_TEXT, CLIPS, PREPROCESS, RETRIEVAL, write_run
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModel

from encoders import encoder_run, manifest
from encoders.config import EncoderConfig, PreprocessConfig
from encoders.data.tokenizers import pad_texts
from encoders.data.transforms import eval_transform
from encoders.errors import DataError, ModelError, ParityError, UsageError
from encoders.export import command as export
from encoders.export import parity, two_towers
from encoders.export.image_head import image_embedding
from encoders.export.parity import fixed_images
from encoders.vision import sincos2d_table
from eval.encoder import evaluate
from eval.zero_shot.spec import parse_spec

CAPTIONS = ["a red square", "square red a a a a a a a a a a a a a a", ""]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def test_exported_folder_computes_what_was_trained(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    export.export(run, out)
    model, _ = encoder_run.load(run)
    tower, info = CLIPVisionModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    images = fixed_images(48, 3)
    pixels = AutoImageProcessor.from_pretrained(out, backend="torchvision")(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, model.normalise(images), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        output = tower(pixels)
        patches, pooled = model.vision(model.normalise(images))
        embedded = image_embedding(out, tower, output)
    torch.testing.assert_close(output.last_hidden_state[:, 1:], patches, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embedded, pooled, rtol=1e-5, atol=1e-5)

    assert all(key.startswith("vision_model.") for key in load_file(out / "model.safetensors"))  # what 4.x reads
    config = json.loads((out / "config.json").read_text())
    assert (config["hidden_act"], config["layer_norm_eps"]) == ("gelu", 1e-5)
    assert config["dtype"] == config["torch_dtype"] == "float32"
    certificate = json.loads((out / "parity.json").read_text())
    for dtype in ("float32", "bfloat16"):
        assert set(certificate[dtype]["layers"]) == {*parity.LAYERS, "image_embeds"}
    assert {layer["rounding_ratio"] for layer in certificate["bfloat16"]["layers"].values()} == {1.0}
    assert manifest.read(out, "encoder").parents["run"].fingerprint == manifest.read(run).fingerprint


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_processor_resizes_as_evaluation_does(tmp_path: Path, resize: str, interpolation: str) -> None:
    preprocess = PreprocessConfig(resize=resize, interpolation=interpolation)
    export.export(write_run(tmp_path / "run", preprocess=preprocess), tmp_path / "encoder")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "encoder", backend="torchvision")
    model, _ = encoder_run.load(tmp_path / "run")
    for height, width in ((70, 90), (90, 70), (40, 47), (50, 70), (70, 50)):  # the last two: an odd rest is cropped
        picture = fixed_images(90, 1)[0][:, :height, :width]
        ours = model.normalise(eval_transform(picture, 48, preprocess)[None])
        found = processor(picture, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-5)


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", text=CLIP_TEXT, pre_norm=False)
    for name in ("one", "two"):
        export.export(run, tmp_path / name, with_text=True)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        if file.name != manifest.MANIFEST:
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert manifest.read(tmp_path / "one").fingerprint == manifest.read(tmp_path / "two").fingerprint
    with safe_open(tmp_path / "one" / "model.safetensors", framework="pt") as stored:
        told = stored.metadata()
    assert told["format"] == "pt"
    assert told["weights_sha256"] == manifest.read(run).files["model.safetensors"].sha256


@pytest.mark.parametrize("mode", ["open_clip", "hf"])
def test_image_size_fits_a_learned_table_the_way_that_is_asked_for(run: Path, tmp_path: Path, mode: str) -> None:
    export.export(run, tmp_path / "native")
    export.export(run, tmp_path / "larger", image_size=64, resize=mode)
    native, larger = (CLIPVisionModel.from_pretrained(tmp_path / name).eval() for name in ("native", "larger"))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = larger(pixels).last_hidden_state
        by_transformers = native(pixels, interpolate_pos_encoding=True).last_hidden_state
    if mode == "hf":
        torch.testing.assert_close(ours, by_transformers, rtol=1e-5, atol=1e-5)
    else:
        state = {"visual.positional_embedding": native.embeddings.position_embedding.weight.detach()}

        class Reference:  # what open_clip's function reads of a model
            class visual:
                grid_size = (8, 8)

        open_clip.model.resize_pos_embed(state, Reference)
        table = larger.embeddings.position_embedding.weight.detach()
        torch.testing.assert_close(table, state["visual.positional_embedding"])
        assert (ours - by_transformers).abs().max() > 1e-3  # the two are not the same
    assert json.loads((tmp_path / "larger" / "preprocessor_config.json").read_text())["crop_size"]["height"] == 64
    facts = {"mode": mode, "from_grid": 6, "to_grid": 8}
    certificate = json.loads((tmp_path / "larger" / "parity.json").read_text())
    assert certificate["resize"] == manifest.read(tmp_path / "larger").config["resize"] == facts
    assert certificate["image_size"] == 64
    assert set(parity.LAYERS) <= set(certificate["source_before_resize"])
    assert "grid of 6 to 8" in (tmp_path / "larger" / "README.md").read_text()


def test_image_size_regenerates_a_sincos_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", position_table="sincos2d")
    export.export(run, tmp_path / "encoder", image_size=64)
    table = load_file(tmp_path / "encoder" / "model.safetensors")["vision_model.embeddings.position_embedding.weight"]
    assert table.equal(sincos2d_table(8, 32))
    assert manifest.read(tmp_path / "encoder").config["resize"]["mode"] == "regenerated"


def test_image_size_that_is_no_multiple_of_the_patch_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the nearest sizes are 48 and 56"):
        export.export(run, tmp_path / "out", image_size=50)
    for size in (0, -8):
        with pytest.raises(UsageError, match=f"image_size {size} has no room for a patch of 8"):
            export.export(run, tmp_path / "out", image_size=size)


def test_image_size_of_the_source_changes_nothing(run: Path, tmp_path: Path) -> None:
    export.export(run, tmp_path / "one")
    export.export(run, tmp_path / "two", image_size=48)
    assert manifest.read(tmp_path / "one").fingerprint == manifest.read(tmp_path / "two").fingerprint


@pytest.mark.parametrize(
    ("text", "vision", "clip_model"),
    [
        (BERT_TEXT, CLIPS, False),
        (CLIP_TEXT, {}, True),
        (CLIP_TEXT, {"pre_norm": False, "norm_eps": 1e-6}, True),
        (replace(CLIP_TEXT, padding="reference", activation="quick_gelu"), {"activation": "quick_gelu"}, True),
    ],
    ids=["clips", "clip", "folded clip", "quick_gelu"],
)
def test_both_towers_are_read_by_open_clip_by_transformers_and_by_us(
    tmp_path: Path, text: object, vision: dict[str, object], clip_model: bool
) -> None:
    run, out = write_run(tmp_path / "run", text=text, **vision), tmp_path / "encoder"
    export.export(run, out, with_text=True)
    model, tokenizer = encoder_run.load(run)
    rows = [tokenizer.encode(caption, model.config.text.length) for caption in CAPTIONS]
    images, ids = fixed_images(48, 3), pad_texts(rows, model.config.text)
    with torch.no_grad():
        image, words = model.encode_image(images), model.encode_text(ids, [len(row) for row in rows])

        theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{out}")
        pixels = model.normalise(images)
        torch.testing.assert_close(theirs.encode_image(pixels, normalize=True), image, rtol=0, atol=3e-6)
        tokens = open_clip.get_tokenizer(f"local-dir:{out}")(CAPTIONS)
        torch.testing.assert_close(theirs.encode_text(tokens, normalize=True), words, rtol=0, atol=3e-6)
        assert theirs.logit_scale == model.logit_scale
        assert tuple(transform.transforms[-1].mean) == PREPROCESS.mean

        ours, our_tokenizer = two_towers.read(out)
        torch.testing.assert_close(ours.encode_image(images), image, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.encode_text(ids, [len(row) for row in rows]), words, rtol=0, atol=1e-6)
        assert [our_tokenizer.encode(caption, model.config.text.length) for caption in CAPTIONS] == rows

        assert (out / "clip").is_dir() == clip_model
        if clip_model:
            clip, info = CLIPModel.from_pretrained(out, subfolder="clip", output_loading_info=True)
            assert not any(info.values())
            output = clip.eval()(input_ids=ids, pixel_values=pixels)
            torch.testing.assert_close(output.image_embeds, image, rtol=0, atol=3e-6)
            torch.testing.assert_close(output.text_embeds, words, rtol=0, atol=3e-6)


def test_eval_encoder_scores_an_exported_folder_as_its_run(tmp_path: Path) -> None:
    from PIL import Image

    run = write_run(tmp_path / "run", text=CLIP_TEXT, pre_norm=False, pool="mean", image_size=32)
    export.export(run, tmp_path / "encoder", with_text=True)
    export.export(run, tmp_path / "image_only")
    for index, picture in enumerate(fixed_images(40, 12)):
        folder = tmp_path / "set" / ("red", "square")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    (tmp_path / "set" / "classes.json").write_text(json.dumps({"red": "red", "square": "square"}))
    spec = parse_spec("classification", f"folder:{tmp_path / 'set'}")
    scores = [evaluate(tmp_path / name, [spec], "cpu", 4)["sets"][0]["metrics"] for name in ("run", "encoder")]
    assert scores[0] == scores[1]
    with pytest.raises(ModelError, match="no text tower; export the encoder again --with-text"):
        evaluate(tmp_path / "image_only", [spec], "cpu", 4)


def test_towers_that_others_cannot_run_are_refused_with_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = write_run(tmp_path / "packed", text=replace(BERT_TEXT, padding="packed"))
    with pytest.raises(ModelError, match=r"text\.padding: packed.* train with text\.padding: reference"):
        export.export(packed, tmp_path / "out", with_text=True)
    mixed = write_run(tmp_path / "mixed", text=CLIP_TEXT, activation="quick_gelu")
    with pytest.raises(ModelError, match="only one of its towers has quick_gelu"):
        export.export(mixed, tmp_path / "out", with_text=True)
    width, mlp_width = next((w, m) for w in range(32, 512, 4) for m in range(w, 4 * w) if int(w * (m / w)) != m)
    odd = write_run(tmp_path / "odd", text=CLIP_TEXT, width=width, mlp_width=mlp_width)
    with pytest.raises(ModelError, match=f"no such ratio makes {mlp_width} of {width}"):
        export.export(odd, tmp_path / "out", with_text=True)
    plain = write_run(tmp_path / "plain")
    monkeypatch.setattr(two_towers, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"encoder-swap\[open-clip\]"):
        export.export(plain, tmp_path / "out", with_text=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mistake", ["visual.proj", "transformer.resblocks.1.mlp.c_fc.bias"])
def test_two_towers_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    right = two_towers.open_clip_export.state_dict

    def wrong(*towers: object) -> dict[str, torch.Tensor]:
        state = right(*towers)
        return state | {mistake: state[mistake].flip(0)}

    monkeypatch.setattr(two_towers.open_clip_export, "state_dict", wrong)
    with pytest.raises(ParityError, match="open_clip computes other"):
        export.export(write_run(tmp_path / "run", text=CLIP_TEXT), tmp_path / "out", with_text=True)
    assert not (tmp_path / "out").exists()


def test_card_says_what_was_measured_in_the_words_of_the_hub(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **CLIPS)
    export.export(run, tmp_path / "encoder", with_text=True)
    export.export(run, tmp_path / "larger", image_size=64)
    card = ModelCard.load(tmp_path / "encoder" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.license == "unknown"
    assert {"clip", "llava", "open_clip"} <= set(card.data.tags)
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {"i2t_r1": 50.0, "t2i_r1": 25.0}
    assert card.data.eval_results[0].dataset_name.endswith(f"({RETRIEVAL['queries']} queries)")
    certificate = json.loads((tmp_path / "encoder" / "parity.json").read_text())
    for name, layer in certificate["float32"]["layers"].items():
        assert f"| {name} | {layer['max_abs_error']:.1e} |" in card.text
    for words in (
        "Folded",
        "Not for float16",
        "is **not** it",
        "CLIPVisionModel.from_pretrained",
        "bibtex",
        "(1, 36, 32)",
    ):
        assert words in card.text
    assert ModelCard.load(tmp_path / "larger" / "README.md").data.eval_results is None  # not its resolution


@pytest.mark.parametrize("folded", [True, False])
def test_card_calls_an_encoder_a_drop_in_only_where_float16_works(tmp_path: Path, folded: bool) -> None:
    export.export(write_run(tmp_path / "run", **CLIPS if folded else {}), tmp_path / "encoder")
    text = (tmp_path / "encoder" / "README.md").read_text()
    assert ("drop-in" in text, "builder.py" in text, "bfloat16` there" in text) == (not folded, folded, folded)


def test_source_is_let_go_before_the_folder_is_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two copies of the weights at a time would not fit where one does."""
    from encoders.sources import source as sources

    seen, opened, certified = [], sources.open_source, parity.certify

    def watched(*arguments: object) -> sources.Source:
        source = opened(*arguments)
        seen.append(weakref.ref(source.tower))
        return source

    def certify(expected: parity.Expected, folder: Path) -> dict[str, object]:
        assert [tower() for tower in seen] == [None]
        return certified(expected, folder)

    monkeypatch.setattr(sources, "open_source", watched)
    monkeypatch.setattr(parity, "certify", certify)
    export.export(run, tmp_path / "out")


def test_a_source_that_our_tower_does_not_repeat_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from encoders.sources import source as sources

    opened = sources.open_source

    def misread(*arguments: object) -> sources.Source:
        source = opened(*arguments)
        reference = source.reference
        return replace(source, reference=lambda pixels: {k: v * 1.001 for k, v in reference(pixels).items()})

    monkeypatch.setattr(sources, "open_source", misread)
    with pytest.raises(ParityError, match="differs from the source"):
        export.export(run, tmp_path / "out")
    with pytest.raises(ParityError, match="our reading of the source, before it is resized, differs"):
        export.export(run, tmp_path / "out", image_size=64)
    assert not (tmp_path / "out").exists()


def test_sources_that_are_no_encoder_run_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises((DataError, UsageError), match="does not exist"):
        export.export(tmp_path / "nothing", tmp_path / "out")
    config = EncoderConfig.read(run / "encoder.json")
    other = replace(config, vision=replace(config.vision, image_size=64))
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


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--resize", "hf"], 2, "--resize belongs to --image-size"),
        (["--dry-run"], 2, "belong to --push-to-hub"),
        (["--help"], 0, "--with-text"),
    ],
)
def test_command_line(run: Path, tmp_path: Path, options: list[str], code: int, words: str) -> None:
    command = [sys.executable, "-m", "encoders.export.command", str(run), str(tmp_path / "out"), *options]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (found.returncode, words in found.stdout + found.stderr) == (code, True), found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [224, 336])
@pytest.mark.parametrize(
    ("width", "layers", "patch", "heads"),
    [(768, 12, 16, 12), (1024, 24, 14, 16), (1280, 3, 14, 16)],
    ids=["B/16", "L/14", "H/14 of 3 layers"],
)
@pytest.mark.parametrize("clips", [True, False])
def test_random_towers_of_full_size(
    tmp_path: Path, clips: bool, width: int, layers: int, patch: int, heads: int, image_size: int
) -> None:
    """open_clip's own random weights, perturbed: the certificate compares with open_clip."""
    vision = {"image_size": image_size, "layers": layers, "width": width, "patch_size": patch}
    vision |= {"head_width": width // heads}
    if clips:
        vision |= {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "norm_kwargs": {"eps": 1e-6}}
    config = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": {"layers": 1, "width": 64, "heads": 1}}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    source = tmp_path / "source"
    source.mkdir()
    save_file(model.state_dict(), source / "open_clip_model.safetensors")
    manifest.write_json(source / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})
    del model
    export.export(source, tmp_path / "out")
    layers_found = json.loads((tmp_path / "out" / "parity.json").read_text())["float32"]["layers"]
    assert {"hidden_states[-2]", "last_hidden_state"} <= set(layers_found)
    assert ("raw_max_abs_error" in layers_found["last_hidden_state"]) == clips


@pytest.mark.slow
def test_a_random_clip_model_of_full_size(tmp_path: Path) -> None:
    """transformers' ViT-B/16 with its text tower, perturbed: the certificate compares with transformers."""
    torch.manual_seed(0)
    vision = {"patch_size": 16, "hidden_act": "gelu"}
    config = CLIPConfig(vision_config=vision, text_config={"eos_token_id": 2, "hidden_act": "gelu"}, projection_dim=512)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "source")
    CLIPImageProcessor().save_pretrained(tmp_path / "source")
    del model
    export.export(tmp_path / "source", tmp_path / "out", with_text=True)
    certificate = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert certificate["two_towers"]["no_clip_model_because"] is None
    assert certificate["two_towers"]["clip_model"]["text"] <= parity.MAX_RELATIVE_ERROR
