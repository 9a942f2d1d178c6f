"""Tiny pre-training runs for tests, through the real command lines, and what two runs must have in common."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from pair_shards import sample, write_shards

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = ROOT / "train" / "pretrain.py"
STEPS, SAVE_EVERY = 24, 5
MODEL = {
    "objective": "clips",
    "embed_dim": 16,
    "vision": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64},
    "text": {"vocab_size": 90, "length": 10, "width": 32, "layers": 1, "heads": 2},
    "captioner": {"tokens": 16, "width": 32, "layers": 1, "heads": 2},
}


def write_pairs(folder: Path) -> Path:
    """Training data with one bad sample, and held-out data."""
    write_shards(folder / "train", 60, image={7: sample(7, 40)["image"][:300]})
    write_shards(folder / "val", 8, shards=1)
    write_shards(folder / "test", 8, shards=1)
    return folder


def options(shards: Path, out: Path, *more: str) -> list[str]:
    """The recipe of a run into `out`, as a file beside it, and further options."""
    config = {
        "run": {"out": str(out), "steps": STEPS, "batch_size": 16, "workers": 1, "threads": 1, "log_every": 1}
        | {"save_every": SAVE_EVERY, "eval_every": 10, "keep": 2},
        "optim": {"lr": 0.01, "warmup_steps": 2, "clip_norm": 1.0},
        "data": {split: str(shards / split) for split in ("train", "val", "test")} | {"max_bad_fraction": 0.2},
        "model": MODEL,
    }
    recipe = out.with_suffix(".yaml")
    recipe.write_text(json.dumps(config))  # JSON is YAML
    return ["--config", str(recipe), *more]


def accelerate(script: Path = PRETRAIN) -> list[str]:
    """One process."""
    return [sys.executable, "-m", "accelerate.commands.launch", str(script)]


def torchrun(ranks: int, script: Path = PRETRAIN) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(script)]


def finish(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run to the end, whatever it is."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def state(out: Path) -> dict[str, str]:
    """sha256 of what must not depend on interruptions: weights, optimizer, ledger and the loss of every step."""
    saved = max((out / "checkpoints").glob("step-*"))
    files = [*out.glob("*.safetensors"), *out.glob("adapter/*.safetensors"), *out.glob("bad_samples.jsonl")]
    files += [saved / name for name in ("model.safetensors", "optimizer.safetensors", "progress.json")]
    found = {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figures = [[row["step"], row["loss"], row["lr"]] for row in rows if "loss" in row]
    return found | {"losses": hashlib.sha256(json.dumps(figures).encode()).hexdigest()}


def status(out: Path) -> tuple[str, int | None]:
    content = json.loads((out / "status.json").read_text())
    return content["state"], content["code"]


def back_to(out: Path, step: int) -> None:
    """As a kill after checkpoint `step` would have left it."""
    for checkpoint in (out / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            for file in sorted(checkpoint.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            checkpoint.rmdir()
    (out / "manifest.json").unlink()
    (out / "model.safetensors").unlink()
