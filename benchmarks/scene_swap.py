"""Does a trained tower make a better LLaVA than a random one? Both stages around SmolLM2 on the embedded world.

    python benchmarks/scene_swap.py [--work runs/scene_swap] [--jobs 2] [--seed 0]

Two arms that differ in the tower's weights alone: trained the CLIPS way on captions of 200 classes, or as initialised.
Held-out loss before, between and after the stages; then lmms-eval's own GQA and POPE tasks on unseen scenes. Every
stage is kept and resumed below --work as train/swap.py keeps its own; --jobs 2 trains the arms side by side. Takes a
GPU where one is at hand. Writes docs/results_llava.md, which ablation_table.py takes into docs/results.md.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionModel

from encoders.manifest import fingerprint, write_json
from encoders.pretrained import load_strict
from llava_adapter import compose
from llava_adapter.chat import TEMPLATES
from llava_adapter.data.batch import collate
from llava_adapter.data.dataset import ChatDataset
from llava_adapter.data.readers import read_chats
from llava_adapter.objective import AnswerObjective
from llava_adapter.save import load_llava
from train.config import RECIPES
from train.pipeline import Runner, Stage
from train.swap_plan import TRAIN

ROOT = TRAIN.parent
SCENES = {"classes": 200, "image-size": 64, "max-objects": 1, "train": 16000, "chats": 9000, "bench-images": 300}
HELD_OUT = 300  # conversations, the last of the file
TOWER = {  # over clips_demo.yaml: patches as small as its objects' parts, and the papers' pool and table
    "run.steps": 600,
    "optim.lr": 1e-3,
    "model.vision.image_size": 48,
    "model.vision.patch_size": 8,
    "model.vision.pool": "mean",
    "model.vision.position_table": "sincos2d",
    "model.text.vocab_size": 1500,
    "model.clips.cut": "truncation",
    "model.clips.cut_tokens": 16,
}
PROJECTOR = {"run.steps": 400, "run.batch_size": 8, "run.save_every": 100}
LORA = {"run.steps": 200, "run.batch_size": 8, "run.save_every": 100}
BENCHES = "gqa,pope"
ARMS = ("random", "trained")
STEMS = ("chats_caption", "chats")  # conversations of stage 1 and of stage 2
LAUNCH = ("--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")


@dataclass(frozen=True)
class Places:
    """Where things lie below --work."""

    work: Path

    @property
    def scenes(self) -> Path:
        return self.work / "scenes"

    @property
    def llm(self) -> Path:
        return self.work / "llm"

    def chats(self, stem: str, held_out: bool) -> Path:
        """Conversations of a stage ("chats_caption" or "chats"), without or with nothing but the held-out ones."""
        return self.work / f"{stem}_{'held_out' if held_out else 'train'}.json"

    def arm(self, name: str, stage: str) -> Path:
        return self.work / name / stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/scene_swap"))
    parser.add_argument("--jobs", type=int, default=2, help="stages that run side by side (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the tower and of both stages (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results_llava.md")
    options = parser.parse_args()
    places = Places(options.work.resolve())
    runner = Runner(places.work, options.jobs)
    runner.run(encoders(places, options.seed))
    random_tower(places.arm("trained", "encoder"), places.arm("random", "encoder"), options.seed)
    split_chats(places)
    runner.run(swap(places, options.seed))
    losses = {arm: held_out_losses(places, arm, options.seed) for arm in ARMS}
    report = json.loads((places.work / "report.json").read_text())
    options.out.write_text(table(losses, report, places), encoding="utf-8")
    print(options.out.read_text())


def encoders(places: Places, seed: int) -> list[Stage]:
    """Scenes, LLM, and the trained tower with its export."""
    scenes = module(
        "scenes",
        "encoders.data.scenes",
        [places.scenes, *(f"--{k}={v}" for k, v in SCENES.items()), "--overwrite"],
        places.scenes,
    )
    llm = module("llm", "llava_adapter.demo_llm", [places.llm, "--overwrite"], places.llm)
    data = {f"data.{split}": places.scenes / "shards" / split for split in ("train", "val", "test")}
    settings = {**TOWER, **data, "run.seed": seed}
    run, folder = places.arm("trained", "pretrain"), places.arm("trained", "encoder")
    tower = training("trained/pretrain", "pretrain.py", "clips_demo.yaml", settings, run, [places.scenes], [scenes])
    export = module("trained/encoder", "encoders.export.command", [run, folder, "--overwrite"], folder, [run], [tower])
    return [scenes, llm, tower, export]


def random_tower(trained: Path, out: Path, seed: int) -> None:
    """The trained tower's architecture and picture processor with fresh weights; written once for each seed, as its
    date counts in what is kept."""
    processor = (trained / "preprocessor_config.json").read_bytes()
    torch.manual_seed(seed)
    fresh = CLIPVisionModel(load_strict(CLIPVisionModel, trained, torch.float32).config)
    if (out / "model.safetensors").is_file() and (out / "preprocessor_config.json").is_file():
        kept = CLIPVisionModel.from_pretrained(out).state_dict()
        state = fresh.state_dict()
        if kept.keys() == state.keys() and all(torch.equal(kept[name], state[name]) for name in state):
            return
    fresh.save_pretrained(out)
    (out / "preprocessor_config.json").write_bytes(processor)


def split_chats(places: Places) -> None:
    """Hold the last conversations of both files out of training; written once, as their dates count in what is kept."""
    for stem in STEMS:
        if not places.chats(stem, held_out=True).is_file():
            conversations = json.loads((places.scenes / f"{stem}.json").read_text())
            write_json(places.chats(stem, held_out=False), conversations[:-HELD_OUT])
            write_json(places.chats(stem, held_out=True), conversations[-HELD_OUT:])


def swap(places: Places, seed: int) -> list[Stage]:
    """Both stages and the benches of every arm, then their comparison."""
    stages, results = [], []
    bench = places.scenes / "bench"
    for arm in ARMS:
        tower, run, llava, scores = (places.arm(arm, name) for name in ("encoder", "projector", "llava", "results"))
        common = {"data.images": places.scenes, "run.seed": seed}
        settings = {
            **PROJECTOR,
            **common,
            "encoder": tower,
            "llm": places.llm,
            "data.chats": places.chats("chats_caption", held_out=False),
        }
        inputs = [tower, places.llm, settings["data.chats"]]
        projector = training(f"{arm}/projector", "tune_llava.py", "projector_demo.yaml", settings, run, inputs, [])
        settings = {**LORA, **common, "llava": run, "data.chats": places.chats("chats", held_out=False)}
        inputs = [run, settings["data.chats"]]
        lora = training(f"{arm}/llava", "tune_llava.py", "lora_demo.yaml", settings, llava, inputs, [projector])
        words = ["--model", llava, "--bench", BENCHES, "--data", bench, "--out", scores, "--overwrite"]
        results.append(module(f"{arm}/results", "eval.run", words, scores, [llava, bench], [lora]))
        stages += [projector, lora, results[-1]]
    page = places.work / "report.html"
    folders = [stage.out for stage in results]
    words = [*folders, "--out", page, "--name", *ARMS]
    return [*stages, module("report", "eval.compare", words, page, folders, results)]


def module(
    name: str,
    command: str,
    words: list[Any],
    out: Path,
    inputs: list[Path] | None = None,
    after: list[Stage] | None = None,
) -> Stage:
    """A stage that is a Python module's command line."""
    return Stage(name, [str(word) for word in words], inputs or [], out, after or [], (sys.executable, "-m", command))


