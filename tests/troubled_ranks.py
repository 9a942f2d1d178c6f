"""Run by test_train_ranks under torchrun: pre-training in which a rank gets stuck, or machines are far from each other.

troubled_ranks.py stuck|far OPTIONS
"""

import os
import signal
import socket
import sys
import time
from typing import Any

from encoders.errors import run_command
from train import loop, pair_task, signals, start, status, watchdog
from train.config import PretrainConfig, parse

RANK = int(os.environ["RANK"])
TROUBLE_AT = 40  # samples into the run


def main() -> None:
    trouble = sys.argv[1]
    config = parse(PretrainConfig, "", sys.argv[2:])
    if trouble == "far":
        socket.gethostname = lambda: f"machine-{RANK}"
        watchdog.SILENT_AFTER = 4.0
    start.prepare_folder(config.run)
    accelerator = start.build_accelerator(config.run)
    with signals.StopRequest() as stop, status.status(config.run, accelerator):
        task = pair_task.pretrain(config, accelerator)
        if RANK == 1:
            task.dataset = Troubled(task.dataset, trouble)
        loop.train(task, config.run, config.optim, stop, accelerator)


class Troubled:
    """Samples that stop coming: for ever, or because the whole process stops."""

    def __init__(self, samples: Any, trouble: str):
        self.samples, self.trouble, self.asked = samples, trouble, 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: Any) -> Any:
        self.asked += 1
        if self.asked == TROUBLE_AT:
            if self.trouble == "far":
                os.kill(os.getpid(), signal.SIGSTOP)  # as a machine that lost its power
            self.wait_for_a_disk_that_is_gone()
        return self.samples[item]

    def wait_for_a_disk_that_is_gone(self) -> None:
        time.sleep(1000)


if __name__ == "__main__":
    run_command(main)
