"""THE training loop: pre-training, resolution fine-tuning and both LLaVA stages run through it.

A stage brings a Task: the model, the data, one optimizer step's forward and backward passes, and what to write at the
end. Checkpoints, resume, logging, the finite-loss guard and the run's status are written once, here.
"""

import json
import math
import multiprocessing
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from encoders import manifest
from encoders.data.order import Shards, StepOrder
from encoders.errors import ModelError, Preempted
from train import checkpoint, ranks, sharding
from train.config import OptimConfig, RunConfig
from train.ledger import BAD_SAMPLES, Ledger
from train.optim import build, set_learning_rate
from train.signals import StopRequest, leave_to_parent
from train.status import STATUS
from train.tracking import METRICS, Clock, Tracker
from train.watchdog import STACKS, Watchdog

Batch = dict[str, Any]
NON_FINITE = "non_finite.json"
# Of the run, not of the artifact that it ends as.
RECORDS = (checkpoint.FOLDER, METRICS, STATUS, BAD_SAMPLES, ranks.RANKS, STACKS, NON_FINITE, "tracker")


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
    data_fingerprint: str
    """Identity of the training data: a resume on other data is refused."""
    base: dict[str, str]
    """Fingerprints of the models that the run starts from, whose frozen weights no checkpoint holds: a resume on others
    is refused."""
    module: nn.Module
    entries: tuple[str, ...]
    """Methods of `module` beside forward that `step` calls."""
    dataset: Dataset[dict[str, Any]]
    shards: Shards
    """How `dataset` lies on its disk."""
    max_bad_fraction: float

    def collate(self, examples: list[dict[str, Any]]) -> Batch:
        """Examples -> batch; needs `sample_ids` and `bad` beside the tensors. `counts` (name -> number) are summed into
        the finished run's metrics."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW."""

    def step(self, module: nn.Module, micro_batches: list[Batch], accelerator: Accelerator) -> dict[str, Tensor]:
        """Forward and backward of one optimizer step. Returns detached scalars, `loss` among them."""

    def adopt(self, module: nn.Module) -> None:
        """Work with this `module` from now on: the same one, whole or sharded."""

    def check_step(self, micro_batches: list[Batch], accelerator: Accelerator) -> str | None:
        """Check, once, that the right parts moved; returns a line to print, or an empty one. Called on every rank after
        the first step, and again after the next one for as long as it returns None: nothing to judge by yet."""

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        """Held-out figures during training; called on the main process."""

    def finish(self, out: Path, accelerator: Accelerator) -> Artifact:
        """Write the finished model's files; called on the main process."""


