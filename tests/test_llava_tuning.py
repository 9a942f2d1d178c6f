"""Who trains: every part as the plan says, nothing else, and a check of it that notices."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_llava_objective import LORA, make_samples
from torch import nn
from transformers import LlavaForConditionalGeneration

from encoders.errors import ModelError, UsageError
from llava_adapter.data.batch import collate
from llava_adapter.objective import AnswerObjective
from llava_adapter.save import load_llava
from llava_adapter.tuning import STAGES, TunePlan, apply, parameter_groups, snapshot, verify_moved, who_trains

PLANS = {
    **{name: replace(plan, lora_r=4, lora_alpha=8, lora_dropout=0.0) for name, plan in STAGES.items()},
    "tower, frozen LLM": replace(STAGES["tower"], llm="frozen"),
    "tower, everything in full": replace(STAGES["tower"], llm="full"),
    "LoRA on both": replace(LORA, vision="lora"),
    "the tower alone": replace(STAGES["tower"], projector="frozen", llm="frozen"),
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    return load_llava(folder, dtype)[0]


def train_step(model: nn.Module, plan: TunePlan) -> None:
    objective = AnswerObjective(model)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(parameter_groups(model, plan))
    out = objective(collate(make_samples(), 0))
    (out["loss_sum"] / out["tokens"]).backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLANS)
def test_exactly_the_declared_parts_move(name: str, dtype: torch.dtype, tiny_llava: Path) -> None:
    """Asked of the weights themselves, not of requires_grad."""
    plan = PLANS[name]
    model = apply(load(tiny_llava, dtype), plan)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    values = {key: p.detach().clone() for key, p in model.named_parameters()}
    before = snapshot(model)
    train_step(model.train(), plan)
    found = verify_moved(model, before, plan)
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, values[key])}
    for part, wanted in (("vision_tower", plan.vision), ("multi_modal_projector", plan.projector)):
        assert any(part in key for key in moved) == (wanted != "frozen")
    assert any("language_model" in key for key in moved) == (plan.llm != "frozen")
    assert all("lora_" in key for key in moved if "language_model" in key) == (plan.llm != "full")
    # The projector reads hidden_states[-2] of three blocks.
    assert not any(".layers.2." in key or "post_layernorm" in key for key in moved if "vision_tower" in key)
    assert all(part in found for part in parts_of(plan))


def parts_of(plan: TunePlan) -> list[str]:
    modes = {"vision": plan.vision, "projector": plan.projector, "llm": plan.llm}
    return [f"{part}_lora" if mode == "lora" else part for part, mode in modes.items() if mode != "frozen"]


def test_verification_has_teeth(tiny_llava: Path) -> None:
    """One changed bit in the tower, a bias of the projector that the optimizer forgot, an LLM that trains unasked."""
    model = apply(load(tiny_llava), LORA)
    assert isinstance(model, PeftModel)
    before = snapshot(model)
    with pytest.raises(ModelError, match="declared trainable but did not change"):
        verify_moved(model, before, LORA)
    train_step(model, LORA)
    verify_moved(model, before, LORA)
    weight = model.get_base_model().model.vision_tower.embeddings.class_embedding
    with torch.no_grad():
        weight[3] = torch.nextafter(weight[3], torch.tensor(torch.inf))
    with pytest.raises(ModelError, match=r"1 tensors are frozen but changed.*class_embedding"):
        verify_moved(model, before, LORA)

    forgetful = apply(load(tiny_llava), LORA)
    before = snapshot(forgetful)
    for name, parameter in forgetful.named_parameters():
        if "linear_1.bias" in name:
            parameter.requires_grad_(False)
    train_step(forgetful, LORA)
    with pytest.raises(ModelError, match=r"1 tensors are declared trainable but did not change: .*linear_1.bias"):
        verify_moved(forgetful, before, LORA)

    leaky = apply(load(tiny_llava), STAGES["projector"])
    before = snapshot(leaky)
    leaky.model.language_model.norm.requires_grad_(True)
    train_step(leaky, STAGES["projector"])
    with pytest.raises(ModelError, match=r"frozen but changed: model.language_model.norm"):
        verify_moved(leaky, before, STAGES["projector"])


@pytest.mark.parametrize("name", ["tower", "tower, everything in full"])
def test_a_tower_that_only_seems_to_train_is_noticed(name: str, tiny_llava: Path) -> None:
    """Its features without gradients, as LLaVA's own tower computes them."""
    plan = PLANS[name]
    model = apply(load(tiny_llava), plan)
    tower = next(module for key, module in model.named_modules() if key.endswith("vision_tower"))
    forward = tower.forward
    tower.forward = torch.no_grad()(forward)
    before = snapshot(model)
    train_step(model, plan)
    with pytest.raises(ModelError, match=r"declared trainable but did not change: .*vision_tower"):
        verify_moved(model, before, plan)


