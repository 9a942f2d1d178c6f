"""Run configs: YAML plus dotted overrides into checked dataclasses. No torch import, so mistakes are told at once.

An unknown key is refused with the nearest known one; a wrong type with what was expected.
"""

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from encoders.config import EncoderConfig, Preset, preset
from encoders.data.spec import DataSpec
from encoders.errors import UsageError
from eval.zero_shot.spec import ZeroShotSpec

RECIPES = Path(__file__).parent / "recipes"
# Settings of a run that cannot change its result: free to differ across a resume and between equal stages.
FREE_RUN_KEYS = (
    *("out", "resume", "workers", "log_every", "eval_every", "save_every", "keep", "tracker", "hang_limit"),
)
SHORT_FLAGS = {"--resume": "--run.resume=true", "--dry-run": "--dry_run=true"}
Config = TypeVar("Config")


@dataclass(frozen=True)
class RunConfig:
    """What every stage of training shares."""

    out: Path = Path("runs/run")
    """Folder of the run: checkpoints, metrics.jsonl, status.json and the finished artifact."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 256
    """Global batch: over all ranks and micro-batches."""
    micro_batches: int = 1
    """Gradient accumulation: forward and backward passes per step and rank."""
    seed: int = 0
    precision: Literal["bf16", "no"] = "bf16"
    """Autocast of the forward pass; weights stay as the task builds them."""
    workers: int = 2
    """Data loader processes per rank."""
    threads: int | None = None
    """CPU threads of torch; null leaves torch's default."""
    log_every: int = 10
    eval_every: int = 0
    """Steps between evaluations on the validation set; 0 evaluates only at the end."""
    save_every: int = 500
    """Steps between checkpoints; 0 saves none before the end."""
    keep: int = 2
    """Checkpoints kept."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Experiment tracker beside metrics.jsonl."""
    hang_limit: float = 1800.0
    """Seconds that a step, a save or an evaluation may take. A run that is stuck for longer writes the stacks of every
    rank and ends; raise it where an evaluation takes longer."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`; starts afresh if there is none."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batches", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise UsageError(f"run.{name} is {getattr(self, name)} but must be at least 1")
        if self.hang_limit <= 0:
            raise UsageError(f"run.hang_limit is {self.hang_limit} but must be positive, in seconds")
        for name in ("workers", "eval_every", "save_every"):
            if getattr(self, name) < 0:
                raise UsageError(f"run.{name} is {getattr(self, name)} but must not be negative")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.2
    """On weight matrices only: not on embeddings, tables, learnable tokens, norms, biases or the temperature."""
    warmup_steps: int = 0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UsageError(f"optim.lr is {self.lr} but must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"optim.betas are {self.betas} but must be from 0 to below 1")
        if self.clip_norm is not None and self.clip_norm <= 0:  # a negative one would turn every gradient round
            raise UsageError(f"optim.clip_norm is {self.clip_norm} but must be positive; null clips nothing")
        for name in ("eps", "weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise UsageError(f"optim.{name} is {getattr(self, name)} but must not be negative")


@dataclass(frozen=True)
class PairData:
    """Data sets: a folder of tars as the embedded world writes them, or path, format and mapping of any other."""

    train: Path | DataSpec = Path("runs/demo/scenes/shards/train")
    val: Path | DataSpec = Path("runs/demo/scenes/shards/val")
    """Scored during training."""
    test: Path | DataSpec = Path("runs/demo/scenes/shards/test")
    """Scored once, by the finished model."""
    max_bad_fraction: float = 0.01
    """The run stops when a larger share of its samples is bad."""
    zero_shot: tuple[ZeroShotSpec, ...] = ()
    """Further evaluation sets, as of `eval-encoder`, scored whenever `val` is and once by the finished model."""

    @property
    def folder(self) -> Path:
        """Where the training data lies."""
        return self.train.path if isinstance(self.train, DataSpec) else self.train


@dataclass(frozen=True)
class PretrainConfig:
    """train/pretrain.py"""

    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: PairData = field(default_factory=PairData)
    model: EncoderConfig = field(default_factory=EncoderConfig)


@dataclass(frozen=True)
class ResolutionConfig:
    """train/finetune_resolution.py"""

    init: str = "runs/demo/clips/pretrain"
    """A finished encoder run, whose model and objective go on at the new resolution; or published weights with both
    towers: a Hub id, a folder in the Hub's layout, or a file of open_clip's weights."""
    model_name: str | None = None
    """Of a file of weights: open_clip's name of its config, such as ViT-B-16."""
    revision: str | None = None
    """Of a Hub id: branch, tag or commit."""
    objective: Literal["clip", "clipa", "clips", "dreamlip"] | None = None
    """Of published weights, which come without one; null takes that of their family (clips without its captioner, which
    was not published; else clip)."""
    image_size: int = 336
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: PairData = field(default_factory=PairData)


