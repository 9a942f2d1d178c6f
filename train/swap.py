"""From pixels to a swap report: every stage for every encoder arm of one YAML, skipping what is up to date.

    python train/swap.py --config train/recipes/demo.yaml

Each stage is a command of the data-flow table, run as a subprocess. It is skipped when its command, its recipe and the
fingerprints of its inputs are those of the last run and its output is untouched.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from encoders import manifest
from encoders.errors import DataError, SwapError, run_command
from train.config import SwapConfig, parse

TRAIN = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Stage:
    """One command: what it reads (artifacts, files), the one path it writes, and the stages it waits for."""

    name: str
    command: list[str]
    inputs: list[Path]
    out: Path
    after: list["Stage"] = field(default_factory=list)
    resumable: bool = False


def main() -> None:
    config = parse(SwapConfig, "demo.yaml")
    stages = plan(config)
    runner = Runner(config.work, config.jobs)
    if not runner.run(stages):
        print(runner.log(stages[-1]).read_text(), end="")  # the table, as the last run printed it
        print("all is up to date")


def plan(config: SwapConfig) -> list[Stage]:
    """All stages, each after those it waits for; the last one writes the report."""
    work = config.work
    stages: list[Stage] = []

    def add(
        name: str, command: Iterable[object], inputs: list[Path], out: Path, after: list[Stage], **kind: bool
    ) -> Stage:
        stages.append(Stage(name, [str(word) for word in command], inputs, out, after, **kind))
        return stages[-1]

    def training(
        name: str, script: str, recipe: Path, inputs: list[Path], after: list[Stage], *options: object
    ) -> Stage:
        launch = [sys.executable, "-m", "accelerate.commands.launch", *config.launch, TRAIN / script]
        command = [*launch, "--config", recipe, "--run.out", work / name, *options]
        return add(name, command, [recipe, *inputs], work / name, after, resumable=True)

    data: list[Stage] = []
    if config.scenes is not None:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in config.scenes.items()]
        module = [sys.executable, "-m", "encoders.data.scenes"]
        data = [add("scenes", [*module, work / "scenes", *options, "--overwrite"], [], work / "scenes", [])]
    llm, llm_ready = config.llm, []
    if llm is None:
        llm = work / "llm"
        module = [sys.executable, "-m", "llava_adapter.demo_llm"]
        llm_ready = [add("llm", [*module, llm, "--overwrite"], [], llm, [])]
    scenes = [stage.out for stage in data]

    results, runs = [], []
    for arm, recipe in config.arms.items():
        run = training(f"{arm}/pretrain", "pretrain.py", recipe, scenes, data)
        if config.resolution is not None:
            run = training(
                f"{arm}/resolution",
                "finetune_resolution.py",
                config.resolution,
                [run.out, *scenes],
                [run],
                "--init",
                run.out,
            )
        export = [sys.executable, "-m", "encoders.export", run.out, work / arm / "encoder", "--overwrite"]
        encoder = add(f"{arm}/encoder", export, [run.out], work / arm / "encoder", [run])
        parts = ["--stage", "projector", "--encoder", encoder.out, "--llm", llm]
        after = [encoder, *llm_ready]
        projector = training(
            f"{arm}/projector", "tune_llava.py", config.projector, [encoder.out, llm, *scenes], after, *parts
        )
        parts = ["--stage", "lora", "--llava", projector.out]
        llava = training(f"{arm}/llava", "tune_llava.py", config.lora, [projector.out, *scenes], [projector], *parts)
        evaluate = [sys.executable, "-m", "eval.run", "--model", llava.out, "--bench", ",".join(config.bench)]
        evaluate += ["--out", work / arm / "results", "--overwrite", "--batch-size", config.eval_batch_size]
        evaluate += ["--data", config.bench_data] if config.bench_data is not None else []
        evaluate += ["--limit", config.limit] if config.limit is not None else []
        bench = [config.bench_data] if config.bench_data is not None else []
        results.append(add(f"{arm}/results", evaluate, [llava.out, *bench], work / arm / "results", [llava]))
        runs.append(run)

    out = work / "report.html"
    compare = [sys.executable, "-m", "eval.compare", *(stage.out for stage in results), "--out", out]
    compare += ["--name", *config.arms, "--encoders", *(run.out for run in runs)]
    add("report", compare, [stage.out for stage in [*results, *runs]], out, [*results, *runs])
    return stages


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
        command = list(stage.command)
        if stage.resumable and stage.out.exists():
            if before.get("key") == key and "fingerprint" not in before:
                command.append("--resume")  # the same run, interrupted
            else:
                shutil.rmtree(stage.out)
        manifest.write_json(record, {"key": key})
        began = time.monotonic()
        print(f"[{stage.name}] starts", flush=True)
        self._execute(stage, command)
        manifest.write_json(record, {"key": key, "fingerprint": manifest.fingerprint(stage.out)})
        print(f"[{stage.name}] done in {time.monotonic() - began:.0f} s", flush=True)
        return True

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
    """Identity of a stage's work: its command and the content of everything it reads."""
    inputs = {str(path): manifest.fingerprint(path) for path in stage.inputs}
    return hashlib.sha256(json.dumps([stage.command, inputs]).encode()).hexdigest()


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
