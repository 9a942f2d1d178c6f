"""What a run tells while it runs: a progress bar on a terminal (lines elsewhere), metrics.jsonl always, and by option
an experiment tracker through Accelerate."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 10


def tell(message: str) -> None:
    """Print a line; the disk that takes the output may be full, and that must not end a run."""
    with suppress(OSError):
        print(message, flush=True)


class Tracker:
    """Context manager of one run's reporting; only the main process writes."""

    def __init__(self, out: Path, name: str, steps: int, start: int, accelerator: Accelerator):
        self.accelerator, self.steps, self.start = accelerator, steps, start
        self.main = accelerator.is_main_process
        self.file = out / METRICS
        console = Console()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not (self.main and console.is_terminal),
        )
        self.task = self.bar.add_task(name, total=steps, completed=start, text="")
        self.name, self.terminal = name, console.is_terminal
        self.began = self.printed = time.monotonic()

    def __enter__(self) -> "Tracker":
        if self.main:
            self._drop_rows_after(self.start)
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Record figures after optimizer step `step` (from 1)."""
        if not self.main:
            return
        self._append(json.dumps({"step": step, **metrics}) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(metrics, step=step)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Advance the bar; where there is no terminal print a line now and then."""
        text = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items())
        self.bar.update(self.task, completed=step, text=text)
        now = time.monotonic()
        due = now - self.printed >= SECONDS_BETWEEN_LINES or step == self.steps
        if self.main and not self.terminal and due:
            eta = (now - self.began) / max(step - self.start, 1) * (self.steps - step)
            tell(f"{self.name} {step}/{self.steps}  eta {eta:.0f} s  {text}")
            self.printed = now

    def say(self, message: str) -> None:
        """A line above the bar; nothing for an empty one."""
        if not (self.main and message):
            return
        if self.terminal:
            self.bar.console.print(message, highlight=False, soft_wrap=True)
        else:
            tell(message)

    def _append(self, row: str) -> None:
        """A full disk costs rows of the log, not the run."""
        before = self.file.stat().st_size
        try:
            with self.file.open("a") as stream:
                stream.write(row)
        except OSError as error:
            os.truncate(self.file, before)
            self.say(f"warning: a row of {self.file} could not be written ({error})")

    def sync(self) -> None:
        """Make the rows durable: a checkpoint is about to be written, and later rows only come after it."""
        if self.main:
            with self.file.open("rb") as stream:
                os.fsync(stream.fileno())

    def _drop_rows_after(self, step: int) -> None:
        """Cut off what a killed run wrote after its last checkpoint, as it will be written again."""
        self.file.touch()
        end = 0
        for row in self.file.read_bytes().splitlines(keepends=True):
            if not _complete(row) or json.loads(row)["step"] > step:
                break
            end += len(row)
        os.truncate(self.file, end)


def _complete(row: bytes) -> bool:
    """A power failure leaves half a row, or zeros."""
    return row.startswith(b"{") and row.endswith(b"}\n")


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Clock:
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
