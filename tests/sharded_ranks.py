"""Run by test_train_sharded under torchrun: pre-training under FSDP2 on CPUs.

Accelerate shards on GPUs only; told that this launch is such a one, the rest - its wrapping, torch's fully_shard, our
loop and checkpoints - is what runs on a cluster.
"""

import os
import sys
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from encoders.errors import run_command
from train import checkpoint, loop, pair_task, sharding, signals, start, status
from train.config import PretrainConfig, parse


def main() -> None:
    config = parse(PretrainConfig, "", sys.argv[1:])
    start.prepare_folder(config.run)
    accelerator = start.build_accelerator(config.run)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    accelerator.state.fsdp_plugin = sharding.plugin()
    accelerator.state.distributed_type = DistributedType.FSDP
    saved = checkpoint.save

    def checked(*arguments: Any) -> bool:
        expect_shards(task, accelerator)
        return saved(*arguments)

    checkpoint.save = checked
    with signals.StopRequest() as stop, status.status(config.run, accelerator):
        task = pair_task.pretrain(config, accelerator)
        loop.train(task, config.run, config.optim, stop, accelerator)


def expect_shards(task: pair_task.PairTask, accelerator: Accelerator) -> None:
    assert accelerator.num_processes == 2
    parts = [type(part).__name__ for part in task.module.modules() if isinstance(part, FSDPModule)]
    assert len(parts) >= 1 + task.model.config.vision.layers, parts
    for name, parameter in task.module.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.to_local().numel() <= (parameter.numel() + 1) // 2 + parameter[0:1].numel(), name
    print(f"rank {accelerator.process_index}: {len(parts)} parts, every parameter a DTensor")


if __name__ == "__main__":
    run_command(main)
