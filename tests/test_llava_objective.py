"""The training objective: the stock loss from fewer logits, packed and padded, with activations kept or not."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from encoders.errors import ModelError
from llava_adapter import packing, tuning
from llava_adapter.chat import IGNORED
from llava_adapter.data.batch import collate
from llava_adapter.objective import AnswerObjective, Checkpointing, checkpoint_activations
from llava_adapter.save import load_llava
from llava_adapter.tuning import STAGES, TunePlan

IMAGE = 402
LORA = replace(STAGES["lora"], lora_r=4, lora_alpha=8, lora_dropout=0.0)
EVERYTHING = TunePlan(vision="full", projector="full", llm="full", lr=1e-2, vision_lr=1e-2, projector_lr=1e-2)


def make_samples(pictures: tuple[int, ...] = (1, 0, 2, 1), lengths: tuple[int, ...] = (30, 25, 50, 19)) -> list[Any]:
    """Conversations of 16 tokens a picture; the last 7 are the answer."""
    noise = torch.Generator().manual_seed(0)
    samples = []
    for number, (length, images) in enumerate(zip(lengths, pictures, strict=True)):
        ids = torch.randint(0, 390, (length,), generator=noise)
        for n in range(images):
            ids[1 + 17 * n : 17 + 17 * n] = IMAGE
        labels = ids.masked_fill(torch.arange(length) < length - 7, IGNORED)
        pixels = torch.randn(images, 3, 32, 32, generator=noise)
        samples.append({"id": str(number), "input_ids": ids, "labels": labels, "pixel_values": pixels})
    return samples


def objective(
    folder: Path, plan: TunePlan, packed: bool = False, kind: Checkpointing = "none", dtype: torch.dtype = torch.float32
) -> AnswerObjective:
    torch.manual_seed(0)
    model = load_llava(folder, dtype)[0]
    if packed:
        packing.enable(model)
    tuned = tuning.apply(model, plan).train()
    checkpoint_activations(tuned, kind)
    return AnswerObjective(tuned)


def gradients(module: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    out = module(batch)
    loss = out["loss_sum"] / out["tokens"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def series(module: AnswerObjective, packed: bool, steps: int = 6) -> list[float]:
    """Losses of a few steps on batches of other conversations."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    samples = make_samples((1, 0, 2, 1, 1, 0), (30, 25, 50, 19, 44, 28))
    found = []
    for step in range(steps):
        loss, _ = gradients(module, collate([samples[(step + n) % 6] for n in range(4)], 0, packed))
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


def test_objective_equals_the_stock_loss(tiny_llava: Path) -> None:
    """Value and every gradient, though only supervised rows pass the head."""
    ours, stock = AnswerObjective(load_llava(tiny_llava, torch.float32)[0]), load_llava(tiny_llava, torch.float32)[0]
    batch = collate(make_samples(), 0)
    loss, grads = gradients(ours, batch)
    inputs = {key: batch[key] for key in ("input_ids", "labels", "attention_mask", "pixel_values")}
    wanted = stock(**inputs).loss
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())
    for (name, found), parameter in zip(grads.items(), stock.parameters(), strict=True):
        assert (found is None) == (parameter.grad is None), name
        if found is not None:
            torch.testing.assert_close(found, parameter.grad, msg=name)


@pytest.mark.parametrize("packed", [False, True])
def test_the_head_sees_supervised_positions_only(packed: bool, tiny_llava: Path) -> None:
    module = objective(tiny_llava, STAGES["projector"], packed)
    rows: list[torch.Size] = []
    module.llava.lm_head.register_forward_hook(lambda head, given, logits: rows.append(given[0].shape))
    out = module(collate(make_samples(), 0, packed))
    assert rows == [torch.Size([28, 48])]
    assert out["tokens"] == 28


@pytest.mark.parametrize("plan", [STAGES["projector"], LORA, EVERYTHING], ids=["projector", "lora", "everything"])
def test_packed_equals_padded(plan: TunePlan, tiny_llava: Path) -> None:
    """One step's gradients and the losses of six steps, with text-only conversations and several pictures."""
    both = {packed: objective(tiny_llava, plan, packed) for packed in (False, True)}
    (loss, wanted), (packed_loss, found) = (gradients(m, collate(make_samples(), 0, p)) for p, m in both.items())
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert series(both[True], True) == pytest.approx(series(both[False], False), abs=1e-5)