@dataclass(frozen=True)
class ChatData:
    """Conversations, as docs/llava_data.md describes them, and how their pictures are shown."""

    chats: Path = Path("runs/demo/scenes/chats.json")
    """A json of LLaVA's or ShareGPT's, or a folder of Dataset.save_to_disk or of parquet files."""
    images: Path = Path("runs/demo/scenes")
    """Folder that image paths start from."""
    max_length: int = 2048
    """Tokens per conversation, image tokens included; what is longer loses whole turns from its end."""
    geometry: Literal["crop", "pad"] = "crop"
    """crop: short side resized, centre kept. pad: made square with the mean colour. Saved with the LLaVA."""
    missing: Literal["error", "skip"] = "error"
    """An entry whose picture is not there stops the run, or is left out and counted."""
    max_bad_fraction: float = 0.0
    """The run stops when a larger share of its conversations cannot be used: the picture does not open, or no answer
    fits into max_length."""

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise UsageError(f"data.max_length is {self.max_length} but must be at least 1")
        if not 0 <= self.max_bad_fraction < 1:
            raise UsageError(f"data.max_bad_fraction is {self.max_bad_fraction} but must be from 0 to below 1")


@dataclass(frozen=True)
class LlavaConfig:
    """train/tune_llava.py"""

    stage: Literal["projector", "full", "lora", "qlora", "tower"] = "projector"
    """projector: the projector alone, between an encoder and an LLM. full: projector and LLM. lora, qlora: projector in
    full and LoRA on the LLM, which qlora holds in 4 or 8 bits. tower: the vision tower as well."""
    encoder: Path | None = None
    """CLIPVisionModel folder, or its id on the Hub (stage projector)."""
    llm: Path | None = None
    """Llama folder, or its id on the Hub (stage projector)."""
    projector: Path | None = None
    """LLaVA folder whose trained projector stage projector begins with; only one of this encoder and LLM is taken."""
    template: Literal["llama3", "vicuna_v1", "chatml"] = "llama3"
    """Chat template of the LLM; stage projector itself trains on the plain one."""
    llava: Path | None = None
    """LLaVA folder written by an earlier stage (every stage but projector)."""
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    projector_lr: float = 2e-5
    """Of the projector after stage projector, where optim.lr is; optim.lr is then the LLM's or its LoRA's."""
    vision_lr: float = 2e-6
    """Of the vision tower in stage tower."""
    vision: Literal["lora", "full"] = "full"
    """How stage tower trains the vision tower."""
    language: Literal["frozen", "lora", "full"] = "lora"
    """How stage tower trains the LLM."""
    bits: Literal[4, 8] = 4
    """Of the LLM's frozen weights in stage qlora."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Of what trains. bfloat16 halves its memory and rounds small updates away: most of those of stage full."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward pass; try selective before full."""
    packing: bool = True
    """The conversations of a micro-batch lie end to end in one row, so that nothing is padded."""
    held_out: Path | None = None
    """Conversations like data.chats whose loss is taken every run.eval_every steps and at the end."""
    dry_run: bool = False
    """Print what the run would do and cost, and stop."""
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0))
    """Without weight decay, as LLaVA has none."""
    data: ChatData = field(default_factory=ChatData)

    def __post_init__(self) -> None:
        needed = ("encoder", "llm") if self.stage == "projector" else ("llava",)
        for name in ("encoder", "llm", "llava"):
            if (getattr(self, name) is not None) != (name in needed):
                problem = "needs" if name in needed else "takes no"
                raise UsageError(f"stage {self.stage} {problem} `{name}`; it reads {' and '.join(needed)}")
        if self.projector is not None and self.stage != "projector":
            raise UsageError(f"stage {self.stage} takes no `projector`; its llava has one")
        if self.optim.weight_decay:
            raise UsageError(f"optim.weight_decay is {self.optim.weight_decay} but a LLaVA stage has none; set it to 0")
        for name in ("projector_lr", "vision_lr", "lora_r", "lora_alpha"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} is {getattr(self, name)} but must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"lora_dropout is {self.lora_dropout} but must be from 0 to below 1")
        if self.stage == "tower" and (self.vision, self.language) == ("lora", "full"):
            raise UsageError(
                "stage tower: `vision: lora` does not go with `language: full`; choose lora or full for both"
            )


