"""Saving: towers that trained, adapters, merges, and QLoRA's gradients and its merge into 16 bits."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_llava_objective import LORA, gradients, make_samples
from test_portability import run_aside, side_installs  # noqa: F401 - a fixture
from torch import Tensor, nn
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from encoders.errors import ModelError, UsageError
from llava_adapter import quantised, save
from llava_adapter.data.batch import collate
from llava_adapter.objective import AnswerObjective
from llava_adapter.save import load_adapter, load_llava, merge, save_adapter, save_llava
from llava_adapter.tuning import STAGES, TunePlan, apply, parameter_groups

FAST = replace(LORA, lr=1e-2, projector_lr=1e-2, vision_lr=1e-2)
TRAINED = {
    "lora": FAST,
    "tower": replace(FAST, vision="full"),
    "LoRA on the tower": replace(FAST, vision="lora"),
    "frozen projector": replace(FAST, projector="frozen"),
}


def trained(folder: Path, plan: TunePlan, dtype: torch.dtype = torch.float32) -> Any:
    """The model after three steps of a plan."""
    torch.manual_seed(0)
    model = apply(load_llava(folder, dtype)[0], plan)
    objective = AnswerObjective(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, plan))
    for _ in range(3):
        out = objective(collate(make_samples(), 0))
        (out["loss_sum"] / out["tokens"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    batch = collate(make_samples(), 0)
    found: Tensor = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}).logits
    return found


@torch.no_grad()
def features(model: Any) -> Tensor:
    found: Tensor = torch.cat(list(model.get_image_features(collate(make_samples(), 0)["pixel_values"]).pooler_output))
    return found


@pytest.mark.parametrize("plan", [replace(STAGES["tower"], llm="full"), replace(STAGES["tower"], llm="frozen")])
def test_a_tower_that_trained_is_the_one_that_is_saved(plan: TunePlan, tiny_llava: Path, tmp_path: Path) -> None:
    model = trained(tiny_llava, replace(plan, vision_lr=1e-2))
    assert (features(model) - features(load_llava(tiny_llava, torch.float32)[0])).abs().max() > 0.1
    save_llava(model, load_llava(tiny_llava, torch.float32)[1], tmp_path)
    assert torch.equal(features(load_llava(tmp_path, torch.float32)[0]), features(model))
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(stock.eval()), logits(model))


@pytest.mark.parametrize("name", TRAINED)
def test_adapter_reload_and_merge(name: str, tiny_llava: Path, tmp_path: Path) -> None:
    """Reloaded adapter: no difference. Merged: within 1e-5, and its folder loads bit for bit with stock classes."""
    model = trained(tiny_llava, TRAINED[name])
    wanted = logits(model)
    assert (wanted - logits(load_llava(tiny_llava, torch.float32)[0])).abs().max() > 0.1, "training changed nothing"
    save_adapter(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(load_llava(tiny_llava, torch.float32)[0], str(tmp_path / "adapter"))
    assert torch.equal(logits(stock), wanted)
    assert torch.equal(logits(load_adapter(load_llava(tiny_llava, torch.float32)[0], tmp_path / "adapter")), wanted)
    merged = merge(model)
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=1e-5)
    save_llava(merged, load_llava(tiny_llava, torch.float32)[1], tmp_path / "merged")
    plain, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(plain.eval()), logits(merged))


def test_merged_bfloat16_weights_are_rounded_once(tiny_llava: Path) -> None:
    model = trained(tiny_llava, FAST, torch.bfloat16)
    layer = model.get_base_model().model.language_model.layers[0].mlp.up_proj
    product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    wanted = (layer.base_layer.weight.double() + layer.scaling["default"] * product).bfloat16()
    tower = {name: t.clone() for name, t in model.get_base_model().model.vision_tower.state_dict().items()}
    merged = merge(model)
    found = merged.model.language_model.layers[0].mlp.up_proj.weight
    assert (found != wanted).float().mean() < 1e-3  # float32 and float64 may round a tie apart
    assert all(torch.equal(tower[name], t) for name, t in merged.model.vision_tower.state_dict().items())


def test_rounding_is_not_mistaken_for_a_loss(tiny_llava: Path) -> None:
    """An adapter strong enough for the logits of two bfloat16 models to part by 6 %, all of it rounding."""
    torch.manual_seed(0)
    model = apply(load_llava(tiny_llava, torch.bfloat16)[0], LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=3)
    assert isinstance(merge(model), LlavaForConditionalGeneration)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_that_loses_something_is_refused(
    dtype: torch.dtype, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tiny_llava, FAST, dtype)
    for module in model.modules():
        if isinstance(module, save.LoraLayer):
            nothing = torch.zeros_like(module.get_base_layer().weight)
            monkeypatch.setattr(module, "get_delta_weight", lambda name, nothing=nothing: nothing)
    with pytest.raises(ModelError, match="the merged layer's outputs differ from the adapter's by"):
        merge(model)
    model = trained(tiny_llava, FAST, dtype)
    wrapper = model.get_base_model().model.multi_modal_projector
    monkeypatch.setattr(model, "merge_and_unload", lambda: unmerged(model, wrapper.original_module))
    with pytest.raises(ModelError, match="multi_modal_projector: merging lost what was trained in full"):
        merge(model)


def unmerged(model: Any, projector: nn.Module) -> Any:
    base = model.get_base_model()
    base.model.multi_modal_projector = projector
    return base


def test_an_adapter_of_another_base_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    save_adapter(trained(tiny_llava, FAST), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    name = next(name for name in state if "layers.1." in name)
    save_file(state | {name.replace("layers.1.", "layers.7."): state[name].clone()}, file)  # of a deeper LLM
    with pytest.raises(ModelError, match="was not loaded into the model"):
        load_adapter(load_llava(tiny_llava, torch.float32)[0], tmp_path)


def dequantised(model: Any) -> Any:
    """The same model with the weights that 4 bits stand for, as ordinary layers."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(weight.float())
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
    del model.config.quantization_config
    return model


