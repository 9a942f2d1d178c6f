"""From pixels to a swap report: every stage for every encoder arm of one YAML, skipping what is up to date.

    python train/swap.py --config train/recipes/demo.yaml

Each stage is a command of the data-flow table, run as a subprocess. It is skipped when its command, its recipe and the
fingerprints of its inputs are those of the last run and its output is untouched.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from encoders import manifest
from encoders.errors import DataError, SwapError, run_command
from train.config import FREE_RUN_KEYS, SwapConfig, load_yaml, parse

TRAIN = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Stage:
    """One command: what decides its result (words, recipe, inputs), the one path it writes, what it waits for."""

    name: str
    command: list[str]
    """Words after the program; paths, options."""
    inputs: list[Path]
    out: Path
    after: list["Stage"] = field(default_factory=list)
    program: tuple[str, ...] = ()
    """Interpreter, launcher and script: they run the stage but do not identify it."""
    recipe: Path | None = None
    """YAML of a training stage, which can then resume."""


def main() -> None:
    config = parse(SwapConfig, "demo.yaml")
    stages = plan(config)
    runner = Runner(config.work, config.jobs)
    if not runner.run(stages):
        print(runner.log(stages[-1]).read_text(), end="")  # the table, as the last run printed it
        print("all is up to date")


def plan(config: SwapConfig) -> list[Stage]:
    """All stages, each after those it waits for; the last one writes the report."""
    work, scenes = config.work, config.work / "scenes"
    stages: list[Stage] = []

    def add(name: str, module: str, words: list[object], inputs: list[Path], out: Path, after: list[Stage]) -> Stage:
        program = (sys.executable, "-m", module)
        stages.append(Stage(name, [str(word) for word in words], inputs, out, after, program))
        return stages[-1]

    def train(name: str, script: str, recipe: Path, inputs: list[Path], after: list[Stage], *words: object) -> Stage:
        program = (sys.executable, "-m", "accelerate.commands.launch", *config.launch, str(TRAIN / script))
        options = [*words, *_scene_options(script, words, scenes)] if config.scenes is not None else list(words)
        read = [*inputs, scenes] if config.scenes is not None else [*inputs, *_data_of(recipe)]
        command = ["--config", str(recipe), "--run.out", str(work / name), *map(str, options)]
        stages.append(Stage(name, command, read, work / name, after, program, recipe))
        return stages[-1]

    data: list[Stage] = []
    if config.scenes is not None:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in config.scenes.items()]
        data = [add("scenes", "encoders.data.scenes", [scenes, *options, "--overwrite"], [], scenes, [])]
    llm, llm_ready = config.llm, []
    if llm is None:
        llm = work / "llm"
        llm_ready = [add("llm", "llava_adapter.demo_llm", [llm, "--overwrite"], [], llm, [])]
    bench = scenes / "bench" if config.scenes is not None else config.bench_data
    asked: list[object] = ["--bench", ",".join(config.bench), "--batch-size", config.eval_batch_size, "--overwrite"]
    asked += ["--data", bench] if bench is not None else []
    asked += ["--limit", config.limit] if config.limit is not None else []

    results, runs = [], []
    for arm, recipe in config.arms.items():
        run = train(f"{arm}/pretrain", "pretrain.py", recipe, [], data)
        if config.resolution is not None:
            script = "finetune_resolution.py"
            run = train(f"{arm}/resolution", script, config.resolution, [run.out], [run], "--init", run.out)
        folder = work / arm / "encoder"
        encoder = add(
            f"{arm}/encoder", "encoders.export.command", [run.out, folder, "--overwrite"], [run.out], folder, [run]
        )
        words: list[object] = ["--stage", "projector", "--encoder", folder, "--llm", llm]
        ready = [encoder, *llm_ready]
        projector = train(f"{arm}/projector", "tune_llava.py", config.projector, [folder, llm], ready, *words)
        words = ["--stage", "lora", "--llava", projector.out]
        llava = train(f"{arm}/llava", "tune_llava.py", config.lora, [projector.out], [projector], *words)
        folder = work / arm / "results"
        read = [llava.out, *([bench] if bench is not None else [])]
        words = ["--model", llava.out, "--out", folder]
        results.append(add(f"{arm}/results", "eval.run", [*words, *asked], read, folder, [llava]))
        runs.append(run)

    out = work / "report.html"
    folders = [stage.out for stage in results]
    words = ["--out", out, "--name", *config.arms, "--encoders", *(run.out for run in runs)]
    read = [*folders, *(run.out for run in runs)]
    add("report", "eval.compare", [*folders, *words], read, out, [*results, *runs])
    return stages


def _scene_options(script: str, words: tuple[object, ...], scenes: Path) -> list[str]:
    """Point a training stage at the scenes of this pipeline, whatever its recipe names."""
    if script == "tune_llava.py":
        chats = "chats_caption.json" if "projector" in words else "chats.json"
        return [f"--data.chats={scenes / chats}", f"--data.images={scenes}"]
    return [f"--data.{split}={scenes / 'shards' / split}" for split in ("train", "val", "test")]


def _data_of(recipe: Path) -> list[Path]:
    """The data that a recipe names, so that a change of it is seen."""
    data = load_yaml(recipe).get("data", {})
    named = [data[name] for name in ("train", "val", "test", "chats") if name in data]
    return [Path(one["path"] if isinstance(one, dict) else one) for one in named]


class Runner:
    """Runs stages in dependency order, `jobs` at a time, and remembers what each was made from."""

    def __init__(self, work: Path, jobs: int):
        self.work, self.jobs = work, jobs
        self.failed = threading.Event()
        (work / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, stages: list[Stage]) -> int:
        """Returns how many stages had to run. Raises StageFailed naming the first that failed."""
        began = time.monotonic()
        done: dict[str, Future[bool]] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = list(stages)
            while waiting or any(not future.done() for future in done.values()):
                for stage in [s for s in waiting if all(self._finished(done, a) for a in s.after)]:
                    waiting.remove(stage)
                    done[stage.name] = pool.submit(self._stage, stage)
                running = [future for future in done.values() if not future.done()]
                wait(running, timeout=1, return_when=FIRST_EXCEPTION)
                for future in done.values():
                    if future.done() and (error := future.exception()):
                        self.failed.set()
                        raise error
        ran = sum(future.result() for future in done.values())
        print(f"{ran} of {len(stages)} stages ran, in {time.monotonic() - began:.0f} s")
        return ran

    def log(self, stage: Stage) -> Path:
        """What the stage's command printed."""
        return self.work / "logs" / (stage.name.replace("/", "-") + ".log")

    @staticmethod
    def _finished(done: dict[str, Future[bool]], stage: Stage) -> bool:
        return stage.name in done and done[stage.name].done() and not done[stage.name].exception()

    def _stage(self, stage: Stage) -> bool:
        """Run a stage unless it is up to date; returns whether it ran."""
        if self.failed.is_set():
            return False
        record = self.log(stage).with_suffix(".json")
        key = stage_key(stage)
        before = json.loads(record.read_text()) if record.is_file() else {}
        if before.get("key") == key and _untouched(stage.out, before.get("fingerprint")):
            print(f"[{stage.name}] up to date")
            return False
        command = [*stage.program, *stage.command]
        if stage.recipe is not None and stage.out.exists():
            if before.get("key") == key and "fingerprint" not in before:
                command.append("--resume")  # the same run, interrupted
            else:
                self._set_aside(stage)
        manifest.write_json(record, {"key": key})
        began = time.monotonic()
        print(f"[{stage.name}] starts", flush=True)
        self._execute(stage, command)
        manifest.write_json(record, {"key": key, "fingerprint": manifest.fingerprint(stage.out)})
        print(f"[{stage.name}] done in {time.monotonic() - began:.0f} s", flush=True)
        return True

    def _set_aside(self, stage: Stage) -> None:
        """A run that is out of date may have cost days: it is moved, never deleted."""
        folder = self.work / "old"
        folder.mkdir(exist_ok=True)
        name = stage.name.replace("/", "-")
        old = next(path for n in count(1) if not (path := folder / f"{name}-{n}").exists())
        stage.out.rename(old)
        print(f"[{stage.name}] its settings or inputs have changed; the earlier run is now {old}")

    def _execute(self, stage: Stage, command: list[str]) -> None:
        log = self.log(stage)
        quiet = {**os.environ, "TQDM_DISABLE": "1"}  # bars of libraries would fill the log
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=quiet
            )
            assert process.stdout is not None
            for line in process.stdout:
                stream.write(line)
                if not line.isspace():
                    print(f"[{stage.name}] {line}", end="", flush=True)
        if process.wait() != 0:
            raise StageFailed(f"stage {stage.name} ended with code {process.returncode}; its output is in {log}")


class StageFailed(SwapError):
    """A stage's command did not succeed."""


def stage_key(stage: Stage) -> str:
    """Identity of a stage's work: its words, what its recipe says, and the content of everything it reads."""
    recipe = load_yaml(stage.recipe) if stage.recipe is not None else {}
    settings = {name: value for name, value in recipe.get("run", {}).items() if name not in FREE_RUN_KEYS}
    inputs = {str(path): manifest.fingerprint(path) for path in stage.inputs}
    identity = [stage.command, {**recipe, "run": settings}, inputs]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _untouched(out: Path, fingerprint: str | None) -> bool:
    """Whether a stage's output is there and is what the stage left."""
    try:
        if out.is_dir():
            return manifest.verify(out).fingerprint == fingerprint
        return manifest.fingerprint(out) == fingerprint
    except DataError:
        return False


if __name__ == "__main__":
    run_command(main)
