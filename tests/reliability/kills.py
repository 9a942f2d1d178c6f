"""SIGKILLs at random moments of runs of all three stages; a resumed run must equal one that nothing stopped."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import write_encoder, write_llm
from pair_runs import ROOT, options, state, torchrun, write_pairs
from PIL import Image

from encoders import manifest

TUNE = ROOT / "train" / "tune_llava.py"
STEPS, SAVE_EVERY = 24, 3


@dataclass(frozen=True)
class Case:
    stage: str
    ranks: int
    workers: int


@dataclass(frozen=True)
class Trial:
    """One run that was killed and resumed."""

    case: Case
    wanted_in_save: bool
    in_save: bool
    """Whether half a checkpoint was left behind."""
    identical: bool
    seconds: float


class World:
    """Data and models of the runs, and the state of each whole run, made once."""

    def __init__(self, work: Path):
        self.work = work
        self.pairs = write_pairs(work / "pairs")
        self.encoder, self.llm = write_encoder(work / "encoder"), write_llm(work / "llm")
        self.chats = _write_chats(work / "chats")
        self.whole: dict[tuple[str, int], dict[str, str]] = {}
        self.llava = work / "llava"
        self._run(self._command(Case("projector", 1, 0), self.llava))

    def expected(self, case: Case) -> dict[str, str]:
        key = case.stage, case.ranks
        if key not in self.whole:
            out = self.work / f"whole-{case.stage}-{case.ranks}"
            self._run(self._command(Case(case.stage, case.ranks, 0), out))
            self.whole[key] = state(out)
        return self.whole[key]

    def kill_and_resume(self, case: Case, in_save: bool, number: int, rng: random.Random) -> Trial:
        expected = self.expected(case)
        out = self.work / f"killed-{number}"
        began = time.monotonic()
        command = self._command(case, out)
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        _wait_for_moment(process, out, in_save, rng)
        _kill_all(process, out)
        half = any((out / "checkpoints").glob(".*.partial"))
        self._run([*command, "--resume"])
        return Trial(case, in_save, half, state(out) == expected, time.monotonic() - began)

    def _command(self, case: Case, out: Path) -> list[str]:
        run = [f"--run.steps={STEPS}", f"--run.save_every={SAVE_EVERY}", f"--run.workers={case.workers}"]
        if case.stage == "pretrain":
            return [*torchrun(case.ranks), *options(self.pairs, out, *run)]
        parts = [f"--llava={self.llava}"]
        if case.stage == "projector":
            parts = [f"--encoder={self.encoder}", f"--llm={self.llm}", "--template=llama3"]
        data = [f"--data.chats={self.chats / 'chats.json'}", f"--data.images={self.chats}"]
        run += ["--run.batch_size=4", "--run.micro_batches=2", "--run.threads=1", "--run.log_every=1"]
        return [*torchrun(case.ranks, TUNE), "--stage", case.stage, *parts, *data, *run, f"--run.out={out}"]

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def trials(work: Path, kills: int, seed: int) -> Iterator[Trial]:
    """`kills` trials over all stages, one and two ranks, none and two workers; two of five are aimed into a save."""
    world, rng = World(work), random.Random(seed)
    cases = [Case(s, r, w) for s in ("pretrain", "projector", "lora") for r in (1, 2) for w in (0, 2)]
    for number in range(kills):
        yield world.kill_and_resume(cases[number % len(cases)], number % 5 < 2, number, rng)


def _wait_for_moment(process: subprocess.Popen[bytes], out: Path, in_save: bool, rng: random.Random) -> None:
    """A random moment after the first checkpoint: within a later save, or anywhere."""
    steps = rng.randrange(SAVE_EVERY + 1, STEPS - SAVE_EVERY)
    while not (out / "metrics.jsonl").is_file() or _steps(out) < steps:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    if not in_save:
        time.sleep(rng.random() * 0.3)
        return
    while not any((out / "checkpoints").glob(".step-*.partial")):
        assert process.poll() is None, "the run ended before it could be killed"
    time.sleep(rng.random() * 0.01)


def _steps(out: Path) -> int:
    return (out / "metrics.jsonl").read_text().count('"loss"')


def _kill_all(process: subprocess.Popen[bytes], out: Path) -> None:
    """Launcher and ranks, which torchrun puts in sessions of their own; the ranks first, as they are what is tested."""
    from train import ranks

    for rank in ranks.read(out):
        if rank.alive:
            os.killpg(rank.pid, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write_chats(folder: Path) -> Path:
    folder.mkdir()
    Image.new("RGB", (40, 40), "red").save(folder / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": "red"}]
    entries = [{"id": str(i), "image": "red.png", "conversations": turns} for i in range(9)]
    manifest.write_json(folder / "chats.json", entries)
    return folder
