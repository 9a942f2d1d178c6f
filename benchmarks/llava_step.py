"""LLaVA training steps against a stock HF Trainer with the flags of LLaVA's scripts, on the same weights and batches.

    python benchmarks/llava_step.py [--stages projector lora] [--rounds 5] [--bf16] [--size small|8b] [--device cuda]

The rival: LlavaForConditionalGeneration with gradient_checkpointing, batches grouped by length and padded, the loss
over all logits, AdamW; with --no-checkpointing it keeps its activations. The Trainer's own steps and ours take turns.
small: a Llama of 8 layers of 384 with LLaMA-3's vocabulary, for a CPU. 8b: LLaMA-3-8B's and CLIP L/14-336's sizes with
random weights, for a GPU; the share of the peak is of useful FLOPs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Bar, announce, check_equal, conclude
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from llava_adapter import packing, tuning
from llava_adapter.chat import IGNORED
from llava_adapter.data.batch import collate
from llava_adapter.objective import AnswerObjective
from train.config import LlavaConfig as Stage
from train.config import RunConfig
from train.llava_plan import Lengths, step_flops

VOCABULARY, IMAGE = 128_256, 128_002
SUPERVISED = 0.2  # of the positions
PEAK = 790e12  # FLOP/s
GOALS = {"projector": 55, "lora": 50}  # % of the peak


@dataclass(frozen=True)
class Size:
    """A LLaVA and its conversations."""

    vision: dict[str, int]
    text: dict[str, int]
    batch: int
    words: int
    """Text tokens of a conversation, about."""
    lora_r: int


SIZES = {
    "small": Size(
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
        | {"image_size": 112, "patch_size": 14},
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
        | {"num_key_value_heads": 2},
        batch=4,
        words=96,
        lora_r=16,
    ),
    "8b": Size(
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 336, "patch_size": 14},
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8},
        batch=16,
        words=260,
        lora_r=128,
    ),
}


def build(size: Size, dtype: torch.dtype, device: str) -> LlavaForConditionalGeneration:
    """Random weights, the same at every call."""
    torch.manual_seed(0)
    patches = (size.vision["image_size"] // size.vision["patch_size"]) ** 2
    text = LlamaConfig(
        vocab_size=VOCABULARY, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **size.text
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size.vision),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=patches,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype=dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)


class Conversations(Dataset[dict[str, Any]]):
    """One picture each and words of long-tailed number; batches of like lengths follow each other, as the scripts'
    group_by_modality_length makes them."""

    def __init__(self, size: Size, batches: int):
        rng, noise = np.random.default_rng(0), torch.Generator().manual_seed(0)
        side = size.vision["image_size"]
        patches = (side // size.vision["patch_size"]) ** 2
        words = np.clip(rng.lognormal(np.log(size.words), 0.5, size.batch * batches), 8, 4 * size.words).astype(int)
        words = rng.permutation(np.sort(words)[::-1].reshape(batches, size.batch)).reshape(-1)
        self.samples = []
        for number, count in enumerate(words.tolist()):
            ids = torch.randint(0, 128_000, (patches + count,), generator=noise)
            ids[1 : 1 + patches] = IMAGE
            answer = min(round(SUPERVISED * len(ids)), count - 1)
            labels = ids.masked_fill(torch.arange(len(ids)) < len(ids) - answer, IGNORED)
            pixels = torch.randn(1, 3, side, side, generator=noise)
            self.samples.append({"id": str(number), "input_ids": ids, "labels": labels, "pixel_values": pixels})

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]

    @property
    def lengths(self) -> Lengths:
        tokens = [len(sample["labels"]) for sample in self.samples]
        answers = [int((sample["labels"] != IGNORED).sum()) for sample in self.samples]
        return Lengths(statistics.mean(tokens), statistics.mean(answers), 1.0, max(tokens), len(self.samples))


class InOrder(Trainer):
    """The stock Trainer on batches in the order they come."""

    def _get_train_sampler(self, *arguments: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@dataclass
class Turns(TrainerCallback):  # type: ignore[misc]
    """Times the Trainer's steps, and lets ours take its turn after each."""

    ours: Callable[[], Tensor]
    clock: Callable[[], float]
    stock_seconds: list[float] = field(default_factory=list)
    our_seconds: list[float] = field(default_factory=list)
    our_losses: list[Tensor] = field(default_factory=list)
    began: float = 0.0

    def on_step_begin(self, *arguments: Any, **others: Any) -> None:
        self.began = self.clock()

    def on_step_end(self, *arguments: Any, **others: Any) -> None:
        ended = self.clock()
        self.stock_seconds.append(ended - self.began)
        self.our_losses.append(self.ours())
        self.our_seconds.append(self.clock() - ended)


