"""THE training loop: pre-training, resolution fine-tuning and both LLaVA stages run through it.

A stage brings a Task: the model, the data, one optimizer step's forward and backward passes, and what to write at the
end. Checkpoints, resume, logging, the finite-loss guard and the run's status are written once, here.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from encoders import manifest
from encoders.data.pairs import Ledger
from encoders.data.shards import StepOrder
from encoders.errors import ModelError, SwapError, UsageError
from train import checkpoint
from train.config import OptimConfig, RunConfig
from train.optim import build, set_learning_rate
from train.tracking import METRICS, Tracker

Batch = dict[str, Any]
STATUS = "status.json"
NON_FINITE = "non_finite.json"
RECORDS = (checkpoint.FOLDER, METRICS, STATUS, NON_FINITE, "tracker")  # of the run, not of the artifact it ends as


@dataclass(frozen=True)
class Artifact:
    """What a finished run is: goes into its manifest."""

    kind: str
    parents: dict[str, Path]
    metrics: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """What a stage brings. `module` is trained; its forward must be the only way the step computes (DDP wraps it)."""

    name: str
    config: dict[str, Any]
    module: nn.Module
    dataset: Dataset[dict[str, Any]]
    ledger: Ledger

    def collate(self, examples: list[dict[str, Any]]) -> Batch:
        """Examples -> batch; needs `sample_ids` and `bad` beside the tensors."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW."""

    def step(self, module: nn.Module, micro_batches: list[Batch], accelerator: Accelerator) -> dict[str, Tensor]:
        """Forward and backward of one optimizer step. Returns detached scalars, `loss` among them."""

    def after_first_step(self) -> str:
        """Check, once, that the right parts moved; returns a line to print, or an empty string."""

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        """Held-out figures during training; called on the main process."""

    def finish(self, out: Path, accelerator: Accelerator) -> Artifact:
        """Write the finished model's files; called on the main process."""


def build_accelerator(run: RunConfig) -> Accelerator:
    """Seeds, threads and the Accelerator of a run; call it before the model is built."""
    if run.threads:
        torch.set_num_threads(run.threads)
    project = ProjectConfiguration(project_dir=str(run.out), logging_dir=str(run.out / "tracker"))
    # Without `cpu` Accelerate takes every rank on a CPU machine for a run of its own.
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=run.precision, log_with=run.tracker, project_config=project)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UsageError(f"{launched} processes were launched but Accelerate sees {accelerator.num_processes}")
    if run.tracker and not accelerator.log_with:
        raise UsageError(f"run.tracker {run.tracker} is not installed; pip install {run.tracker} or leave it out")
    torch.manual_seed(run.seed)
    return accelerator


def prepare_folder(run: RunConfig) -> bool:
    """Whether there is anything to train. Raises UsageError if `out` is taken and the run was not asked to resume."""
    if (run.out / manifest.MANIFEST).is_file() and run.resume:
        print(f"{run.out} is already finished; nothing to do")
        return False
    taken = [name for name in (manifest.MANIFEST, checkpoint.FOLDER) if (run.out / name).exists()]
    if taken and not run.resume:
        raise UsageError(
            f"{run.out} already holds a run ({', '.join(taken)}); pass --resume to continue it or choose another out"
        )
    run.out.mkdir(parents=True, exist_ok=True)
    return True


@contextmanager
def status(run: RunConfig, accelerator: Accelerator) -> Iterator[None]:
    """Keep status.json: launchers return 1 whatever happened, this file holds the state and the code."""

    def write(state: str, code: int | None, message: str = "") -> None:
        # Any rank may be the one that fails, and the launcher then kills the others.
        if accelerator.is_main_process or state == "failed":
            rank = accelerator.process_index
            content = {"state": state, "code": code, "message": message, "rank": rank}
            manifest.write_json(run.out / STATUS, content)

    write("running", None)
    try:
        yield
    except SwapError as error:
        write("failed", error.exit_code, str(error))
        raise
    except BaseException as error:
        write("failed", 1, repr(error))
        raise
    write("finished", 0)


