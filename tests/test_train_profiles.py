"""The shipped Accelerate profiles are understood as meant, and one that would be run as something else is refused."""

import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from pair_runs import PRETRAIN, ROOT, finish, options, write_pairs

PROFILES = sorted((ROOT / "train" / "profiles").glob("*.yaml"))
KIND = {"cpu": "NO", "gpu": "NO", "ddp": "MULTI_GPU", "ddp_nodes": "MULTI_GPU", "fsdp2": "FSDP", "fsdp2_nodes": "FSDP"}


def test_all_six_are_there() -> None:
    assert {profile.stem for profile in PROFILES} == KIND.keys()


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_accelerate_reads_a_profile_as_meant(profile: Path) -> None:
    config = load_config_from_file(str(profile))  # raises for keys that it does not know
    assert config.distributed_type.value == KIND[profile.stem]
    assert (config.num_machines > 1) == profile.stem.endswith("_nodes")
    assert (config.num_processes > 1) == (KIND[profile.stem] != "NO")
    assert config.use_cpu == (profile.stem == "cpu")
    arguments = launch_command_parser().parse_args(["--config_file", str(profile), "train/pretrain.py"])
    launched, _, _ = _validate_launch_command(arguments)
    assert launched.use_fsdp == ("fsdp2" in profile.stem)
    assert launched.multi_gpu == ("ddp" in profile.stem)
    if launched.use_fsdp:
        assert launched.fsdp_version == 2
        given = yaml.safe_load(profile.read_text())["fsdp_config"]
        assert all(hasattr(arguments, key) for key in given)  # a misspelt one would be ignored


def test_fsdp_on_a_cpu_is_refused_and_not_run_as_ddp(tmp_path: Path) -> None:
    profile = str(ROOT / "train" / "profiles" / "fsdp2.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", profile, "--num_processes", "2"]
    refused = finish([*launch, str(PRETRAIN), *options(write_pairs(tmp_path / "pairs"), tmp_path / "run")])
    assert refused.returncode != 0
    assert "the profile asks for FSDP2, but with 2 process(es) on cpu" in refused.stderr


def test_several_processes_on_a_cpu_are_not_quietly_one(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    refused = finish([*launch, str(PRETRAIN), *options(write_pairs(tmp_path / "pairs"), tmp_path / "run")])
    assert refused.returncode != 0
    assert "use torchrun --nproc_per_node" in refused.stderr
