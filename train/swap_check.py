"""Refuses a swap that cannot work before its first stage runs: training is a dear way to find a typing error.

Recipes go through the parsers of their own commands; encoders and LLMs are judged by their configs. No torch import.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from encoders import manifest
from encoders.errors import DataError, ModelError, UsageError
from encoders.inspection.stated import read_configs
from encoders.sources.download import download
from encoders.sources.open_clip_config import OPEN_CLIP_WEIGHTS
from eval.benches.benchmarks import resolve
from eval.benches.preflight import check_requirements
from eval.benches.staging import check_datasets
from llava_adapter.sources import model_folder
from train.config import LlavaConfig
from train.pipeline import Stage
from train.swap_config import Arm, Llm, SwapConfig
from train.swap_plan import data_of, parsed

CLIP_KINDS = ("clip", "clip_vision_model")


def check(config: SwapConfig, stages: Sequence[Stage], hub: bool) -> None:
    """Refuse what could only fail later. `hub`: also ask the Hub for the configs of what lies there.

    Raises UsageError for a recipe, bench or template that does not fit, DataError for data that is not there,
    ModelError for an encoder or LLM that cannot take part.
    """
    benches = resolve(",".join(config.bench))
    check_requirements(benches)
    if config.scenes is None and config.bench_data is not None:
        check_datasets(config.bench_data, [folder for bench in benches for folder in bench.folders])
    made = {stage.out for stage in stages}
    for stage in stages:
        if stage.recipe is not None:
            _check_data(stage, made | {config.work / "scenes"})
    for name, arm in config.arms.items():
        if arm.source is not None:
            _check_source(name, arm, hub)
    for llm in config.llms.values() or (Llm(config.llm),):
        if llm.model is not None and (hub or not _may_be_id(Path(llm.model))):
            _check_llm(llm.model)


def _check_data(stage: Stage, made: set[Path]) -> None:
    """The data of a training stage is there, as far as this plan does not make it."""
    config = parsed(stage.name, stage.command)
    data = data_of(config)
    if isinstance(config, LlavaConfig):
        data["data.images"] = config.data.images
    for key, where in data.items():
        if not where.exists() and not any(out in (where, *where.parents) for out in made):
            raise DataError(f"stage {stage.name}: {key} is {where}, which does not exist; name it in {stage.recipe}")


def _check_source(name: str, arm: Arm, hub: bool) -> None:
    """An encoder that exists, and is one of CLIP's own architecture as far as its configs tell."""
    assert arm.source is not None
    path = Path(arm.source)
    if path.is_file():
        if arm.model_name is None:
            raise UsageError(f"arms.{name}: {path} is a file of weights; add its `model_name`, such as ViT-B-16")
        return
    if not path.exists():
        if not _may_be_id(path):
            raise DataError(
                f"arms.{name}: {path} does not exist, and it is no id on the Hub (organisation/name) either"
            )
        if not hub:
            return
        path = download(arm.source, arm.revision, None).folder
    if (path / manifest.MANIFEST).is_file():
        kind = manifest.read(path).kind
        if kind not in ("encoder", "encoder-run"):
            raise ModelError(
                f"arms.{name}: {path} holds a {kind!r} artifact where 'encoder' or 'encoder-run' is needed"
            )
        if kind == "encoder" and arm.image_size is not None:
            raise UsageError(f"arms.{name}: {path} is exported; export its source again with --image-size")
        return
    refusal = None
    if (path / "open_clip_config.json").is_file():
        refusal = read_configs(path, path / OPEN_CLIP_WEIGHTS[0]).refusal
    elif (kind := _model_type(path)) not in CLIP_KINDS:
        refusal = f"its model_type is {kind!r}; needed is {' or '.join(CLIP_KINDS)}"
    if refusal is not None:
        raise ModelError(f"arms.{name}: {arm.source} cannot become a CLIPVisionModel: {refusal}")


def _may_be_id(path: Path) -> bool:
    """Whether what is not on this machine may be on the Hub."""
    return not path.exists() and not path.is_absolute() and len(path.parts) == 2 and path.parts[0] not in (".", "..")


def _check_llm(model: str) -> None:
    folder = model_folder(model, weights=False)
    if (kind := _model_type(folder)) != "llama":
        raise ModelError(f"{model}: model_type is {kind!r}, needed is a Llama")
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{model} has no tokenizer.json; save its tokenizer as transformers' fast one")


def _model_type(folder: Path) -> str:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json; it is no model that transformers or open_clip wrote")
    try:
        return str(json.loads(file.read_text()).get("model_type"))
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