def training(
    name: str, script: str, recipe: str, settings: dict[str, Any], out: Path, inputs: list[Path], after: list[Stage]
) -> Stage:
    """A stage that trains, by a recipe with other settings."""
    file = RECIPES / recipe
    words = [word for key, value in {**settings, "run.out": out}.items() for word in (f"--{key}", str(value))]
    program = (sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, str(TRAIN / script))
    return Stage(name, ["--config", str(file), *words], inputs, out, after, program, file)


def held_out_losses(places: Places, arm: str, seed: int) -> dict[str, float]:
    """Loss per supervised token on held-out captions and conversations: untrained projector, stage 1, stage 2.

    Kept, and taken again only for another stage 2.
    """
    kept, llava = places.work / f"{arm}_losses.json", fingerprint(places.arm(arm, "llava"))
    if kept.is_file() and (known := json.loads(kept.read_text()))["llava"] == llava:
        return dict(known["losses"])
    torch.manual_seed(seed)
    untrained = compose.compose(places.arm(arm, "encoder"), places.llm, "chatml", torch.bfloat16)
    found = {}
    for stage, (model, processor) in {
        "before": untrained,
        "stage 1": load_llava(places.arm(arm, "projector"), torch.bfloat16),
        "stage 2": load_llava(places.arm(arm, "llava"), torch.bfloat16),
    }.items():
        for stem, template in zip(STEMS, ("plain", "chatml"), strict=True):
            file = places.chats(stem, held_out=True)
            data = ChatDataset(read_chats(file, places.scenes, "error"), processor, TEMPLATES[template], 2048)
            found[f"{stem} {stage}"] = loss(model, data, processor.tokenizer.pad_token_id)
    write_json(kept, {"llava": llava, "losses": found})
    return found


