"""The loop through its real command line: a kill at any step costs nothing but the steps since the last checkpoint."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from pair_runs import ROOT, SAVE_EVERY, STEPS, accelerate, finish, options, state, torchrun, write_pairs
from safetensors.torch import load_file

from encoders import encoder_run, manifest
from encoders.data.tokenizers import CaptionTokenizer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def command(shards: Path, out: Path, *more: str) -> list[str]:
    return [*accelerate(), *options(shards, out, *more)]


def launch(shards: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return finish(command(shards, out, *more))


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    finished = launch(shards, out)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return out


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_is_an_artifact_with_its_figures(uninterrupted: Path) -> None:
    artifact = manifest.verify(uninterrupted, full=True)
    assert artifact.kind == "encoder-run"
    assert artifact.metrics["retrieval"]["queries"] == 8
    assert artifact.metrics["samples_seen"] == STEPS * 16
    assert sum(artifact.metrics["bad_samples"].values()) > 0
    assert json.loads((uninterrupted / "status.json").read_text())["state"] == "finished"
    losses = [row["loss"] for row in rows(uninterrupted) if "loss" in row]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert any("val_i2t_r1" in row for row in rows(uninterrupted))
    assert [p.name for p in sorted((uninterrupted / "checkpoints").iterdir())] == ["step-00000020", "step-00000024"]
    model, _ = encoder_run.load(uninterrupted)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_sigkill_at_a_random_step_and_resume_is_bit_for_bit_the_same(
    shards: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    step = random.SystemRandom().randrange(SAVE_EVERY + 1, STEPS)
    print(f"killing after step {step}")
    process = subprocess.Popen(
        command(shards, out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    metrics = out / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count('"loss"') < step:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()

    refused = launch(shards, out)
    assert refused.returncode != 0
    assert "pass --resume" in refused.stderr
    other = launch(shards, out, "--resume", "--optim.lr", "0.02")
    assert "the config has changed: optim.lr: 0.01 -> 0.02" in other.stderr

    resumed = launch(shards, out, "--resume", "--run.workers", "0")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming" in resumed.stdout
    whole, mended = (load_file(folder / "model.safetensors") for folder in (uninterrupted, out))
    assert whole.keys() == mended.keys()
    assert all(whole[name].equal(mended[name]) for name in whole)
    figures = ("step", "loss", "lr", "bad")
    assert [[row.get(f) for f in figures] for row in rows(out)] == [
        [row.get(f) for f in figures] for row in rows(uninterrupted)
    ]
    first, second = (manifest.read(folder).metrics for folder in (uninterrupted, out))
    assert first == second
    assert state(out) == state(uninterrupted)
    again = launch(shards, out, "--resume")
    assert "already finished; nothing to do" in again.stdout
    other = launch(shards, out, "--resume", "--optim.lr", "0.02")
    assert "the config has changed: optim.lr: 0.01 -> 0.02" in other.stderr


def test_two_ranks_are_one_run(shards: Path, tmp_path: Path) -> None:
    finished = finish([*torchrun(2), *options(shards, tmp_path / "run", "--run.steps", "3")])
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert manifest.read(tmp_path / "run").metrics["samples_seen"] == 3 * 16
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    assert len(list(saved.glob("random-*.safetensors"))) == 2


def test_a_loss_that_is_not_finite_stops_every_rank_before_the_update(shards: Path, tmp_path: Path) -> None:
    settings = ("--run.steps", "4", "--run.save_every", "1", "--optim.lr", "1e30", "--optim.warmup_steps", "0")
    finished = finish([*torchrun(2), *options(shards, tmp_path / "run", *settings)])
    assert finished.returncode != 0
    written = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert [rank["rank"] for rank in written["ranks"]] == [0, 1]
    ids = [i for rank in written["ranks"] for i in rank["sample_ids"]]
    assert len(ids) == len(set(ids)) == 16
    saved = [int(folder.name[-8:]) for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert max(saved) == written["step"] - 1  # nothing was updated, let alone saved, after it
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 4)


def test_what_cannot_be_trained_is_refused_before_it_starts(shards: Path, tmp_path: Path) -> None:
    vocabulary = launch(shards, tmp_path / "a", "--model.text.vocab_size", "20")
    assert "below the" in vocabulary.stderr
    batch = launch(shards, tmp_path / "b", "--run.batch_size", "5", "--run.micro_batches", "4")
    assert "batch_size 5 does not divide into 1 rank(s) x 4 micro-batch(es)" in batch.stderr
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    CaptionTokenizer.train(["a red square " * 3], 60, "bert").save(tokenizer)
    ids = launch(shards, tmp_path / "c", "--model.text.tokenizer", str(tokenizer), "--model.text.vocab_size", "12")
    assert "but model.text.vocab_size is 12" in ids.stderr
