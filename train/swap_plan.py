"""SwapConfig -> the stages of a swap.

Below `work`: ARM/pretrain, ARM/resolution and ARM/encoder once; for every LLM and seed projector, llava and results in
ARM[/LLM][/seed-N]; a report for every LLM, and a matrix over several. No torch import.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from encoders import manifest
from encoders.data.spec import DataSpec
from encoders.errors import UsageError
from train.config import LlavaConfig, PretrainConfig, ResolutionConfig, parse
from train.pipeline import Stage
from train.swap_config import Arm, Llm, SwapConfig

TRAIN = Path(__file__).resolve().parent
SCRIPTS = {"pretrain": "pretrain.py", "resolution": "finetune_resolution.py"}  # the others: tune_llava.py
CONFIGS = {"pretrain": PretrainConfig, "resolution": ResolutionConfig}  # of the others: LlavaConfig
Kind = Literal["pretrain", "resolution", "projector", "tune"]


@dataclass
class _Plan:
    """Stages under construction."""

    config: SwapConfig
    stages: list[Stage] = field(default_factory=list)

    @property
    def scenes(self) -> Path:
        return self.config.work / "scenes"

    def add(
        self, name: str, module: str, words: list[object], inputs: list[Path], out: Path, after: list[Stage]
    ) -> Stage:
        """A stage that is a module's command."""
        program = (sys.executable, "-m", module)
        self.stages.append(Stage(name, [str(word) for word in words], inputs, out, after, program))
        return self.stages[-1]

    def train(
        self, kind: Kind, name: str, recipe: Path, inputs: list[Path], after: list[Stage], words: list[object]
    ) -> Stage:
        """A training stage: the recipe, then the options of this plan, then `words`, the last of which win."""
        out = self.config.work / name
        script = TRAIN / SCRIPTS.get(kind, "tune_llava.py")
        program = (sys.executable, "-m", "accelerate.commands.launch", *self.config.launch, str(script))
        options = self.config.options.get(kind, ())
        scenes = _scene_options(kind, self.scenes) if self.config.scenes is not None else []
        command = ["--config", recipe, *options, *scenes, "--run.out", out, *words]
        stated = [str(word) for word in command]
        read = [self.scenes] if self.config.scenes is not None else list(data_of(parsed(name, stated)).values())
        stage = Stage(name, stated, [*inputs, *read], out, after, program, recipe)
        self.stages.append(stage)
        return stage


def plan(config: SwapConfig) -> list[Stage]:
    """All stages, each after those it waits for; the last one writes the report, or the matrix of several."""
    made = _Plan(config)
    data: list[Stage] = []
    if config.scenes is not None:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in config.scenes.items()]
        words = [made.scenes, *options, "--overwrite"]
        data = [made.add("scenes", "encoders.data.scenes", words, [], made.scenes, [])]
    # What others made is fetched and proved first: in minutes, while training would take days to get there.
    ordered = sorted(config.arms.items(), key=lambda item: item[1].source is None)
    encoders = {name: _encoder(made, name, arm, data) for name, arm in ordered}
    llms = config.llms or {"": Llm(config.llm)}
    demo = _demo_llm(made) if any(llm.model is None for llm in llms.values()) else None
    reports = [
        _report(made, name, {arm: _results(made, arm, encoders[arm], name, llm, demo) for arm in config.arms}, encoders)
        for name, llm in llms.items()
    ]
    if len(reports) > 1:
        out = config.work / "matrix.html"
        files = [report.out.with_suffix(".json") for report in reports]
        made.add("matrix", "eval.matrix", [*files, "--out", out, "--name", *llms], files, out, reports)
    return made.stages


@dataclass(frozen=True)
class _Encoder:
    """An arm's exported folder, the stages that make it, and the run that it was exported from, where that is ours."""

    folder: Path
    after: list[Stage]
    run: Path | None = None


def _encoder(made: _Plan, name: str, arm: Arm, data: list[Stage]) -> _Encoder:
    work, command = made.config.work, "encoders.export.command"
    folder = work / name / "encoder"
    if arm.source is not None:
        path = Path(arm.source)
        if _is_exported(path):
            return _Encoder(path, [])
        pairs = {"--revision": arm.revision, "--model-name": arm.model_name, "--image-size": arm.image_size}
        options = [word for option, value in pairs.items() if value is not None for word in (option, value)]
        inputs = [path] if path.exists() else []
        words: list[object] = [arm.source, folder, *options, "--overwrite"]
        return _Encoder(folder, [made.add(f"{name}/encoder", command, words, inputs, folder, [])])
    assert arm.recipe is not None  # Arm sees to it
    run = made.train("pretrain", f"{name}/pretrain", arm.recipe, [], data, [])
    if made.config.resolution is not None:
        words = ["--init", run.out]
        run = made.train("resolution", f"{name}/resolution", made.config.resolution, [run.out], [run], words)
    words = [run.out, folder, "--overwrite"]
    return _Encoder(folder, [made.add(f"{name}/encoder", command, words, [run.out], folder, [run])], run.out)