def train(task: Task, run: RunConfig, optim: OptimConfig, stop: StopRequest, accelerator: Accelerator) -> None:
    """Run the task to its last step and seal `run.out` as the artifact it makes.

    Raises Preempted, with a checkpoint written, once any rank was asked to stop; UsageError if `out` holds another run.
    """
    if (run.out / manifest.MANIFEST).is_file():
        checkpoint.refuse_another_run(run.out, manifest.read(run.out).config, task.config)
        accelerator.print(f"{run.out} is already finished; nothing to do")
        return
    order = StepOrder(
        task.shards.sizes,
        run.batch_size,
        run.steps,
        run.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        micro_batches=run.micro_batches,
        window=task.shards.window,
        ahead=task.shards.fetch_ahead,
    )
    everyone = ranks.register(run.out, accelerator)
    optimizer = build(task.parameter_groups(), optim)
    plan = _fit_for_fsdp(task, accelerator)
    module, optimizer = accelerator.prepare(task.module, optimizer)
    if plan is not None:
        sharding.enter_by(module, task.entries)
    torch.manual_seed(run.seed + accelerator.process_index)  # ranks draw different dropout masks
    ledger = Ledger(run.out, task.max_bad_fraction, order.samples, accelerator)
    order.start = start = _resume(task, run, optimizer, ledger, accelerator)
    unchecked = start == 0
    if run.tracker:
        accelerator.init_trackers("encoder-swap", config=_flat_for_tracker(task.config))

    tracker = Tracker(run.out, task.name, run.steps, start, accelerator)
    watchdog = Watchdog(run.out, everyone, run.hang_limit, accelerator)
    batches = _batches(task, order, run, accelerator.device)
    with watchdog, tracker, closing(batches):
        clock = Clock(run.batch_size)
        for step in range(start, run.steps):
            watchdog.beat(f"waiting for the data of step {step + 1}")
            with clock.waiting():
                micro_batches = [next(batches) for _ in range(run.micro_batches)]
            watchdog.beat(f"computing step {step + 1}")
            new_bad = ledger.note(step + 1, micro_batches)
            rate = set_learning_rate(optimizer, step, run.steps, optim.warmup_steps)
            figures = task.step(module, micro_batches, accelerator)
            loss, leave, new_bad = _agree(figures["loss"], stop, new_bad, accelerator)
            _refuse_non_finite("loss", loss, figures["loss"], step, micro_batches, run.out, accelerator)
            ledger.count(run.batch_size, new_bad)
            if optim.clip_norm is not None:
                norm = _plain(accelerator.clip_grad_norm_(module.parameters(), optim.clip_norm))
                _refuse_non_finite("norm", float(norm), figures["loss"], step, micro_batches, run.out, accelerator)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            if unchecked:
                with _whole(task, plan, accelerator):
                    line = task.check_step(micro_batches, accelerator)
                unchecked = line is None
                tracker.say(line or "")
            clock.tick()
            tracker.show(done, {"loss": loss, "samples/s": clock.rate, "data wait %": 100 * clock.wait_share})
            if done % run.log_every == 0 or done == run.steps:
                means = {name: float(accelerator.reduce(value, "mean")) for name, value in figures.items()}
                tracker.log(done, {**means, "lr": rate, "samples_per_s": clock.rate, "bad": ledger.bad})
            if run.eval_every and done % run.eval_every == 0 and done < run.steps and not leave:
                watchdog.beat(f"evaluating after step {done}")
                with _whole(task, plan, accelerator):
                    _evaluate(task, tracker, done, accelerator)
            if leave or (run.save_every and (done % run.save_every == 0 or done == run.steps)):
                watchdog.beat(f"saving after step {done}")
                tracker.sync()
                ledger.gather()
                saved = checkpoint.save(
                    run.out, done, ledger, task.module, optimizer, _identity(task), run.keep, accelerator
                )
                if leave:
                    raise Preempted(_farewell(run.out, done, saved))
        watchdog.beat("writing the finished model")
        with _whole(task, plan, accelerator):
            _seal(task, run, ledger, accelerator)
    accelerator.wait_for_everyone()  # no rank leaves while another's watchdog still looks for it


def _fit_for_fsdp(task: Task, accelerator: Accelerator) -> nn.Module | None:
    """Under FSDP: tell Accelerate which layers to shard, and make every parameter one that can be. Returns the plan of
    the whole module."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return None
    plan = sharding.blueprint(task.module)
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sharding.layers(task.module)
    sharding.scalars_to_vectors(task.module)
    return plan


@contextmanager
def _whole(task: Task, plan: nn.Module | None, accelerator: Accelerator) -> Iterator[None]:
    """Under FSDP: inside, the main process' task holds a whole copy of its module, which needs no other rank."""
    if plan is None:
        yield
        return
    sharded = task.module
    if plain := sharding.whole(sharded, plan, accelerator.device, keep=accelerator.is_main_process):
        task.adopt(plain)
    yield
    task.adopt(sharded)


def _identity(task: Task) -> dict[str, Any]:
    """What a checkpoint belongs to: it can be resumed under these settings, on these data and models, and no others."""
    return {**task.config, "data_fingerprint": task.data_fingerprint, "base": task.base}


