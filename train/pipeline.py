"""Stages in dependency order, each a subprocess that writes one path, skipped while it is up to date.

A stage is up to date when its command, its recipe and the fingerprints of its inputs are those of the last run and its
output is untouched; `work/logs` remembers them and holds what each stage printed.
"""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import FrameType

from encoders import manifest
from encoders.errors import DataError, Preempted, SwapError, UsageError
from train import ranks
from train.config import FREE_RUN_KEYS, load_yaml
from train.signals import SIGNALS

UP_TO_DATE = "up to date"
CONTINUES = "continues"


@dataclass(frozen=True)
class Stage:
    """One command: what decides its result (words, recipe, inputs), the one path it writes, what it waits for."""

    name: str
    command: list[str]
    """Words after the program; paths, options."""
    inputs: list[Path]
    out: Path
    after: list["Stage"] = field(default_factory=list)
    program: tuple[str, ...] = ()
    """Interpreter, launcher and script: they run the stage but do not identify it."""
    recipe: Path | None = None
    """YAML of a training stage, which can then resume."""

    def words(self, state: str) -> list[str]:
        """The command that a stage in this state is run by."""
        return [*self.program, *self.command, *(["--resume"] if state == CONTINUES else [])]


class StageFailed(SwapError):
    """A stage's command did not succeed."""


