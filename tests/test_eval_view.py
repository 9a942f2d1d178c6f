"""view-encoder: the picture is a function of the encoder, shows what its processor sees, and refuses what it cannot."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_encoder
from encoder_runs import CLIP_TEXT, CLIPS, write_run
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionModel

from encoders import encoder_run
from encoders.data.tokenizers import pad_texts
from encoders.errors import DataError, ModelError, SwapError, UsageError
from encoders.export.command import export
from eval import view
from eval.comparing import views
from eval.viewing import drawing, patch_tokens
from eval.viewing.patch_tokens import Components, aligned, components, open_encoder

ROOT = Path(__file__).resolve().parent.parent


def write_picture(file: Path, size: tuple[int, int] = (70, 50), seed: int = 0) -> Path:
    """Blocks of random colours."""
    blocks = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(file)
    return file


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_picture(tmp_path_factory.mktemp("view") / "blocks.png")


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("view") / "run", CLIP_TEXT)


@pytest.fixture(scope="module")
def clips_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tower has no norm before its blocks, so that its export is folded."""
    return write_run(tmp_path_factory.mktemp("view") / "run", **CLIPS)


def draw(*words: object) -> None:
    view.main([str(word) for word in words])


def test_tokens_are_those_that_a_llava_reads(tiny_encoder: Path, tiny_llava: Path, picture: Path) -> None:
    """The encoder's folder and the LLaVA around it: hidden_states[-2] without class token, by transformers alone."""
    shown = Image.open(picture).convert("RGB")
    pixels = CLIPImageProcessor.from_pretrained(tiny_encoder)(images=shown, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        states = CLIPVisionModel.from_pretrained(tiny_encoder)(pixels, output_hidden_states=True).hidden_states
    for folder in (tiny_encoder, tiny_llava):
        encoder = open_encoder(folder)
        assert torch.allclose(encoder.tokens(encoder.pixels(shown)), states[-2][0, 1:], atol=1e-6)
        first = open_encoder(folder, layer=0)
        assert torch.allclose(first.tokens(first.pixels(shown)), states[0][0, 1:], atol=1e-6)
    input_shown = np.asarray(open_encoder(tiny_encoder).shown(pixels), dtype=int)
    centre = np.asarray(shown.resize((44, 32), Image.Resampling.BICUBIC).crop((6, 0, 38, 32)), dtype=int)
    assert np.abs(input_shown - centre).max() <= 2  # short side to 32, the centre kept


def test_an_export_looks_like_its_run(clips_run: Path, picture: Path, tmp_path: Path) -> None:
    """Though folding takes the mean over channels out of every token."""
    export(clips_run, tmp_path / "encoder")
    shown = patch_tokens.read_picture("x", picture)
    run, exported = (open_encoder(source) for source in (clips_run, tmp_path / "encoder"))
    one, other = (encoder.tokens(run.pixels(shown)) for encoder in (run, exported))
    assert one.std() > 0.1
    assert torch.allclose(one, other, atol=1e-4)


def test_components_are_the_singular_vectors_of_the_centred_tokens() -> None:
    tokens = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5, 3, 2, 1, 1, 1.0])
    found = components(list(tokens))
    flat = tokens.reshape(-1, 6).numpy()
    centred = flat - flat.mean(0)
    _, strengths, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(right[range(3), np.abs(right[:3]).argmax(1)])
    wanted = centred @ right[:3].T * signs / (strengths[:3] / np.sqrt(len(flat)))
    assert found.unusual == 0
    assert np.allclose(found.scores.reshape(-1, 3), wanted, atol=1e-5)
    assert np.allclose(found.shares, strengths[:3] ** 2 / (strengths**2).sum(), atol=1e-6)


def test_a_token_of_huge_norm_does_not_take_the_colours_of_all_others() -> None:
    tokens = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([6, 4, 3, *[0.5] * 13])
    tokens[..., -1] += 20  # which all share
    plain = components(list(tokens))
    outlier = tokens.clone()
    outlier[0, 5] = 20.0
    found = components(list(outlier))
    assert found.unusual == 1
    assert np.allclose(found.shares, plain.shares, atol=0.05)
    others = [place for place in range(64) if place != 5]
    before, after = (np.asarray(c.images()[0], dtype=int).reshape(64, 3)[others] for c in (plain, found))
    assert np.median(np.abs(before - after)) < 20


@pytest.mark.parametrize("patches", [1, 4])
def test_few_patches_have_few_components_and_no_noise(patches: int) -> None:
    tokens = torch.randn(1, patches, 8, generator=torch.Generator().manual_seed(0))
    found = components(list(tokens))
    rank = patches - 1
    assert found.scores.isfinite().all()
    assert torch.equal(found.scores[..., rank:], torch.zeros_like(found.scores[..., rank:]))
    assert sum(found.shares) == pytest.approx(1.0 if rank else 0.0)


def test_another_encoder_is_rotated_to_the_first_ones_colours() -> None:
    noise = torch.Generator().manual_seed(0)
    one = components([torch.randn(64, 12, generator=noise)])
    smooth = torch.cumsum(torch.cumsum(one.scores, 1), 2)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=noise).double())[0]
    same, agreement = aligned(one, Components(one.scores @ turn, one.shares, 0))
    assert agreement == pytest.approx(1.0)
    assert torch.allclose(same.scores, one.scores, atol=1e-9)
    other = components([torch.randn(64, 12, generator=noise)])
    _, chance = aligned(one, other)
    assert chance < 0.5
    fewer = F.interpolate(smooth.permute(0, 3, 1, 2), (4, 4), mode="bilinear").permute(0, 2, 3, 1) @ turn
    coarse, agreement = aligned(Components(smooth, one.shares, 0), Components(fewer, one.shares, 0))
    assert coarse.scores.shape == (1, 4, 4, 3)
    assert agreement > 0.8


