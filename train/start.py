"""What happens before the first step: the folder, the seeds, the Accelerator, and refusals of what cannot work."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

from encoders import manifest
from encoders.errors import UsageError
from train import checkpoint, sharding
from train.config import RunConfig

MINUTE = 60.0


def prepare_folder(run: RunConfig) -> None:
    """Make `out`. Raises UsageError if it holds a run and the run was not asked to resume."""
    taken = [name for name in (manifest.MANIFEST, checkpoint.FOLDER) if (run.out / name).exists()]
    if taken and not run.resume:
        raise UsageError(
            f"{run.out} already holds a run ({', '.join(taken)}); pass --resume to continue it or choose another out"
        )
    run.out.mkdir(parents=True, exist_ok=True)


def build_accelerator(run: RunConfig) -> Accelerator:
    """Seeds, threads and the Accelerator of a run; call it before the model is built."""
    if run.threads:
        torch.set_num_threads(run.threads)
    # Without `cpu` Accelerate takes every rank on a CPU machine for a run of its own.
    on_cpu = not torch.accelerator.is_available()
    plugin = sharding.plugin()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=run.precision,
        log_with=run.tracker,
        project_config=ProjectConfiguration(project_dir=str(run.out), logging_dir=str(run.out / "tracker")),
        fsdp_plugin=plugin,
        # The watchdog speaks first, as it can say who is stuck and where.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=run.hang_limit + MINUTE))],
    )
    _refuse_another_launch(accelerator, plugin is not None)
    if run.tracker and not accelerator.log_with:
        raise UsageError(f"run.tracker {run.tracker} is not installed; pip install {run.tracker} or leave it out")
    torch.manual_seed(run.seed)
    return accelerator


def _refuse_another_launch(accelerator: Accelerator, sharded: bool) -> None:
    """Raise UsageError where Accelerate made something else of the launch than was asked for."""
    seen, device = accelerator.num_processes, accelerator.device.type
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != seen:
        raise UsageError(f"{launched} processes were launched but Accelerate sees {seen}")
    # Accelerate's launcher for one process names a master only when it was asked for several.
    if {"MASTER_ADDR", "ACCELERATE_USE_CPU"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "accelerate launch was asked for several processes and started one, as it does on a CPU; "
            "use torchrun --nproc_per_node N instead (or unset MASTER_ADDR if one is meant)"
        )
    if sharded and accelerator.distributed_type != DistributedType.FSDP:
        raise UsageError(
            f"the profile asks for FSDP2, but with {seen} process(es) on {device} Accelerate would run "
            f"{accelerator.distributed_type.value} instead; FSDP2 needs a GPU per process (docs/cluster.md)"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UsageError("the profile asks for FSDP version 1; set fsdp_version: 2, as train/profiles/fsdp2.yaml does")
