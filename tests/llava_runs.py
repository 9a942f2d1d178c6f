"""Tiny LLaVA runs for tests, in float32, in this process or (run by torchrun with a settings file) in several."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from PIL import Image

from encoders import manifest
from llava_adapter.save import load_llava
from train import llava_task, loop, sharding, signals, start
from train.config import LlavaConfig, OptimConfig, RunConfig

CONVERSATIONS, BATCH, STEPS = 12, 4, 6


def write_chats(folder: Path, captions: bool = False) -> Path:
    """Conversations of several lengths: some without a picture, one with two; or one caption for each picture."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = torch.Generator().manual_seed(0)
    entries = []
    for i in range(CONVERSATIONS):
        pixels = torch.randint(0, 255, (2, 40, 50, 3), generator=noise, dtype=torch.uint8).numpy()
        images = 1 if captions else (1, 0, 2, 1, 0, 1)[i % 6]
        names = [f"{i}-{n}.png" for n in range(images)]
        for name, picture in zip(names, pixels, strict=False):
            Image.fromarray(picture).save(folder / name)
        turns = [{"from": "human", "value": "<image>\n" * images + "What colour is it?" + " the" * (i % 5)}]
        turns += [{"from": "gpt", "value": ("red", "a blue dog and a cat", "no")[i % 3]}]
        if not captions and i % 4 == 1:
            turns += [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "yes"}]
        pictures: dict[str, Any] = {0: {}, 1: {"image": names[:1][0] if names else None}, 2: {"image": names}}[images]
        entries.append({"id": str(i), "conversations": turns, **pictures})
    file = folder / "chats.json"
    file.write_text(json.dumps(entries))
    return file


def sealed(llava: Path, folder: Path) -> Path:
    """A copy of a LLaVA folder, with a manifest as stage projector would write it."""
    shutil.copytree(llava, folder)
    manifest.seal(folder, "llava", {"encoder": {"path": "x", "fingerprint": "0"}, "llm": {"fingerprint": "0"}})
    return folder


def config(stage: str, out: Path, chats: Path, sources: dict[str, Path], **settings: Any) -> LlavaConfig:
    """A run of six steps of four conversations; `settings` with a dot go into the section before it."""
    base = LlavaConfig(stage=stage, lora_r=4, lora_alpha=8, lora_dropout=0.0, **sources)  # type: ignore[arg-type]
    run = RunConfig(
        out=out, steps=STEPS, batch_size=BATCH, workers=0, threads=1, log_every=1, save_every=2, precision="no", keep=9
    )
    data = replace(base.data, chats=chats, images=chats.parent, max_length=256)
    base = replace(base, run=run, optim=OptimConfig(lr=1e-3, weight_decay=0.0), data=data, projector_lr=1e-3)
    for name, value in settings.items():
        section, _, key = name.rpartition(".")
        changed = replace(getattr(base, section), **{key: value}) if section else value
        base = replace(base, **{section or key: changed})
    return base


def train(config: LlavaConfig, float32: bool = True, sharded: bool = False) -> list[float]:
    """Run to the end; the loss of every step. In float32, results can be compared beyond bfloat16's three digits."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config.run.out.mkdir(parents=True, exist_ok=True)
    accelerator = start.build_accelerator(config.run)
    if sharded:
        # Accelerate shards on GPUs only; told that this launch is such a one, the rest is what runs on a cluster.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
        accelerator.state.fsdp_plugin = sharding.plugin()
        accelerator.state.distributed_type = DistributedType.FSDP
    if float32 and config.llava is not None:
        model, processor = load_llava(config.llava, torch.float32)
        origin = manifest.read(config.llava, "llava").config
        chats = llava_task.Sets.read(config, processor, "llama3")
        task = llava_task.LlavaTask(config, origin, model, processor, chats, {"llava": config.llava})
    else:
        task = llava_task.build(config)
    with signals.StopRequest() as stop:
        loop.train(task, config.run, config.optim, stop, accelerator)
    return losses(config.run.out)


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    paths = {name: Path(value) for name, value in asked["sources"].items()}
    settings = config(asked["stage"], Path(asked["out"]), Path(asked["chats"]), paths, **asked["settings"])
    train(settings, asked["float32"], asked["sharded"])
