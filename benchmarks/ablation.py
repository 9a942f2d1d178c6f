"""The papers' ablations in the small: every arm on equal samples of the embedded world, scored on unseen scenes.

    python benchmarks/ablation.py [--seeds 0 1 2] [--arms dreamlip_raw ...] [--jobs 2] [--val]

Each (arm, seed) is kept as a line of benchmarks/ablation_PROFILE.jsonl, so a stopped or repeated call only adds what is
missing; ablation_table.py writes docs/results.md from it. --val scores the validation scenes instead, for choosing
settings, and keeps nothing. With a GPU the profile is a ViT-S/16 at 112 px on 100,000 scenes held on the device;
without one it is tiny.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation_arms import ARMS, PROFILES, Profile, kept_results, results_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from encoders import manifest, objectives
from encoders.config import EncoderConfig
from encoders.data.order import StepOrder
from encoders.data.pairs import collate, decode_sample
from encoders.data.scenes.__main__ import write_scenes
from encoders.data.shards import TarSamples
from encoders.data.tokenizers import CaptionTokenizer
from encoders.data.transforms import eval_transform
from encoders.objective import Objective
from eval.zero_shot.scorer import open_sets
from eval.zero_shot.spec import ZeroShotSpec
from train.config import OptimConfig
from train.optim import build, decay_groups, set_learning_rate

KERNELS = {"cpu": [SDPBackend.MATH], "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]}


@dataclass
class Scenes:
    """The training scenes in memory: samples for their captions, pictures as uint8 (n,3,H,H) on the device."""

    samples: TarSamples
    images: Tensor


class TextDraws(Dataset[dict[str, Any]]):
    """(epoch, sample id) -> the objective's texts; `images` is the id, looked up on the device."""

    def __init__(self, samples: TarSamples, config: EncoderConfig, tokenizer: CaptionTokenizer, seed: int):
        self.samples = [samples[index] for index in range(len(samples))]
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.texts = objectives.OBJECTIVES[config.objective].texts

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        epoch, index = item
        rng = np.random.default_rng([self.seed, epoch, index])
        texts = self.texts(self.samples[index], self.tokenizer, self.config, rng)
        return {"images": torch.tensor(index), "sample_id": index, "bad": [], **texts}


def main() -> None:
    options = parse_options()
    profile = PROFILES["gpu" if torch.cuda.is_available() else "cpu"]
    scenes = options.work / "scenes"
    if not (scenes / manifest.MANIFEST).is_file():
        write_scenes(scenes, profile.scenes)
    elif manifest.read(scenes, "scenes").config != asdict(profile.scenes):
        raise SystemExit(f"{scenes} holds other scenes than profile {profile.name} asks for; remove it or use --work")
    wanted = [(arm, seed) for seed in options.seeds for arm in options.arms]
    done = {(result["arm"], result["seed"]) for result in kept_results(profile.name)}
    missing = [one for one in wanted if options.val or one not in done]
    if options.val or len(missing) <= 1 or options.jobs == 1:
        run_arms(missing, options, profile)
    else:
        run_side_by_side(missing, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="arms side by side, one thread each")
    parser.add_argument("--val", action="store_true", help="score the validation scenes and keep nothing")
    parser.add_argument("--lr", type=float, help="with --val: another peak learning rate")
    parser.add_argument("--steps", type=int, help="with --val: another number of steps")
    return parser.parse_args()


def run_arms(wanted: list[tuple[str, int]], options: argparse.Namespace, profile: Profile) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    scenes = options.work / "scenes"
    data = load_scenes(scenes / "shards" / "train", profile, device)
    for arm, seed in wanted:
        result = train_and_score(arm, seed, data, scenes, profile, device, options)
        print(f"{arm}, seed {seed}: " + "  ".join(f"{k} {v:.4g}" for k, v in result["metrics"].items()), flush=True)
        if not options.val:
            with results_file(profile.name).open("a") as stream:
                stream.write(json.dumps(result) + "\n")


