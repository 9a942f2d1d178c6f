"""Every shipped recipe trains: shrunk to tiny sizes, with each option that changes the code path kept, for one step.

Numbers are checked against the papers' formulas, and the demos against the full-size recipes they stand for.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from llava_runs import sealed, write_chats
from pair_shards import sample, write_shards
from torch import Tensor

from encoders import manifest
from encoders.config import EncoderConfig
from train import llava_task, loop, pair_task, start
from train.config import (
    RECIPES,
    LlavaConfig,
    OptimConfig,
    PairData,
    PretrainConfig,
    ResolutionConfig,
    RunConfig,
    load_yaml,
    parse,
)
from train.signals import StopRequest

DOCS = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
IMAGENET = 1_281_167  # samples of an "ImageNet epoch"
SAMPLES, BATCH, PATCH = 16, 8, 8
CONTENTS = {recipe.stem: load_yaml(recipe) for recipe in sorted(RECIPES.glob("*.yaml"))}
PRETRAIN = [stem for stem, content in CONTENTS.items() if "model" in content]
RESOLUTION = [stem for stem, content in CONTENTS.items() if "image_size" in content]
LLAVA = [stem for stem, content in CONTENTS.items() if "stage" in content]
FULL_SIZE_LLAVA = [stem for stem in LLAVA if not stem.endswith("_demo")]
FULL_SIZE = [stem for stem in (*PRETRAIN, *RESOLUTION) if not stem.endswith("_demo")]
SIZES = {"layers", "width", "heads", "mlp_width", "patch_size", "embed_dim", "threads", "eval_every"}
Trained = tuple[Path, dict[str, tuple[Tensor, Tensor]]]


def pretrain_config(stem: str, *options: str) -> PretrainConfig:
    return parse(PretrainConfig, "unused", ["--config", str(RECIPES / f"{stem}.yaml"), *options])


def resolution_config(stem: str) -> ResolutionConfig:
    return parse(ResolutionConfig, "unused", ["--config", str(RECIPES / f"{stem}.yaml")])


def shrunk(model: EncoderConfig) -> EncoderConfig:
    """Tiny sizes; whatever else the recipe says stays."""
    size = {"width": 32, "layers": 2, "heads": 2}
    text = replace(model.text, **size, vocab_size={"bert": 90, "clip": 560}[model.text.kind], length=12, tokenizer=None)
    return replace(
        model,
        embed_dim=16,
        vision=replace(model.vision, **size, mlp_width=64, patch_size=PATCH, image_size=2 * PATCH),
        text=text,
        captioner=model.captioner and replace(model.captioner, **size, tokens=12),
        clips=model.clips and replace(model.clips, cut_tokens=model.clips.cut_tokens and 6),
    )


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Accelerate keeps one state a process, precision included; lmms-eval, imported by other tests, leaves its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


def shrunk_run(run: RunConfig, out: Path, micro_batches: int) -> RunConfig:
    return replace(run, out=out, steps=1, batch_size=BATCH, micro_batches=micro_batches, workers=0, threads=1)


def one_step(task: pair_task.PairTask, run: RunConfig, optim: OptimConfig, accelerator: Accelerator) -> Trained:
    """The run's folder, and each trainable parameter before and after its only step."""
    before = {name: p.detach().clone() for name, p in task.module.named_parameters() if p.requires_grad}
    loop.train(task, run, replace(optim, warmup_steps=0), StopRequest(), accelerator)
    after = dict(task.module.named_parameters())
    return run.out, {name: (value, after[name].detach()) for name, value in before.items()}