@pytest.mark.parametrize("part", ["vision", "llm"])
def test_lora_sits_on_every_linear_of_its_part_and_nowhere_else(part: str, tiny_llava: Path) -> None:
    plan = replace(LORA, **{"vision": "frozen", "llm": "frozen", part: "lora"})  # type: ignore[arg-type]
    model = apply(load(tiny_llava), plan)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    # Two blocks of seven in the LLM; of the tower's three blocks of six the projector sees two.
    assert len(adapted) == {"vision": 2 * 6, "llm": 2 * 7}[part]
    assert all({"vision": "vision_tower.encoder", "llm": "language_model"}[part] in name for name in adapted)


def test_every_part_has_its_own_rate(tiny_llava: Path) -> None:
    plan = replace(PLANS["tower"], vision_lr=1e-6, projector_lr=3e-5, lr=4e-4)
    model = apply(load(tiny_llava), plan)
    groups = {group["name"]: group for group in parameter_groups(model, plan)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "vision": 1e-6,
        "projector": 3e-5,
        "llm_lora": 4e-4,
    }
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    table = {line.split()[0]: line.split()[2] for line in who_trains(model).splitlines()}
    assert table["llm"] == "frozen"
    assert table["projector"] == "3,936"
    assert table["vision"] == f"{sum(p.numel() for p in groups['vision']['params']):,}"
    assert table["llm_lora"] == f"{sum(p.numel() for p in groups['llm_lora']['params']):,}"


def test_the_fold_of_a_folded_tower_stays(tiny_llava: Path) -> None:
    model = load(tiny_llava)
    model.config.vision_config.folded = True
    plan = PLANS["tower, everything in full"]
    tuned = apply(model, plan)
    before = snapshot(tuned)
    train_step(tuned, plan)
    verify_moved(tuned, before, plan)
    frozen = [name for name, p in tuned.named_parameters() if "vision_tower" in name and not p.requires_grad]
    fold = ("vision_tower.embeddings.", "vision_tower.pre_layrnorm.")
    assert sum(any(part in name for part in fold) for name in frozen) == 5


@pytest.mark.parametrize(("layer", "blocks"), [(-1, 3), (-2, 2), (-3, 1), (1, 1)])
def test_blocks_behind_the_layer_that_is_read_are_frozen(layer: int, blocks: int, tiny_llava: Path) -> None:
    """Against the gradients that a backward pass really leaves."""
    model = load(tiny_llava)
    model.config.vision_feature_layer = layer
    model.model.config.vision_feature_layer = layer
    plan = PLANS["the tower alone"]
    names = {name for name, p in apply(model, plan).named_parameters() if p.requires_grad and "vision" in name}
    model.requires_grad_(True)
    AnswerObjective(model)(collate(make_samples(), 0))["loss_sum"].backward()
    assert names == {name for name, p in model.named_parameters() if p.grad is not None and "vision" in name}
    assert {name.split(".")[4] for name in names if "encoder.layers" in name} == {str(block) for block in range(blocks)}


def test_the_warm_up_of_a_small_rate_is_no_complaint(tiny_llava: Path) -> None:
    """The tower recipe's first step: 1/156 of its rates, which no norm's weight of 1 shows in float32. A key's bias has
    no gradient but rounding."""
    share = 1 / 156
    plan = replace(PLANS["tower, everything in full"], vision_lr=2e-6, projector_lr=1e-5, lr=1e-5)
    model = load(tiny_llava)
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            nn.init.constant_(parameter, 0.5)
    model = apply(model, plan)
    before = snapshot(model)
    train_step(model, replace(plan, vision_lr=2e-6 * share, projector_lr=1e-5 * share, lr=1e-5 * share))
    assert "vision: 30 tensors moved, 7 did not" in verify_moved(model, before, plan, share)
    with pytest.raises(ModelError, match=r"6 tensors are declared trainable but did not change: .*pre_layrnorm"):
        verify_moved(model, before, plan)


def test_bfloat16_weights_lose_small_updates_and_say_so(tiny_llava: Path) -> None:
    plan = replace(PLANS["full"], weights="bfloat16", lr=1e-4, projector_lr=1e-4)
    model = apply(load(tiny_llava, torch.bfloat16), plan)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    before = snapshot(model)
    train_step(model, plan)
    # Weights of 1, in the norms, are 1/128 apart: an update of 1e-4 is rounded away.
    assert "llm: 16 tensors moved, 5 did not (updates below their weights' resolution)" in verify_moved(
        model, before, plan
    )
    none = replace(plan, lr=1e-9)
    model = apply(load(tiny_llava, torch.bfloat16), none)
    before = snapshot(model)
    train_step(model, none)
    with pytest.raises(ModelError, match="declared trainable but did not change"):
        verify_moved(model, before, none)
    with pytest.raises(ModelError, match="loaded in bfloat16"):
        apply(load(tiny_llava), plan)


def test_impossible_plans() -> None:
    impossible: list[dict[str, Any]] = [
        {"projector": "lora"},
        {"projector": "frozen"},
        {"lora_r": 0},
        {"vision": "lora", "llm": "full"},
        {"weights": "float16"},
    ]
    for changes in impossible:
        with pytest.raises(UsageError, match="tuning plan"):
            TunePlan(**changes)
