"""`--dry-run` of a LLaVA stage: steps, tokens, memory, disk and hours, from configs and a sample of the conversations.

No weight is loaded: the model is built without memory, and tuned as the run would tune it. FLOPs count matrix products
of real tokens, two per multiply-add; attention's own are left out (3 % at 1,000 tokens in an 8B LLM).
"""

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import LlavaConfig as ModelConfig
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from encoders.data.order import StepOrder
from llava_adapter import compose, tuning
from llava_adapter.chat import IGNORED, template_of
from llava_adapter.data.dataset import ChatDataset
from train.config import LlavaConfig
from train.llava_task import CAPTION_TEMPLATE, Sets, described, plan_of

SAMPLE = 1000  # conversations that are tokenised
H200 = 790e12  # FLOP/s of bfloat16 products that one reaches
SHARE = 0.5  # of it that a run is taken to use
# Products per weight and token: forward; backward to the inputs; backward to the weight.
FORWARD, INPUTS, WEIGHTS = 2, 2, 2
GIB = 2**30


@dataclass(frozen=True)
class Lengths:
    """Means over conversations."""

    tokens: float
    """As fed, image tokens included."""
    supervised: float
    images: float
    longest: int
    conversations: int


def show(config: LlavaConfig) -> None:
    """Print the plan of a run, on the first process of a launch. Raises what the run would raise for wrong input."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(describe(config, int(os.environ.get("WORLD_SIZE", "1"))))


def describe(config: LlavaConfig, processes: int) -> str:
    """What a run would do and cost, in words."""
    shape, processor, template = _parts(config)
    chats = Sets.read(config, processor, template).train
    lengths = measure(chats)
    run = config.run
    StepOrder(len(chats), run.batch_size, run.steps, run.seed, rank=0, world=processes, micro_batches=run.micro_batches)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(shape).bfloat16()
    model.config.dtype = torch.bfloat16
    folder = sum(p.numel() * p.element_size() for p in model.parameters())
    tuned = tuning.apply(model, plan_of(config))
    flops = step_flops(tuned, config, lengths)
    hours = run.steps * flops / (H200 * SHARE * processes) / 3600
    here = run.steps * flops / (_speed_here() * SHARE * processes) / 3600
    trained = sum(p.numel() * p.element_size() for p in tuned.parameters() if p.requires_grad)
    frozen = sum(_frozen_bytes(name, p, config) for name, p in tuned.named_parameters() if not p.requires_grad)
    per_step = run.batch_size * lengths.tokens
    micro = run.batch_size / (run.micro_batches * processes)
    return "\n".join(
        (
            compose.describe(shape, processor),
            tuning.who_trains(tuned),
            f"data        {lengths.conversations:,} conversations of {lengths.tokens:.0f} tokens on average (longest "
            f"{lengths.longest:,}), {lengths.supervised:.0f} of them supervised, {lengths.images:.2f} images each",
            f"steps       {run.steps:,} of {run.batch_size} conversations: "
            f"{run.steps * run.batch_size / lengths.conversations:.2f} epochs",
            f"tokens      {per_step:,.0f} a step, {run.steps * per_step / 1e6:,.1f} M in all; "
            f"{micro * lengths.tokens:,.0f} at a time on each of {processes} process(es)",
            f"checkpoint  {_size(3 * trained)}, {run.keep} kept; finished folder {_size(folder)}",
            f"memory      {_size(frozen + 4 * trained)} of weights, gradients and optimizer (shared under FSDP2, else "
            "each process holds all), and activations",
            f"hours       {hours:.2f} on {processes} H200 at {SHARE:.0%} of {H200 / 1e12:.0f} TFLOP/s; {here:.1f} on "
            f"{processes} of this machine's {_device().type} at {SHARE:.0%} of its speed; "
            f"{flops / 1e12:,.3f} TFLOP a step",
        )
    )


def _parts(config: LlavaConfig) -> tuple[ModelConfig, LlavaProcessor, str]:
    """The model's config, its processor and the name of the template that the run would train on."""
    if config.llava is not None:
        shape, processor = described(config.llava, config.data.geometry)
        return shape, processor, template_of(processor.tokenizer.chat_template)
    assert config.encoder is not None
    assert config.llm is not None  # LlavaConfig refuses the stage without them
    plan = compose.draft(config.encoder, config.llm, config.template, config.data.geometry, torch.bfloat16)
    return plan.config, plan.processor, CAPTION_TEMPLATE


def measure(dataset: ChatDataset) -> Lengths:
    """Tokenise some conversations, evenly spread over the file, as training does."""
    rows = []
    for number in range(0, len(dataset), max(1, len(dataset) // SAMPLE)):
        chat = dataset.chats[number]
        labels = dataset.tokens(chat).labels
        rows.append((len(labels), sum(label != IGNORED for label in labels), len(chat.pictures)))
    tokens, supervised, images = zip(*rows, strict=True)
    return Lengths(
        statistics.mean(tokens), statistics.mean(supervised), statistics.mean(images), max(tokens), len(dataset)
    )


def step_flops(model: nn.Module, config: LlavaConfig, lengths: Lengths) -> float:
    """Forward and backward of one step, over all processes."""
    llava: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    shape: Any = llava.config
    patches = (shape.vision_config.image_size // shape.vision_config.patch_size) ** 2
    seen = {"vision": lengths.images * (patches + 1), "projector": lengths.images * patches, "llm": lengths.tokens}
    plan = plan_of(config)
    backward = {"vision": plan.vision != "frozen", "projector": plan.projector == "full", "llm": True}
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "embed" in name or ".original_module." in name:
            continue  # norms, biases and tables multiply nothing
        part = tuning.part_of(name).removesuffix("_lora")
        products = FORWARD + INPUTS * backward[part] + WEIGHTS * parameter.requires_grad
        if config.checkpointing == "full" and part == "llm" and "lm_head" not in name:
            products += FORWARD
        total += products * parameter.numel() * (lengths.supervised if "lm_head" in name else seen[part])
    return config.run.batch_size * total


def _frozen_bytes(name: str, parameter: nn.Parameter, config: LlavaConfig) -> float:
    quantised = config.stage == "qlora" and "language_model.layers" in name and parameter.dim() == 2
    return parameter.numel() * (config.bits / 8 if quantised else parameter.element_size())


def _speed_here() -> float:
    """FLOP/s of one large bfloat16 product on this machine's device, the best of a few."""
    device = _device()
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        (a @ a).sum().item()
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