def test_a_packed_conversation_is_blind_to_its_neighbours(tiny_llava: Path) -> None:
    """Other words in the one before, even at its end, where its last token would predict our first."""
    module = objective(tiny_llava, STAGES["projector"], packed=True)
    samples = make_samples()
    before = module(collate(samples, 0, True))["loss_sum"] - module(collate(samples[:1], 0, True))["loss_sum"]
    ids = samples[0]["input_ids"]
    samples[0]["input_ids"] = torch.where(ids == IMAGE, ids, (ids + 5) % 390)
    samples[0]["labels"][:] = IGNORED
    samples[1]["labels"][0] = 5  # a first token is never supervised
    after = module(collate(samples, 0, True))
    torch.testing.assert_close(after["loss_sum"], before)
    assert after["tokens"] == 21


def test_attention_is_computed_in_the_type_of_the_values() -> None:
    """Under autocast an LLM of float32 weights brings float32 queries and keys, for which there is no fast kernel."""
    noise = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 9, 8, generator=noise).bfloat16() for heads in (4, 2, 2))
    spans = packing.Spans([4, 5], query.device)
    wanted, _ = packing.attend(nn.Identity(), query, key, value, None, spans=spans)
    found, _ = packing.attend(nn.Identity(), query.float(), key.float(), value, None, spans=spans)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)


def test_layouts_are_not_mistaken_for_each_other(tiny_llava: Path) -> None:
    with pytest.raises(ModelError, match="the batch is packed and the model takes only the other kind"):
        objective(tiny_llava, LORA)(collate(make_samples(), 0, True))
    packed = objective(tiny_llava, LORA, packed=True)
    with pytest.raises(ModelError, match="the batch is padded"):
        packed(collate(make_samples(), 0))
    with pytest.raises(ModelError, match="made ready for packed batches"):
        packed.llava(input_ids=torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("plan", [LORA, EVERYTHING], ids=["lora", "everything"])
def test_checkpointing_changes_memory_only(kind: Checkpointing, plan: TunePlan, tiny_llava: Path) -> None:
    plain, saving = objective(tiny_llava, plan, packed=True), objective(tiny_llava, plan, packed=True, kind=kind)
    once, again = (Operators.of(module) for module in (plain, saving))
    products, activation = torch.ops.aten.mm, torch.ops.aten.silu
    assert again[activation] == 2 * once[activation] == 4  # two blocks
    if kind == "selective":
        assert again[products] == once[products]
    else:
        assert again[products] > once[products]
    assert series(saving, True) == pytest.approx(series(plain, True), abs=1e-5)


class Operators(TorchDispatchMode):
    """Counts what is really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))

    @classmethod
    def of(cls, module: AnswerObjective) -> Counter[Any]:
        with cls() as counting:
            gradients(module, collate(make_samples(), 0, True))
        return counting.counts


def test_dropout_is_the_same_when_computed_again(tiny_llava: Path) -> None:
    plan = replace(LORA, lora_dropout=0.5)
    found = []
    for kind in ("none", "selective", "full"):
        module = objective(tiny_llava, plan, packed=True, kind=kind)  # type: ignore[arg-type]
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.ones_(parameter)
        torch.manual_seed(3)
        found.append(gradients(module, collate(make_samples(), 0, True))[1])
    for name, gradient in found[0].items():
        assert gradient is not None
        assert torch.equal(found[1][name], gradient), name  # type: ignore[arg-type]
        assert torch.equal(found[2][name], gradient), name  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [LORA, EVERYTHING], ids=["lora", "everything"])
def test_a_batch_without_pictures_gives_zero_gradients(plan: TunePlan, tiny_llava: Path) -> None:
    """DDP waits for a gradient of every trainable parameter, FSDP for every rank's part in gathering the tower."""
    module = objective(tiny_llava, plan)
    _, grads = gradients(module, collate(make_samples((0, 0), (20, 25)), 0))
    assert all(grad is not None for grad in grads.values())
    unseen = [name for name in grads if "multi_modal_projector" in name or "vision_tower" in name]
    assert len(unseen) > 3
    assert not any(grads[name].any() for name in unseen)  # type: ignore[union-attr]


@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_models_train_under_autocast(packed: bool, tiny_llava: Path) -> None:
    for plan in (LORA, EVERYTHING, replace(EVERYTHING, weights="bfloat16")):
        module = objective(tiny_llava, plan, packed, dtype=torch.bfloat16)
        loss, grads = gradients(module, collate(make_samples(), 0, packed))
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert isinstance(module, AnswerObjective)
    assert not isinstance(module.llava, PeftModel)


def test_a_packed_batch_tells_its_conversations_apart() -> None:
    samples = make_samples()
    batch = collate(samples, 0, packed=True)
    assert batch["lengths"] == [30, 25, 50, 19]
    assert torch.equal(batch["input_ids"][0], torch.cat([sample["input_ids"] for sample in samples]))
    assert batch["position_ids"][0].tolist() == [*range(30), *range(25), *range(50), *range(19)]
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
