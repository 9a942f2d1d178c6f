"""FSDP2 on two CPU processes: sharded parameters, whole models where one is looked at, checkpoints that go anywhere."""

from pathlib import Path

import pytest
import torch
from pair_runs import ROOT, accelerate, back_to, finish, options, torchrun, write_pairs
from safetensors.torch import load_file

from encoders import encoder_run

SHARDED = ROOT / "tests" / "sharded_ranks.py"
SETTINGS = ("--run.precision=no", "--run.steps=6", "--run.save_every=3", "--run.eval_every=2", "--run.workers=0")


@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sharded_run_resumes_bit_for_bit(micro_batches: int, tmp_path: Path) -> None:
    shards, out = write_pairs(tmp_path / "pairs"), tmp_path / "fsdp"
    settings = (*SETTINGS, f"--run.micro_batches={micro_batches}")
    sharded = [*torchrun(2, SHARDED), *options(shards, out, *settings)]
    first = finish(sharded)
    assert first.returncode == 0, first.stderr[-3000:]
    assert first.stdout.count("every parameter a DTensor") == 4  # two ranks, two saves
    assert "step 4: val_i2t_r1" in first.stdout
    assert len(list((out / "checkpoints" / "step-00000003" / "shards").glob("*.distcp"))) == 2
    expected = load_file(out / "model.safetensors")
    encoder_run.load(out)
    back_to(out, 3)
    resumed = finish([*sharded, "--resume"])
    assert "after step 3" in resumed.stdout, resumed.stderr[-3000:]
    again = load_file(out / "model.safetensors")
    assert all(again[name].equal(expected[name]) for name in expected)


@pytest.mark.slow
def test_sharded_whole_and_alone_train_the_same_and_read_each_others_checkpoints(tmp_path: Path) -> None:
    shards, fsdp, ddp = write_pairs(tmp_path / "pairs"), tmp_path / "fsdp", tmp_path / "ddp"

    def run(launcher: list[str], out: Path, *more: str) -> dict[str, torch.Tensor]:
        done = finish([*launcher, *options(shards, out, *SETTINGS, "--run.micro_batches=2", *more)])
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("after step 3" in done.stdout) == bool(more)
        return load_file(out / "model.safetensors")

    expected = run(torchrun(2, SHARDED), fsdp)
    found = {"whole": run(torchrun(2), ddp)}
    back_to(fsdp, 3)
    found["alone after sharded"] = run(accelerate(), fsdp, "--resume")
    back_to(ddp, 3)
    found["sharded after whole"] = run(torchrun(2, SHARDED), ddp, "--resume")
    for case, weights in found.items():
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            close = torch.allclose(value, expected[name], rtol=1e-3, atol=1e-3)
            assert close, f"{case}, {name}: {(value - expected[name]).abs().max()}"
