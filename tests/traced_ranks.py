"""Run by test_train_ranks under torchrun: pre-training that notes each rank's sample ids step by step.

traced_ranks.py FOLDER OPTIONS
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from encoders.errors import run_command
from train import loop, pair_task, signals, start, status
from train.config import PretrainConfig, parse


def main() -> None:
    trace = Path(sys.argv[1], f"{os.getpid()}.jsonl")
    config = parse(PretrainConfig, "", sys.argv[2:])
    start.prepare_folder(config.run)
    accelerator = start.build_accelerator(config.run)
    with signals.StopRequest() as stop, status.status(config.run, accelerator):
        task = pair_task.pretrain(config, accelerator)
        step = task.step

        def traced(module: Any, micro_batches: list[dict[str, Any]], accelerator: Any) -> Any:
            with trace.open("a") as stream:
                stream.write(json.dumps([i for batch in micro_batches for i in batch["sample_ids"]]) + "\n")
            return step(module, micro_batches, accelerator)

        task.step = traced
        loop.train(task, config.run, config.optim, stop, accelerator)


if __name__ == "__main__":
    run_command(main)
