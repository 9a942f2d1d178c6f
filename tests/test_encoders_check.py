"""`python -m encoders.data.check`: everything that is wrong is named and counted; a sound set passes."""

import json
import subprocess
import sys
from pathlib import Path

from pair_shards import sample, write_shards


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "encoders.data.check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_sound_set_passes_with_its_counts(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 20, shards=3)
    finished = check(folder, "--out", tmp_path / "report.json")
    assert finished.returncode == 0, finished.stderr
    assert "20 samples in 3 shards; 20 read" in finished.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bad"] == []
    words = [len(sample(i, 40)["long"].split()) for i in range(20)]
    assert report["words"]["long (synthetic)"]["number"] == 20
    assert report["words"]["long (synthetic)"]["mean"] == round(sum(words) / 20, 2)
    assert report["width"]["min"] == report["width"]["max"] == 40
    assert (report["height"]["min"], report["height"]["max"]) == (40, 42)


def test_damage_is_named_and_the_exit_code_tells(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 20, shards=2, web={4: ""}, image={6: b"nothing"})
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole.rstrip(b"\0")) - 2000])
    finished = check(folder, "--out", tmp_path / "report.json")
    assert finished.returncode == 3
    assert "bad: 1 x no web caption" in finished.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bad_by_reason"] == {"damaged tar": 1, "no web caption": 1, "undecodable image": 1}
    assert {(bad["shard"], bad["key"]) for bad in report["bad"]} >= {("00000.tar", "00004"), ("00000.tar", "00006")}
    assert report["bad_by_shard"] == {"00000.tar": 2, "00001.tar": 1}
    skimmed = check(folder, "--no-decode", "--every", 2, "--out", tmp_path / "skimmed.json")
    assert json.loads((tmp_path / "skimmed.json").read_text())["width"] == {}
    assert skimmed.returncode == 3
    assert check(tmp_path / "nowhere").returncode == 3
    assert check(folder, "--mapping", "nonsense").returncode == 2