def test_the_similarity_of_a_phrase_is_that_of_the_joint_space(clip_run: Path, picture: Path, tmp_path: Path) -> None:
    export(clip_run, tmp_path / "both", with_text=True)
    model, tokenizer = encoder_run.load(clip_run)
    rows = [tokenizer.encode("a red square", CLIP_TEXT.length)]
    shown = patch_tokens.read_picture("x", picture)
    for source in (clip_run, tmp_path / "both"):
        encoder = open_encoder(source)
        pixels = encoder.pixels(shown)
        with torch.inference_mode():
            image = ((pixels * model.std + model.mean) * 255).round().to(torch.uint8)
            patches = model.encode_patches(image)[0]
            wanted = patches @ model.encode_text(pad_texts(rows, CLIP_TEXT), [len(rows[0])])[0]
        assert torch.allclose(encoder.similarity(pixels, "a red square").flatten(), wanted, atol=1e-4)


def test_the_command_draws_the_same_picture_twice_and_states_its_facts(
    clip_run: Path, tiny_encoder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "new" / f"{n}.png" for n in range(2)]
    for file in files:
        draw(clip_run, "--image", picture, "--vs", tiny_encoder, "--phrase", "a red square", "--out", file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(file.name for file in files[0].parent.iterdir()) == ["0.png", "1.png"]  # nothing half-written
    told = capsys.readouterr().out
    assert "6 x 6 patches of 8 px" in told
    assert "4 x 4 patches of 8 px" in told
    assert "% of the variance" in told
    assert "similarity to 'a red square'" in told
    assert "has no text tower" in told  # of the second, whose panel is left out
    assert "agreement" in told
    width, height = Image.open(files[0]).size
    assert width == 3 * (drawing.PANEL + drawing.GAP) + drawing.GAP
    assert height > 2 * drawing.PANEL


def test_pictures_for_the_report_share_their_colours(tiny_llava: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    """Two encoders, one of them twice; the fit is over all pictures, so each alone looks otherwise."""
    images = [write_picture(tmp_path / f"{n}.png", seed=n).read_bytes() for n in range(3)]
    other = write_encoder(tmp_path / "other", image_size=48, seed=1)
    drawn = views.patch_pictures([tiny_llava, tiny_encoder, other], images)
    assert [len(of_one) for of_one in drawn] == [3, 3, 3]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert Image.open(io.BytesIO(drawn[2][0])).size == (drawing.PANEL, drawing.PANEL // 2)
    alone = views.patch_pictures([tiny_llava], images[:1])
    assert alone[0][0] != drawn[0][0]


def without_tower(folder: Path) -> None:
    file = folder / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(file).items() if "vision_tower" not in name}
    save_file(state, file, metadata={"format": "pt"})


def broken_llava(folder: Path, llava: Path, how: str) -> Path:
    shutil.copytree(llava, folder)
    config = json.loads((folder / "config.json").read_text())
    if how == "no tower":
        without_tower(folder)
    elif how == "siglip":
        config["vision_config"]["model_type"] = "siglip_vision_model"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("how", ["no tower", "siglip"])
def test_a_llava_without_a_clip_tower_is_refused(how: str, tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vision_tower" if how == "no tower" else "not a CLIPVisionModel"):
        open_encoder(broken_llava(tmp_path / "llava", tiny_llava, how))


def test_what_cannot_be_drawn_is_refused(
    tiny_encoder: Path, tiny_llm: Path, clip_run: Path, picture: Path, tmp_path: Path
) -> None:
    text, strip, missing = tmp_path / "a.txt", tmp_path / "strip.png", tmp_path / "b" / "x.png"
    text.write_text("no picture")
    Image.new("RGB", (1, 200)).save(strip)
    out = tmp_path / "out.png"
    usual = [tiny_encoder, "--image", picture, "--out", out]
    faults: list[tuple[type[SwapError], str, list[object]]] = [
        (DataError, "not a picture", [tiny_encoder, "--image", text, "--out", out]),
        (DataError, "sides of more than 100", [tiny_encoder, "--image", strip, "--out", out]),
        (DataError, "does not exist", [tiny_encoder, "--image", missing, "--out", out]),
        (UsageError, "end in .png", [tiny_encoder, "--image", picture, "--out", tmp_path / "out.jpg"]),
        (ModelError, "has no text tower", [*usual, "--phrase", "a dog"]),
        (UsageError, "--phrase is empty", [*usual, "--phrase", " "]),
        (UsageError, "has 3 layers", [*usual, "--layer", "4"]),
        (UsageError, "more tokens", [clip_run, *usual[1:], "--phrase", "a red square " * 20]),
        (UsageError, "export it first", [picture, *usual[1:]]),
        (UsageError, "no id on the Hub", [tmp_path / "nowhere", *usual[1:]]),
        (ModelError, "cannot be", [tiny_llm, *usual[1:]]),
    ]
    for error, message, words in faults:
        with pytest.raises(error, match=message):
            draw(*words)
        assert not out.exists()


def test_one_pixel_is_a_picture(tiny_encoder: Path, tmp_path: Path) -> None:
    Image.new("L", (1, 1), 200).save(tmp_path / "dot.png")
    draw(tiny_encoder, "--image", tmp_path / "dot.png", "--out", tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 0


def test_help_does_not_wait_for_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "eval.view", "--help"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0
    loaded = {line.split("|")[-1].strip() for line in finished.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"torch", "transformers"}
