"""Ends a job that cannot go on: a rank that is gone is named within a minute, a stuck one leaves its threads' stacks.

Each rank runs one thread. It looks for the processes of its own machine, and through a store of its own for the
heartbeats of all others. The process group's timeout (train/start.py) stands behind it.
"""

import faulthandler
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from train.ranks import Rank
from train.status import write_status

STACKS = "stacks"
LOOK_EVERY = 2.0
SILENT_AFTER = 45.0
"""Seconds without a heartbeat from another machine: long enough for a busy interpreter, short enough for one minute."""
EXIT_GONE, EXIT_STUCK = 1, 70
GRACE = 20.0


class Watchdog:
    """Context manager around training. Call `beat` whenever something was finished, saying what comes next."""

    def __init__(self, out: Path, ranks: list[Rank], limit: float, accelerator: Accelerator):
        self.out, self.limit = out, limit
        self.me = ranks[accelerator.process_index]
        # A container may hide its neighbours' processes: watch only what can be seen.
        self.neighbours = [rank for rank in ranks if rank != self.me and rank.here and rank.alive]
        far = [rank for rank in ranks if not rank.here]
        self.heartbeats = _Heartbeats(self.me, far, accelerator) if _several_hosts(ranks) else None
        self.over = threading.Event()
        self.beat("starting")

    def beat(self, doing: str) -> None:
        """Work goes on; `doing` is what the rank will be found doing should it get stuck."""
        self.last, self.doing = time.monotonic(), doing
        # Behind this class' own thread, which a main thread stuck in C code may keep from running.
        faulthandler.dump_traceback_later(self.limit + GRACE, exit=True)

    def gone(self) -> str:
        """The ranks known to be gone, in words; empty if there are none."""
        gone = [str(rank) for rank in self.neighbours if not rank.alive]
        return f"{' and '.join(gone)} is gone" if gone else self.heartbeats.silent() if self.heartbeats else ""

    def __enter__(self) -> "Watchdog":
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self.over.wait(min(LOOK_EVERY, self.limit / 4)):
            idle = time.monotonic() - self.last
            if idle > self.limit:
                what = f"{self.me} is stuck: {self.doing} for more than run.hang_limit, {self.limit:.0f} s"
                self._end(what, EXIT_STUCK)
            # One that merely finished first is not missed: this rank is about to finish too.
            if (lost := self.gone()) and not self.over.wait(LOOK_EVERY):
                self._end(f"{lost}; {self.me} was {self.doing}", EXIT_GONE)

    def _end(self, what: str, code: int) -> None:
        file = self.out / STACKS / f"rank-{self.me.rank:05d}.txt"
        message = f"{what}; its stacks are in {file}; go on from the last checkpoint with --resume"
        faulthandler.dump_traceback_later(GRACE, exit=True)  # the disk may hang as well
        try:
            print(f"error: {message}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            file.parent.mkdir(exist_ok=True)
            with file.open("w") as stream:
                stream.write(what + "\n")
                stream.flush()
                faulthandler.dump_traceback(stream, all_threads=True)
            write_status(self.out, "failed", code, message, self.me.rank)
        finally:
            os._exit(code)  # the main thread sits in a call that no exception reaches


class _Heartbeats:
    """Signs of life between machines, in a store that rank 0 serves."""

    def __init__(self, me: Rank, far: list[Rank], accelerator: Accelerator):
        self.me, self.far = me, far
        main = accelerator.is_main_process
        address = os.environ["MASTER_ADDR"]
        patience = timedelta(seconds=SILENT_AFTER / 3)
        if main:
            self.store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience)
        [port] = broadcast_object_list([self.store.port if main else None])
        if not main:
            self.store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
        self.seen = {rank.rank: (b"", time.monotonic()) for rank in far}
        self.count = 0
        self._send()
        accelerator.wait_for_everyone()  # so that every key is there before it is read

    def _send(self) -> None:
        self.count += 1
        self.store.set(f"{self.me.rank}", f"{self.count}")

    def silent(self) -> str:
        """Send a sign of life; the first far rank that has sent none for too long, in words."""
        try:
            self._send()
            beats = self.store.multi_get([f"{rank.rank}" for rank in self.far])
            for rank, beat in zip(self.far, beats, strict=True):
                if beat != self.seen[rank.rank][0]:
                    self.seen[rank.rank] = (beat, time.monotonic())
        except dist.DistError as error:
            return f"rank 0, which serves the heartbeats, does not answer ({error})"
        for rank in self.far:
            if time.monotonic() - self.seen[rank.rank][1] > SILENT_AFTER:
                return f"{rank} has been silent for {SILENT_AFTER:.0f} s"
        return ""


def _several_hosts(ranks: list[Rank]) -> bool:
    return len({rank.host for rank in ranks}) > 1