def run_side_by_side(missing: list[tuple[str, int]], options: argparse.Namespace) -> None:
    """One process per arm and seed: a thread each is faster than all threads on one after the other."""

    def run(one: tuple[str, int]) -> None:
        arm, seed = one
        command = [sys.executable, __file__, "--work", str(options.work), "--arms", arm, "--seeds", str(seed)]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, missing))


def train_and_score(
    arm: str,
    seed: int,
    data: Scenes,
    scenes: Path,
    profile: Profile,
    device: torch.device,
    options: argparse.Namespace,
) -> dict[str, Any]:
    began, cpu_began = time.monotonic(), time.process_time()
    config = profile.config(arm)
    tokenizer = CaptionTokenizer.train(all_captions(data.samples), config.text.vocab_size, config.text.kind)
    torch.manual_seed(seed)
    model = objectives.build(config).to(device)
    steps = options.steps or profile.steps
    losses = train(model, tokenizer, data, seed, steps, options.lr or profile.lr, profile, device)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
    split = "val" if options.val else "test"
    tasks = ("retrieval", "classification", "segmentation")
    sets = open_sets([ZeroShotSpec(task, "scenes", str(scenes), name=task, split=split) for task in tasks])
    scores = {one.name: one.score(model, tokenizer, device, 250) for one in sets}
    metrics = {
        "i2t_r1": scores["retrieval"]["i2t_r1"],
        "t2i_r1": scores["retrieval"]["t2i_r1"],
        "accuracy": scores["classification"]["top1"],
        "miou": scores["segmentation"]["miou"],
    }
    return {
        **profile.identity(arm, seed),
        "metrics": metrics,
        "chance": {"i2t_r1": scores["retrieval"]["chance_r1"]},
        "last_loss": sum(losses[-10:]) / 10,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu, 1 thread",
        "torch": torch.__version__,
    }


def train(
    model: Objective,
    tokenizer: CaptionTokenizer,
    data: Scenes,
    seed: int,
    steps: int,
    lr: float,
    profile: Profile,
    device: torch.device,
) -> list[float]:
    """Train on `steps` batches; returns the loss of each."""
    order = StepOrder(len(data.samples), profile.batch_size, steps, seed, rank=0, world=1)
    draws = TextDraws(data.samples, model.config, tokenizer, seed)
    optim = OptimConfig(lr=lr, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.2)
    optimizer = build(decay_groups(model, optim.weight_decay), optim)
    losses = []
    for step, batch in enumerate(batches(draws, order, profile.workers)):
        batch = {name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for name, x in batch.items()}
        batch["images"] = data.images[batch["images"]]  # ids -> uint8 (B,3,H,H)
        set_learning_rate(optimizer, step, steps, profile.warmup)
        # On CPUs the fused attention kernel is the slowest part of a step at these lengths.
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(KERNELS[device.type]):
            loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def batches(draws: TextDraws, order: StepOrder, workers: int) -> Iterator[dict[str, Any]]:
    yield from DataLoader(
        draws, batch_sampler=order, collate_fn=lambda examples: collate(examples, draws.config), num_workers=workers
    )


def load_scenes(folder: Path, profile: Profile, device: torch.device) -> Scenes:
    samples, size = TarSamples(folder), profile.scenes.image_size
    preprocess = profile.config(next(iter(ARMS))).preprocess
    pictures = (eval_transform(decode_sample(samples[i]), size, preprocess) for i in range(len(samples)))
    return Scenes(samples, torch.stack(list(pictures)).to(device))


def all_captions(samples: TarSamples) -> Iterator[str]:
    for index in range(0, len(samples), max(len(samples) // 20_000, 1)):
        sample = samples[index]
        yield from (sample.web, *sample.short.values(), *sample.long.values())


if __name__ == "__main__":
    main()
