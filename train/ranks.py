"""Who the ranks of a run are: `ranks.json` in its folder names each one's host and process, so that a stop can be asked
of them directly and a dead one can be named."""

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from encoders import manifest
from encoders.errors import DataError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

RANKS = "ranks.json"


@dataclass(frozen=True)
class Rank:
    """One process of a run; `started` tells it from a later process with its number."""

    rank: int
    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def here(self) -> bool:
        """Whether it runs, or ran, on this machine."""
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether the process still runs; only this machine's can be asked."""
        return _started(self.pid) == self.started


def register(out: Path, accelerator: "Accelerator") -> list[Rank]:
    """All ranks, also written to `out`. Every rank must call it. Raises UsageError where `out` is not shared, or where
    another run's ranks are still at work on this machine."""
    from accelerate.utils import broadcast_object_list, gather_object  # here: `train.signals` must be quick

    mine = Rank(accelerator.process_index, socket.gethostname(), os.getpid(), _started(os.getpid()) or "")
    ranks: list[Rank] = gather_object([mine])
    before = read(out) if (out / RANKS).is_file() else []
    [others] = broadcast_object_list([[str(rank) for rank in before if rank.here and rank.alive and rank not in ranks]])
    if others:
        raise UsageError(
            f"{' and '.join(others)} still works in {out}; ask it to leave with `python -m train.signals {out}` (a "
            "launcher that was stopped leaves its ranks running)"
        )
    if accelerator.is_main_process:
        manifest.write_json(out / RANKS, [asdict(rank) for rank in ranks])
    accelerator.wait_for_everyone()
    if not (out / RANKS).is_file():
        raise UsageError(f"{mine} does not see what rank 0 wrote to {out}; put run.out where all machines see it")
    return ranks


def _started(pid: int) -> str | None:
    """When a process began, by a count that setting the clock does not change; None if there is none, or a dead one."""
    if not Path("/proc/self/stat").is_file():  # macOS tells only that some process has the number
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        return "unknown"
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None if state in "ZX" else f"{boot} {fields[18]}"  # ticks since the machine came up


def read(out: Path) -> list[Rank]:
    """The ranks that a run's folder names. Raises DataError if it names none."""
    file = out / RANKS
    if not file.is_file():
        raise DataError(f"{file} does not exist: no run has started in {out}")
    return [Rank(**entry) for entry in json.loads(file.read_text())]
