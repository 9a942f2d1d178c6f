"""Who trains: freeze, add LoRA, show it, and prove after the first step that it is so.

What trains is float32 (a tower in part, as a whole); what is frozen keeps its type. With `weights: bfloat16` what
trains is bfloat16 too: half the memory, but an update below 1/512 of a weight is rounded away. At a rate of
2e-5 that is nearly every update of a weight above 0.01, and a norm's weights never move; `verify_moved` counts the
tensors that stood still.
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
from encoders.export.fold import FROZEN as FOLD
from encoders.export.fold import is_folded, refuse_training

MODES = {"vision": ("frozen", "lora", "full"), "projector": ("frozen", "full"), "llm": ("frozen", "lora", "full")}
# Full paths: module names alone (q_proj, ...) would also match the other parts.
LORA_TARGETS = {
    "vision": r"model\.vision_tower\.encoder\.layers\.(BLOCKS)\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])",
    "llm": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
}
MODULES = {"vision": "model.vision_tower", "projector": "model.multi_modal_projector", "llm": "model.language_model"}
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# LoRA's A has none in the first step, while B is zero; a key's bias never has but rounding: softmax is blind to it.
WITHOUT_GRADIENT = (".lora_A.default.weight", ".k_proj.bias")


@dataclass(frozen=True)
class TunePlan:
    """How each part is trained. Raises UsageError on a value or combination that has no meaning."""

    vision: Literal["frozen", "lora", "full"] = "frozen"
    """What comes after the layer that the projector reads never trains, nor does the fold of a folded tower."""
    projector: Literal["frozen", "full"] = "full"
    llm: Literal["frozen", "lora", "full"] = "frozen"
    vision_lr: float = 2e-6
    projector_lr: float = 1e-3
    lr: float = 2e-4
    """Learning rate of the LLM or its LoRA; unused while the LLM is frozen."""
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05
    weights: Literal["float32", "bfloat16"] = "float32"
    """Type of what trains; bfloat16 loses small updates (see above)."""

    def __post_init__(self) -> None:
        for part, modes in MODES.items():
            if vars(self)[part] not in modes:
                raise UsageError(f"tuning plan: {part} is {vars(self)[part]!r}, must be one of {', '.join(modes)}")
        if self.vision == self.projector == self.llm == "frozen":
            raise UsageError("tuning plan: vision, projector and llm are all frozen, nothing would train")
        if self.vision == "lora" and self.llm == "full":
            raise UsageError("tuning plan: LoRA on the tower does not go with an LLM that trains in full")
        if self.lora_r < 1:
            raise UsageError(f"tuning plan: lora_r is {self.lora_r}, must be at least 1")
        if self.weights not in WEIGHTS:
            raise UsageError(f"tuning plan: weights is {self.weights!r}, must be one of {', '.join(WEIGHTS)}")

    def parts(self, mode: str) -> list[str]:
        """The parts that are trained in this mode."""
        return [part for part in MODES if vars(self)[part] == mode]


# LLaVA-1.5's stages; `qlora` is `lora` on a model that was loaded quantised.
STAGES = {
    "projector": TunePlan(projector="full", llm="frozen", projector_lr=1e-3),
    "full": TunePlan(projector="full", llm="full", projector_lr=2e-5, lr=2e-5),
    "lora": TunePlan(projector="full", llm="lora", projector_lr=2e-5, lr=2e-4),
    "qlora": TunePlan(projector="full", llm="lora", projector_lr=2e-5, lr=2e-4),
    "tower": TunePlan(vision="full", projector="full", llm="lora", vision_lr=2e-6, projector_lr=2e-5, lr=2e-4),
}


def apply(model: LlavaForConditionalGeneration, plan: TunePlan) -> LlavaForConditionalGeneration | PeftModel:
    """Freeze and unfreeze the model in place; with LoRA, return the PEFT model around it.

    Raises ModelError if a part has linear layers that LoRA would not cover, if a quantised LLM is to train in full, or
    if bfloat16 weights are asked for in a model of another type.
    """
    if plan.weights == "bfloat16" and model.config.dtype != torch.bfloat16:
        raise ModelError(f"weights: bfloat16 needs a model that was loaded in bfloat16, not {model.config.dtype}")
    if plan.llm == "full" and hasattr(model.config, "quantization_config"):
        raise ModelError("a quantised LLM cannot train in full; use LoRA or load it in 16 bits")
    model.requires_grad_(False)
    kept = never_trained(model)
    tuned: LlavaForConditionalGeneration | PeftModel = model
    if plan.parts("lora"):
        tuned = _with_lora(model, plan, kept)
    for name, parameter in tuned.named_parameters():
        trains = _declared_trainable(name, plan, kept)
        parameter.requires_grad_(trains)
        # A tower is of one type as a whole: its norms do not take another's output.
        if trains or (plan.vision == "full" and part_of(name) == "vision"):
            parameter.data = parameter.data.to(WEIGHTS[plan.weights])
    return tuned


def _with_lora(model: LlavaForConditionalGeneration, plan: TunePlan, kept: tuple[str, ...]) -> PeftModel:
    blocks = "|".join(map(str, range(blocks_used(model))))
    targets = [LORA_TARGETS[part].replace("BLOCKS", blocks) for part in plan.parts("lora")]
    config = LoraConfig(
        r=plan.lora_r,
        lora_alpha=plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        target_modules="|".join(targets),
        # Saved in full with the adapter: without this a reloaded adapter would meet an untrained projector or tower.
        modules_to_save=[MODULES[part].rpartition(".")[2] for part in plan.parts("full")] or None,
    )
    wanted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _kept(name, kept)
        if any(name.startswith(MODULES[part] + ".") for part in plan.parts("lora"))
    }
    adapted = get_peft_model(model, config)
    covered = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if covered != wanted:
        raise ModelError(
            f"LoRA covers {len(covered)} layers but {' and '.join(plan.parts('lora'))} have {len(wanted)} linear ones; "
            f"in only one of the two: {', '.join(sorted(covered ^ wanted)[:5])}. The LLM must be a plain Llama"
        )
    return adapted


def blocks_used(model: nn.Module) -> int:
    """Blocks of the tower that the projector sees the output of. Raises ModelError if it reads several layers."""
    config: Any = model.config
    layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int):
        raise ModelError(f"config.json: vision_feature_layer is {layer}; a projector that reads one layer is needed")
    # hidden_states[0] are the embeddings, hidden_states[i] what block i - 1 gives.
    return layer if layer >= 0 else layers + 1 + layer


def never_trained(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the tower's parameters that no plan trains: what comes after the layer that the projector reads, and
    a folded tower's fold."""
    config: Any = model.config
    unused = [f"encoder.layers.{n}." for n in range(blocks_used(model), config.vision_config.num_hidden_layers)]
    return (*unused, "post_layernorm.", *(FOLD if is_folded(config.to_dict()) else ()))


