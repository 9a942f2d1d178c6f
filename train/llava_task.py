"""The task of both LLaVA stages: answers in conversations about pictures, by a stock LLaVA around the encoder."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from encoders import manifest
from encoders.data.order import Shards, Unsharded
from llava_adapter import data, save, tuning
from llava_adapter.chat import IGNORED, TEMPLATES, template_of
from llava_adapter.compose import compose, describe
from llava_adapter.objective import AnswerObjective
from train.config import LlavaConfig
from train.loop import Artifact, Batch

CAPTION_TEMPLATE = "plain"  # of LLaVA-1.5's first stage: the picture, then its caption


def projector(config: LlavaConfig) -> "LlavaTask":
    """Stage 1: compose encoder and LLM, train the fresh projector between them on captions."""
    assert config.encoder is not None
    assert config.llm is not None  # LlavaConfig refuses the stage without them
    model, processor = compose(config.encoder, config.llm, config.template, torch.bfloat16)
    plan = replace(tuning.STAGES["projector"], projector_lr=config.optim.lr)
    parents = {"encoder": config.encoder, "llm": config.llm}
    origin = {
        "encoder": {"path": str(config.encoder), "fingerprint": manifest.fingerprint(config.encoder)},
        "llm": {"fingerprint": manifest.fingerprint(config.llm)},
        "template": config.template,
    }
    return LlavaTask(config, origin, model, processor, plan, CAPTION_TEMPLATE, parents)


def lora(config: LlavaConfig) -> "LlavaTask":
    """Stage 2: LoRA on the LLM and the projector in full, on conversations."""
    assert config.llava is not None  # LlavaConfig refuses the stage without it
    origin = manifest.read(config.llava, "llava").config
    model, processor = save.load_llava(config.llava, torch.bfloat16)
    plan = replace(
        tuning.STAGES["lora"],
        lr=config.optim.lr,
        projector_lr=config.projector_lr,
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
    )
    template = template_of(processor.tokenizer.chat_template)
    return LlavaTask(config, origin, model, processor, plan, template, {"llava": config.llava})


class LlavaTask:
    """See train.loop.Task."""

    def __init__(
        self,
        config: LlavaConfig,
        origin: dict[str, Any],
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        plan: tuning.TunePlan,
        template: str,
        parents: dict[str, Path],
    ):
        chats = data.read_chats(config.data.chats, config.data.images)
        self.name: str = config.stage
        self.plan, self.processor = plan, processor
        self.config = {**origin, config.stage: _settings(config)}
        self.parents = {**parents, "chats": config.data.chats}
        print(describe(model, processor))
        self.model = tuning.apply(model, plan).train()
        print(tuning.who_trains(self.model))
        self.module: nn.Module = AnswerObjective(self.model)
        self.entries: tuple[str, ...] = ()
        self.data_fingerprint = manifest.fingerprint(config.data.chats)
        dataset = data.ChatDataset(chats, processor, TEMPLATES[template], config.data.max_length)
        self.dataset: Dataset[dict[str, Any]] = _Indexed(dataset)
        self.shards: Shards = Unsharded(len(dataset))
        self.max_bad_fraction = 0.0
        self.before: dict[str, Tensor] = tuning.snapshot(self.model)

    def collate(self, examples: list[dict[str, Any]]) -> Batch:
        batch = data.collate(examples, self.processor.tokenizer.pad_token_id)
        return {**batch, "sample_ids": batch["id"], "bad": []}

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
        if accelerator.is_main_process:
            tuning.verify_moved(self.model, self.before, self.plan)
        self.before = {}
        return "first step with a picture: what should train has moved, what is frozen is bit-identical"

    def evaluate(self, accelerator: Accelerator) -> dict[str, float]:
        return {}

    def finish(self, out: Path, accelerator: Accelerator) -> Artifact:
        if isinstance(self.model, PeftModel):
            save.save_adapter(self.model, out / "adapter")
            save.save_llava(save.merge(self.model), self.processor, out)
        else:
            save.save_llava(self.model, self.processor, out)
        return Artifact("llava", self.parents)


class _Indexed(Dataset[dict[str, Any]]):
    """Looks conversations up by the loop's (epoch, sample id)."""

    def __init__(self, chats: data.ChatDataset):
        self.chats = chats

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        return self.chats[item[1]]


def _settings(config: LlavaConfig) -> dict[str, Any]:
    """The recipe without the paths that name this arm."""
    settings = asdict(config)
    settings["run"].pop("out")
    return {name: value for name, value in settings.items() if name not in ("stage", "encoder", "llm", "llava")}
