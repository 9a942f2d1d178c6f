"""Write and read LLaVA folders that transformers 4.57 and 5 both load exactly, PEFT adapters, and their merge.

Transformers 5 alone writes tower keys, RoPE and tokenizer settings that 4.57 silently misreads; here they are written
in the form that both understand. The functions fill a given directory; the caller writes its manifest.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from encoders.errors import ModelError
from encoders.manifest import write_json
from encoders.pretrained import load_strict

SHARD_SIZE = "5GB"
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
    write_json(file, config)


def load_llava(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a LLaVA folder of any origin. Raises ModelError unless config and weights agree key by key."""
    model = load_strict(LlavaForConditionalGeneration, folder, dtype)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has no tokenizer.json; a LLaVA folder carries its processor")
    processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval(), processor


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write LoRA and the trained projector as a PEFT adapter folder."""
    model.save_pretrained(str(folder))


def merge(model: PeftModel) -> LlavaForConditionalGeneration:
    """Fold the adapter into the base model, in place, and return it in its `config.dtype`."""
    merged = model.merge_and_unload()
    return merged.to(merged.config.dtype)