def part_of(parameter_name: str) -> str:
    """The part a parameter belongs to: vision, projector or llm, with `_lora` behind it if it is one of LoRA's."""
    path = parameter_name.split(".")
    part = "vision" if "vision_tower" in path else "projector" if "multi_modal_projector" in path else "llm"
    return f"{part}_lora" if "lora_A" in path or "lora_B" in path else part


def _within_tower(name: str) -> str:
    """A parameter's or module's name inside the tower, whatever PEFT wrapped around it; "" outside."""
    return name.partition("vision_tower.")[2].removeprefix("modules_to_save.default.")


def _kept(name: str, kept: tuple[str, ...]) -> bool:
    return _within_tower(name).startswith(kept)


def _declared_trainable(name: str, plan: TunePlan, kept: tuple[str, ...]) -> bool:
    """What the plan says about a parameter, whatever its requires_grad says."""
    if ".original_module." in name or _kept(name, kept):  # PEFT trains a copy of a full part and keeps the original
        return False
    part, _, lora = part_of(name).partition("_")
    return vars(plan)[part] == ("lora" if lora else "full")


def parameter_groups(model: nn.Module, plan: TunePlan) -> list[dict[str, Any]]:
    """Optimizer groups {"name", "params", "lr", "weight_decay"}, one per trainable part. Weight decay is 0.

    Raises ModelError if the fold of a folded vision tower would be among them.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    of_tower = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(part_of(name), []).append(parameter)
            of_tower += [_within_tower(name)] if part_of(name) == "vision" else []
    if of_tower:
        config: Any = model.config
        refuse_training(of_tower, config.to_dict())
    rates = _rates(plan)
    return [
        {"name": part, "params": params, "lr": rates[part.removesuffix("_lora")], "weight_decay": 0.0}
        for part, params in groups.items()
    ]


def _rates(plan: TunePlan) -> dict[str, float]:
    return {"vision": plan.vision_lr, "projector": plan.projector_lr, "llm": plan.lr}


def who_trains(model: nn.Module) -> str:
    """A table of the parts: parameters, how many of them train, and their types."""
    rows: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:
            rows.setdefault(part_of(name), []).append(parameter)
    lines = [f"{'part':<11} {'parameters':>14} {'trainable':>14}  type"]
    for part, parameters in rows.items():
        size = sum(_size(p) for p in parameters)
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        types = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        lines.append(f"{part:<11} {size:>14,} {trainable or 'frozen':>14{',' if trainable else ''}}  {types}")
    return "\n".join(lines)


def _size(parameter: nn.Parameter) -> int:
    """Weights in a parameter: 4-bit ones lie two to a byte."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A checksum of every parameter's bits, to be taken before the first optimizer step."""
    return dict(_checksums(model))


