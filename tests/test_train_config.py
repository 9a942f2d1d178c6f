"""Configs: every shipped recipe loads, and a mistake is told with its place and the way out."""

import json
from pathlib import Path

import pytest

from encoders.errors import UsageError
from train.config import RECIPES, LlavaConfig, PretrainConfig, ResolutionConfig, SwapConfig, load_yaml, parse
from train.swap import plan


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


def test_overrides_win_over_the_file_and_lists_and_floats_are_typed(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optim: {lr: 1e-3, betas: [0.8, 0.9]}\nrun: {steps: 7}\n")
    config = parse(PretrainConfig, "unused", ["--config", str(recipe), "--run.steps=9", "--resume"])
    assert (config.optim.lr, config.optim.betas, config.run.steps, config.run.resume) == (0.001, (0.8, 0.9), 9, True)


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
        ({"model": {"objective": "clips"}}, [], "needs a captioner"),
        ({"model": {"piece_tokens": 5}}, [], "takes no captioner: and no piece_tokens"),
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
