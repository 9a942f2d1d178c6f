"""The training objective of every LLaVA stage: next-token cross-entropy on the answers.

Shapes: B batch, L text tokens (image tokens included), T supervised tokens, D width, V vocabulary.
"""

import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from encoders.errors import ModelError
from llava_adapter import packing
from llava_adapter.chat import IGNORED

Checkpointing = Literal["none", "selective", "full"]
# Dear to compute and small to keep; all else (norms, rotations, activations, casts) is cheap to compute again.
SAVED = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
    torch.ops.torch_attn._varlen_attn,
}


class AnswerObjective(nn.Module):
    """Summed answer loss of a LLaVA (with or without adapter) on a batch of `data.collate`: padded on the right, or
    packed if the model was made ready for that (`packing.enable`).

    Returns {"loss_sum": float32 scalar, "tokens": number of supervised tokens}; the caller divides by the number of
    tokens of the whole optimizer step, over all micro-batches and processes. A model loaded in bfloat16 runs under
    autocast, as what trains may be float32.
    """

    def __init__(self, model: LlavaForConditionalGeneration | PeftModel) -> None:
        super().__init__()
        # Adapters sit inside the base model's layers; the wrapper itself adds nothing to a forward pass.
        self.llava: Any = model.get_base_model() if isinstance(model, PeftModel) else model

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss sum and token count of one micro-batch. Raises ModelError for a layout that the model does not take."""
        images = batch["pixel_values"]  # (images, 3, H, W)
        with self._precision(images.device.type):
            hidden = self.llava.model(
                # No attention_mask: under causal attention no supervised token sees the padding on its right, and
                # without a mask attention takes its fast causal path. A packed row is told its spans instead.
                **self._inputs(batch["input_ids"], images),
                use_cache=False,
                **self._layout(batch),
            ).last_hidden_state  # (B, L, D)
            targets = batch["labels"][:, 1:]  # (B, L-1): position i predicts token i+1
            supervised = targets != IGNORED
            # Only supervised rows pass the head: its output is the largest tensor of the step.
            logits = self.llava.lm_head(hidden[:, :-1][supervised])  # (T, V)
        loss_sum = functional.cross_entropy(logits.float(), targets[supervised], reduction="sum")
        return {"loss_sum": loss_sum, "tokens": supervised.sum()}

    def _layout(self, batch: dict[str, Any]) -> dict[str, Any]:
        packed = "lengths" in batch
        if packed != packing.is_enabled(self.llava):
            raise ModelError(f"the batch is {'packed' if packed else 'padded'} and the model takes only the other kind")
        if not packed:
            return {}
        spans = packing.Spans(batch["lengths"], batch["input_ids"].device)
        return {"position_ids": batch["position_ids"], "spans": spans}

    def _precision(self, device_type: str) -> torch.autocast | nullcontext[None]:
        if self.llava.config.dtype != torch.bfloat16:
            return nullcontext()
        return torch.autocast(device_type, dtype=torch.bfloat16)

    def _inputs(self, input_ids: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Words and pictures. Without a picture a blank one, times zero, takes the same way through tower, projector
        and LLM: DDP waits for every parameter's gradient, and FSDP's ranks must gather and reduce in one order."""
        if len(images):
            return {"input_ids": input_ids, "pixel_values": images}
        blank = self.llava.model.get_image_features(images.new_zeros(1, *images.shape[1:]), return_dict=True)
        words = self.llava.get_input_embeddings()(input_ids)  # (B, L, D)
        return {"inputs_embeds": words + 0.0 * torch.cat(list(blank.pooler_output)).sum().to(words.dtype)}


def checkpoint_activations(model: LlavaForConditionalGeneration | PeftModel, kind: Checkpointing) -> None:
    """Keep fewer activations of the layers that gradients flow through: `selective` computes again what is cheap (a few
    % more time), `full` everything (a third more). The gradients are the same."""
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    llava: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    tower, language = llava.model.vision_tower, llava.model.language_model
    parts = [language] + [tower] * any(parameter.requires_grad for parameter in tower.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the newest transformers 5 calls it otherwise
        for module in (module for part in parts for module in part.modules() if isinstance(module, PreTrainedModel)):
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _policy(context: object, operator: Any, *arguments: object, **options: object) -> CheckpointPolicy:
    saved = operator.overloadpacket in SAVED if isinstance(operator, torch._ops.OpOverload) else False
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