def verify_moved(model: nn.Module, before: dict[str, Tensor], plan: TunePlan, share: float = 1.0) -> str:
    """Compare with `before` after the first optimizer step that saw an image, at `share` of the plan's rates (warm-up).

    Returns what was found, part by part. Raises ModelError if a parameter that the plan freezes changed a bit, or one
    that it trains did not change, unless others of its part did and its update may just have been rounded away.
    """
    kept, rates = never_trained(model), _rates(plan)
    moved: dict[str, int] = {}
    rounded: dict[str, int] = {}
    stuck, leaked = [], []
    changed = {name for name, checksum in _checksums(model) if not torch.equal(checksum, before[name])}
    alive = {part_of(name) for name in changed}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if not _declared_trainable(name, plan, kept):
            leaked += [name] if name in changed else []
        elif name in changed:
            moved[part] = moved.get(part, 0) + 1
        elif part in alive and _is_rounded_away(rates[part.removesuffix("_lora")] * share, parameter):
            rounded[part] = rounded.get(part, 0) + 1
        elif not name.endswith(WITHOUT_GRADIENT):
            stuck.append(name)
    for names, complaint in ((leaked, "frozen but changed"), (stuck, "declared trainable but did not change")):
        if names:
            raise ModelError(
                f"after the first step {len(names)} tensors are {complaint}: {', '.join(names[:3])}; "
                "check that the optimizer holds tuning.parameter_groups of this very model"
            )
    found = [
        f"{part}: {count} tensors moved"
        + (f", {rounded[part]} did not (updates below their weights' resolution)" if part in rounded else "")
        for part, count in moved.items()
    ]
    return "; ".join(found) + "; everything else is bit-identical"


def _is_rounded_away(rate: float, parameter: nn.Parameter) -> bool:
    """Whether AdamW's first update, `rate` at most, may leave every weight as it is. Beside a norm's weights of 1,
    float32 sees nothing below 6e-8: a tower at 2e-6 is slower than that during its warm-up."""
    margin = 4  # gradients near AdamW's eps make smaller updates
    smallest = float(parameter.detach().abs().min())
    return rate < margin * torch.finfo(parameter.dtype).eps * smallest


def _checksums(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Exact integer sums over dimension 0 of the parameters' bit patterns."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in model.named_parameters():
        bits = parameter.detach().contiguous().view(integers[parameter.element_size()])
        yield name, bits.sum(dim=0, dtype=torch.int64).cpu()