class Runner:
    """Runs stages in dependency order, `jobs` at a time, and remembers what each was made from."""

    def __init__(self, work: Path, jobs: int):
        self.work, self.jobs = work, jobs
        self.failed = threading.Event()
        self.stopped: signal.Signals | None = None
        self.processes: dict[str, tuple[Stage, int]] = {}  # of the stages at work, by name

    def run(self, stages: Sequence[Stage]) -> int:
        """Returns how many stages had to run. Raises StageFailed naming the first that failed, Preempted if this
        process was asked to stop, UsageError if another one works in the same folder."""
        with self._alone(), self._stoppable():
            ran = self._run(stages)
            if self.stopped is not None:
                raise self._preempted()
            return ran

    def _run(self, stages: Sequence[Stage]) -> int:
        began = time.monotonic()
        done: dict[str, Future[bool]] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            waiting = list(stages)
            while waiting or any(not future.done() for future in done.values()):
                for stage in [s for s in waiting if all(self._finished(done, a) for a in s.after)]:
                    waiting.remove(stage)
                    done[stage.name] = pool.submit(self._stage, stage)
                running = [future for future in done.values() if not future.done()]
                wait(running, timeout=1, return_when=FIRST_EXCEPTION)
                for future in done.values():
                    if future.done() and (error := future.exception()):
                        self.failed.set()
                        raise error
        ran = sum(future.result() for future in done.values())
        print(f"{ran} of {len(stages)} stages ran, in {time.monotonic() - began:.0f} s")
        return ran

    def states(self, stages: Sequence[Stage]) -> dict[str, str]:
        """Of each stage, given after those it waits for: `up to date`, or what a run would do. Changes nothing."""
        found: dict[str, str] = {}
        for stage in stages:
            late = [before.name for before in stage.after if found[before.name] != UP_TO_DATE]
            found[stage.name] = f"after {', '.join(late)}" if late else self._state(stage, stage_key(stage))
        return found

    def log(self, stage: Stage) -> Path:
        """What the stage's command printed."""
        return self.work / "logs" / f"{stage.name}.log"

    @staticmethod
    def _finished(done: dict[str, Future[bool]], stage: Stage) -> bool:
        return stage.name in done and done[stage.name].done() and not done[stage.name].exception()

    def _stage(self, stage: Stage) -> bool:
        """Run a stage unless it is up to date; returns whether it ran."""
        if self.failed.is_set() or self.stopped is not None:
            return False
        key = stage_key(stage)
        state = self._state(stage, key)
        if state == UP_TO_DATE:
            print(f"[{stage.name}] up to date")
            return False
        command = stage.words(state)
        if state != CONTINUES and stage.recipe is not None and stage.out.exists():
            self._set_aside(stage)
        record = self._record(stage)
        record.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_json(record, {"key": key})
        began = time.monotonic()
        print(f"[{stage.name}] starts", flush=True)
        self._execute(stage, command)
        manifest.write_json(record, {"key": key, "fingerprint": manifest.fingerprint(stage.out)})
        print(f"[{stage.name}] done in {time.monotonic() - began:.0f} s", flush=True)
        return True

    def _state(self, stage: Stage, key: str) -> str:
        """What a run would do with a stage whose inputs are there."""
        record = self._record(stage)
        before = json.loads(record.read_text()) if record.is_file() else {}
        if before.get("key") != key:
            return "runs again: its settings or inputs have changed" if before else "runs"
        if "fingerprint" not in before:
            # The same run, interrupted: training can go on, what else there is starts anew.
            return CONTINUES if stage.recipe is not None and stage.out.exists() else "runs: it did not finish"
        return UP_TO_DATE if _untouched(stage.out, before["fingerprint"]) else "runs again: its output was changed"

    def _record(self, stage: Stage) -> Path:
        return self.log(stage).with_suffix(".json")

    def _set_aside(self, stage: Stage) -> None:
        """A run that is out of date may have cost days: it is moved, never deleted."""
        folder = self.work / "old"
        folder.mkdir(exist_ok=True)
        name = stage.name.replace("/", "-")
        old = next(path for n in count(1) if not (path := folder / f"{name}-{n}").exists())
        stage.out.rename(old)
        print(f"[{stage.name}] its settings or inputs have changed; the earlier run is now {old}")

    def _execute(self, stage: Stage, command: list[str]) -> None:
        log = self.log(stage)
        quiet = {**os.environ, "TQDM_DISABLE": "1"}  # bars of libraries would fill the log
        with log.open("w", buffering=1) as stream:  # readable while the stage runs
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=quiet,
                start_new_session=True,  # so that a signal reaches it once, by us, and all that it started
            )
            self.processes[stage.name] = stage, process.pid
            if self.stopped is not None:  # it was, while the process started
                _ask_to_leave(stage, process.pid)
            assert process.stdout is not None
            for line in process.stdout:  # until the last process that it started is gone
                stream.write(line)
                if not line.isspace():
                    print(f"[{stage.name}] {line}", end="", flush=True)
        code = process.wait()
        del self.processes[stage.name]
        if code != 0 and self.stopped is not None:
            raise self._preempted()
        if code != 0:
            raise StageFailed(f"stage {stage.name} ended with code {code}; its output is in {log}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two runs would train into the same folders."""
        file = self.work / "logs" / "lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"another train/swap.py works in {self.work}; wait for it or name another") from error
            yield

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Signals are passed on to the stages, which would else go on for days without us."""
        noted = [number for number in (*SIGNALS, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]  # nohup
        before = {number: signal.signal(number, self._stop) for number in noted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        again, self.stopped = self.stopped is not None, signal.Signals(number)
        if not again and number != signal.SIGHUP:  # with which the terminal went
            os.write(2, b"stopping: the stages at work are asked to leave; a second signal ends them at once\n")
        for stage, leader in list(self.processes.values()):
            if again:
                with suppress(ProcessLookupError):
                    os.killpg(leader, signal.SIGKILL)
            else:
                _ask_to_leave(stage, leader)

    def _preempted(self) -> Preempted:
        assert self.stopped is not None
        return Preempted(
            f"stopped by {self.stopped.name}; run the same command again: finished stages are kept and training goes "
            "on from its last checkpoint"
        )


def _ask_to_leave(stage: Stage, leader: int) -> None:
    """Ranks are asked themselves: launchers lose signals, or kill a rank that still writes its checkpoint."""
    at_work = ranks.read(stage.out) if (stage.out / ranks.RANKS).is_file() else []
    at_work = [rank for rank in at_work if rank.here and rank.alive]
    with suppress(ProcessLookupError):  # it may have just ended
        for rank in at_work:
            os.kill(rank.pid, signal.SIGUSR1)
        if not at_work:
            os.killpg(leader, signal.SIGTERM)


def stage_key(stage: Stage) -> str:
    """Identity of a stage's work: its words, what its recipe says, and the content of everything it reads."""
    recipe = load_yaml(stage.recipe) if stage.recipe is not None else {}
    settings = {name: value for name, value in recipe.get("run", {}).items() if name not in FREE_RUN_KEYS}
    inputs = {str(path): manifest.fingerprint(path) for path in stage.inputs}
    free = tuple(f"--run.{name}=" for name in FREE_RUN_KEYS)
    words = [word for word in stage.command if not word.startswith(free)]
    identity = [words, {**recipe, "run": settings}, inputs]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _untouched(out: Path, fingerprint: str) -> bool:
    """Whether a stage's output is there and is what the stage left."""
    try:
        if out.is_dir():
            return manifest.verify(out).fingerprint == fingerprint
        return manifest.fingerprint(out) == fingerprint
    except DataError:
        return False
