"""What a run says of itself: rows that survive a kill, a status that survives a full disk, one run to a folder."""

import faulthandler
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from encoders.errors import Preempted, UsageError
from train import loop, ranks, status, watchdog
from train.config import RunConfig
from train.tracking import Tracker


def test_a_resume_cuts_off_rows_without_rewriting_the_others(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 8)]
    damaged = [(rows, 5), ([*rows[:2], rows[2][:9]], 2), ([*rows[:4], "\0" * 40], 4), ([], 0)]
    for left, kept in damaged:
        file.write_text("".join(left))
        before = file.stat().st_ino
        with Tracker(tmp_path, "test", 10, 5, Accelerator(cpu=True)):
            assert file.read_text() == "".join(rows[:kept])
        assert file.stat().st_ino == before


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    mine = ranks.register(tmp_path, accelerator)
    assert mine == ranks.read(tmp_path)
    assert mine[0].alive
    assert ranks.register(tmp_path, accelerator) == mine  # itself is no other
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        left = {"rank": 0, "host": mine[0].host, "pid": other.pid, "started": ranks._started(other.pid)}
        (tmp_path / "ranks.json").write_text(json.dumps([left]))
        with pytest.raises(UsageError, match=rf"process {other.pid} .* still works in .*train\.signals"):
            ranks.register(tmp_path, accelerator)
        other.communicate(b"\n")
    assert ranks.register(tmp_path, accelerator) == mine


def test_a_status_that_cannot_be_written_changes_no_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(status.manifest, "write_json", full)
    with pytest.raises(Preempted):
        with status.status(RunConfig(out=tmp_path), Accelerator(cpu=True)):
            raise Preempted("saved")
    assert "the run is preempted (75): saved" in capsys.readouterr().out


def test_a_finished_run_stays_finished_and_the_first_failure_first(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{")  # half written is no status
    status.write_status(tmp_path, "failed", 3, "first", 0)
    status.write_status(tmp_path, "failed", 1, "second", 1)
    assert json.loads((tmp_path / "status.json").read_text())["message"] == "first"
    status.write_status(tmp_path, "finished", 0, "", 0)
    status.write_status(tmp_path, "failed", 1, "is gone", 1)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_the_watchdog_ends_the_process_though_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    dog = watchdog.Watchdog(tmp_path, ranks.register(tmp_path, accelerator), 100, accelerator)

    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        faulthandler.cancel_dump_traceback_later()
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(faulthandler, "dump_traceback", lambda *_, **__: None)
    (tmp_path / "stacks").write_text("no folder can be made here")
    with pytest.raises(Left, match="70"):
        dog._end("stuck", 70)


class Hanging(Dataset[int]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index:
            time.sleep(1000)
        return os.getpid()


def test_a_worker_that_hangs_does_not_keep_the_run_from_leaving() -> None:
    task: Any = SimpleNamespace(dataset=Hanging(), collate=lambda items: {"pid": items[0]})
    order: Any = [[0], [1], [2]]
    batches = loop._batches(task, order, RunConfig(workers=1), torch.device("cpu"))
    worker = next(batches)["pid"]
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 30
    for _ in range(100):
        if ranks._started(worker) is None:
            break
        time.sleep(0.05)
    assert ranks._started(worker) is None