def parse(config_class: type[Config], default_recipe: str, arguments: Sequence[str] | None = None) -> Config:
    """Command line -> config. Without any argument the demo recipe `default_recipe` is taken, and said so.

    Raises UsageError for an unknown key (with a suggestion), a wrong type or an impossible combination.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments:
        arguments = ["--config", str(RECIPES / default_recipe)]
        print(f"no arguments given: running the demo recipe train/recipes/{default_recipe}")
    arguments = [SHORT_FLAGS.get(argument, argument) for argument in arguments]
    check_keys(arguments, config_class)
    parser = ArgumentParser(prog=Path(sys.argv[0]).name, description=config_class.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; later --key.sub value arguments override it")
    parser.add_argument("--resume", action="store_true", help="same as --run.resume true")
    parser.add_class_arguments(config_class, nested_key=None)
    sizes = _preset_sizes(arguments)
    try:
        namespace = parser.parse_args([f"--config={json.dumps({'model': sizes})}", *arguments] if sizes else arguments)
    except ArgumentError as error:
        raise UsageError(str(error)) from error
    try:
        instance = parser.instantiate(namespace)
    except ValueError as error:  # an optional section's own complaint comes wrapped
        if isinstance(error.__cause__, UsageError):
            raise error.__cause__ from None
        raise
    return config_class(**{f.name: instance[f.name] for f in fields(config_class)})  # type: ignore[arg-type]


def _preset_sizes(arguments: Sequence[str]) -> dict[str, Any]:
    """Sizes of the preset that a recipe or the command line names (the last one wins); none if there is none.

    A captioner's sizes come along only where the recipe has a `captioner` section, even an empty one.
    """
    said: dict[str, Any] = {}
    for place, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        value = value or (arguments[place + 1] if place + 1 < len(arguments) else "")
        if flag == "--config":
            said |= load_yaml(Path(value)).get("model") or {}
        elif flag == "--model.preset":
            said["preset"] = value
    if said.get("preset") is None:
        return {}
    if said["preset"] not in get_args(Preset):
        raise UsageError(f"unknown model.preset {said['preset']}; known: {', '.join(get_args(Preset))}")
    sizes = preset(said["preset"])
    if "captioner" not in said:
        del sizes["captioner"]
    return sizes


def check_keys(arguments: Sequence[str], config_class: type) -> None:
    """Raise UsageError for the first key, in a YAML or on the command line, that the config does not have."""
    known, free = keys(config_class), _free_mappings(config_class)
    for place, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag == "--config":
            file = Path(value or (arguments[place + 1] if place + 1 < len(arguments) else ""))
            for key in _flatten(load_yaml(file)):
                if not _is_known(key, known, free):
                    raise UsageError(f"{file}: unknown key `{key}`; {suggest(key, known)}")
        elif flag.startswith("--") and not _is_known(flag[2:], (*known, "help", "print_config"), free):
            raise UsageError(f"unknown option `{flag}`; {suggest(flag[2:], known)}")


def load_yaml(file: Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises UsageError if it cannot be read as one."""
    try:
        text = file.read_text()
        content = yaml.safe_load(text)
        _refuse_twice_said(file, yaml.compose(text, yaml.SafeLoader))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} must hold a mapping of keys to values")
    return content


def _refuse_twice_said(file: Path, node: yaml.Node | None) -> None:
    """Of a key that stands twice, YAML would silently take the last."""
    if isinstance(node, yaml.MappingNode):
        said = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for place, key in enumerate(said) if key in said[:place]]:
            raise UsageError(f"{file}: `{twice[0]}` stands there twice")
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                _refuse_twice_said(file, part)


def suggest(key: str, known: Sequence[str]) -> str:
    """', did you mean ...?' for the nearest known key, else the list of known keys."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"


def keys(config_class: type, prefix: str = "") -> list[str]:
    """Every dotted key of a config."""
    found = []
    for name, hint in get_type_hints(config_class).items():
        nested = next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), None)
        found.append(prefix + name)
        if isinstance(nested, type):
            found += keys(nested, f"{prefix}{name}.{'*.' if 'dict[' in str(hint) else ''}")
    return found


def _is_known(key: str, known: Sequence[str], free: Sequence[str]) -> bool:
    """`known` has a star in the place of a name that the user gives."""
    top, _, rest = key.partition(".")
    starred = f"{top}.*.{rest.partition('.')[2]}"
    return key in known or key.rpartition(".")[0] in free or starred in known


def _free_mappings(config_class: type) -> list[str]:
    """Top-level fields whose keys the user names."""
    return [name for name, hint in get_type_hints(config_class).items() if "dict[" in str(hint)]


def _flatten(mapping: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in mapping.items():
        found.append(f"{prefix}{key}")
        if isinstance(value, dict):
            found += _flatten(value, f"{prefix}{key}.")
    return found