def check(trained: Trained) -> None:
    out, parameters = trained
    [row] = [row for line in (out / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]
    assert all(math.isfinite(value) for value in row.values())
    still = [name for name, (before, after) in parameters.items() if torch.equal(before, after)]
    assert not still, f"did not move: {still}"
    assert manifest.read(out, "encoder-run").metrics["samples_seen"] == BATCH


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PairData:
    folder = tmp_path_factory.mktemp("pairs")
    both = {i: {"LLaVA-1.5": sample(i, 40)["long"], "ShareGPT4V": "A square. It is plain!"} for i in range(SAMPLES)}
    write_shards(folder / "train", SAMPLES, long=both)
    write_shards(folder / "held_out", 4, shards=1)
    return PairData(folder / "train", folder / "held_out", folder / "held_out")


@pytest.fixture(scope="module")
def pretrained(data: PairData, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Trained]:
    """Recipe, micro-batches -> its one step, taken once."""
    runs: dict[tuple[str, int], Trained] = {}

    def run(stem: str, micro_batches: int) -> Trained:
        if (stem, micro_batches) not in runs:
            config = pretrain_config(stem)
            out = tmp_path_factory.mktemp(stem)
            config = replace(config, data=data, model=shrunk(config.model))
            config = replace(config, run=shrunk_run(config.run, out, micro_batches))
            accelerator = start.build_accelerator(config.run)
            task = pair_task.pretrain(config, accelerator)
            runs[stem, micro_batches] = one_step(task, config.run, config.optim, accelerator)
        return runs[stem, micro_batches]

    return run


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("stem", PRETRAIN)
def test_pretraining_takes_a_step(stem: str, micro_batches: int, pretrained: Callable[[str, int], Trained]) -> None:
    check(pretrained(stem, micro_batches))


@pytest.mark.parametrize("stem", RESOLUTION)
def test_resolution_fine_tuning_takes_a_step(
    stem: str, pretrained: Callable[[str, int], Trained], data: PairData, tmp_path: Path
) -> None:
    """From a run with a fixed position table and from one with a learned one."""
    for source in ("clips_112", "clips_demo"):
        config = replace(resolution_config(stem), init=pretrained(source, 1)[0], image_size=3 * PATCH, data=data)
        config = replace(config, run=shrunk_run(config.run, tmp_path / source, 1))
        (tmp_path / source).mkdir()
        accelerator = start.build_accelerator(config.run)
        task = pair_task.finetune_resolution(config)
        check(one_step(task, config.run, config.optim, accelerator))
        assert EncoderConfig.read(tmp_path / source / "encoder.json").vision.image_size == 3 * PATCH


@pytest.mark.parametrize(
    ("stem", "epochs", "warmup_epochs", "base"),
    [
        ("clips_112", 2_000, 40, 8e-6),
        ("clips_84", 10_000, 40, 8e-6),
        ("clipa_112", 2_000, 40, 8e-6),
        ("coca_112", 2_000, 40, 8e-6),
        ("resolution_112_224", 100, 20, 4e-7),
        ("resolution_84_224", 400, 20, 4e-7),
        ("resolution_336", 100, 0, 1e-7),
    ],
)
def test_clips_schedules_follow_the_paper(stem: str, epochs: int, warmup_epochs: int, base: float) -> None:
    config = pretrain_config(stem) if stem in PRETRAIN else resolution_config(stem)
    batch = config.run.batch_size
    assert config.run.steps == round(epochs * IMAGENET / batch)
    assert config.optim.warmup_steps == round(warmup_epochs * IMAGENET / batch)
    assert config.optim.lr == pytest.approx(base * 64 * batch / 16_384, rel=1e-9)


@pytest.mark.parametrize("stem", [stem for stem in FULL_SIZE if stem in PRETRAIN])
def test_every_size_that_a_recipe_offers_fits_it(stem: str) -> None:
    [line] = re.findall(r"^# Size: --model\.preset ([\w |()']+)", (RECIPES / f"{stem}.yaml").read_text(), re.M)
    for name in re.findall(r"\b[sblh]\d\d\b", line):
        model = pretrain_config(stem, f"--model.preset={name}").model
        assert model.vision.patch_size == int(name[1:])
        assert model.vision.mlp_width == 4 * model.vision.width
        assert model.embed_dim == {"s": 384, "b": 512, "l": 768, "h": 1024}[name[0]]


@pytest.mark.parametrize("stem", [stem for stem in FULL_SIZE if stem in RESOLUTION])
def test_a_resolution_recipe_starts_from_a_shipped_one(stem: str) -> None:
    by_out = {content["run"]["out"]: content for content in CONTENTS.values() if "run" in content}
    start = by_out[CONTENTS[stem]["init"]]
    before = start.get("image_size") or start["model"]["vision"]["image_size"]
    assert before < CONTENTS[stem]["image_size"]


def llava_config(stem: str) -> LlavaConfig:
    return parse(LlavaConfig, "unused", ["--config", str(RECIPES / f"{stem}.yaml")])


@pytest.mark.parametrize("stem", LLAVA)
def test_a_llava_stage_takes_a_step(
    stem: str, tiny_encoder: Path, tiny_llm: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    """As the recipe says, but for sizes and paths: the tiny models have LLaMA-3's template. The step is the warm-up's
    first, and all that should train must be seen to move."""
    config = llava_config(stem)
    chats = write_chats(tmp_path / "chats", captions=config.stage == "projector")
    sources: dict[str, Any] = {"encoder": tiny_encoder, "llm": tiny_llm, "template": "llama3"}
    if config.stage != "projector":
        sources = {"llava": sealed(tiny_llava, tmp_path / "llava")}
    run = replace(config.run, out=tmp_path / "run", steps=1, batch_size=4, micro_batches=2, workers=0, threads=1)
    data = replace(config.data, chats=chats, images=chats.parent)
    config = replace(config, **sources, run=run, data=data, lora_r=4, lora_alpha=8)
    run.out.mkdir()
    accelerator = start.build_accelerator(run)
    loop.train(llava_task.build(config), run, config.optim, StopRequest(), accelerator)
    seal = manifest.read(run.out, "llava")
    assert seal.metrics["samples_seen"] == 4
    assert (run.out / "adapter").is_dir() == (config.stage in ("lora", "qlora"))


@pytest.mark.parametrize("stem", FULL_SIZE_LLAVA)
def test_llava_recipes_follow_llava(stem: str) -> None:
    """LLaVA-1.5's table; one epoch, 3 % warm-up; its stage 1 crops and its stage 2 pads."""
    config = llava_config(stem)
    samples, batch = (558_128, 256) if stem == "projector" else (665_298, 128)
    rates = {"projector": (1e-3,), "full": (2e-5, 2e-5), "tower": (1e-5, 1e-5, 2e-6)}
    own = (config.optim.lr, config.projector_lr, config.vision_lr)
    assert own[: len(rates.get(stem, (0, 0)))] == rates.get(stem, (2e-4, 2e-5))
    assert config.run.batch_size == batch
    assert config.run.steps == round(samples / batch)
    assert config.optim.warmup_steps == round(0.03 * config.run.steps)
    assert (config.optim.weight_decay, config.optim.betas, config.optim.clip_norm) == (0.0, (0.9, 0.999), None)
    assert config.data.geometry == ("crop" if stem == "projector" else "pad")
    assert config.data.max_length == 2048
    assert (config.run.precision, config.weights, config.checkpointing) == ("bf16", "float32", "none")
    if "lora" in stem:
        assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (128, 256, 0.05)


@pytest.mark.parametrize("stem", FULL_SIZE_LLAVA)
def test_a_demo_of_the_same_stage_stands_beside_each_llava_recipe(stem: str) -> None:
    [demo] = re.findall(r"^# Demo of the same shape: (\w+_demo)\.yaml$", (RECIPES / f"{stem}.yaml").read_text(), re.M)
    assert f"Stands for {stem}.yaml." in (RECIPES / f"{demo}.yaml").read_text()
    full, small = llava_config(stem), llava_config(demo)
    for name in ("stage", "vision", "language", "bits", "weights", "checkpointing", "packing"):
        assert getattr(full, name) == getattr(small, name)


@pytest.mark.parametrize("stem", FULL_SIZE)
def test_a_demo_of_the_same_shape_stands_beside_each_full_size_recipe(stem: str) -> None:
    [demo] = re.findall(r"^# Demo of the same shape: (\w+_demo)\.yaml$", (RECIPES / f"{stem}.yaml").read_text(), re.M)
    assert f"{stem}.yaml" in (RECIPES / f"{demo}.yaml").read_text()
    assert shape(CONTENTS[stem]) == shape(CONTENTS[demo])
    if "model" in CONTENTS[stem]:
        assert paths(pretrain_config(stem).model) == paths(pretrain_config(demo).model)


def shape(content: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe, but for sizes and for what kind of data set it reads."""
    nested = {
        name: shape(value) if isinstance(value, dict) and "path" not in value else None
        for name, value in content.items()
    }
    return {name: value for name, value in nested.items() if name not in SIZES}


def paths(model: EncoderConfig) -> dict[str, Any]:
    """Everything that changes the code path: the model without its sizes."""
    return replace(shrunk(model), preset=None, preprocess=replace(model.preprocess, crop_area=(1.0, 1.0))).to_dict()


def test_the_documentation_has_every_recipe() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    for stem in CONTENTS:
        [row] = [row for row in rows if row.startswith(f"| `{stem}`")]
        if stem in (*FULL_SIZE, *FULL_SIZE_LLAVA):
            [demo] = re.findall(r"Demo of the same shape: (\w+)\.yaml", (RECIPES / f"{stem}.yaml").read_text())
            assert f"`{demo}`" in row