def _resume(task: Task, run: RunConfig, optimizer: Any, ledger: Ledger, accelerator: Accelerator) -> int:
    """Restore model, optimizer, random states and ledger; returns the steps done."""
    found = checkpoint.newest_for_all(run.out, accelerator) if run.resume else None
    if found is None:
        if run.resume:
            accelerator.print(f"no checkpoint in {run.out}: starting from the beginning")
        ledger.restore(None)
        return 0
    progress = checkpoint.load(found, task.module, optimizer, _identity(task), accelerator)
    ledger.restore(progress.ledger)
    accelerator.print(f"resuming {run.out} after step {progress.step}")
    return progress.step


def _batches(task: Task, order: StepOrder, run: RunConfig, device: torch.device) -> Generator[Batch, None, None]:
    loader = DataLoader(
        task.dataset,
        batch_sampler=order,
        collate_fn=task.collate,
        num_workers=run.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_to_parent,
        generator=torch.Generator().manual_seed(run.seed),  # else the loader would draw from the global state
    )
    others = multiprocessing.active_children()
    source = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    try:
        for batch in source:
            yield {
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
    finally:
        del source  # asks the workers to end; one that is stuck in a read would keep this process from leaving
        for worker in workers:
            worker.kill()


def _agree(loss: Tensor, stop: StopRequest, new_bad: int, accelerator: Accelerator) -> tuple[float, bool, int]:
    """One message between the ranks per step: the mean loss, whether any of them was asked to stop, and how many bad
    samples they met."""
    counts = torch.tensor([float(stop.noted is not None), new_bad], device=loss.device)
    total, asked, bad = accelerator.reduce(torch.cat([loss.float().reshape(1), counts]), "sum").tolist()
    return total / accelerator.num_processes, asked > 0, int(bad)


def _farewell(out: Path, done: int, saved: bool) -> str:
    state = f"a checkpoint of step {done} is written" if saved else "no checkpoint could be written now"
    return f"{out} was asked to stop: {state}; go on with --resume"


def _plain(norm: Tensor) -> Tensor:
    """A norm that FSDP2 may have left in parts."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _refuse_non_finite(
    name: str, found: float, loss: Tensor, step: int, micro_batches: list[Batch], out: Path, accelerator: Accelerator
) -> None:
    """If the mean loss, or the norm of the gradients, is not finite every rank stops before the update: the step, and
    each rank's loss and sample ids, are written to non_finite.json, and ModelError is raised."""
    if math.isfinite(found):
        return
    ids = [i for batch in micro_batches for i in batch["sample_ids"]]
    mine = {"rank": accelerator.process_index, "loss": str(float(loss)), "sample_ids": ids}
    everyone = gather_object([mine])
    if accelerator.is_main_process:
        manifest.write_json(out / NON_FINITE, {"step": step + 1, "ranks": everyone})
    raise ModelError(
        f"the {name} is {found} at step {step + 1}, before the update; the samples are in {out / NON_FINITE}. Look at "
        f"them; if the weights have gone wrong, remove the newest of {out / checkpoint.FOLDER} and go on from the one "
        "before with --resume, or begin again elsewhere with a lower optim.lr"
    )


def _evaluate(task: Task, tracker: Tracker, step: int, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        figures = task.evaluate(accelerator)
        tracker.log(step, figures)
        tracker.say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    accelerator.wait_for_everyone()


def _seal(task: Task, run: RunConfig, ledger: Ledger, accelerator: Accelerator) -> None:
    ledger.gather()
    if accelerator.is_main_process:
        ledger.write()
        made = task.finish(run.out, accelerator)
        files = (path.relative_to(run.out) for path in run.out.rglob("*") if path.is_file())
        names = [path.as_posix() for path in files if path.parts[0] not in RECORDS]
        saw = {"samples_seen": ledger.seen, "bad_samples": dict(sorted(ledger.by_reason.items()))}
        metrics = {**made.metrics, **ledger.counts, **saw}
        manifest.seal(run.out, made.kind, task.config, made.parents, metrics, files=names)
        print(f"finished {run.out} ({made.kind})")
    accelerator.wait_for_everyone()
    if run.tracker:
        accelerator.end_training()


def _flat_for_tracker(config: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value, default=str) for name, value in config.items()}
