"""QLoRA's base model: the LLM's linear layers in 4 or 8 bits by bitsandbytes; tower, projector and head keep theirs."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from encoders.errors import ModelError, UsageError

# Matched from the start of a full name: a bare "vision_tower" would match nothing.
SKIPPED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
KINDS = {4: "Linear4bit", 8: "Linear8bitLt"}


def require_bitsandbytes() -> None:
    """Raise UsageError where it is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            "stage qlora needs bitsandbytes, which is not installed; pip install 'encoder-swap[quant]' or take stage "
            "lora"
        )


def load_quantised(folder: Path, bits: int, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """Load a LLaVA folder with its LLM in 4 bits (NF4, double quantisation) or 8; products are computed in `dtype`.

    Raises UsageError without bitsandbytes, ModelError unless exactly the LLM's linear layers are quantised.
    """
    require_bitsandbytes()
    options: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options |= {"bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(llm_int8_skip_modules=SKIPPED, **options)
    model_class: Any = LlavaForConditionalGeneration
    model, info = model_class.from_pretrained(
        folder, dtype=dtype, quantization_config=config, output_loading_info=True, local_files_only=True
    )
    if wrong := [f"{kind}: {sorted(names)[:3]}" for kind, names in info.items() if names]:
        raise ModelError(f"{folder}: config.json and weights disagree ({'; '.join(wrong)}); write the folder again")
    names = {name for name, module in model.named_modules() if type(module).__name__ == KINDS[bits]}
    wanted = {name for name, module in model.model.language_model.named_modules() if isinstance(module, nn.Linear)}
    if names != {f"model.language_model.{name}" for name in wanted}:
        raise ModelError(f"{len(names)} layers of {folder} were quantised, not the LLM's {len(wanted)} linear ones")
    for module in model.modules():
        # On a CPU with AVX512-BF16 one forward pass in eval mode would repack these weights for a kernel without
        # gradients, and training would go on with wrong ones.
        if type(module).__name__ == KINDS[4]:
            module.support_avx512bf16_for_cpu = False
    quantised: LlavaForConditionalGeneration = model
    return quantised
