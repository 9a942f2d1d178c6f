"""Asked to stop: the run saves within a step, says so, leaves with 75, and goes on as if it had not been asked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pair_runs import ROOT, STEPS, accelerate, finish, options, state, status, torchrun, write_pairs

from train import ranks
from train.signals import StopRequest

LATE_SAVE = ("--run.save_every=100000",)  # so that a checkpoint before the end is the signal's


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def steps_logged(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.is_file() else 0


def start_and_wait(command: list[str], out: Path, steps: int) -> subprocess.Popen[str]:
    """A run that has taken some steps."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while steps_logged(out) < steps:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    return process


def saved_step(out: Path) -> int:
    [checkpoint] = (out / "checkpoints").glob("step-*")
    return int(checkpoint.name.removeprefix("step-"))


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGUSR1, signal.SIGINT))],
    ids=lambda number: number.name,
)
def test_one_process_saves_within_a_step_and_exits_75(number: signal.Signals, shards: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    command = [sys.executable, str(ROOT / "train" / "pretrain.py"), *options(shards, out, *LATE_SAVE)]
    process = start_and_wait(command, out, 6)
    process.send_signal(number)
    seen = steps_logged(out)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output[-3000:]
    assert status(out) == ("preempted", 75)
    assert seen <= saved_step(out) <= seen + 2  # the step in progress, and one logged while the signal travelled
    assert not (out / "manifest.json").exists()
    resumed = finish([*command, "--resume"])
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert status(out) == ("finished", 0)
    assert finish([*accelerate(), *options(shards, whole, *LATE_SAVE)]).returncode == 0
    assert state(out) == state(whole)


def test_all_ranks_leave_together_when_one_is_asked(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start_and_wait([*torchrun(2), *options(shards, out, *LATE_SAVE)], out, 4)
    asked = ranks.read(out)[1]
    os.kill(asked.pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1  # whatever the ranks say, torchrun says 1
    assert status(out) == ("preempted", 75)
    assert output.count("was asked to stop") >= 2, output[-3000:]
    assert not any(rank.alive for rank in ranks.read(out))
    assert 4 <= saved_step(out) < STEPS


def test_a_command_asks_the_ranks_of_a_run(shards: Path, tmp_path: Path) -> None:
    """As the SLURM script does: accelerate's launcher would not pass the signal on."""
    out = tmp_path / "run"
    process = start_and_wait([*accelerate(), *options(shards, out, "--run.steps=100000", *LATE_SAVE)], out, 4)
    asked = finish([sys.executable, "-m", "train.signals", str(out)])
    assert "asked 1 rank(s)" in asked.stdout, asked.stderr
    process.communicate(timeout=300)
    assert status(out) == ("preempted", 75)
    again = finish([sys.executable, "-m", "train.signals", str(out)])
    assert again.returncode == 3
    assert "runs on this machine" in again.stderr
    nothing = finish([sys.executable, "-m", "train.signals", str(tmp_path)])
    assert nothing.returncode == 3


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """A cluster of this machine: srun runs its command here, scontrol notes what it is asked."""
    tools = tmp_path / "bin"
    tools.mkdir()
    strip = 'while [ "${1#--}" != "$1" ]; do shift; done\nSLURM_NODEID=0 exec "$@"\n'
    (tools / "srun").write_text(f"#!/bin/bash\n{strip}")
    log = tmp_path / "scontrol.log"
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {log}\n[ "$1" = show ] && echo localhost\ntrue\n')
    for tool in ("srun", "scontrol"):
        (tools / tool).chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "log": str(log)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        {"LAUNCHER": "accelerate", "PROFILE": "cpu", "SLURM_GPUS_ON_NODE": "1", "PORT": "29611"},
        {"LAUNCHER": "torchrun", "SLURM_GPUS_ON_NODE": "2", "PORT": "29612"},
    ],
    ids=lambda launcher: launcher["LAUNCHER"],
)
def test_the_slurm_script_queues_a_preempted_run_again(
    launcher: dict[str, str], slurm: dict[str, str], shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = options(shards, out, "--run.steps=300", *LATE_SAVE)
    script = ["bash", "train/profiles/slurm.sh", str(out), "train/pretrain.py", *settings]
    env = slurm | launcher
    process = subprocess.Popen(script, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while steps_logged(out) < 4:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert "the run is preempted" in output, output[-3000:]
    assert "requeue 7" in Path(slurm["log"]).read_text()
    second = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-2000:]
    assert "the run is finished" in second.stdout
    assert Path(slurm["log"]).read_text().count("requeue") == 1


def test_a_second_ctrl_c_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.noted == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_status_of_a_failed_run_names_the_first_failure(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    failed = finish([*accelerate(), *options(shards, out, "--data.max_bad_fraction=0", "--run.save_every=0")])
    assert failed.returncode == 1
    content = json.loads((out / "status.json").read_text())
    assert (content["state"], content["code"]) == ("failed", 3)
    assert "samples are bad" in content["message"]
