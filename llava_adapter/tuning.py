"""Who trains: freeze, add LoRA, show it, and prove after the first step that it is so.

What trains is float32 (bfloat16 weights would lose updates below 1/256 of their size); what is frozen keeps its type.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from encoders.errors import ModelError, UsageError
from encoders.export.fold import refuse_training

MODES = {"vision": ("frozen",), "projector": ("frozen", "full"), "llm": ("frozen", "lora", "full")}
# A full path: module names alone (q_proj, ...) would also match the vision tower.
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@dataclass(frozen=True)
class TunePlan:
    """How each part is trained. Raises UsageError on a value or combination that has no meaning."""

    vision: Literal["frozen"] = "frozen"
    projector: Literal["frozen", "full"] = "full"
    llm: Literal["frozen", "lora", "full"] = "frozen"
    projector_lr: float = 1e-3
    lr: float = 2e-4
    """Learning rate of the LLM or its LoRA; unused while the LLM is frozen."""
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05

    def __post_init__(self) -> None:
        for part, modes in MODES.items():
            if vars(self)[part] not in modes:
                raise UsageError(f"tuning plan: {part} is {vars(self)[part]!r}, must be one of {', '.join(modes)}")
        if self.projector == "frozen" and self.llm == "frozen":
            raise UsageError("tuning plan: projector and llm are both frozen, nothing would train")
        if self.lora_r < 1:
            raise UsageError(f"tuning plan: lora_r is {self.lora_r}, must be at least 1")


# LLaVA-1.5's two stages.
STAGES = {
    "projector": TunePlan(projector="full", llm="frozen", projector_lr=1e-3),
    "lora": TunePlan(projector="full", llm="lora", projector_lr=2e-5, lr=2e-4),
}


def apply(model: LlavaForConditionalGeneration, plan: TunePlan) -> LlavaForConditionalGeneration | PeftModel:
    """Freeze and unfreeze the model in place; with LoRA, return the PEFT model around it.

    Raises ModelError if the LLM has linear layers that LoRA would not cover.
    """
    model.requires_grad_(False)
    if plan.projector == "full":
        model.model.multi_modal_projector.float().requires_grad_(True)
    if plan.llm == "full":
        model.model.language_model.float().requires_grad_(True)
        model.lm_head.float().requires_grad_(True)
    if plan.llm != "lora":
        return model
    config = LoraConfig(
        r=plan.lora_r,
        lora_alpha=plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        target_modules=LORA_TARGETS,
        # Saved in full with the adapter: without this a reloaded adapter would meet an untrained projector.
        modules_to_save=["multi_modal_projector"] if plan.projector == "full" else None,
    )
    linears = {name for name, module in model.named_modules() if _is_llm(name) and isinstance(module, nn.Linear)}
    adapted = get_peft_model(model, config)
    covered = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if covered != linears:
        raise ModelError(
            f"LoRA covers {len(covered)} layers but the LLM has {len(linears)} linear ones; in only one of the two: "
            f"{', '.join(sorted(covered ^ linears)[:5])}. The LLM must be a plain Llama"
        )
    return adapted


def _is_llm(module_name: str) -> bool:
    return module_name.startswith("model.language_model.")


def part_of(parameter_name: str) -> str:
    """The part a parameter belongs to: vision, projector, lora or llm."""
    path = parameter_name.split(".")
    if "vision_tower" in path:
        return "vision"
    if "multi_modal_projector" in path:
        return "projector"
    return "lora" if "lora_A" in path or "lora_B" in path else "llm"


def _declared_trainable(name: str, plan: TunePlan) -> bool:
    """What the plan says about a parameter, whatever its requires_grad says."""
    if ".original_module." in name:  # PEFT trains a copy of the projector and keeps the original
        return False
    part = part_of(name)
    return {"vision": False, "projector": plan.projector == "full", "llm": plan.llm == "full", "lora": True}[part]


def parameter_groups(model: nn.Module, plan: TunePlan) -> list[dict[str, Any]]:
    """Optimizer groups {"name", "params", "lr", "weight_decay"}, one per trainable part. Weight decay is 0.

    Raises ModelError if the fold of a folded vision tower would be among them.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    of_tower = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(part_of(name), []).append(parameter)
            of_tower += [name.partition("vision_tower.")[2]] if part_of(name) == "vision" else []
    if of_tower:
        config: Any = model.config
        refuse_training(of_tower, config.to_dict())
    rates = {"projector": plan.projector_lr, "lora": plan.lr, "llm": plan.lr}
    return [{"name": part, "params": params, "lr": rates[part], "weight_decay": 0.0} for part, params in groups.items()]


def who_trains(model: nn.Module) -> str:
    """A table of the parts: parameters, how many of them train, and their types."""
    rows: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:
            rows.setdefault(part_of(name), []).append(parameter)
    lines = [f"{'part':<10} {'parameters':>14} {'trainable':>14}  type"]
    for part, parameters in rows.items():
        size = sum(p.numel() for p in parameters)
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        types = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        lines.append(f"{part:<10} {size:>14,} {trainable or 'frozen':>14{',' if trainable else ''}}  {types}")
    return "\n".join(lines)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A checksum of every parameter's bits, to be taken before the first optimizer step."""
    return dict(_checksums(model))


def verify_moved(model: nn.Module, before: dict[str, Tensor], plan: TunePlan) -> None:
    """Compare with `before` after the first optimizer step that saw an image (at a learning rate above 0).

    Raises ModelError if a parameter that the plan freezes changed a bit, or one that it trains did not change.
    """
    stuck, leaked = [], []
    for name, checksum in _checksums(model):
        moved = not torch.equal(checksum, before[name])
        if _declared_trainable(name, plan):
            # LoRA's A gets no gradient while B is still zero.
            if not moved and ".lora_A." not in name:
                stuck.append(name)
        elif moved:
            leaked.append(name)
    for names, complaint in ((leaked, "frozen but changed"), (stuck, "declared trainable but did not change")):
        if names:
            raise ModelError(
                f"after the first step {len(names)} tensors are {complaint}: {', '.join(names[:3])}; "
                "check that the optimizer holds tuning.parameter_groups of this very model"
            )


def _checksums(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Exact integer sums over dimension 0 of the parameters' bit patterns."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in model.named_parameters():
        bits = parameter.detach().contiguous().view(integers[parameter.element_size()])
        yield name, bits.sum(dim=0, dtype=torch.int64).cpu()
