"""Ranks that die, get stuck or cannot share the data: the job ends soon, and says which rank and why."""

import json
import math
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pair_runs import ROOT, back_to, finish, options, status, torchrun, write_pairs

from encoders.data.order import StepOrder
from encoders.errors import UsageError
from train import ranks

TROUBLED = ROOT / "tests" / "troubled_ranks.py"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def wait_for_steps(process: subprocess.Popen[str], out: Path, steps: int) -> None:
    metrics = out / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count('"loss"') < steps:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_dead_rank_ends_the_job_and_is_named(victim: int, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*torchrun(2), *options(shards, out, "--run.steps=2000")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_steps(process, out, 3)
    dead = ranks.read(out)[victim]
    os.kill(dead.pid, signal.SIGKILL)
    began = time.monotonic()
    output, _ = process.communicate(timeout=300)
    print(f"ended {time.monotonic() - began:.1f} s after the kill")
    assert process.returncode != 0
    assert status(out)[0] == "failed"
    message = json.loads((out / "status.json").read_text())["message"]
    assert f"rank {victim} (process {dead.pid} on" in message, message
    assert f"rank      : {victim}" in output  # torchrun's own report
    assert not any(rank.alive for rank in ranks.read(out))


@pytest.mark.slow
def test_a_machine_that_falls_silent_is_named_by_the_others(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*torchrun(2, TROUBLED), "far", *options(shards, out, "--run.workers=0")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate(timeout=120)
    assert "on machine-1) has been silent for 4 s" in output, output[-3000:]
    assert status(out) == ("failed", 1)


@pytest.mark.slow
def test_a_stuck_rank_leaves_its_stacks(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stuck = finish([*torchrun(2, TROUBLED), "stuck", *options(shards, out, "--run.workers=0", "--run.hang_limit=15")])
    assert stuck.returncode != 0
    assert "is stuck: waiting for the data of step 5 for more than run.hang_limit, 15 s" in stuck.stderr
    assert "wait_for_a_disk_that_is_gone" in (out / "stacks" / "rank-00001.txt").read_text()
    other = (out / "stacks" / "rank-00000.txt").read_text()
    assert "computing step 5" in other
    assert status(out)[0] == "failed"


def test_three_hundred_set_ups_share_the_data_or_are_refused_with_the_arithmetic() -> None:
    """Whatever the ranks before and after a resume, a step's samples are the same, and each is one rank's."""
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        shards = np.array([rng.randrange(40) for _ in range(rng.randrange(1, 9))])
        worlds = rng.randrange(1, 9), rng.randrange(1, 9)
        micro, steps, seed, window = rng.randrange(1, 4), rng.randrange(1, 12), rng.randrange(5), rng.randrange(1, 90)
        # Two of three are possible, unless the samples do not suffice.
        batch = math.lcm(*worlds) * micro if rng.randrange(3) else rng.randrange(1, 40)
        change = rng.randrange(steps + 1)

        def order(rank: int, world: int) -> StepOrder:
            sizes = {"rank": rank, "world": world, "micro_batches": micro, "window": window}  # noqa: B023
            return StepOrder(shards, batch, steps, seed, **sizes)  # noqa: B023

        try:
            parts = [[order(rank, world) for rank in range(world)] for world in worlds]
        except UsageError as error:
            refused += 1
            impossible = shards.sum() < batch or any(batch % (world * micro) for world in worlds)
            if impossible and str(batch) in str(error):
                continue
            raise
        seen: list[list[tuple[int, int]]] = [[] for _ in range(steps)]
        for phase, (begin, end) in enumerate(((0, change), (change, steps))):
            for part in parts[phase]:
                part.start = begin
                batches = iter(part)
                for step in range(begin, end):
                    for _ in range(micro):
                        seen[step] += next(batches)
        whole = iter(StepOrder(shards, batch, steps, seed, rank=0, world=1, window=window))
        assert all(sorted(step) == sorted(next(whole)) for step in seen)
        drawn = [item for step in seen for item in step]
        assert len(set(drawn)) == len(drawn) == steps * batch  # no sample twice in an epoch
    assert 50 < refused < 250


def test_ranks_and_workers_may_change_across_a_resume(shards: Path, tmp_path: Path) -> None:
    """1 -> 2 ranks, 0 -> 3 workers: every good sample once an epoch, and the spares are those that are listed."""
    out, script = tmp_path / "run", ROOT / "tests" / "traced_ranks.py"
    seen: list[int] = []
    for world, workers, steps in ((1, 0, range(10)), (2, 3, range(10, 15))):
        folder = tmp_path / f"trace-{world}"
        folder.mkdir()
        settings = ("--run.steps=15", "--run.eval_every=0", f"--run.workers={workers}", *["--resume"][: world - 1])
        done = finish([*torchrun(world, script), str(folder), *options(shards, out, *settings)])
        assert done.returncode == 0, done.stderr[-3000:]
        traces = [file.read_text().splitlines() for file in folder.iterdir()]
        assert len(traces) == world
        for trace in traces:
            seen += [i for line in trace[: len(steps)] for i in json.loads(line)]
        if world == 1:
            back_to(out, 10)
    reports = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert [(report["key"], report["epoch"]) for report in reports] == [("00007", epoch) for epoch in range(4)]
    uses = Counter(seen)
    uses.subtract(report["spare_id"] for report in reports)
    bad = {report["id"] for report in reports}
    assert {i: uses[i] for i in range(60)} == {i: 0 if i in bad else 4 for i in range(60)}  # 15 x 16 samples: 4 epochs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "workers", "batch", "said"),
    [
        (1, 0, 60, None),
        (2, 3, 60, None),
        (2, 1, 2, None),
        (2, 0, 15, "batch_size 15 does not divide into 2 rank(s) x 1 micro-batch(es)"),
        (2, 2, 62, "60 training samples are fewer than one batch of 62"),
        (2, 5, 30, None),
    ],
)
def test_set_ups_as_real_launches(
    world: int, workers: int, batch: int, said: str | None, shards: Path, tmp_path: Path
) -> None:
    settings = (f"--run.workers={workers}", f"--run.batch_size={batch}", "--run.steps=3", "--run.eval_every=0")
    done = finish([*torchrun(world), *options(shards, tmp_path / "run", *settings)])
    if said is None:
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert done.returncode != 0
        assert said in done.stderr