def _demo_llm(made: _Plan) -> Stage:
    out = made.config.work / "llm"
    return made.add("llm", "llava_adapter.demo_llm", [out, "--overwrite"], [], out, [])


def _results(made: _Plan, arm: str, encoder: _Encoder, name: str, llm: Llm, demo: Stage | None) -> list[Stage]:
    """The evaluated LLaVAs of an arm with one LLM, one for each seed."""
    config = made.config
    if llm.model is None:
        assert demo is not None  # plan() sees to it
        model, ready, read = str(demo.out), [demo], [demo.out]
    else:
        model, ready, read = llm.model, [], [Path(llm.model)] if Path(llm.model).exists() else []
    bench = made.scenes / "bench" if config.scenes is not None else config.bench_data
    asked: list[object] = ["--bench", ",".join(config.bench), "--batch-size", config.eval_batch_size, "--overwrite"]
    asked += ["--data", bench] if bench is not None else []
    asked += ["--limit", config.limit] if config.limit is not None else []
    results = []
    for seed in config.seeds or (None,):
        where = "/".join(part for part in (arm, name, f"seed-{seed}" if seed is not None else "") if part)
        drawn: list[object] = ["--run.seed", seed] if seed is not None else []
        words: list[object] = ["--encoder", encoder.folder, "--llm", model, *drawn]
        words += ["--template", llm.template] if llm.template is not None else []
        after = [*encoder.after, *ready]
        projector = made.train(
            "projector", f"{where}/projector", config.projector, [encoder.folder, *read], after, words
        )
        words = ["--llava", projector.out, *drawn]
        llava = made.train("tune", f"{where}/llava", config.tune, [projector.out], [projector], words)
        out = config.work / where / "results"
        inputs = [llava.out, *([bench] if bench is not None else [])]
        words = ["--model", llava.out, "--out", out, *asked]
        results.append(made.add(f"{where}/results", "eval.run", words, inputs, out, [llava]))
    return results


def _report(made: _Plan, llm: str, results: dict[str, list[Stage]], encoders: dict[str, _Encoder]) -> Stage:
    """compare-runs over the arms with one LLM."""
    work = made.config.work
    runs = [encoders[arm].run for arm in results]
    # Retrieval needs the runs of all arms; of exported folders there is the certificate.
    shown = [run for run in runs if run is not None]
    if len(shown) < len(runs):
        shown = [encoders[arm].folder for arm in results]
    arms = [",".join(str(stage.out) for stage in stages) for stages in results.values()]
    name = f"report-{llm}" if llm else "report"
    out = work / f"{name}.html"
    words = [*arms, "--out", out, "--name", *results, "--encoders", *shown]
    evaluated = [stage for stages in results.values() for stage in stages]
    after = [*evaluated, *(stage for arm in results for stage in encoders[arm].after)]
    return made.add(name, "eval.compare", words, [*(stage.out for stage in evaluated), *shown], out, after)


def _scene_options(kind: Kind, scenes: Path) -> list[str]:
    """Point a training stage at the scenes of this pipeline, whatever its recipe names."""
    if kind in ("projector", "tune"):
        chats = "chats_caption.json" if kind == "projector" else "chats.json"
        return [f"--data.chats={scenes / chats}", f"--data.images={scenes}"]
    return [f"--data.{split}={scenes / 'shards' / split}" for split in ("train", "val", "test")]


def parsed(stage: str, command: Sequence[str]) -> Any:
    """The config of a training stage, by its own parser. Raises UsageError if that refuses the recipe or an option."""
    try:
        return parse(CONFIGS.get(stage.rpartition("/")[2], LlavaConfig), "unused", command)
    except UsageError as error:
        raise UsageError(f"stage {stage}: {error}") from error


def data_of(config: Any) -> dict[str, Path]:
    """The data that a training stage reads, by key, so that a change of it is seen: its recipe's, its options' or the
    defaults."""
    if isinstance(config, LlavaConfig):
        return {"data.chats": config.data.chats}
    splits = {f"data.{split}": getattr(config.data, split) for split in ("train", "val", "test")}
    return {key: where.path if isinstance(where, DataSpec) else where for key, where in splits.items()}


def _is_exported(path: Path) -> bool:
    return (path / manifest.MANIFEST).is_file() and manifest.read(path).kind == "encoder"
