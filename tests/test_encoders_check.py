"""`python -m encoders.data.check`: everything that is wrong is named and counted; a sound set passes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pair_shards import sample, write_shards

from encoders.data import check as check_module
from encoders.data.remote import index_urls
from encoders.data.spec import DataSpec
from encoders.errors import run_command


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command, run in this process; its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
        try:
            run_command(check_module.main)
        except SystemExit as left:
            return int(str(left.code))
        return 0

    return run


def test_a_sound_set_passes_with_its_counts(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 20, shards=3)
    command = [sys.executable, "-m", "encoders.data.check", str(folder), "--out", str(tmp_path / "report.json")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "20 samples in 3 shards; 20 read" in finished.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bad"] == []
    words = [len(sample(i, 40)["long"].split()) for i in range(20)]
    assert report["words"]["long (synthetic)"]["number"] == 20
    assert report["words"]["long (synthetic)"]["mean"] == round(sum(words) / 20, 2)
    assert report["width"]["min"] == report["width"]["max"] == 40
    assert (report["height"]["min"], report["height"]["max"]) == (40, 42)


def test_damage_is_named_and_the_exit_code_tells(
    check: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = write_shards(tmp_path / "shards", 20, shards=2, web={4: ""}, image={6: b"nothing"})
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole.rstrip(b"\0")) - 2000])
    assert check(folder, "--out", tmp_path / "report.json") == 3
    assert "bad: 1 x no web caption" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bad_by_reason"] == {"damaged tar": 1, "no web caption": 1, "undecodable image": 1}
    assert {(bad["shard"], bad["key"]) for bad in report["bad"]} >= {("00000.tar", "00004"), ("00000.tar", "00006")}
    assert report["bad_by_shard"] == {"00000.tar": 2, "00001.tar": 1}
    assert check(folder, "--no-decode", "--every", 2, "--out", tmp_path / "skimmed.json") == 3
    assert json.loads((tmp_path / "skimmed.json").read_text())["width"] == {}
    assert check(folder, "--workers", 2, "--out", tmp_path / "workers.json") == 3
    assert json.loads((tmp_path / "workers.json").read_text()) == report
    assert check(tmp_path / "nowhere") == 3
    assert check(folder, "--mapping", "nonsense") == 2


def test_what_was_read_is_reported_if_a_shard_cannot_be_had(
    check: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "CHUNK", 3)
    folder = write_shards(tmp_path / "shards", 20, shards=2, web={4: ""})
    index_urls([str(folder)], iter).save(tmp_path / "list.npz")
    os.utime(folder / "00001.tar", ns=(1, 1))  # as if it had been written anew
    for workers in (0, 2):
        report = check_module.check(DataSpec(tmp_path / "list.npz"), workers=workers)
        assert (report["samples"], report["read"], report["width"]["number"]) == (20, 10, 9)
        assert [bad["key"] for bad in report["bad"]] == ["00004"]
        assert "00001.tar is not what it was" in report["stopped"]
    assert check(tmp_path / "list.npz", "--out", tmp_path / "report.json") == 3
    assert "report.json tells of the 10 samples read before" in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text()) == report
