"""Write and read LLaVA folders that transformers 4.57 and 5 both load exactly, PEFT adapters, and their merge.

Transformers 5 alone writes tower keys, RoPE and tokenizer settings that 4.57 silently misreads; here they are written
in the form that both understand. The functions fill a given directory; the caller writes its manifest.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from encoders.errors import ModelError
from encoders.manifest import write_json
from encoders.pretrained import load_strict
from encoders.weights.headers import weight_files

SHARD_SIZE = "5GB"
# Share of a layer's output that rounding its merged weight may change.
MERGED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
PROBES = 8  # inputs of noise that a layer is compared on
ADAPTER = "default"  # PEFT's name of the only adapter
# Name in memory -> name on disk.
PREFIXES = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def save_llava(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write a whole LLaVA, every tensor in the model's `config.dtype`. Raises ModelError if it has an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(portable_state(model), folder, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})
    _write_config(model, folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    _make_tokenizer_config_portable(processor.tokenizer, folder)


def portable_state(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """The state dict under its portable names; a tied output head is left out."""
    tied = model.config.tie_word_embeddings
    state = {}
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None or "lora_" in name or "modules_to_save" in name:
            raise ModelError(f"{name} is not a tensor of a plain LLaVA; merge the adapter before saving")
        state[PREFIXES[prefix] + name.removeprefix(prefix)] = tensor.detach().to(model.config.dtype).contiguous()
    return state


def _write_config(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Everything explicit: a setting left to a library's default may change with the library."""
    config = model.config.to_dict()
    config["architectures"] = ["LlavaForConditionalGeneration"]
    for part in (config, config["vision_config"], config["text_config"]):
        del part["_name_or_path"]
    text = config["text_config"]
    scaling = dict(text["rope_parameters"])
    text["rope_theta"] = scaling.pop("rope_theta")
    if scaling["rope_type"] != "default":
        text["rope_scaling"] = scaling
    write_json(folder / "config.json", config)


def _make_tokenizer_config_portable(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["extra_special_tokens"] = {"image_token": tokenizer.image_token}
    config["model_input_names"] = ["input_ids", "attention_mask"]  # else 4.57 gives token_type_ids, which Llama refuses
    write_json(file, config)


def load_llava(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a LLaVA folder of any origin. Raises ModelError unless config and weights agree key by key."""
    model = load_strict(LlavaForConditionalGeneration, folder, dtype)
    return model.to(device).eval(), load_processor(folder)


def load_processor(folder: Path) -> LlavaProcessor:
    """The processor of a LLaVA folder. Raises ModelError if it has none."""
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has no tokenizer.json; a LLaVA folder carries its processor")
    processor: LlavaProcessor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    return processor


def tower_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The vision tower's tensors as a LLaVA folder of any origin stores them, by their names in a CLIPVisionModel; the
    LLM is not read."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                _, in_tower, name = key.partition("vision_tower.")
                if in_tower:
                    yield name.removeprefix("vision_model."), tensors.get_tensor(key)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write LoRA, and in full every other part that trained, as a PEFT adapter folder."""
    model.save_pretrained(str(folder))


def load_adapter(model: LlavaForConditionalGeneration, folder: Path) -> PeftModel:
    """Put a PEFT adapter folder around its base model. Raises ModelError unless every tensor of it finds its place."""
    adapted = PeftModel.from_pretrained(model, str(folder))
    state = get_peft_model_state_dict(adapted)
    for name, saved in load_file(folder / "adapter_model.safetensors").items():
        if name not in state or not torch.equal(state[name].cpu(), saved.to(state[name].dtype)):
            raise ModelError(f"{folder}: {name} was not loaded into the model; the adapter was trained on another base")
    return adapted


@torch.no_grad()
def merge(model: PeftModel) -> LlavaForConditionalGeneration:
    """Fold the adapter into the base model, in place, and return it in its `config.dtype`, in eval mode.

    Every merged weight is the base's plus LoRA's product, rounded once (PEFT rounds the product as well). Raises
    ModelError for a quantised base, and unless what trained in full is kept to the bit and every adapted layer's
    outputs stay the same.
    """
    base: Any = model.eval().get_base_model()
    if hasattr(base.config, "quantization_config"):
        raise ModelError("merging into quantised weights would round the adapter away; merge into the 16-bit base")
    layers: dict[str, Any] = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    before = {name: _outputs(layer) for name, layer in layers.items()}
    for layer in layers.values():
        weight = layer.get_base_layer().weight
        weight.copy_(weight.float() + layer.get_delta_weight(ADAPTER).float())
        layer.lora_B[ADAPTER].weight.zero_()  # nothing is left for PEFT to add
    trained = {
        name: wrapper.modules_to_save[ADAPTER].state_dict()
        for name, wrapper in base.named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
    }
    merged: Any = model.merge_and_unload()
    for name, state in trained.items():
        found = merged.get_submodule(name).state_dict()
        if found.keys() != state.keys() or not all(torch.equal(found[key], state[key]) for key in state):
            raise ModelError(f"{name}: merging lost what was trained in full")
    merged.to(merged.config.dtype)
    for name, wanted in before.items():
        difference = float((_outputs(merged.get_submodule(name)) - wanted).norm() / wanted.norm())
        if not difference <= MERGED[merged.config.dtype]:
            raise ModelError(f"{name}: the merged layer's outputs differ from the adapter's by {difference:.1%}")
    plain: LlavaForConditionalGeneration = merged
    return plain


def _outputs(layer: Any) -> Tensor:
    """What a linear layer, with its adapter if it has one, makes of noise: (PROBES, features). Layer by layer, as the
    logits of a deep bfloat16 model tell rounding and loss apart no more."""
    noise = torch.randn(PROBES, layer.in_features, generator=torch.Generator().manual_seed(0))
    outputs: Tensor = layer(noise.to(layer.weight.device, layer.weight.dtype))
    return outputs.float()
