"""The fold: a tower without a norm before its blocks as a CLIPVisionModel, exact but for each token's channel mean."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from encoder_runs import CLIPS, TINY, write_run
from torch import Tensor
from transformers import CLIPVisionModel

from encoders import encoder_run, manifest
from encoders.config import VisionConfig
from encoders.errors import ModelError
from encoders.export import fold
from encoders.export.command import export
from encoders.export.image_head import image_embedding
from encoders.export.parity import fixed_images
from encoders.pretrained import load_strict
from encoders.vision import VisionTower
from llava_adapter import tuning
from llava_adapter.compose import compose
from llava_adapter.save import load_llava, save_llava


def tower_of(eps: float, size: float = 1.0, **vision: object) -> VisionTower:
    """A random tower without a norm before its blocks, its embeddings `size` times as large as usual."""
    torch.manual_seed(0)
    tower = VisionTower(VisionConfig(**TINY | CLIPS | {"norm_eps": eps} | vision), 16).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name in fold.EMBEDDINGS:
            tower.model.get_parameter(name).mul_(size)
    return tower


def folded(tower: VisionTower, chosen: fold.Fold) -> CLIPVisionModel:
    stock = CLIPVisionModel(tower.model.config)
    stock.load_state_dict(fold.folded_state(tower, chosen))
    return stock.eval()


def pixels(size: int = 48) -> Tensor:
    return (fixed_images(size).float() / 255 - 0.45) / 0.25


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
@pytest.mark.parametrize("size", [1e-2, 1.0, 30.0])
def test_hidden_states_differ_by_the_channel_mean_of_the_embeddings_and_nothing_else(eps: float, size: float) -> None:
    tower, images = tower_of(eps, size), pixels()
    stock = folded(tower, fold.choose(fold.largest_variance(tower, images), eps))
    with torch.inference_mode():
        ours = tower.model(images, output_hidden_states=True).hidden_states
        theirs = stock(images, output_hidden_states=True).hidden_states
        means = tower.model.embeddings(images).mean(-1, keepdim=True)  # (B,1+N,1)
    assert means.abs().max() > 1e-3 * size  # there is something to be lost
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other, mine - means, rtol=0, atol=2e-6 * mine.abs().max().item())


def test_error_is_what_the_formula_says_where_it_can_be_seen() -> None:
    """LayerNorm's own series: with t^2 var = eps/50 an embedding shrinks by 1 % of itself."""
    tower, images = tower_of(1e-6), pixels()
    variance = fold.largest_variance(tower, images)
    exponent = math.log2(variance * 50) / 2
    coarse = fold.Fold(1e-3 * 2**-exponent, 2**exponent, variance)
    assert coarse.error == pytest.approx(0.01)
    with torch.inference_mode():
        ours = tower.model.embeddings(images)
        ours = ours - ours.mean(-1, keepdim=True)
        theirs = folded(tower, coarse)(images, output_hidden_states=True).hidden_states[0]
    loss = 1 - (theirs.norm(dim=-1) / ours.norm(dim=-1)).min().item()
    assert loss == pytest.approx(0.01, rel=0.03)


def test_folded_embeddings_have_no_channel_mean() -> None:
    """The norm would take it away too, but in bfloat16 a mean costs the digits of what lies around it."""
    tower = tower_of(1e-6)
    state = fold.folded_state(tower, fold.choose(1.0, 1e-6))
    for name, channels in fold.EMBEDDINGS.items():
        before, after = tower.model.state_dict()[name], state[name]
        assert before.mean(channels).abs().max() > 1e-3 * before.abs().max()
        assert after.mean(channels).abs().max() < 1e-6 * after.abs().max()


@pytest.mark.parametrize("variance", [1e-12, 0.9, 2.4, 4096.0, 1e12])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_scale_is_small_enough_for_float32_and_its_norm_is_a_power_of_two(variance: float, eps: float) -> None:
    chosen = fold.choose(variance, eps)
    assert chosen.error <= 2**-31
    assert chosen.error > 2**-34  # and no smaller than needed
    assert math.frexp(chosen.norm_weight)[0] == 0.5
    assert torch.tensor(chosen.norm_weight).bfloat16().item() == chosen.norm_weight
    assert chosen.scale * chosen.norm_weight == pytest.approx(math.sqrt(eps), rel=1e-12)


