"""Configs: every shipped recipe loads, and a mistake is told with its place and the way out."""

import json
import shlex
from pathlib import Path

import pytest

from encoders.errors import UsageError
from train.config import RECIPES, LlavaConfig, PretrainConfig, ResolutionConfig, load_yaml, parse
from train.swap_config import SwapConfig
from train.swap_plan import plan

SCRIPTS = {
    PretrainConfig: "pretrain",
    ResolutionConfig: "finetune_resolution",
    LlavaConfig: "tune_llava",
    SwapConfig: "swap",
}


def config_class(recipe: Path) -> type:
    """What a recipe is for, by its keys."""
    content = load_yaml(recipe)
    if "arms" in content:
        return SwapConfig
    if "stage" in content:
        return LlavaConfig
    return PretrainConfig if "model" in content else ResolutionConfig


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    config = parse(config_class(recipe), "unused", ["--config", str(recipe)])
    if isinstance(config, SwapConfig):
        assert [stage.name for stage in plan(config)][-1] == "report"


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_the_command_on_top_of_a_recipe_is_one(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent.parent)
    comments = [line[1:] for line in recipe.read_text().splitlines() if line.startswith("#")]
    [command] = [line for line in "\n".join(comments).replace("\\\n", "").splitlines() if " --config " in line]
    words = shlex.split(command)
    place = next(place for place, word in enumerate(words) if word.startswith("train/"))
    assert Path(words[place]).stem == SCRIPTS[config_class(recipe)]
    assert f"train/recipes/{recipe.name}" in words
    parse(config_class(recipe), "unused", words[place + 1 :])


def test_overrides_win_over_the_file_and_lists_and_floats_are_typed(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim: {lr: 1e-3, betas: [0.8, 0.9]}\nrun: {steps: 7}\n")
    config = parse(PretrainConfig, "unused", ["--config", str(recipe), "--run.steps=9", "--resume"])
    assert (config.optim.lr, config.optim.betas, config.run.steps, config.run.resume) == (0.001, (0.8, 0.9), 9, True)


def test_a_preset_gives_sizes_that_recipe_and_command_line_override(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    model = {"preset": "l14", "objective": "clips", "vision": {"image_size": 112}, "captioner": {"layers": 3}}
    recipe.write_text(json.dumps({"model": model}))
    model = parse(PretrainConfig, "unused", ["--config", str(recipe)]).model
    assert (model.vision.width, model.text.width, model.captioner.width, model.embed_dim) == (1024, 768, 768, 768)
    assert (model.vision.image_size, model.captioner.layers, model.captioner.tokens) == (112, 3, 128)
    other = ["--config", str(recipe), "--model.preset", "s16", "--model.text.layers=2"]
    model = parse(PretrainConfig, "unused", other).model
    assert (model.vision.width, model.vision.patch_size, model.text.width, model.text.layers) == (384, 16, 384, 2)
    assert (model.captioner.width, model.captioner.heads, model.captioner.layers) == (384, 6, 3)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"optim": {"learning_rate": 1}}, [], r"recipe\.yaml: unknown key `optim\.learning_rate`"),
        ({"optim": {"lrr": 1}}, [], r"did you mean `optim\.lr`"),
        ({"modle": {}}, [], "did you mean `model`"),
        ({"model": {"captioner": {"tokns": 3}}}, [], r"did you mean `model\.captioner\.tokens`"),
        ({}, ["--run.stepz", "3"], r"unknown option `--run\.stepz`; did you mean `run\.steps`"),
        ({"run": {"steps": "many"}}, [], "Expected a <class 'int'>"),
        ({"run": {"steps": 0}}, [], r"run\.steps is 0 but must be at least 1"),
        ({"model": {"vision": {"image_size": 65}}}, [], "nearest sizes are 64 and 80"),
        ({"model": {"piece_tokens": 5}}, [], r"unknown key `model\.piece_tokens`"),
        ({"model": {"objective": "clips"}}, [], "clips needs a captioner: section"),
        ({"model": {"objective": "clip", "captioner": {}}}, [], "clip trains no captioner"),
        ({"model": {"objective": "clips", "clips": {"beta": 0}, "captioner": {}}}, [], "trains no captioner"),
        ({"model": {"objective": "coca", "captioner": {}}}, [], r"causal text tower: text\.kind: clip"),
        (
            {"model": {"objective": "clip", "dreamlip": {"k": 4}}},
            [],
            "takes no `dreamlip:` section",
        ),
        ({"model": {"objective": "dreamlip", "dreamlip": {"k": 0}}}, [], r"raw: always and grouping_weight: 0"),
        (
            {"model": {"clips": {"cut": "block_mask"}}},
            [],
            r"block_mask and clips\.cut_tokens None do not fit",
        ),
        ({"model": {"clips": {"cut_tokens": 8}}}, [], r"sentence and clips\.cut_tokens 8 do not fit"),
        ({"model": {"preset": "b14"}}, [], r"unknown model\.preset b14; known: ti16, s16"),
        ({"model": {"vision": {"norm_after_pool": True}}}, [], "norm_after_pool belongs to pool: mean"),
        ({"model": {"preprocess": {"jitter": {"hue": 2}}}}, [], r"preprocess\.jitter\.hue 2\.0 must lie between"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, content: dict, options: list[str], message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        parse(PretrainConfig, "unused", ["--config", str(recipe), *options])


def test_a_stage_names_what_it_reads(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stage lora needs `llava`"):
        parse(LlavaConfig, "unused", ["--stage", "lora"])
    with pytest.raises(UsageError, match="stage projector needs `llm`"):
        parse(LlavaConfig, "unused", ["--encoder", "x"])
    with pytest.raises(UsageError, match="at least two encoders"):
        parse(SwapConfig, "unused", ["--work", "x"])
    with pytest.raises(UsageError, match="cannot be read as YAML"):
        parse(SwapConfig, "unused", ["--config", str(tmp_path / "missing.yaml")])
