"""The task of every LLaVA stage: answers in conversations about pictures, by a stock LLaVA around the encoder."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlavaConfig as ModelConfig
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from encoders import manifest
from encoders.data.order import Shards
from llava_adapter import compose, packing, save, tuning
from llava_adapter.chat import IGNORED, TEMPLATES, template_of
from llava_adapter.data.batch import collate
from llava_adapter.data.dataset import ChatDataset, TrainingChats
from llava_adapter.data.readers import read_chats
from llava_adapter.geometry import Geometry, with_geometry
from llava_adapter.objective import AnswerObjective, checkpoint_activations
from llava_adapter.quantised import load_quantised
from llava_adapter.sources import fingerprint
from train.config import LlavaConfig
from train.loop import Artifact, Batch
from train.optim import schedule

SHORTENED = ("lost_turns", "cut_tokens")  # by data.max_length
CAPTION_TEMPLATE = "plain"  # of LLaVA-1.5's first stage: the picture, then its caption
# Settings that name this arm, or say how to start rather than what.
PATHS = ("stage", "encoder", "llm", "llava", "projector", "dry_run")


def build(config: LlavaConfig) -> "LlavaTask":
    """The stage that the config names."""
    return projector(config) if config.stage == "projector" else later(config)


def projector(config: LlavaConfig) -> "LlavaTask":
    """Stage 1: compose encoder and LLM, train the fresh projector between them on captions."""
    assert config.encoder is not None
    assert config.llm is not None  # LlavaConfig refuses the stage without them
    plan = compose.draft(config.encoder, config.llm, config.template, config.data.geometry, torch.bfloat16)
    print(plan)
    chats = Sets.read(config, plan.processor, CAPTION_TEMPLATE)
    model = compose.build(plan, config.projector)
    origin = {
        "encoder": {"path": str(config.encoder), **_identity(config.encoder, plan.encoder)},
        "llm": _identity(config.llm, plan.llm),
        "template": config.template,
    }
    parents = {"encoder": plan.encoder, "llm": plan.llm}
    return LlavaTask(config, origin, model, plan.processor, chats, parents)


def later(config: LlavaConfig) -> "LlavaTask":
    """Every other stage: a LLaVA that an earlier one wrote, on conversations."""
    assert config.llava is not None  # LlavaConfig refuses the stage without it
    shape, processor = described(config.llava, config.data.geometry)
    print(compose.describe(shape, processor))
    chats = Sets.read(config, processor, template_of(processor.tokenizer.chat_template))
    origin = manifest.verify(config.llava).config
    if config.stage == "qlora":
        model = load_quantised(config.llava, config.bits, torch.bfloat16)
    else:
        model, _ = save.load_llava(config.llava, torch.bfloat16)
    if config.stage == "tower":  # no longer the tower of that fingerprint
        origin = {**origin, "encoder": {**origin["encoder"], "trained_further": True}}
    return LlavaTask(config, origin, model, processor, chats, {"llava": config.llava})


def described(llava: Path, geometry: Geometry) -> tuple[ModelConfig, LlavaProcessor]:
    """Config of a LLaVA folder, and its processor with a recipe's geometry; no weight is loaded. Raises DataError for a
    folder that no stage has finished."""
    manifest.read(llava, "llava")
    processor = save.load_processor(llava)
    processor.image_processor = with_geometry(processor.image_processor, geometry)
    return ModelConfig.from_pretrained(llava, local_files_only=True), processor


def plan_of(config: LlavaConfig) -> tuning.TunePlan:
    """The stage's plan with the config's rates and sizes."""
    plan = replace(
        tuning.STAGES[config.stage],
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        weights=config.weights,
    )
    if config.stage == "projector":
        return replace(plan, projector_lr=config.optim.lr)
    plan = replace(plan, lr=config.optim.lr, projector_lr=config.projector_lr, vision_lr=config.vision_lr)
    return replace(plan, vision=config.vision, llm=config.language) if config.stage == "tower" else plan


@dataclass(frozen=True)
class Sets:
    """The conversations of a run. Read before any weight is: a picture that is missing is told at once."""

    train: ChatDataset
    held_out: ChatDataset | None

    @classmethod
    def read(cls, config: LlavaConfig, processor: LlavaProcessor, template: str) -> "Sets":
        """Open the files that the config names. Raises DataError as `read_chats` does."""
        data, sets = config.data, []
        for file in [data.chats] + ([config.held_out] if config.held_out is not None else []):
            chats = read_chats(file, data.images, data.missing)
            print(chats.findings)
            sets.append(ChatDataset(chats, processor, TEMPLATES[template], data.max_length))
        return cls(sets[0], sets[1] if len(sets) > 1 else None)


class LlavaTask:
    """See train.loop.Task."""

    def __init__(
        self,
        config: LlavaConfig,
        origin: dict[str, Any],
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        chats: Sets,
        parents: dict[str, Path],
    ):
        self.name: str = config.stage
        self.stage, self.processor, self.plan = config, processor, plan_of(config)
        self.data_fingerprint = manifest.fingerprint(config.data.chats)
        self.config = {**origin, config.stage: self._settings(origin, len(chats.train))}
        self.parents = {**parents, "chats": config.data.chats}
        self.held_out = chats.held_out
        if config.packing:
            packing.enable(model)
        self.model = tuning.apply(model, self.plan).train()
        checkpoint_activations(self.model, config.checkpointing)
        print(tuning.who_trains(self.model))
        self.module: nn.Module = AnswerObjective(self.model)
        self.entries: tuple[str, ...] = ()
        # Those of stage 1 stand in its config.
        self.base = {"llava": manifest.fingerprint(config.llava)} if config.llava is not None else {}
        self.dataset: Dataset[dict[str, Any]] = TrainingChats(chats.train, config.run.seed)
        self.shards: Shards = chats.train.chats.shards
        self.max_bad_fraction = config.data.max_bad_fraction
        self.before: dict[str, Tensor] = tuning.snapshot(self.model)

    def _settings(self, origin: dict[str, Any], conversations: int) -> dict[str, Any]:
        """The recipe without the paths that name this arm; its conversations are known by content, those without a
        picture left out. `before` is training of the same kind that went into what this stage begins with."""
        config, settings = self.stage, asdict(self.stage)
        settings["run"].pop("out")
        settings["data"]["chats"] = {
            "path": str(config.data.chats),
            "fingerprint": self.data_fingerprint,
            "conversations": conversations,
        }
        before: dict[str, Any] = {name: origin[name] for name in (config.stage,) if name in origin}
        if config.projector is not None:
            known = manifest.read(config.projector, "llava").config
            before = {name: known[name] for name in tuning.STAGES if name in known}
        if before:
            settings["before"] = before
        return {name: value for name, value in settings.items() if name not in PATHS}

    def collate(self, examples: list[dict[str, Any]]) -> Batch:
        batch = collate(examples, self.processor.tokenizer.pad_token_id, self.stage.packing)
        return {
            **batch,
            "sample_ids": [example["sample_id"] for example in examples],
            "bad": [report for example in examples for report in example["bad"]],
            "counts": {name: sum(example[name] for example in examples) for name in SHORTENED},
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        return tuning.parameter_groups(self.model, self.plan)

    def step(self, module: nn.Module, micro_batches: list[Batch], accelerator: Accelerator) -> dict[str, Tensor]:
        """The loss is per supervised token of the whole step, however it is split over ranks and micro-batches."""
        counts = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in micro_batches])
        tokens = accelerator.reduce(counts.sum(), "sum")
        total = torch.zeros((), device=accelerator.device)
        for place, batch in enumerate(micro_batches):
            last = place == len(micro_batches) - 1
            with nullcontext() if last else accelerator.no_sync(module):
                # DDP averages over ranks; times their number makes it the sum that the token count belongs to.
                loss = module(batch)["loss_sum"] * accelerator.num_processes / tokens
                accelerator.backward(loss)
            total += loss.detach()
        return {"loss": total, "tokens": tokens.float()}

    def adopt(self, module: nn.Module) -> None:
        assert isinstance(module, AnswerObjective)
        self.module = module
        if isinstance(self.model, PeftModel):
            self.model.base_model.model = module.llava
        else:
            self.model = module.llava

    def check_step(self, micro_batches: list[Batch], accelerator: Accelerator) -> str | None:
        images = torch.tensor(sum(len(batch["pixel_values"]) for batch in micro_batches), device=accelerator.device)
        if not accelerator.reduce(images, "sum"):
            return None  # the projector had nothing to learn from
        found = ""
        if accelerator.is_main_process:
            share = schedule(0, self.stage.run.steps, self.stage.optim.warmup_steps)
            found = tuning.verify_moved(self.model, self.before, self.plan, share)
        self.before = {}
        return f"first step with a picture: what should train has moved. {found}"

    @torch.no_grad()
    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        """The held-out loss per supervised token."""
        if self.held_out is None:
            return {}
        self.module.eval()
        totals = [self.module(batch) for batch in self._held_out_batches(self.held_out, accelerator)]
        self.module.train()
        return {"held_out_loss": float(sum(t["loss_sum"] for t in totals) / sum(t["tokens"] for t in totals))}

    def _held_out_batches(self, chats: ChatDataset, accelerator: Accelerator) -> Iterator[Batch]:
        """Of the size that training has on one process: what fits there fits here."""
        run, device = self.stage.run, accelerator.device
        size = run.batch_size // (run.micro_batches * accelerator.num_processes)
        for first in range(0, len(chats), size):
            samples = [chats[i] for i in range(first, min(first + size, len(chats)))]
            batch = collate(samples, self.processor.tokenizer.pad_token_id, self.stage.packing)
            yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def finish(self, out: Path, accelerator: Accelerator) -> Artifact:
        metrics = self.evaluate(accelerator)
        if not isinstance(self.model, PeftModel):
            save.save_llava(self.model, self.processor, out)
            return Artifact("llava", self.parents, metrics)
        save.save_adapter(self.model, out / "adapter")
        if self.name == "qlora":  # the adapter goes into the weights that were quantised, not into what is left of them
            base, _ = save.load_llava(self.parents["llava"], torch.bfloat16)
            self.model = save.load_adapter(base, out / "adapter")
        save.save_llava(save.merge(self.model), self.processor, out)
        return Artifact("llava", self.parents, metrics)


def _identity(named: Path, folder: Path) -> dict[str, str]:
    """Of a model: its content, and where it was fetched from the Hub, the commit."""
    fetched = {} if folder == named else {"repository": str(named), "commit": folder.name}
    return {"fingerprint": fingerprint(folder), **fetched}
