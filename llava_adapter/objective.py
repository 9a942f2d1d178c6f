"""The training objective of both LLaVA stages: next-token cross-entropy on the answers.

Shapes: B batch, L text tokens (image tokens included), T supervised tokens, D width, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from llava_adapter.chat import IGNORED


class AnswerObjective(nn.Module):
    """Summed answer loss of a LLaVA (with or without adapter) on a right-padded batch of `data.collate`.

    Returns {"loss_sum": float32 scalar, "tokens": number of supervised tokens}; the caller divides by the number of
    tokens of the whole optimizer step, over all micro-batches and processes. A model loaded in bfloat16 runs under
    autocast, as what trains is float32.
    """

    def __init__(self, model: LlavaForConditionalGeneration | PeftModel) -> None:
        super().__init__()
        # Adapters sit inside the base model's layers; the wrapper itself adds nothing to a forward pass.
        self.llava: Any = model.get_base_model() if isinstance(model, PeftModel) else model

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss sum and token count of one micro-batch."""
        images = batch["pixel_values"]  # (images, 3, H, W)
        with self._precision(images.device.type):
            hidden = self.llava.model(
                input_ids=batch["input_ids"],
                # No attention_mask: under causal attention no supervised token sees the padding on its right, and
                # without a mask attention takes its fast causal path.
                pixel_values=images if len(images) else None,
                use_cache=False,
            ).last_hidden_state  # (B, L, D)
            targets = batch["labels"][:, 1:]  # (B, L-1): position i predicts token i+1
            supervised = targets != IGNORED
            # Only supervised rows pass the head: its output is the largest tensor of the step.
            logits = self.llava.lm_head(hidden[:, :-1][supervised])  # (T, V)
        loss_sum = functional.cross_entropy(logits.float(), targets[supervised], reduction="sum")
        if not len(images):
            loss_sum = loss_sum + self._unused_projector()
        return {"loss_sum": loss_sum, "tokens": supervised.sum()}

    def _precision(self, device_type: str) -> torch.autocast | nullcontext[None]:
        if self.llava.config.dtype != torch.bfloat16:
            return nullcontext()
        return torch.autocast(device_type, dtype=torch.bfloat16)

    def _unused_projector(self) -> Tensor:
        """Zero, with zero gradients: a rank whose batch has no image must still take part in DDP's reduction."""
        projector = self.llava.model.multi_modal_projector
        weight = next(projector.parameters())
        width = self.llava.config.vision_config.hidden_size
        return projector(torch.zeros(0, width, dtype=weight.dtype, device=weight.device)).float().sum()