def train(task: Task, run: RunConfig, optim: OptimConfig, accelerator: Accelerator) -> None:
    """Run the task to its last step and seal `run.out` as the artifact it makes."""
    order = StepOrder(
        len(task.dataset),  # type: ignore[arg-type]
        run.batch_size,
        run.steps,
        run.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        micro_batches=run.micro_batches,
    )
    optimizer = build(task.parameter_groups(), optim)
    module, optimizer = accelerator.prepare(task.module, optimizer)
    torch.manual_seed(run.seed + accelerator.process_index)  # ranks draw different dropout masks
    progress = _resume(task, run, optimizer, accelerator)
    order.start = progress.step
    if run.tracker:
        accelerator.init_trackers("encoder-swap", config=_flat_for_tracker(task.config))

    with Tracker(run.out, task.name, run.steps, progress.step, accelerator) as tracker:
        batches = _batches(task, order, run, accelerator.device)
        clock = _Clock(run.batch_size)
        for step in range(progress.step, run.steps):
            with clock.waiting():
                micro_batches = [next(batches) for _ in range(run.micro_batches)]
            for batch in micro_batches:
                task.ledger.record(batch)
            rate = set_learning_rate(optimizer, step, run.steps, optim.warmup_steps)
            figures = task.step(module, micro_batches, accelerator)
            loss = _finite_loss(figures["loss"], step, micro_batches, run.out, accelerator)
            if optim.clip_norm is not None:
                accelerator.clip_grad_norm_(module.parameters(), optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            if done == 1 and (line := task.after_first_step()):
                tracker.say(line)
            clock.tick()
            tracker.show(done, {"loss": loss, "samples/s": clock.rate, "data wait %": 100 * clock.wait_share})
            if done % run.log_every == 0 or done == run.steps:
                scalars = {name: float(accelerator.reduce(value, "mean")) for name, value in figures.items()}
                tracker.log(done, {**scalars, "lr": rate, "samples_per_s": clock.rate, "bad": len(task.ledger.bad)})
            if run.eval_every and done % run.eval_every == 0 and done < run.steps:
                _evaluate(task, tracker, done, accelerator)
            if run.save_every and (done % run.save_every == 0 or done == run.steps):
                state = checkpoint.Progress(done, _gathered(task.ledger))
                unwrapped = accelerator.unwrap_model(module)
                checkpoint.save(run.out, state, unwrapped, optimizer, task.config, run.keep, accelerator)
    _seal(task, run, accelerator)


def _resume(task: Task, run: RunConfig, optimizer: Any, accelerator: Accelerator) -> checkpoint.Progress:
    found = checkpoint.newest(run.out) if run.resume else None
    if found is None:
        if run.resume:
            accelerator.print(f"no checkpoint in {run.out}: starting from the beginning")
        return checkpoint.Progress(0, {})
    progress = checkpoint.load(found, task.module, optimizer, task.config, accelerator)
    if accelerator.is_main_process:  # one rank carries on what all had counted
        task.ledger.seen, task.ledger.bad = progress.ledger["seen"], progress.ledger["bad"]
    accelerator.print(f"resuming {run.out} after step {progress.step}")
    return progress


def _batches(task: Task, order: StepOrder, run: RunConfig, device: torch.device) -> Iterator[Batch]:
    loader = DataLoader(
        task.dataset,
        batch_sampler=order,
        collate_fn=task.collate,
        num_workers=run.workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(run.seed),  # else the loader would draw from the global state
    )
    for batch in loader:
        yield {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }


def _finite_loss(loss: Tensor, step: int, micro_batches: list[Batch], out: Path, accelerator: Accelerator) -> float:
    """The mean loss of all ranks. If it is not finite every rank stops before the update: the step, and each rank's
    loss and sample ids, are written to non_finite.json, and ModelError is raised."""
    value = float(accelerator.reduce(loss, "mean"))
    if not math.isfinite(value):
        ids = [i for batch in micro_batches for i in batch["sample_ids"]]
        mine = {"rank": accelerator.process_index, "loss": str(float(loss)), "sample_ids": ids}
        ranks = gather_object([mine])
        if accelerator.is_main_process:
            manifest.write_json(out / NON_FINITE, {"step": step + 1, "ranks": ranks})
        raise ModelError(
            f"loss is {value} at step {step + 1}, before the update; the samples are in {out / NON_FINITE}; lower "
            "optim.lr or look at these samples, then go on from the last checkpoint with --resume"
        )
    return value


def _evaluate(task: Task, tracker: Tracker, step: int, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        figures = task.evaluate(accelerator)
        tracker.log(step, figures)
        tracker.say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    accelerator.wait_for_everyone()


def _seal(task: Task, run: RunConfig, accelerator: Accelerator) -> None:
    ledger = Ledger(1.0, **_gathered(task.ledger))
    if accelerator.is_main_process:
        made = task.finish(run.out, accelerator)
        files = (path.relative_to(run.out) for path in run.out.rglob("*") if path.is_file())
        names = [path.as_posix() for path in files if path.parts[0] not in RECORDS]
        metrics = {**made.metrics, "samples_seen": ledger.seen, "bad_samples": ledger.by_reason()}
        manifest.seal(run.out, made.kind, task.config, made.parents, metrics, files=names)
        print(f"finished {run.out} ({made.kind})")
    accelerator.wait_for_everyone()
    if run.tracker:
        accelerator.end_training()


def _gathered(ledger: Ledger) -> dict[str, Any]:
    """What all ranks counted. Every rank must call it."""
    return {"seen": sum(gather_object([ledger.seen])), "bad": gather_object(list(ledger.bad))}


def _flat_for_tracker(config: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value, default=str) for name, value in config.items()}


class _Clock:
    """Samples per second and the share of time spent waiting for data, over the recent past."""

    def __init__(self, samples_per_step: int):
        self.samples = samples_per_step
        self.last = time.monotonic()
        self.wait = self.wait_share = self.rate = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.wait = time.monotonic() - began

    def tick(self) -> None:
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        memory = 0.9 if self.rate else 0.0
        self.rate = memory * self.rate + (1 - memory) * self.samples / seconds
        self.wait_share = memory * self.wait_share + (1 - memory) * self.wait / seconds
