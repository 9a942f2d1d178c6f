"""Objective, who trains, adapter and merge."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

from encoders.errors import ModelError, UsageError
from llava_adapter.chat import IGNORED
from llava_adapter.objective import AnswerObjective
from llava_adapter.save import load_llava, merge, save_adapter, save_llava
from llava_adapter.tuning import STAGES, TunePlan, apply, parameter_groups, snapshot, verify_moved, who_trains

LORA = replace(STAGES["lora"], lora_r=4, lora_alpha=8, lora_dropout=0.0)


def make_batch(image_token: int, images: int = 2) -> dict[str, Any]:
    """Two right-padded conversations of 30 and 25 tokens, 16 image tokens each, half of the text supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 390, (2, 30), generator=generator)
    ids[:images, 2:18] = image_token
    labels = ids.masked_fill(torch.arange(30) < 22, IGNORED)
    mask = torch.ones_like(ids)
    labels[1, 25:], mask[1, 25:] = IGNORED, 0
    pixels = torch.randn(images, 3, 32, 32, generator=generator)
    return {"id": ["a", "b"], "input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    return load_llava(folder, dtype)[0]


def train_step(model: torch.nn.Module, plan: TunePlan, batch: dict[str, Any]) -> None:
    objective = AnswerObjective(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, plan))
    out = objective(batch)
    (out["loss_sum"] / out["tokens"]).backward()
    optimizer.step()


def test_objective_equals_the_stock_loss(tiny_llava: Path) -> None:
    """Value and every gradient, though only supervised rows pass the head."""
    ours, stock = load(tiny_llava), load(tiny_llava)
    batch = make_batch(ours.config.image_token_id)
    out = AnswerObjective(ours)(batch)
    (out["loss_sum"] / out["tokens"]).backward()
    inputs = {key: batch[key] for key in ("input_ids", "labels", "attention_mask", "pixel_values")}
    loss = stock(**inputs).loss
    loss.backward()
    assert out["tokens"] == 11
    torch.testing.assert_close(out["loss_sum"] / out["tokens"], loss)
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_text_only_batch_gives_the_projector_zero_gradients(tiny_llava: Path) -> None:
    """DDP waits for a gradient of every trainable parameter."""
    model = apply(load(tiny_llava), LORA)
    assert isinstance(model, PeftModel)
    out = AnswerObjective(model)(make_batch(0, images=0))
    out["loss_sum"].backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    assert all(not grad.any() for name, grad in grads.items() if "multi_modal_projector" in name and grad is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", [STAGES["projector"], LORA, TunePlan(llm="full")], ids=["projector", "lora", "full"])
def test_exactly_the_declared_parts_move(plan: TunePlan, dtype: torch.dtype, tiny_llava: Path) -> None:
    model = apply(load(tiny_llava, dtype), plan)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    before = snapshot(model)
    train_step(model.train(), plan, make_batch(402))
    verify_moved(model, before, plan)


def test_verification_has_teeth(tiny_llava: Path) -> None:
    """One changed bit in the tower, a projector that the optimizer forgot, an LLM that trains by mistake."""
    model = apply(load(tiny_llava), LORA)
    assert isinstance(model, PeftModel)
    before = snapshot(model)
    with pytest.raises(ModelError, match="declared trainable but did not change"):
        verify_moved(model, before, LORA)
    train_step(model, LORA, make_batch(402))
    verify_moved(model, before, LORA)
    weight = model.get_base_model().model.vision_tower.embeddings.class_embedding
    with torch.no_grad():
        weight[3] = torch.nextafter(weight[3], torch.tensor(torch.inf))
    with pytest.raises(ModelError, match=r"1 tensors are frozen but changed.*class_embedding"):
        verify_moved(model, before, LORA)

    forgetful = apply(load(tiny_llava), LORA)
    before = snapshot(forgetful)
    for name, parameter in forgetful.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(False)
    train_step(forgetful, LORA, make_batch(402))
    with pytest.raises(ModelError, match=r"did not change: .*multi_modal_projector"):
        verify_moved(forgetful, before, LORA)

    leaky = apply(load(tiny_llava), STAGES["projector"])
    before = snapshot(leaky)
    leaky.model.language_model.norm.requires_grad_(True)
    train_step(leaky, STAGES["projector"], make_batch(402))
    with pytest.raises(ModelError, match=r"frozen but changed: model.language_model.norm"):
        verify_moved(leaky, before, STAGES["projector"])


def test_lora_sits_on_every_linear_of_the_llm_and_nowhere_else(tiny_llava: Path) -> None:
    model = apply(load(tiny_llava), LORA)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(adapted) == 2 * 7
    assert all("language_model.layers." in name for name in adapted)
    groups = {group["name"]: group for group in parameter_groups(model, LORA)}
    assert {name: group["lr"] for name, group in groups.items()} == {"projector": 2e-5, "lora": 2e-4}
    table = {line.split()[0]: line.split()[2] for line in who_trains(model).splitlines()}
    assert table["vision"] == table["llm"] == "frozen"
    assert table["projector"] == "3,936"
    assert table["lora"] == f"{sum(p.numel() for p in groups['lora']['params']):,}"


def test_adapter_reload_and_merge(tiny_llava: Path, tmp_path: Path) -> None:
    """Reloaded adapter: no difference. Merged: within 1e-5, and its folder loads bit for bit with stock classes."""
    model = apply(load(tiny_llava), LORA)
    assert isinstance(model, PeftModel)
    batch = make_batch(402)
    for _ in range(3):
        train_step(model, replace(LORA, projector_lr=1e-2, lr=1e-2), batch)
    model.eval()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        wanted = model(**inputs).logits
        assert (wanted - load(tiny_llava)(**inputs).logits).abs().max() > 0.1, "training changed nothing"
        save_adapter(model, tmp_path / "adapter")
        reloaded = PeftModel.from_pretrained(load(tiny_llava), str(tmp_path / "adapter"))
        assert torch.equal(reloaded(**inputs).logits, wanted)
        merged = merge(model)
        torch.testing.assert_close(merged(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
        save_llava(merged, load_llava(tiny_llava, torch.float32)[1], tmp_path / "merged")
        stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(stock.eval()(**inputs).logits, merged(**inputs).logits)


def test_impossible_plans() -> None:
    for changes in ({"vision": "full"}, {"projector": "lora"}, {"projector": "frozen"}, {"lora_r": 0}):
        with pytest.raises(UsageError, match="tuning plan"):
            TunePlan(**changes)  # type: ignore[arg-type]
