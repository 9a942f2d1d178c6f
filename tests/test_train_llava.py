"""Resuming a LLaVA stage: dropout, LoRA and the projector go on exactly as if nothing had happened."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from encoders import manifest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def llava(tiny_llava: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "llava"
    shutil.copytree(tiny_llava, folder)
    (folder / manifest.MANIFEST).unlink(missing_ok=True)
    manifest.seal(folder, "llava", {"encoder": {"path": "x"}})
    return folder


def launch(llava: Path, chats: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    settings = {"run.steps": 5, "run.batch_size": 4, "run.micro_batches": 2, "run.save_every": 3, "run.log_every": 1}
    settings |= {"run.workers": 0, "run.threads": 1, "lora_r": 4, "lora_dropout": 0.3, "optim.lr": 0.01}
    settings |= {"data.chats": chats, "data.images": chats.parent, "llava": llava, "run.out": out}
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train" / "tune_llava.py")]
    command += ["--stage", "lora", *(f"--{name}={value}" for name, value in settings.items()), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_lora_resumes_with_the_same_dropout(llava: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": "red"}]
    entries = [{"id": str(i), "image": "red.png", "conversations": turns} for i in range(9)]
    (tmp_path / "chats.json").write_text(json.dumps(entries))
    out = tmp_path / "lora"
    finished = launch(llava, tmp_path / "chats.json", out)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "first step with a picture: what should train has moved" in finished.stdout
    whole = load_file(out / "adapter" / "adapter_model.safetensors")
    losses = (out / "metrics.jsonl").read_text().splitlines()

    # As a kill after step 4 would have left it: the checkpoint of step 3 and nothing that is written at the end.
    shutil.rmtree(out / "checkpoints" / "step-00000005")
    for path in out.iterdir():
        if path.name not in ("checkpoints", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = launch(llava, tmp_path / "chats.json", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "after step 3" in resumed.stdout
    again = load_file(out / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(whole[name].equal(again[name]) for name in whole)
    rows = [
        [json.loads(line)["loss"] for line in lines]
        for lines in (losses, (out / "metrics.jsonl").read_text().splitlines())
    ]
    assert rows[0] == rows[1]