@torch.no_grad()
def loss(model: Any, data: ChatDataset, pad_id: int) -> float:
    """Mean over all supervised tokens of the set."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = AnswerObjective(model.to(device).eval())
    total, tokens = 0.0, 0.0
    for first in range(0, len(data), 20):
        batch = collate([data[at] for at in range(first, min(first + 20, len(data)))], pad_id)
        on_device = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
        }
        part = objective(on_device)
        total, tokens = total + float(part["loss_sum"]), tokens + float(part["tokens"])
    return total / tokens


def table(losses: dict[str, dict[str, float]], report: dict[str, Any], places: Places) -> str:
    """The section, in Markdown; differences are those of compare-runs."""
    metrics = json.loads((places.arm("trained", "pretrain") / "manifest.json").read_text())["metrics"]["retrieval"]
    machine = "a GPU" if torch.cuda.is_available() else "CPU, one thread an arm"
    lines = [
        "## A trained tower against a random one, inside a LLaVA",
        "",
        f"Written by `benchmarks/scene_swap.py` on {date.today()}; torch {version('torch')}, transformers "
        f"{version('transformers')}, {machine}.",
        f"Scenes of one object out of {SCENES['classes']} classes; a ViT of 4 x 192 at 48 px, patch 8; "
        "SmolLM2-135M-Instruct.",
        f"{PROJECTOR['run.steps']} steps of stage 1 and {LORA['run.steps']} of stage 2 (LoRA), of "
        f"{LORA['run.batch_size']} conversations each.",
        "The arms differ in the tower's weights alone. The trained one finds "
        f"{100 * metrics['i2t_r1']:.0f} % of 500 unseen scenes' captions at rank 1.",
        "",
        f"Loss per supervised token on {HELD_OUT} held-out conversations:",
        "",
        "| tower | captions: before | stage 1 | stage 2 | questions: before | stage 1 | stage 2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, found in losses.items():
        cells = [f"{found[f'{stem} {when}']:.3f}" for stem in STEMS for when in ("before", "stage 1", "stage 2")]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += [
        "",
        "Stage 1 learns captions in the plain template, stage 2 questions in the chat template: the loss of "
        "each on the other's kind need not fall.",
        "",
        "lmms-eval's tasks on unseen scenes, in percent; the 95 % interval is over pictures:",
        "",
        "| bench | measure | questions | random | trained | difference | 95 % interval | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for bench in report["benches"]:
        for measure in bench["measures"]:
            (one,) = measure["differences"]
            scores = " | ".join(f"{100 * score:.1f}" for score in measure["scores"])
            interval = f"{100 * one['low']:+.1f} to {100 * one['high']:+.1f}"
            cells = (
                bench["bench"],
                measure["name"],
                bench["questions"],
                scores,
                f"{100 * one['value']:+.1f}",
                interval,
            )
            lines.append(f"| {' | '.join(map(str, cells))} | {one['verdict']} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