def test_qlora_gradients_are_right_even_after_an_evaluation(tiny_llava: Path) -> None:
    """Against ordinary layers that hold the dequantised weights."""
    batch = collate(make_samples(), 0)
    found = []
    for change in (lambda model: model, dequantised):
        torch.manual_seed(0)
        plan = replace(STAGES["qlora"], lora_r=4, lora_alpha=8, lora_dropout=0.0)
        model = apply(change(quantised.load_quantised(tiny_llava, 4, torch.float32)), plan)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
        objective = AnswerObjective(model).eval()
        with torch.no_grad():
            objective(batch)
        found.append(gradients(objective.train(), batch)[1])
    assert len(found[0]) == 2 * 2 * 7 + 4
    for name, wanted in found[1].items():
        assert wanted is not None
        error = (found[0][name] - wanted).norm() / wanted.norm()
        assert error < 1e-3, f"{name}: {error:.1%} off"


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_is_merged_into_the_sixteen_bit_base(bits: int, tiny_llava: Path, tmp_path: Path) -> None:
    plan = replace(STAGES["qlora"], lora_r=4, lora_alpha=8, lr=1e-2, projector_lr=1e-2)
    model = apply(quantised.load_quantised(tiny_llava, bits, torch.float32), plan)
    objective = AnswerObjective(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, plan))
    (objective(collate(make_samples(), 0))["loss_sum"] / 28).backward()
    optimizer.step()
    with pytest.raises(ModelError, match="16-bit base"):
        merge(model)  # type: ignore[arg-type]
    save_adapter(model, tmp_path / "adapter")  # type: ignore[arg-type]
    adapted = load_adapter(load_llava(tiny_llava, torch.float32)[0], tmp_path / "adapter")
    wanted = logits(adapted)
    merged = merge(adapted)
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=1e-5)
    save_llava(merged, load_llava(tiny_llava, torch.float32)[1], tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float32}


def test_only_the_llm_is_quantised(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bits, kind in ((4, bitsandbytes.nn.Linear4bit), (8, bitsandbytes.nn.Linear8bitLt)):
        model = quantised.load_quantised(tiny_llava, bits, torch.float32)
        names = [name for name, module in model.named_modules() if isinstance(module, kind)]
        assert len(names) == 14
        assert all(name.startswith("model.language_model.layers.") for name in names)
    with pytest.raises(ModelError, match="a quantised LLM cannot train in full"):
        apply(model, STAGES["full"])
    monkeypatch.setattr(quantised, "SKIPPED", ["vision_tower", "multi_modal_projector"])
    with pytest.raises(ModelError, match="layers of .* were quantised, not the LLM's 14 linear ones"):
        quantised.load_quantised(tiny_llava, 4, torch.float32)
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="bitsandbytes, which is not installed"):
        quantised.load_quantised(tiny_llava, 4, torch.float32)


def test_the_folder_is_complete_for_stock_tools(tiny_llava: Path, tmp_path: Path) -> None:
    """Processor and tokenizer by Auto classes, from what a merge leaves behind; text goes in and comes out."""
    merged = merge(trained(tiny_llava, FAST))
    processor = load_llava(tiny_llava, torch.float32)[1]
    save_llava(merged, processor, tmp_path)
    loaded, tokenizer = AutoProcessor.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]}]
    prompts = [p.apply_chat_template(chat, add_generation_prompt=True) for p in (processor, loaded)]
    assert prompts[0] == prompts[1]
    assert tokenizer(prompts[0])["input_ids"] == processor.tokenizer(prompts[0])["input_ids"]


OLDER = """
import json, sys, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, pixels = sys.argv[1:]
model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
processor = AutoProcessor.from_pretrained(folder)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the dog?"}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
picture = Image.fromarray(load_file(pixels)["pixels"].numpy())
inputs = processor(images=picture, text=prompt, add_special_tokens=False, return_tensors="pt")
said = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
print(json.dumps([sum(map(len, info.values())), inputs["input_ids"].tolist(), processor.decode(said[0])]))
"""


@pytest.mark.slow
def test_a_merged_folder_speaks_the_same_on_transformers_4(
    side_installs: Callable[[str], Path],  # noqa: F811
    tiny_llava: Path,
    tmp_path: Path,
) -> None:
    """From text and a picture to text, with the folder's own processor, tokenizer and stops."""
    save_llava(
        merge(trained(tiny_llava, TRAINED["tower"])), load_llava(tiny_llava, torch.float32)[1], tmp_path / "llava"
    )
    pixels = torch.randint(0, 255, (50, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    found = [
        run_aside(install, OLDER, tmp_path / "llava", tmp_path / "pixels.safetensors")
        for install in (tmp_path / "nothing", side_installs("4.57.6"))
    ]
    assert found[0] == found[1]
    assert found[0][0] == 0  # type: ignore[index]
