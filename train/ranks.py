"""Who the ranks of a run are: `ranks.json` in its folder names each one's host and process, so that a stop can be asked
of them directly and a dead one can be named."""

import json
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from encoders import manifest
from encoders.errors import DataError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

RANKS = "ranks.json"


@dataclass(frozen=True)
class Rank:
    """One process of a run; `started` (seconds since the epoch) tells it from a later process with its number."""

    rank: int
    host: str
    pid: int
    started: float

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def here(self) -> bool:
        """Whether it runs, or ran, on this machine."""
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether the process still runs; only this machine's can be asked."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def register(out: Path, accelerator: "Accelerator") -> list[Rank]:
    """All ranks, also written to `out`. Every rank must call it. Raises UsageError where `out` is not shared."""
    from accelerate.utils import gather_object  # here: `train.signals` must be quick

    me = psutil.Process()
    mine = Rank(accelerator.process_index, socket.gethostname(), me.pid, me.create_time())
    ranks: list[Rank] = gather_object([mine])
    if accelerator.is_main_process:
        manifest.write_json(out / RANKS, [asdict(rank) for rank in ranks])
    accelerator.wait_for_everyone()
    if not (out / RANKS).is_file():
        raise UsageError(f"{mine} does not see what rank 0 wrote to {out}; put run.out where all machines see it")
    return ranks


def read(out: Path) -> list[Rank]:
    """The ranks that a run's folder names. Raises DataError if it names none."""
    file = out / RANKS
    if not file.is_file():
        raise DataError(f"{file} does not exist: no run has started in {out}")
    return [Rank(**entry) for entry in json.loads(file.read_text())]
