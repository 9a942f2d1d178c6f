"""The harness of docs/reliability.md, whole; its parts run a handful each in test_train_*.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_kills_and_all_resume(tmp_path: Path) -> None:
    page = tmp_path / "reliability.md"
    command = [sys.executable, "tests/reliability", "--kills", "40", "--no-suites", "--out", str(page)]
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert "**40 of 40** runs" in page.read_text()