def our_steps(
    model: Any, plan: tuning.TunePlan, batches: Iterator[dict[str, Any]], device: str
) -> Callable[[], Tensor]:
    """A packed step with fused AdamW."""
    objective = AnswerObjective(model)
    optimizer = torch.optim.AdamW(tuning.parameter_groups(model, plan), fused=True)

    def step() -> Tensor:
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in next(batches).items()}
        out = objective(batch)
        loss = out["loss_sum"] / out["tokens"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def padded(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch for the stock model."""
    batch = collate(samples, 0)
    del batch["id"]
    return batch


def compare(stage: str, size: Size, arguments: argparse.Namespace) -> Bar:
    """Both sides through the same batches; the first is the warm-up, and its losses must agree."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    device, lora = arguments.device, {"lora_r": size.lora_r, "lora_alpha": 2 * size.lora_r, "lora_dropout": 0.0}
    plan = replace(tuning.STAGES[stage], **lora)
    data = Conversations(size, arguments.rounds + 1)
    torch.manual_seed(1)
    model = build(size, dtype, device)
    packing.enable(model)
    ours = tuning.apply(model, plan).train()
    torch.manual_seed(1)
    stock = tuning.apply(build(size, dtype, device), plan)
    stock.load_state_dict(ours.state_dict())
    lengths = data.lengths
    share = lengths.supervised / lengths.tokens
    print(f"{stage}: {size.batch} conversations of {lengths.tokens:.0f} tokens, {share:.0%} supervised, {dtype}")
    rows = [data.samples[i : i + size.batch] for i in range(0, len(data), size.batch)]
    batches = (collate(row, 0, packed=True) for row in rows)
    turns = Turns(our_steps(ours, plan, batches, device), clock(device))
    with tempfile.TemporaryDirectory() as out:
        options = TrainingArguments(
            output_dir=out,
            max_steps=len(rows),
            per_device_train_batch_size=size.batch,
            gradient_checkpointing=not arguments.no_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            learning_rate=plan.lr if stage == "lora" else plan.projector_lr,
            weight_decay=0.0,
            warmup_steps=1,
            lr_scheduler_type="cosine",
            max_grad_norm=0.0,
            bf16=arguments.bf16,
            use_cpu=device == "cpu",
            optim="adamw_torch",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = InOrder(stock, options, data_collator=padded, train_dataset=data, callbacks=[turns])
        trainer.train()
    first = torch.tensor(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
    check_equal("loss of the first step", turns.our_losses[0].cpu().float(), first, 1e-2 if arguments.bf16 else 1e-4)
    for name, seconds in (("stock Trainer", turns.stock_seconds), ("ours", turns.our_seconds)):
        del seconds[0]
        print(f"  {name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})", flush=True)
    if device != "cpu":
        return share_of_peak(stage, size, ours, lengths, statistics.median(turns.our_seconds))
    faster = statistics.median(a / b for a, b in zip(turns.stock_seconds, turns.our_seconds, strict=True))
    return Bar(f"stage {stage} step over a stock Trainer's, times as fast", faster, "at least", 1.5)


def share_of_peak(stage: str, size: Size, model: Any, lengths: Lengths, seconds: float) -> Bar:
    """% of the peak on useful FLOPs, with the samples/s printed."""
    nowhere = Path("none")
    where = {"encoder": nowhere, "llm": nowhere} if stage == "projector" else {"llava": nowhere}
    config = Stage(stage=stage, run=RunConfig(batch_size=size.batch), lora_r=size.lora_r, **where)  # type: ignore[arg-type]
    print(f"  {size.batch / seconds:.1f} samples/s, {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB at the peak")
    reached = 100 * step_flops(model, config, lengths) / seconds / PEAK
    return Bar(f"stage {stage}, % of {PEAK / 1e12:.0f} TFLOP/s", reached, "at least", GOALS[stage])


def clock(device: str) -> Callable[[], float]:
    """CPU seconds of this process, or time once the GPU is done."""
    if device == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=tuple(GOALS), default=list(GOALS))
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 weights and autocast instead of float32")
    parser.add_argument("--no-checkpointing", action="store_true", help="the Trainer keeps its activations")
    arguments = parser.parse_args()
    announce()
    conclude([compare(stage, SIZES[arguments.size], arguments) for stage in arguments.stages])


if __name__ == "__main__":
    main()
