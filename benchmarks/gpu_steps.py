"""Training steps on one CUDA card: images/s and the share of its bf16 peak spent on useful FLOPs.

    python benchmarks/gpu_steps.py [--lines clip clips dreamlip] [--batch 256] [--steps 30] [--peak 790]

clip: L/14@224 against open_clip, eager and compiled. clips: L/14@84, reference and packed. dreamlip: B/16 K=8, packed
and padded. Each arm sees one batch again and again, in bfloat16 autocast with fused AdamW; the arms of a line take
turns, and medians are of the steps after 20 to warm up.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import torch
from flops import captioner_flops, dual_encoder_flops
from measure import Bar, check_equal, conclude
from rival import clip_config, on, open_clip_twin, optimizer_step, random_images, random_lengths, random_texts
from torch import Tensor

from encoders.config import CaptionerConfig, DreamlipOptions, EncoderConfig, TextConfig, VisionConfig, preset
from encoders.objective import Objective
from encoders.objectives import build
from encoders.objectives.clips import Clips

WARM_UP = 20
K = 8


@dataclass(frozen=True)
class Arm:
    """A step to time, and what of it is useful."""

    name: str
    step: Callable[[], Tensor]
    flops: float
    """Forward and backward of one batch, over real tokens."""
    goal: float | None = None
    """% of the peak that it must reach."""


def compiled(model: Objective) -> Objective:
    """The image tower compiled whole; text tower and captioner, whose shapes follow the batch, block by block."""
    model.vision.compile()
    for block in model.text.blocks:
        block.compile(dynamic=model.config.text.padding == "packed")
    if isinstance(model, Clips) and model.captioner is not None:
        for block in model.captioner.decoder.blocks:
            block.compile(dynamic=True)
    return model


def clip_arms(batch: int, device: str) -> list[Arm]:
    """CLIP L/14@224, 77 slots of text. Useful FLOPs count real tokens, whoever computes the padding."""
    config = clip_config("l14", 224, "reference")
    lengths = random_lengths(batch, 18, 77)
    data = on(
        device,
        {
            "images": random_images(batch, 224),
            "text_ids": random_texts(lengths, config.text),
            "text_lengths": lengths,
        },
    )
    flops = dual_encoder_flops(config, batch, lengths)
    arms = []
    for kind in ("eager", "compiled"):
        model = _initial(config, device)
        clip, loss = open_clip_twin(model).to(device), open_clip.ClipLoss()
        pixel_values = model.normalise(data["images"])  # open_clip's loader gives these
        call = torch.compile(clip) if kind == "compiled" else clip

        def rival_loss(call: Any = call, pixel_values: Tensor = pixel_values, loss: Any = loss) -> Tensor:
            value: Tensor = loss(*call(pixel_values, data["text_ids"]))
            return value

        arms.append(Arm(f"open_clip {kind}", optimizer_step(clip, rival_loss, device, True), flops))
    arms.append(_ours("ours eager, padded", config, data, flops, device, compile_it=False))
    arms.append(_ours("ours compiled, padded", config, data, flops, device))
    packed = replace(config, text=replace(config.text, padding="packed"))
    return [*arms, _ours("ours compiled, packed", packed, data, flops, device, goal=55)]


def clips_arms(batch: int, device: str) -> list[Arm]:
    """CLIPS L/14@84 with the paper's tower: web caption, short piece, caption of 64 tokens of 128. In reference mode
    padding is attended, so that its text slots are useful work; unused queries are not."""
    sizes = preset("l14")
    vision = VisionConfig(
        image_size=84,
        pre_norm=False,
        pool="mean",
        norm_after_pool=True,
        position_table="sincos2d",
        norm_eps=1e-6,
        **sizes["vision"],
    )
    captioner = CaptionerConfig(**sizes["captioner"])
    web, piece = random_lengths(batch, 14, 80, seed=1), random_lengths(batch, 20, 80, seed=2)
    captions = random_lengths(batch, 64, captioner.tokens, seed=3)
    targets = torch.full((batch, max(captions)), -100)
    for row, length in enumerate(captions):
        targets[row, :length] = torch.randint(3, 32000, (length,))
    arms = []
    for padding, goal in (("reference", 50), ("packed", 45)):
        text = TextConfig(padding=padding, **sizes["text"])  # type: ignore[arg-type]
        config = EncoderConfig(
            objective="clips", embed_dim=sizes["embed_dim"], vision=vision, text=text, captioner=captioner
        )
        data = on(
            device,
            {
                "images": random_images(batch, 84),
                "web_ids": random_texts(web, text),
                "web_lengths": web,
                "piece_ids": random_texts(piece, text),
                "piece_lengths": piece,
                "targets": targets,
            },
        )
        slots = [text.length] * batch
        texts, condition = (slots * 2, slots) if padding == "reference" else (web + piece, web)
        useful = dual_encoder_flops(config, batch, texts) + captioner_flops(config, condition, captions)
        arms.append(_ours(f"ours compiled, {padding}", config, data, useful, device, goal=goal))
    return arms


def dreamlip_arms(batch: int, device: str) -> list[Arm]:
    """DreamLIP B/16@224 with 1 + K texts of about 20 tokens."""
    lengths = random_lengths(batch * (1 + K), 20, 77)
    config = clip_config("b16", 224, "packed", DreamlipOptions(k=K))
    ids = random_texts(lengths, config.text).unflatten(0, (batch, 1 + K))
    data = on(device, {"images": random_images(batch, 224), "text_ids": ids, "text_lengths": lengths})
    flops = dual_encoder_flops(config, batch, lengths)
    padded = replace(config, text=replace(config.text, padding="reference"))
    return [
        _ours("ours compiled, padded", padded, data, flops, device),
        _ours("ours compiled, packed", config, data, flops, device, goal=45),
    ]


def _initial(config: EncoderConfig, device: str) -> Objective:
    torch.manual_seed(0)  # the arms of a line begin with the same weights
    return build(config).to(device)


def _ours(
    name: str,
    config: EncoderConfig,
    data: dict[str, Any],
    flops: float,
    device: str,
    goal: float | None = None,
    compile_it: bool = True,
) -> Arm:
    model = _initial(config, device)
    if compile_it:
        compiled(model)
    return Arm(name, optimizer_step(model, lambda: model(data)["loss"], device, True), flops, goal)


def seconds_per_step(arms: list[Arm], steps: int) -> list[float]:
    """Medians; the arms take turns and each step is waited for."""
    for arm in arms:
        for _ in range(WARM_UP):
            arm.step()
    taken: list[list[float]] = [[] for _ in arms]
    for _ in range(steps):
        for arm, seconds in zip(arms, taken, strict=True):
            torch.cuda.synchronize()
            began = time.perf_counter()
            arm.step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in taken]


LINES = {"clip": clip_arms, "clips": clips_arms, "dreamlip": dreamlip_arms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--peak", type=float, default=790, help="bf16 matmul TFLOP/s measured on this card")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a CUDA card and torch sees none here; the other benchmarks run on a CPU")
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}, open_clip {open_clip.__version__}")
    torch.set_float32_matmul_precision("high")
    bars = []
    for line in options.lines:
        torch.manual_seed(0)
        torch.compiler.reset()
        arms = LINES[line](options.batch, "cuda")
        losses = [arm.step() for arm in arms]
        if line != "clips":  # whose modes are different functions of the text
            for arm, loss in zip(arms, losses, strict=True):
                check_equal(f"loss of {line} {arm.name}", loss, losses[0], 1e-2)
        for arm, seconds in zip(arms, seconds_per_step(arms, options.steps), strict=True):
            percent = 100 * arm.flops / seconds / (options.peak * 1e12)
            what = f"{line} {arm.name}"
            print(f"  {what}: {options.batch / seconds:.0f} images/s, {percent:.1f} % of peak", flush=True)
            if arm.goal is not None:
                bars.append(
                    Bar(f"{what}, % of {options.peak:g} TFLOP/s on useful FLOPs", percent, "at least", arm.goal)
                )
        del arms
        torch.cuda.empty_cache()
    conclude(bars)


if __name__ == "__main__":
    main()