@pytest.mark.parametrize(("variance", "eps"), [(0.0, 1e-6), (math.nan, 1e-6), (math.inf, 1e-6), (1.0, 0.0)])
def test_what_cannot_be_folded_is_refused(variance: float, eps: float) -> None:
    with pytest.raises(ModelError, match="cannot be folded"):
        fold.choose(variance, eps)


def test_weights_out_of_range_are_refused() -> None:
    tower = tower_of(1e-6)
    with pytest.raises(ModelError, match=r"class_embedding cannot be folded by 1e-42: .* range of float32"):
        fold.folded_state(tower, fold.Fold(1e-42, 1e39, 1.0))


@pytest.mark.parametrize("pool", [("mean", True), ("mean", False), ("class", False)])
def test_image_embedding_of_the_folder_is_that_of_the_run(tmp_path: Path, pool: tuple[str, bool]) -> None:
    run = write_run(tmp_path / "run", **CLIPS | {"pool": pool[0], "norm_after_pool": pool[1]})
    export(run, tmp_path / "encoder")
    model, _ = encoder_run.load(run)
    stock = CLIPVisionModel.from_pretrained(tmp_path / "encoder").eval()
    images = fixed_images(48, 5)
    with torch.inference_mode():
        found = image_embedding(tmp_path / "encoder", stock, stock(model.normalise(images)))
        expected = model.vision(model.normalise(images))[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


@pytest.fixture(scope="module")
def folded_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fold")
    run = write_run(place / "run", **CLIPS)
    export(run, place / "encoder")
    return place / "encoder"


def test_manifest_config_and_certificate_say_folded(folded_encoder: Path) -> None:
    sealed = manifest.read(folded_encoder, "encoder")
    parity = json.loads((folded_encoder / "parity.json").read_text())
    assert sealed.config["folded"] is True
    assert sealed.metrics["parity"]["fold"] == parity["fold"] == sealed.config["fold"]
    assert parity["fold"]["error"] <= 2**-31
    layer = parity["float32"]["layers"]["hidden_states[-2]"]
    assert layer["raw_max_relative_error"] > 1e-3 > 1e-5 > layer["max_relative_error"]
    assert json.loads((folded_encoder / "config.json").read_text())["folded"] is True


def test_float16_is_warned_of_because_it_is_wrong(folded_encoder: Path) -> None:
    images = pixels()
    with torch.inference_mode():
        exact = load_strict(CLIPVisionModel, folded_encoder, torch.float32)(images).last_hidden_state
        with pytest.warns(UserWarning, match="folded.*float16"):
            half = load_strict(CLIPVisionModel, folded_encoder, torch.float16)
        found = half(images.half()).last_hidden_state.float()
    assert not (found - exact).norm() < 0.1 * exact.norm()  # nan counts as wrong
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_strict(CLIPVisionModel, folded_encoder, torch.bfloat16)


def test_llava_inherits_the_mark_and_its_fold_is_not_trained(
    folded_encoder: Path, tiny_llm: Path, tmp_path: Path
) -> None:
    model, processor = compose(folded_encoder, tiny_llm, "llama3", torch.float32)
    save_llava(model, processor, tmp_path / "llava")
    with pytest.warns(UserWarning, match="folded.*float16"):
        load_llava(tmp_path / "llava", torch.float16)
    reloaded, _ = load_llava(tmp_path / "llava", torch.float32)
    tuned = tuning.apply(reloaded, tuning.STAGES["lora"])
    tuning.parameter_groups(tuned, tuning.STAGES["lora"])  # a frozen tower trains nothing

    tower = reloaded.model.vision_tower
    tower.requires_grad_(True)
    with pytest.raises(ModelError, match=r"folded, and 5 of the parameters .* Freeze its embeddings and pre_layrnorm"):
        tuning.parameter_groups(tuned, tuning.STAGES["lora"])
    tower.embeddings.requires_grad_(False)
    tower.pre_layrnorm.requires_grad_(False)
    left = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    assert len(left) > 40
    fold.refuse_training(left, reloaded.config.to_dict())  # the rest of the tower may train


def test_an_encoder_with_a_norm_is_neither_folded_nor_marked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    export(run, tmp_path / "encoder")
    sealed = manifest.read(tmp_path / "encoder", "encoder")
    assert sealed.config["folded"] is False
    assert sealed.config["fold"] is None
    assert "folded" not in (tmp_path / "encoder" / "config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_strict(CLIPVisionModel, tmp_path / "encoder", torch.float16)
