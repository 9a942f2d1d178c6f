"""Checkpoints in one process: damage is seen, a full disk costs nothing, every random state comes back."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW

from encoders import manifest
from encoders.errors import DataError, UsageError
from train import checkpoint, random_state, training_state
from train.checkpoint import Progress
from train.ledger import Ledger

IDENTITY = {"optim": {"lr": 0.1}, "data_fingerprint": "a"}


class Run:
    """A model with some optimizer state, and where it is saved."""

    def __init__(self, out: Path, width: int = 64):
        torch.manual_seed(0)
        self.out = out
        self.model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 1))
        self.optimizer = AdamW(self.model.parameters(), lr=0.1)
        self.accelerator = Accelerator(cpu=True)
        out.mkdir(exist_ok=True)
        self.ledger = Ledger(out, 1.0, 100, self.accelerator)

    def step(self) -> None:
        self.model(torch.randn(4, self.model[0].in_features)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int, keep: int = 2) -> bool:
        self.ledger.count(4, self.ledger.note(step, [{"bad": [{"id": step, "reason": "no image"}]}]))
        self.ledger.gather()
        return checkpoint.save(
            self.out, step, self.ledger, self.model, self.optimizer, IDENTITY, keep, self.accelerator
        )

    def load(self) -> Progress:
        found = checkpoint.newest_for_all(self.out, self.accelerator)
        assert found is not None
        progress = checkpoint.load(found, self.model, self.optimizer, IDENTITY, self.accelerator)
        self.ledger = Ledger(self.out, 1.0, 100, self.accelerator)
        self.ledger.restore(progress.ledger)
        return progress

    def reported(self) -> list[int]:
        """Steps whose reports the file holds."""
        return [json.loads(line)["step"] for line in (self.out / "bad_samples.jsonl").read_text().splitlines()]

    def weights(self) -> list[torch.Tensor]:
        parameters = list(self.model.parameters())
        state = [value for p in parameters for _, value in sorted(self.optimizer.state[p].items())]
        return [tensor.detach().clone() for tensor in (*parameters, *state)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.step()
    return run


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_what_is_saved_comes_back_with_every_random_state(run: Run) -> None:
    random.gauss(0, 1)
    np.random.standard_normal()  # noqa: NPY002 - leaves half a pair behind, as a state must keep
    assert run.save(1)
    expected = run.weights()

    def draws() -> list[float]:
        numpy = [np.random.standard_normal(), np.random.random()]  # noqa: NPY002
        return [random.gauss(0, 1), random.random(), *numpy, torch.rand(()).item()]

    first = draws()
    run.step()
    other = Run(run.out.parent / "run")  # has no optimizer state yet
    assert other.load() == Progress(1, run.ledger.state())
    assert (other.ledger.seen, other.ledger.bad, dict(other.ledger.by_reason)) == (4, 1, {"no image": 1})
    assert all(a.equal(b) for a, b in zip(expected, other.weights(), strict=True))
    assert draws() == first
    before = random_state.capture()
    draws()
    random_state.restore(before)
    assert all(value.equal(before[name]) for name, value in random_state.capture().items())


def test_another_config_or_other_data_is_refused(run: Run) -> None:
    run.save(1)
    folder = checkpoint.newest(run.out)
    assert folder is not None
    for changed, said in (
        ({**IDENTITY, "optim": {"lr": 0.2}}, "optim.lr: 0.1 -> 0.2"),
        ({**IDENTITY, "data_fingerprint": "b"}, "data_fingerprint: a -> b"),
    ):
        with pytest.raises(UsageError, match=said):
            checkpoint.load(folder, run.model, run.optimizer, changed, run.accelerator)


def test_pruning_keeps_the_newest_and_leftovers_go(run: Run) -> None:
    leftover = run.out / "checkpoints" / ".step-00000009.partial"
    leftover.mkdir(parents=True)
    for step in (1, 2, 3):
        assert run.save(step)
    assert names(run.out) == ["step-00000002", "step-00000003"]


def test_too_little_space_is_told_before_anything_is_written(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.save(1)
    usage = shutil.disk_usage(run.out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    assert not run.save(2)
    said = capsys.readouterr().out
    assert "needs 1.0 MiB but only 1.0 MiB are free" in said
    assert "the last good one is step-00000001" in said
    monkeypatch.undo()
    assert run.save(3)
    assert names(run.out) == ["step-00000001", "step-00000003"]


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """A disk that takes no file above `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def largest_file(out: Path) -> int:
    return max(file.stat().st_size for file in (out / "checkpoints").rglob("*") if file.is_file())


@pytest.mark.parametrize("sixteenth", range(16))
def test_a_full_disk_loses_nothing(sixteenth: int, run: Run) -> None:
    assert run.save(1)
    expected = run.weights()
    run.step()
    with file_size_limit(largest_file(run.out) * sixteenth // 16):
        assert not run.save(2)
    assert names(run.out) == ["step-00000001"]
    assert run.reported() in ([1], [1, 2])
    later = run.weights()
    assert run.load().step == 1
    assert run.reported() == [1]
    assert all(a.equal(b) for a, b in zip(expected, run.weights(), strict=True))
    run.step()
    assert all(a.equal(b) for a, b in zip(later, run.weights(), strict=True))  # the lost step, taken again
    assert run.save(3)
    assert run.load().step == 3
    assert run.reported() == [1, 3]


def test_a_write_that_fails_only_when_it_is_synced_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.save(1)
    real, calls = os.fsync, [0]

    def failing(handle: int) -> None:
        calls[0] += 1
        if calls[0] == failing_at:
            raise OSError(errno.EIO, "as a network disk says it")
        real(handle)

    monkeypatch.setattr(os, "fsync", failing)
    for failing_at in range(1, 8):
        calls[0] = 0
        assert not run.save(2), failing_at
        assert names(run.out) == ["step-00000001"]
    failing_at = 0
    assert run.save(2)


def flip_bit(content: bytes, place: int) -> bytes:
    damaged = bytearray(content)
    damaged[place // 8] ^= 1 << place % 8
    return bytes(damaged)


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit": lambda content, rng: flip_bit(content, rng.randrange(8 * len(content))),
    "cut": lambda content, rng: content[: rng.randrange(len(content))],
}


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ("bit", 12),
        ("cut", 8),
        pytest.param("bit", 200, marks=pytest.mark.slow),
        pytest.param("cut", 100, marks=pytest.mark.slow),
    ],
)
def test_damage_is_found_and_the_checkpoint_before_is_taken(kind: str, places: int, run: Run) -> None:
    assert run.save(1)
    good = run.weights()
    run.step()
    assert run.save(2)
    rng = random.Random(places)
    newest = run.out / "checkpoints" / "step-00000002"
    # By size, so that the places are spread over the checkpoint's bytes; the manifest counts as much as the weights.
    files = sorted(file for file in newest.rglob("*") if file.is_file())
    sizes = [max(file.stat().st_size, 4096) for file in files]
    for file in rng.choices(files, sizes, k=places):
        content, times = file.read_bytes(), file.stat()
        file.write_bytes(DAMAGE[kind](content, rng))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and time must not be trusted
        assert run.load().step == 1, file.name
        assert all(a.equal(b) for a, b in zip(good, run.weights(), strict=True))
        file.write_bytes(content)
    assert run.load().step == 2


def test_when_all_are_damaged_it_says_so(run: Run) -> None:
    assert checkpoint.newest(run.out) is None
    run.save(1)
    (run.out / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="every checkpoint .* is damaged"):
        checkpoint.newest_for_all(run.out, run.accelerator)


def test_hidden_files_are_hashed_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed.checkpoint's index of shards is one, and a pickle."""
    write = training_state.write

    def sharded(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        (folder / "shards").mkdir()
        (folder / "shards" / ".metadata").write_bytes(b"a pickle")

    monkeypatch.setattr(training_state, "write", sharded)
    assert run.save(1)
    assert run.save(2)
    index = run.out / "checkpoints" / "step-00000002" / "shards" / ".metadata"
    for spoil in (lambda: index.write_bytes(b"another!"), index.unlink, lambda: index.write_bytes(b"a pick")):
        spoil()
        assert checkpoint.newest(run.out) == run.out / "checkpoints" / "step-00000001"
    index.write_bytes(b"a pickle")
    assert checkpoint.newest(run.out) == run.out / "checkpoints" / "step-00000002"
    (index.parent / ".more").write_bytes(b"")
    assert checkpoint.newest(run.out) == run.out / "checkpoints" / "step-00000001"


def test_a_checkpoint_that_cannot_be_read_is_passed_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.save(1)
    assert run.save(2)
    verify = manifest.verify

    def failing(folder: Path, full: bool) -> manifest.Manifest:
        if folder.name.endswith("2"):
            raise OSError(errno.EIO, "a bad sector")
        return verify(folder, full=full)

    monkeypatch.setattr(manifest, "verify", failing)
    assert run.load().step == 1


def test_what_is_written_holds_no_pickle(run: Run) -> None:
    run.save(1)
    [folder] = (run.out / "checkpoints").iterdir()
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    assert set(manifest.read(folder).files) == {file.name for file in folder.iterdir()} - {
        "manifest.json",
        checkpoint.SEAL,
    }
